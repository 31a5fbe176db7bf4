"""A checkpoint for rules."""

import json

import pytest

from qwenft.family.architectures import FAMILY


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a config.json and an empty file of weights: no rule reads more of it."""

    def write(architecture=None, **changes):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        config = (architecture or FAMILY["qwen3.5-4b"]).to_config() | changes
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").touch()
        return folder

    return write

"""What a process leaves that is killed, and what a disk leaves that fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import qwenft as qf

from .helpers import printed, recipe

HERE = Path(__file__).parent


@pytest.mark.parametrize("kills", [6, pytest.param(194, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again(dense_checkpoint, tmp_path, kills):
    """SIGKILL at random moments, half of them inside a save: the result is the uninterrupted run's, to the bit."""
    asked = recipe(
        dense_checkpoint,
        adapter=qf.AdapterSpec.lora(rank=4, dropout=0.1),
        neftune_alpha=5.0,
        dtype="bfloat16",
        max_steps=30,
        save_every=1,
    )
    asked.save(tmp_path / "recipe.json")
    found = printed(HERE / "killed.py", tmp_path / "recipe.json", tmp_path, kills, kills)
    assert found["random"] == found["in save"] == kills // 2
    assert found["damaged"] == found["different"] == []
    assert found["runs"] >= 1


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A library that fails the operations of a disk, before libc."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "disk.c"), "-ldl"], check=True)
    return library


def test_every_operation_of_a_disk_fails_once(dense_checkpoint, tmp_path, disk):
    """The checkpoint before is whole, the new one is whole or not there, and each error names what failed."""
    asked = recipe(dense_checkpoint, adapter=qf.AdapterSpec.lora(rank=4))
    asked.save(tmp_path / "recipe.json")
    found = printed(HERE / "on_bad_disk.py", tmp_path / "recipe.json", tmp_path / "run", LD_PRELOAD=str(disk))
    saves = [case for case in found if case["does"] == "save"]
    loads = [case for case in found if case["does"] == "load"]
    assert len(saves) > 5 * 20
    assert len(loads) > 4 * 8
    for case in found:
        assert case["before"], case
        assert case["error"] in (None, "CheckpointError", "DamagedError"), case
        assert (case["error"] is None) == (case["message"] == "None"), case
    for case in saves:
        # What fails behind the renaming leaves a new one that is whole.
        assert case["after"] is True if case["error"] is None else case["after"] in (None, True), case
        if case["fault"] in ("ENOSPC", "EIO", "EACCES"):
            assert case["error"] is not None, case
    for case in loads:
        assert case["state"], case

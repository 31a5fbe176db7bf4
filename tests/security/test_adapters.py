"""Adapters of somebody else: safetensors and numbers, and nothing that peft would build of their config."""

from __future__ import annotations

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenft as qf
from qwenft.models.adapter import CONFIG, TENSORS

from .hostile import DEEP, change_json, link_out, pickled, refused, write_raw

FIRST = "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora"


@pytest.fixture
def adapter(tmp_path):
    """An adapter beside one weight of the tiny checkpoint, in peft's two files."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    save_file({f"{FIRST}_A.weight": torch.ones(4, 64), f"{FIRST}_B.weight": torch.ones(256, 4)}, folder / TENSORS)
    return folder


@pytest.fixture
def use(adapter, dense_checkpoint):
    """Plan to train on it."""
    recipe = qf.Recipe(qf.ModelSpec(dense_checkpoint, dtype="float32"), adapter=qf.AdapterSpec.load(adapter))
    return recipe.compile


def test_the_adapter_that_is_not_touched_is_trained_on(use):
    """What the other tests change is right before they do."""
    assert use().trained_parameters == 4 * 64 + 256 * 4


VALUES = {
    "r": [None, "4", 0, -1, True, 1.5, [4], 10**30],
    "lora_alpha": [None, "8", 0, float("nan"), float("inf"), 10**400, []],
    "lora_dropout": ["0", 2, -1],
    "use_dora": ["yes", 3],
    "use_rslora": [{}],
    "rank_pattern": [[], "q_proj", {"(": 4}, {"(a+)+$": 4}, {"q_proj": 0}, {"q_proj": "4"}],
    "alpha_pattern": [{"[": 1}, {"q_proj": None}],
    "trainable_token_indices": ["abc", {"embed_tokens": "b"}, {"embed_tokens": 3}, [10**12], [[1]], [-1], 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_values_that_peft_does_not_write_are_refused(adapter, use, name, value):
    """The message has the file, the name and what was expected; patterns that match for ever are none."""
    change_json(adapter / CONFIG, **{name: value})
    refused(qf.CheckpointError, use, adapter / CONFIG, f"{name} is .*expected ")


@pytest.mark.parametrize(
    "values",
    [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"target_modules": 3, "modules_to_save": ["anything"], "exclude_modules": "q_proj"},
        {"base_model_name_or_path": "../../elsewhere", "revision": "evil"},
    ],
)
def test_what_decides_of_no_tensor_is_not_looked_at(adapter, use, values):
    """Peft imports libraries that such fields name; here they are fields of a JSON file."""
    change_json(adapter / CONFIG, **values)
    assert use().trained_parameters == 4 * 64 + 256 * 4


def pickle_alone(folder):
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickled(folder / "ran"))


def with_tensors(change):
    def damage(folder):
        save_file(change(load_file(folder / TENSORS)), folder / TENSORS)

    return damage


def repeated(tensors):
    name = f"{FIRST}_A.weight"
    return {**tensors, name.replace("language_model.", ""): torch.zeros(4, 64)}


FILES = {
    "a pickle alone": (pickle_alone, "No such file"),
    "a pickle in its place": (
        lambda folder: (folder / TENSORS).write_bytes(pickled(folder / "ran")),
        "header too",
    ),
    "a header of 2^60 bytes": (
        lambda folder: (folder / TENSORS).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "header too large",
    ),
    "a header of a list": (lambda folder: write_raw(folder / TENSORS, b"[]"), "invalid JSON"),
    "a link": (lambda folder: link_out(folder / TENSORS), "is a link to"),
    "a linked config": (lambda folder: link_out(folder / CONFIG), "is a link to"),
    "deep JSON": (lambda folder: (folder / CONFIG).write_text(DEEP), "maximum recursion"),
    "whole numbers": (
        with_tensors(lambda held: {name: one.long() for name, one in held.items()}),
        "is held in I64",
    ),
    "64 bits": (with_tensors(lambda held: {name: one.double() for name, one in held.items()}), "is held in F64"),
    "scalars": (with_tensors(lambda held: {name: torch.tensor(1.0) for name in held}), "is of the shapes"),
    "a tensor twice": (with_tensors(repeated), "which are beside the same weight"),
    "a tensor of nothing": (with_tensors(lambda held: {**held, "evil": torch.ones(3)}), "it holds evil"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_adapter_are_refused(adapter, use, case):
    """Loading names the folder, and no code runs."""
    damage, problem = FILES[case]
    damage(adapter)
    refused(qf.CheckpointError, use, adapter, problem)
    assert not (adapter / "ran").exists()


def test_an_adapter_that_is_none_is_not_put_beside_a_run(adapter, dense_checkpoint, tmp_path):
    """`run.load_adapter` refuses it before the model has changed."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    model = qf.ModelSpec(dense_checkpoint, dtype="float32")
    run = (
        qf.Recipe(model, qf.DataSpec.messages(rows), training=qf.TrainingSpec(max_steps=1))
        .compile()
        .train(tmp_path / "run", verbose=0)
    )
    before = list(run.prepared.model.peft_config)
    pickle_alone(adapter)
    refused(qf.CheckpointError, lambda: run.load_adapter(adapter, "other"), adapter, "No such file")
    assert list(run.prepared.model.peft_config) == before

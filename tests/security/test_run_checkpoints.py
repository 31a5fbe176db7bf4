"""Checkpoints of a run that somebody else made, with a manifest whose every sha256 is right."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

import qwenft as qf

from ..training.helpers import recipe  # noqa: TID252 - as the tests beside it
from .hostile import DEEP, change_json, link_out, pickled, refused

MODEL, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"


@pytest.fixture(scope="module")
def saved(dense_checkpoint, tmp_path_factory):
    """A prepared model after a step, and its checkpoint."""
    prepared = recipe(dense_checkpoint, adapter=qf.AdapterSpec.lora(rank=4)).compile().prepare()
    prepared.step(next(prepared.batches()))
    return prepared, prepared.save(tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the checkpoint."""
    return Path(shutil.copytree(saved[1], tmp_path / "checkpoint"))


def described(file):
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def named(name):
    """The manifest names a further file, as it is."""

    def damage(folder):
        files = json.loads((folder / "manifest.json").read_text())["files"]
        try:
            described_so = described(folder / name)
        except (OSError, ValueError):
            described_so = {"bytes": 0, "sha256": "0" * 64}
        change_json(folder / "manifest.json", files={**files, name: described_so})

    return damage


def with_tensors(name, change, metadata=None):
    """A file holds other tensors, and the manifest has its sha256."""

    def damage(folder):
        tensors = change(load_file(folder / name))
        save_file(tensors, folder / name, metadata=metadata and {CUSTOM_METADATA_KEY: metadata(tensors)})
        named(name)(folder)

    return damage


def same(tensors):
    return tensors


def each(change):
    return lambda tensors: {name: change(tensor) for name, tensor in tensors.items()}


def beginning(*start):
    return lambda tensors: json.dumps(
        {name: {SAVED_OFFSETS_KEY: [*start, 0, 0][: tensor.ndim]} for name, tensor in tensors.items()}
    )


def folder_link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def large(folder):
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(2**40)


def fifo(folder):
    (folder / RANDOM).unlink()
    os.mkfifo(folder / RANDOM)


FILES = {
    "a file above": (
        lambda folder: (shutil.copy(folder / MODEL, folder.parent), named(f"../{MODEL}")(folder)),
        "names '../model.safetensors'",
    ),
    "an absolute path": (named("/etc/passwd"), "names '/etc/passwd'"),
    "a null byte": (named("a\0"), r"names 'a\\x00'"),
    "itself": (named("."), r"names '\.'"),
    "a pickle": (
        lambda folder: ((folder / "model.bin").write_bytes(pickled(folder / "ran")), named("model.bin")(folder)),
        "names 'model.bin'",
    ),
    "weights that are not named": (
        lambda folder: save_file(
            each(torch.zeros_like)(load_file(folder / MODEL)), folder / "model-2.safetensors"
        ),
        r"holds model-2\.safetensors",
    ),
    "hidden weights": (
        lambda folder: save_file({"evil": torch.ones(1)}, folder / ".evil.safetensors"),
        r"holds \.evil\.safetensors",
    ),
    "a link": (lambda folder: link_out(folder / MODEL), "is no plain file"),
    "a link as manifest": (lambda folder: link_out(folder / "manifest.json"), "is no plain file"),
    "a link as folder": (folder_link, "is a link to"),
    "a FIFO": (fifo, "is no plain file"),
    "a manifest of a terabyte": (large, "more than 268,435,456 are not read"),
    "a deep manifest": (lambda folder: (folder / "manifest.json").write_text(DEEP), "RecursionError"),
}
TENSORS = {
    "weights of 64 bits": (with_tensors(MODEL, each(torch.Tensor.double)), "is of another model"),
    "moments of whole numbers": (with_tensors(OPTIMIZER, each(torch.Tensor.long)), "torch.int64, beside a weight"),
    "moments of 64 bits": (with_tensors(OPTIMIZER, each(torch.Tensor.double)), "torch.float64, beside a weight"),
    "moments of another shape": (
        with_tensors(OPTIMIZER, each(lambda one: one[:1].clone() if one.ndim else one)),
        "is of .* beside a weight of",
    ),
    "moments of nothing": (
        with_tensors(OPTIMIZER, lambda held: {**held, "evil:exp_avg": torch.ones(1)}),
        "evil:exp_avg is of",
    ),
    "no moment": (with_tensors(OPTIMIZER, lambda held: {**held, "evil": torch.ones(1)}), "evil is of"),
    "random floats": (with_tensors(RANDOM, each(torch.Tensor.float)), "holds no random states of torch"),
    "a short random state": (with_tensors(RANDOM, each(lambda one: one[:9].clone())), "holds no random states"),
    "a random state of ones": (with_tensors(RANDOM, each(lambda one: one.fill_(255))), "holds no random states"),
    "no random state": (with_tensors(RANDOM, lambda _: {"a": torch.ones(1)}), "holds no random state of the CPU"),
    "parts that leave much out": (with_tensors(MODEL, same, beginning(2**50)), "is held in parts of"),
    "moments that leave much out": (with_tensors(OPTIMIZER, same, beginning(2**50)), "is held in parts of"),
    "parts before the first": (with_tensors(MODEL, same, beginning(-1)), "is held in parts of"),
    "places that are no JSON": (with_tensors(MODEL, same, lambda _: "{"), "cannot be read"),
    "deep places": (with_tensors(MODEL, same, lambda _: DEEP), "cannot be read"),
    "no places": (with_tensors(MODEL, same, lambda _: '{"a": 1}'), "cannot be read"),
    "places that are words": (with_tensors(MODEL, same, beginning("x")), "cannot be read"),
}
CASES = {**FILES, **TENSORS}


@pytest.mark.parametrize("case", CASES)
def test_what_was_not_written_there_is_refused(saved, copy, case):
    """Nothing is loaded, run or changed, whatever the sums of the manifest say."""
    prepared, _ = saved
    before = {name: parameter.detach().clone() for name, parameter in prepared.trained.items()}
    damage, problem = CASES[case]
    damage(copy)
    refused(qf.CheckpointError, lambda: prepared.load(copy), copy, problem)
    assert all(torch.equal(parameter, before[name]) for name, parameter in prepared.trained.items())
    assert not (copy / "ran").exists()


VALUES = {
    "step": ["x", -1, None, 1.5, True, 10**30],
    "ranks": ["x", 0, None],
    "next": [None, {}, {"evil": 1}, {"epoch": "x", "row": 0, "read": 0, "digest": ""}],
    "optimizer": [None, [], {"a:step": "x"}, {"a:step": float("nan")}],
    "schedule": [
        None,
        {},
        {"base_lrs": ["x"], "_last_lr": [0.1], "last_epoch": 1, "lr_lambdas": [None]},
        {"base_lrs": [0.1], "_last_lr": [0.1], "last_epoch": 1, "lr_lambdas": [{"evil": 1}]},
        {"base_lrs": [0.1], "_last_lr": [0.1], "last_epoch": 1, "lr_lambdas": [None], "step": 1},
        {"base_lrs": [0.1], "_last_lr": [0.1], "last_epoch": 1, "lr_lambdas": [None], "optimizer": 1},
    ],
    "identity": [None, [], 3],
    "files": [3, {}, {MODEL: 3}, {MODEL: None, RANDOM: "x"}, {MODEL: {"bytes": 1}, RANDOM: {}}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_values_of_another_kind_are_named(saved, copy, name, value):
    """A manifest's values become attributes of what trains, and so each is what is written there."""
    change_json(copy / "manifest.json", **{name: value})
    refused(
        qf.CheckpointError, lambda: saved[0].load(copy), copy, f"manifest has {name} = .*; expected|is damaged"
    )


def test_other_files_are_no_part_of_it(saved, copy):
    """What lies there of a file manager, of NFS or of the user is not looked at."""
    for name in (".DS_Store", ".nfs0001", "notes.txt"):
        (copy / name).write_bytes(b"x")
    saved[0].load(copy)

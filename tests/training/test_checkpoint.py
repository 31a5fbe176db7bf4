from __future__ import annotations

import json
import resource
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import qwenft as qf
from qwenft.training.checkpoint import differences, read_manifest

from .helpers import recipe, written

LORA = qf.AdapterSpec.lora(rank=4)


@pytest.fixture
def saved(dense_checkpoint, tmp_path):
    """A prepared model after two steps, and its checkpoint."""
    prepared = recipe(dense_checkpoint, adapter=LORA, epochs=2).compile().prepare()
    for _, batches in prepared.remaining():
        prepared.step(batches)
        if prepared.steps_done == 2:
            break
    return prepared, prepared.save(tmp_path / "checkpoint")


def test_a_checkpoint_is_safetensors_and_a_manifest(saved):
    """It holds the trained parameters and the moments as safetensors, and all else as JSON; there is no pickle."""
    prepared, path = saved
    assert {file.name for file in path.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
    }
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert manifest["step"] == 2
    assert manifest["next"] == {"epoch": 0, "row": 2, "read": 0, "digest": ""}
    assert manifest["environment"]["torch"] == version("torch")
    assert manifest["identity"]["recipe"]["training"]["learning_rate"] == 1e-3
    model = load_file(path / "model.safetensors")
    trained = {name: p for name, p in prepared.model.named_parameters() if p.requires_grad}
    assert model.keys() == trained.keys()
    assert all(torch.equal(model[name], parameter) for name, parameter in trained.items())
    moments = load_file(path / "optimizer.safetensors")
    assert len(moments) == 3 * len(trained)
    assert {name.rpartition(":")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torchs_distributed_checkpoint_reads_it(saved):
    """The format is one that torch.distributed.checkpoint loads, and so can reshard, without a pickle."""
    _, path = saved
    wanted = {**load_file(path / "model.safetensors"), **load_file(path / "optimizer.safetensors")}
    found = {name: torch.full_like(tensor, -1) for name, tensor in wanted.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_place_that_is_taken_is_refused(saved):
    """Nothing is overwritten."""
    prepared, path = saved
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(qf.CheckpointError, match="checkpoint exists already, and is not overwritten"):
        prepared.save(path)
    assert (path / "manifest.json").read_bytes() == before


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def grow(file):
    file.write_bytes(file.read_bytes() + b"0")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random.safetensors"])
@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, r"is damaged: expected bytes \d+, got \d+"),
        (grow, r"is damaged: expected bytes \d+, got \d+"),
        (flip, r"is damaged: expected sha256 \w+, got \w+"),
        (lambda file: file.unlink(), "cannot be read: No such file"),
    ],
    ids=["cut", "grown", "flipped", "missing"],
)
def test_a_damaged_file_is_named_and_nothing_is_loaded(saved, name, damage, problem):
    """Whatever happened to a file is noticed before anything is changed, with what to do."""
    prepared, path = saved
    before = {n: p.detach().clone() for n, p in prepared.trained.items()}
    prepared.step(next(prepared.batches()))
    after = {n: p.detach().clone() for n, p in prepared.trained.items()}
    damage(path / name)
    with pytest.raises(qf.CheckpointError, match=rf"{name}: {problem}") as caught:
        prepared.load(path)
    assert caught.value.fix == f"remove {path}, and continue from the checkpoint before it"
    assert all(torch.equal(parameter, after[n]) for n, parameter in prepared.trained.items())
    assert not all(torch.equal(before[n], after[n]) for n in before)
    assert prepared.steps_done == 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is damaged: JSONDecodeError"),
        ('{"format": 3', "is damaged: JSONDecodeError"),
        ("[]", "is damaged: TypeError"),
        ('{"files": {}}', "is damaged: KeyError"),
        ('{"format": 1, "files": {}}', "expected a checkpoint of format 3, got 1"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, content, problem):
    """A manifest that is cut, is no manifest, or is of another format is refused."""
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(qf.CheckpointError, match=problem):
        read_manifest(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    """A path where no checkpoint is, is told as such."""
    with pytest.raises(qf.CheckpointError, match=r"nowhere is no checkpoint: manifest\.json cannot be read"):
        read_manifest(tmp_path / "nowhere")


def test_a_checkpoint_of_another_model_is_refused(saved, dense_checkpoint):
    """Where the recipe says nothing, shapes and names do: parameters that are not alike are listed."""
    _, path = saved
    other = recipe(dense_checkpoint, adapter=qf.AdapterSpec.lora(rank=8), epochs=2).compile().prepare()
    other.identity = read_manifest(path)["identity"]
    with pytest.raises(qf.CheckpointError, match=r"is of another model:") as caught:
        other.load(path)
    assert any(
        "lora_A.default.weight: '(4, 64) torch.float32' there, '(8, 64)" in d for d in caught.value.differences
    )


def test_differences_name_each_place():
    """Values that differ, are missing or are new are listed by their path."""
    saved = {"a": {"b": 1, "c": [1, 2]}, "d": None, "gone": 5}
    present = {"a": {"b": 2, "c": [1, 2]}, "d": None, "new": "x"}
    assert differences(saved, present) == [
        "a.b: 1 there, 2 here",
        "gone: 5 there, None here",
        "new: None there, 'x' here",
    ]
    assert differences(saved, saved) == []


@pytest.fixture
def full_disk():
    """Files of more than 60 kB cannot be written: the operating system refuses them, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("failed_save", ["stop", "continue"])
def test_a_full_disk_leaves_earlier_checkpoints_whole(dense_checkpoint, tmp_path, full_disk, failed_save):
    """A save that fails ends the run if asked or if it is the last; those before are whole, and the run goes on."""
    plan = recipe(dense_checkpoint, max_steps=6, save_every=2, failed_save=failed_save).compile()
    whole = plan.train(tmp_path / "whole", verbose=0)

    def fill(record):
        if record["step"] == 3:
            full_disk()

    step = {"stop": 4, "continue": 6}[failed_save]
    with pytest.raises(qf.CheckpointError, match=rf"step-{step}: cannot be written: .*File too large") as caught:
        plan.train(tmp_path / "run", verbose=0, on_step=fill)
    assert caught.value.fix.endswith(f"it continues from {tmp_path}/run/checkpoints/step-2")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"latest", "step-2"}
    notices = [line["notice"] for line in map(json.loads, read_lines(tmp_path / "run" / "notices.jsonl"))]
    assert [notice.partition(":")[0] for notice in notices] == ["a checkpoint is missing"] * (step == 6)
    run = plan.train(tmp_path / "run", "must", verbose=0)
    assert [record["loss"] for record in run.history] == [record["loss"] for record in whole.history]
    assert all(map(torch.equal, run.prepared.model.parameters(), whole.prepared.model.parameters()))


def read_lines(path):
    """The lines of a file, none where it is not there."""
    return path.read_text().splitlines() if path.exists() else []


def test_a_save_that_fails_once_costs_one_checkpoint(dense_checkpoint, tmp_path, full_disk):
    """Where there is room again the run goes on to its end, says what is missing, and has lost nothing else."""
    plan = recipe(dense_checkpoint, max_steps=6, save_every=2, keep_checkpoints=9).compile()

    def fill(record):
        if record["step"] == 3:
            full_disk()
        if record["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    run = plan.train(tmp_path / "run", verbose=0, on_step=fill)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"latest", "step-2", "step-6"}
    (notice,) = run.notices
    assert "step-4: cannot be written" in notice


def test_room_is_asked_for_before_a_byte_is_written(saved, tmp_path, monkeypatch):
    """A checkpoint that the disk has no room for is refused with what it takes and what there is."""
    prepared, _ = saved
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(qf.CheckpointError, match=r"it takes [\d,]+ bytes, and the disk has 1,000 left"):
        prepared.save(tmp_path / "another" / "checkpoint")
    assert list((tmp_path / "another").iterdir()) == []


def test_a_full_disk_at_the_end_loses_no_step(dense_checkpoint, tmp_path, full_disk):
    """Where the result cannot be written every step is in the last checkpoint, and the same call writes it later."""
    plan = recipe(dense_checkpoint, max_steps=2).compile()
    with pytest.raises(qf.CheckpointError, match=r"model: cannot be written") as caught:
        plan.train(tmp_path / "run", verbose=0, on_save=lambda path: path.name == "step-2" and full_disk())
    assert caught.value.fix.endswith(f"every step is in {tmp_path}/run/checkpoints")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not (tmp_path / "run" / "model").exists()
    plan.train(tmp_path / "run", "must", verbose=0, on_step=pytest.fail)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(dense_checkpoint, tmp_path, keep):
    """As many as the recipe says stay on disk, the newest."""
    saved = []
    plan = recipe(dense_checkpoint, max_steps=7, save_every=2, keep_checkpoints=keep).compile()
    plan.train(tmp_path / "run", verbose=0, on_save=lambda path: saved.append(path.name))
    assert saved == ["step-2", "step-4", "step-6", "step-7"]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == set(saved[-keep:])


def test_without_an_interval_a_tenth_of_the_run_is_lost_at_most(dense_checkpoint, tmp_path):
    """A recipe that says nothing saves ten times and at the end."""
    saved = []
    plan = recipe(dense_checkpoint, max_steps=23).compile()
    plan.train(tmp_path / "run", verbose=0, on_save=lambda path: saved.append(path.name))
    assert saved == [f"step-{step}" for step in (*range(2, 23, 2), 23)]


def test_a_newest_checkpoint_that_is_damaged(dense_checkpoint, tmp_path):
    """A run goes on from the newest that is whole, to the bit, and says so; what is damaged is kept apart."""
    plan = recipe(dense_checkpoint, max_steps=4, save_every=1, keep_checkpoints=3).compile()
    whole = plan.train(tmp_path / "run", verbose=0)
    folder = tmp_path / "run" / "checkpoints"
    cut(folder / "step-4" / "model.safetensors")
    (folder / "step-3" / "manifest.json").unlink()
    run = plan.train(tmp_path / "run", verbose=0)
    assert [notice.partition(": ")[2] for notice in run.notices] != []
    newest, next_one = run.notices
    assert "step-4/model.safetensors: is damaged: expected bytes" in newest
    assert "step-3 is no checkpoint: manifest.json cannot be read" in next_one
    assert all(notice.endswith("the run goes on from step-2") for notice in run.notices)
    assert {path.name for path in folder.iterdir()} == {
        "damaged-step-3",
        "damaged-step-4",
        "latest",
        "step-2",
        "step-3",
        "step-4",
    }
    assert [r["loss"] for r in written(run.folder)] == [r["loss"] for r in whole.history]
    assert all(map(torch.equal, run.prepared.model.parameters(), whole.prepared.model.parameters()))


def test_a_run_without_a_whole_checkpoint(dense_checkpoint, tmp_path):
    """It neither begins anew nor loses what is there, and every damage is told."""
    plan = recipe(dense_checkpoint, max_steps=2, save_every=1).compile()
    plan.train(tmp_path / "run", verbose=0)
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.glob("step-*"):
        flip(path / "model.safetensors")
    with pytest.raises(qf.DamagedError, match=r"no checkpoint of .*run is whole:\n.*step-2.*\n.*step-1") as caught:
        plan.train(tmp_path / "run", verbose=0)
    assert 'another folder, "' in caught.value.fix
    assert {path.name for path in folder.iterdir()} == {"latest", "step-1", "step-2"}


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(saved, monkeypatch):
    """What a file system refuses at the moment may be whole."""
    prepared, path = saved
    real = Path.open

    def refusing(file, *args, **kwargs):
        if file.name == "optimizer.safetensors":
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(qf.CheckpointError, match=r"optimizer\.safetensors: cannot be read: Permission") as caught:
        prepared.load(path)
    assert not isinstance(caught.value, qf.DamagedError)

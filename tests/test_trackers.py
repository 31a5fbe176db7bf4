"""Trackers are told every number of a run once, also of one that crashed and continued; each by its own reader."""

from __future__ import annotations

import json
import signal
import struct

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import qwenft as qf
from qwenft.trackers import Mlflow, TrackedRun, Trackio, Wandb

from .training.helpers import recipe

NUMBERS = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_bytes", "state_bytes")
HELD_OUT = ("loss", "perplexity", "accuracy", "exact_match")


@pytest.fixture
def plan(dense_checkpoint):
    """Five steps, evaluated every second one."""
    options = {"held_out": 0.2, "evaluate_every": 2, "sample_prompts": ("Hi",), "sample_tokens": 3}
    return recipe(
        dense_checkpoint, adapter=qf.AdapterSpec.lora(rank=4), max_steps=5, save_every=2, **options
    ).compile()


def crash(record):
    """Behind the third step, which is repeated."""
    if record["step"] == 3:
        msg = "a cable was pulled"
        raise RuntimeError(msg)


def trained(plan, folder, **options):
    """A run that crashed once."""
    with pytest.raises(RuntimeError, match="cable"):
        plan.train(folder, verbose=0, on_step=crash, **options)
    return plan.train(folder, verbose=0, **options)


def losses(run):
    return {record["step"]: record["loss"] for record in run.history if "loss" in record}


def test_tensorboard_reads_what_a_run_wrote(plan, tmp_path):
    """Without being named it has a file in the folder, in which every number of every step is once."""
    run = trained(plan, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in NUMBERS:
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert sorted(found) == [1, 2, 3, 4, 5]
        assert len(events.Scalars(f"train/{name}")) == 5
        if name == "loss":
            assert found == pytest.approx(losses(run), rel=1e-6)
    for name in HELD_OUT:
        assert [event.step for event in events.Scalars(f"held_out/{name}")] == [0, 2, 4, 5]
    assert "Hi/text_summary" in events.Tags()["tensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "run" / "trackers.json").exists()


def records_of_wandb(content):
    """The records of an offline file of W&B: LevelDB's log, behind a head of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, part = 7, b""
    while place + 7 < len(content):
        if (left := -place % 2**15) < 7:  # of a block, where no head has room
            place += left
        _, size, kind = struct.unpack_from("<IHB", content, place)
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(part)
            part = b""


def test_wandb_is_told(plan, tmp_path, monkeypatch):
    """Offline files in the folder of the run hold its numbers, answers and recipe under one id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = trained(plan, tmp_path / "run", trackers=["wandb"])
    told, recipes, ids = {}, [], set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in records_of_wandb(path.read_bytes()):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                recipes += [item.value_json for item in record.run.config.update if item.key == "recipe"]
            values = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "train/loss" in values:
                told.setdefault(values["_step"], values["train/loss"])
    assert told == pytest.approx(losses(run))
    assert ids == {json.loads((tmp_path / "run" / "trackers.json").read_text())["Wandb"]}
    assert json.loads(recipes[0])["training"]["max_steps"] == 5


def test_mlflow_is_told(plan, tmp_path, monkeypatch):
    """Its own client finds the run, finished, with its numbers and the parts of its recipe."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = trained(plan, tmp_path / "run", trackers=[Mlflow(experiment="mine")])
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.run_name == "run"
    assert found.info.status == "FINISHED"
    assert found.data.params["recipe.training.max_steps"] == "5"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(losses(run))
    assert client.list_artifacts(found.info.run_id, "answers")[0].path == "answers/step-0.json"


def test_trackio_is_told(plan, tmp_path, monkeypatch):
    """Its database holds the numbers of the run under one name."""
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run = trained(plan, tmp_path / "run", trackers=[Trackio(project="mine")])
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["Trackio"]
    rows = sqlite_storage.SQLiteStorage.get_logs("mine", name)
    found = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert found == pytest.approx(losses(run))
    assert sqlite_storage.SQLiteStorage.get_runs("mine") == [name]


class Recorder(qf.Tracker):
    """As a user writes one."""

    def __init__(self, dies_at=None, id="my-id"):  # noqa: A002 - as what it is given back
        self.started, self.told, self.answers, self.ended, self.dies_at, self.id = [], [], [], [], dies_at, id

    def start(self, run: TrackedRun):
        """Remember it."""
        self.started.append(run)
        return self.id

    def log(self, values, step):
        """Fail where that is asked for."""
        if step == self.dies_at:
            msg = "no network to https://me:secret@tracker.example"
            raise ConnectionError(msg)
        self.told.append((step, values))

    def log_answers(self, answers, step):
        """Remember them."""
        self.answers.append((step, answers))

    def finish(self, ending):
        """Remember how."""
        self.ended.append(ending)


def test_a_tracker_of_ones_own(plan, tmp_path):
    """It is told the recipe, numbers, answers and the end, and by its own id when the run is continued."""
    recorder, other = Recorder(), Recorder(id="other-id")
    run = trained(plan, tmp_path / "run", trackers=[recorder, other])
    first, second = recorder.started
    assert (first.id, first.steps_done, second.id, second.steps_done) == (None, 0, "my-id", 2)
    assert [started.id for started in other.started] == [None, "other-id"]
    assert first.folder == run.folder
    assert first.config["recipe"]["training"]["max_steps"] == 5
    json.dumps(first.config)
    assert recorder.ended == ["failed", "finished"]
    told = [(step, values["train/loss"]) for step, values in recorder.told if "train/loss" in values]
    assert [step for step, _ in told] == [1, 2, 3, 3, 4, 5]
    assert dict(told) == losses(run)
    assert {step for step, _ in recorder.answers} == {0, 2, 4, 5}
    assert all(set(answers) == {"Hi"} for _, answers in recorder.answers)


def test_a_tracker_that_fails_ends_no_run(plan, tmp_path):
    """The user is told once, it is told nothing any more, and the others everything."""
    broken, whole = Recorder(dies_at=3), Recorder()
    run = plan.train(tmp_path / "run", verbose=0, trackers=[broken, whole])
    assert run.ending == "finished"
    assert run.notices == [
        "Recorder is told nothing any more: ConnectionError('no network to https://tracker.example')"
    ]
    assert broken.ended == []
    assert whole.ended == ["finished"]
    assert [step for step, values in whole.told if "train/loss" in values] == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_not_there_is_refused(plan, tmp_path, monkeypatch):
    """A misspelt name, one that is not installed, and an object for other processes; no folder is made."""
    with pytest.raises(qf.SpecError, match=r"'wandbb' is none of wandb, mlflow, trackio; did you mean 'wandb'"):
        plan.train(tmp_path / "run", trackers=["wandbb"])
    monkeypatch.setattr("qwenft.trackers.find_spec", lambda _: None)
    with pytest.raises(qf.BackendUnavailable, match=r"'trackio' is not installed(.|\n)*pip install trackio"):
        plan.train(tmp_path / "run", trackers=["trackio"])
    with pytest.raises(qf.SpecError, match="cannot be handed to other processes"):
        plan.launch(tmp_path / "run", processes=2, trackers=[Wandb()])
    assert not (tmp_path / "run").exists()

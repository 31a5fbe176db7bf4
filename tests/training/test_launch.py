from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import qwenft as qf
from qwenft.training.launch import _watch
from qwenft.training.ranks import Ranks
from qwenft.training.run_folder import RunFolder

from .faults import dying, failing, poisoned, stalling
from .helpers import chats, comparable, recipe, written
from .test_shards import ROOT

LORA = qf.AdapterSpec.lora(rank=4)
#: What a step of several processes has of its own, or counts in another order.
OWN = {"ranks", "state_bytes", "grad_norm", "loss", "held_out_loss", "held_out_perplexity"}


def shared(checkpoint, **training):
    """A small recipe of which several processes share everything."""
    numbers = {"tokens_per_step": 512, "max_steps": 8, "save_every": 2, **training}
    return recipe(checkpoint, adapter=LORA, held_out=0.2, **numbers).with_parallel(qf.ParallelSpec.fsdp2())


def evaluated(checkpoint):
    """The same, with what is asked of the model on its way."""
    asked = {"sample_prompts": ("What follows one and two?",), "sample_tokens": 8}
    return shared(checkpoint, evaluate_every=4, **asked)


def losses(folder):
    """Of every step that is written, once."""
    return {record["step"]: record["loss"] for record in written(folder) if "loss" in record}


@pytest.fixture(scope="module")
def alone(dense_checkpoint, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    single = evaluated(dense_checkpoint).with_parallel(qf.ParallelSpec.single())
    return single.compile().train(folder, verbose=0)


@pytest.mark.long
def test_a_notebook_starts_all_processes(dense_checkpoint, alone, tmp_path, capsys):
    """What two processes leave is what one leaves, in half the memory each; the run is used as any other."""
    handler = signal.getsignal(signal.SIGINT)
    run = evaluated(dense_checkpoint).compile().launch(tmp_path / "run", processes=2)
    assert run.ending == "finished"
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(run.history) == len(alone.history)
    for own, expected in zip(comparable(run.history), comparable(alone.history), strict=True):
        assert own.keys() == expected.keys()
        for key in own.keys() - OWN:
            assert own[key] == expected[key], key
        for key in own.keys() & (OWN - {"ranks", "state_bytes"}):
            assert own[key] == pytest.approx(expected[key], abs=1e-5, rel=1e-5), key
    assert {record["ranks"] for record in run.history if "loss" in record} == {2}
    assert run.history[-1]["state_bytes"] <= 0.55 * alone.history[-1]["state_bytes"]
    assert run.samples == alone.samples
    assert len(run.samples) == 3
    shown = capsys.readouterr().err
    assert shown.count("held-out loss") == 3
    assert all(f"  -> {sample['answer']}" in shown for sample in run.samples)
    assert "is gone" not in shown
    assert "prepared" not in vars(run)
    assert run.evaluate()["loss"] == pytest.approx(alone.evaluate()["loss"], abs=1e-5)
    assert run.generate("What follows one and two?") == alone.generate("What follows one and two?")
    run.export(tmp_path / "merged")
    assert (run.adapter_path / "adapter_model.safetensors").exists()


@pytest.mark.long
def test_the_best_weights_are_left(dense_checkpoint, tmp_path):
    """Where a run gets worse again, several processes end with the weights that one ends with."""
    recipe = shared(dense_checkpoint, evaluate_every=2, keep_best=True, learning_rate=1e-2)
    noise = "ZQXJ KVWY #@% ZZ QQ XJ KK WV YY ~~ && ^^ ||"
    unlearned = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": noise}]}]
    recipe = recipe.with_data(recipe.data.hold_out(qf.DataSpec.messages(unlearned)))
    alone = recipe.with_parallel(qf.ParallelSpec.single()).compile().train(tmp_path / "alone", verbose=0)
    run = recipe.compile().launch(tmp_path / "run", processes=2, verbose=0)
    assert run.best_step == alone.best_step < 8
    expected, found = (load_file(done.adapter_path / "adapter_model.safetensors") for done in (alone, run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3 * tensor.abs().max().item(), rtol=0)


@pytest.mark.long
def test_a_failure_is_shown_with_its_traceback(dense_checkpoint, tmp_path):
    """The error is of the process that failed, and not of one that waited for it."""
    plan = shared(dense_checkpoint).with_training(loss=failing).compile()
    with pytest.raises(qf.RankError, match=r"rank 1: ZeroDivisionError: no more of this") as caught:
        plan.launch(tmp_path / "run", processes=2, verbose=0)
    assert caught.value.rank == 1
    assert "faults.py" in caught.value.traceback
    assert "goes on from the last checkpoint" in caught.value.fix


@pytest.mark.long
def test_killed_processes_are_started_again(dense_checkpoint, alone, tmp_path, monkeypatch):
    """With restarts allowed, the run goes on from its last checkpoint to the same end, killed twice on its way."""
    kills = sorted(random.Random(0).sample(range(3, 13), 2))
    (tmp_path / "dying").write_text(json.dumps(kills))
    monkeypatch.setenv("DYING", str(tmp_path / "dying"))
    plan = shared(dense_checkpoint).with_training(loss=dying).compile()
    run = plan.launch(tmp_path / "run", processes=2, resume="never", max_restarts=2, verbose=0)
    assert run.ending == "finished"
    assert json.loads((tmp_path / "dying").read_text()) == []
    assert losses(tmp_path / "run") == pytest.approx(losses(alone.folder), abs=1e-5)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("asleep", r"rank 1 is in step 1, at stalling \(training/faults\.py\)"),
        ("stopped", r"rank 1 has given no sign of life for \d+ s"),
    ],
)
@pytest.mark.long
def test_a_process_that_the_others_wait_for_is_named(dense_checkpoint, tmp_path, monkeypatch, how, told):
    """While it holds them up, the user is told which one it is; when it goes on, so does the run."""
    monkeypatch.setenv("STALLS", how)
    plan = shared(dense_checkpoint).with_training(loss=stalling, max_steps=4).compile()
    run = plan.launch(tmp_path / "run", processes=2, verbose=0)
    assert run.ending == "finished"
    (notice,) = run.notices
    assert re.fullmatch(rf"step 1 has taken \d+ s so far: {told}.*", notice)


@pytest.mark.long
def test_a_step_that_is_not_finite_in_one_process_is_left_out_by_all(dense_checkpoint, tmp_path):
    """Documents and layer come from the process that has them, and the run goes on to its end."""
    options = {"loss": poisoned, "non_finite": "skip", "evaluate_every": None, "max_steps": 8}
    run = shared(dense_checkpoint, **options).compile().launch(tmp_path / "run", processes=2, verbose=0)
    assert run.ending == "finished"
    left_out = [record for record in run.history if "skipped" in record]
    assert left_out
    assert all(["rows in memory", 7] in record["skipped"] for record in left_out)
    assert len(run.notices) == len(left_out)
    assert all("it began in the loss, forward" in notice for notice in run.notices)


def test_every_step_is_told_once(tmp_path):
    """What a run that was started again repeats is not told anew, and half a line is not told yet."""
    folder, told, over = RunFolder(tmp_path), [], threading.Event()
    folder.metrics.write_text('{"step": 0}\n{"step": 1}\n')
    folder.notice("before")
    watcher = threading.Thread(
        target=_watch, args=(folder, lambda record: told.append(record["step"]), told.append, over), daemon=True
    )
    watcher.start()
    time.sleep(1)
    with folder.metrics.open("a") as lines:
        lines.write('{"step": 2}\n{"step": 3}\n{"step": ')
    deadline = time.monotonic() + 20
    while told != [2, 3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "anew").write_text('{"step": 0}\n{"step": 1}\n')
    (tmp_path / "anew").replace(folder.metrics)
    with folder.metrics.open("a") as lines:
        lines.write("".join(f'{{"step": {step}}}\n' for step in (2, 3, 4)))
    folder.notice("something")
    over.set()
    watcher.join()
    assert told == [2, 3, 4, "something"]


@pytest.mark.long
def test_a_killed_process_ends_the_others(dense_checkpoint, tmp_path, monkeypatch):
    """Within a minute all are ended, and it is said which one was killed."""
    (tmp_path / "dying").write_text("[5]")
    monkeypatch.setenv("DYING", str(tmp_path / "dying"))
    plan = shared(dense_checkpoint).with_training(loss=dying).compile()
    with pytest.raises(qf.RankError, match=r"rank 1 was ended by SIGKILL, and the others with it"):
        plan.launch(tmp_path / "run", processes=2, verbose=0)
    assert time.time() - (tmp_path / "dying").stat().st_mtime < 60


class Torchrun:
    """A run as a shell starts it."""

    def __init__(self, folder, processes, *options):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
        command += ["--nproc-per-node", str(processes), "-m", "qwenft", "train", str(folder / "recipe.json")]
        self.run = folder / "run"
        self.log = (folder / f"log-{time.monotonic()}").open("w")
        self.process = subprocess.Popen(
            [*command, f"--run-dir={self.run}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, step):
        """Until a step is written."""
        deadline = time.monotonic() + 240
        while step not in (losses(self.run) if (self.run / "metrics.jsonl").exists() else {}):
            assert self.process.poll() is None, Path(self.log.name).read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def workers(self):
        """The processes that train."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "qwenft" in child.cmdline()]

    def end(self, limit=60):
        """The exit code, which must come in time."""
        with self.log:
            return self.process.wait(timeout=limit)


@pytest.mark.parametrize("begun", [2, 4])
@pytest.mark.long
def test_a_run_goes_on_with_fewer_processes(dense_checkpoint, alone, tmp_path, begun):
    """Stopped by a signal at four processes, and then at two, it ends in one with the losses of the whole run."""
    recipe = shared(dense_checkpoint, evaluate_every=4)
    recipe.save(tmp_path / "recipe.json")
    for processes, step in ((4, 2), (2, 5)):
        if processes <= begun:
            started = Torchrun(tmp_path, processes)
            started.wait_for(step)
            started.process.send_signal(signal.SIGTERM)
            started.end()
            assert max(losses(tmp_path / "run")) < 8
    recipe.compile().train(tmp_path / "run", verbose=0)
    assert losses(tmp_path / "run") == pytest.approx(losses(alone.folder), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_kills_at_random_moments_lose_nothing(dense_checkpoint, alone, tmp_path, number):
    """Whichever process is killed, and when: nothing hangs, and the run goes on to the same end."""
    shared(dense_checkpoint, evaluate_every=4, save_every=1).save(tmp_path / "recipe.json")
    chance = random.Random(number)
    started = Torchrun(tmp_path, 2)
    started.wait_for(chance.randint(1, 6))
    time.sleep(chance.uniform(0, 1))
    workers = started.workers()
    if workers:
        chance.choice(workers).kill()
    started.end()
    before = losses(tmp_path / "run")
    assert Torchrun(tmp_path, 2).end(limit=240) == 0
    after = losses(tmp_path / "run")
    assert after == pytest.approx(losses(alone.folder), abs=1e-5)
    assert after.keys() >= before.keys()


@pytest.fixture(scope="module")
def odd(dense_checkpoint, tmp_path_factory):
    """What each of two processes raised, by what went wrong."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [json.dumps(row) + "\n" for row in chats()]
    (folder / "seen-by-0.jsonl").write_text("".join(rows))
    (folder / "few.jsonl").write_text(rows[0])
    shared(dense_checkpoint).save(folder / "recipe.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.training.odd_ranks", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:4000]
    return [json.loads((folder / f"raised.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("versions", "rank 1 runs other versions of libraries: torch: '2.", None),
        ("hidden file", "rank 1: ", "seen-by-1.jsonl"),
        ("few documents", "1 documents cannot be shared out over 2 processes", None),
        ("other data", "rank 1 trains something else: recipe.training.seed: 0 on rank 0, 1 on rank 1", None),
    ],
)
def test_what_is_wrong_in_one_process_ends_all(odd, case, first, second):
    """The first process says what is wrong in any of them, and none waits for it."""
    assert first in odd[0][case]["text"]
    assert (second or first) in odd[1][case]["text"]
    assert max(found[case]["seconds"] for found in odd) < 60


def test_a_port_that_is_taken_is_named(monkeypatch):
    """Processes that a launcher sends to a port in use say which one it is."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(qf.RankError, match=rf"rank 0 of 2 cannot meet the others at 127\.0\.0\.1:{port}"):
            Ranks.join(device="cpu")


def test_one_process_answers_for_all():
    """A run of one process asks nobody."""
    one = Ranks()
    assert one.is_first
    assert one.sum([1, 2.5]) == [1, 2.5]
    assert one.gather("a") == ["a"]
    assert one.by_first(lambda: 7) == one.together(lambda: 7) == one.first_then_others(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        one.together(lambda: 1 / 0)

"""The folder of a run: who may write it, what is in it, and what is left of one that never began."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import stat
import subprocess
from importlib.metadata import version

import pytest

from qwenft.errors import CheckpointError
from qwenft.training.environment import environment, versions
from qwenft.training.results import INTERRUPTED, RUNNING
from qwenft.training.run_folder import RunFolder


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    """What a run writes holds the user's data: nobody else reads it."""
    place = tmp_path / "deep" / "run"
    folder = RunFolder(place)
    with folder.locked(), folder.claimed({}):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert folder.is_claimed
    assert everything(place) == [".lock", "plan.json"]


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("fails", [None, RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_run_that_did_not_begin(tmp_path, was_there, fails):
    """Neither a lock nor a half; a folder that was there stays, empty as it was."""
    place = tmp_path / "run"
    if was_there:
        place.mkdir()
    folder = RunFolder(place)

    def begin():
        with folder.locked():
            if fails is not None:
                with folder.claimed({"a": 1}):
                    folder.write("environment.json", {})
                    raise fails

    if fails is None:
        begin()
    else:
        with pytest.raises(type(fails)):
            begin()
    assert everything(tmp_path) == (["run"] if was_there else [])


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_what_is_there_is_not_overwritten(tmp_path, taken):
    """A file, and a folder that holds something, are refused and stay as they are."""
    place = tmp_path / "run"
    if taken == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    folder = RunFolder(place)
    with pytest.raises(CheckpointError, match=r"exists") as caught, folder.locked(), folder.claimed({}):
        pass
    assert caught.value.path == place
    assert [name for name in everything(tmp_path) if not name.endswith(".lock")] == before


def hold(path, begun, over):
    """Lock a folder until it is told to end."""
    with RunFolder(path).locked():
        begun.set()
        over.wait(60)


def test_two_processes_do_not_share_a_folder(tmp_path):
    """The second is told who is there; the first one's death, however it comes, sets the folder free."""
    context = multiprocessing.get_context("spawn")
    begun, over = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", begun, over))
    process.start()
    assert begun.wait(60)
    folder = RunFolder(tmp_path / "run")
    assert folder.is_locked
    with (
        pytest.raises(CheckpointError, match=rf"another process trains here: process {process.pid} on ") as caught,
        folder.locked(),
    ):
        pass
    assert "qf.open_run(" in caught.value.fix
    process.kill()
    process.join()
    assert not folder.is_locked
    with folder.locked():
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Some of clusters have none: the run goes on, and the user is told what nobody watches then."""

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path / "run").locked() as notices:
        assert "cannot be locked on its file system (Function not implemented)" in notices[0]
    monkeypatch.undo()
    with RunFolder(tmp_path / "run").locked() as notices:
        assert notices == []


def test_a_place_that_cannot_be_written(tmp_path):
    """A run folder below a file is refused."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"file/run: cannot be written: Not a directory"),
        RunFolder(tmp_path / "file" / "run").locked(),
    ):
        pass
    assert everything(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    """A run folder where the user may not write is refused."""
    tmp_path.chmod(0o500)
    try:
        refused = pytest.raises(CheckpointError, match=r"run: cannot be written: Permission denied")
        with refused, RunFolder(tmp_path / "run").locked():
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_claim_that_was_killed_can_be_claimed(tmp_path):
    """The half of a plan that a killed process left is no run, and is in nobody's way."""
    folder = RunFolder(tmp_path)
    (tmp_path / ".lock").touch()
    (tmp_path / ".plan.json.writing").write_text("{")
    with folder.locked(), folder.claimed({"identity": {"a": 1}, "data": {"steps": 7}}):
        pass
    assert folder.identity == {"a": 1}
    assert folder.steps == 7
    assert everything(tmp_path) == [".lock", "plan.json"]


def test_it_tells_whether_a_run_goes_on(tmp_path):
    """While it is locked it runs; without a result it was interrupted."""
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), folder.claimed({}):
        assert folder.ending == RUNNING
    assert folder.ending == INTERRUPTED


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": 3, "data": null}'])
def test_a_plan_that_is_none(tmp_path, content):
    """A damaged plan is told as such."""
    (tmp_path / "plan.json").write_text(content)
    folder = RunFolder(tmp_path)
    for ask in (lambda: folder.identity, lambda: folder.steps):
        with pytest.raises(CheckpointError, match=r"plan\.json is no plan of a run: "):
            ask()


def test_a_line_that_is_damaged_is_named(tmp_path):
    """A line that was cut by a crash is left out; one that is no JSON is told by its file and number."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert folder.history == [{"step": 1}, {"step": 2}]
    assert folder.rewind(1) == [{"step": 1}]
    folder.metrics.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
    for read in (lambda: folder.history, lambda: folder.rewind(1)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: is damaged: b'") as caught:
            read()
        assert "remove this line" in caught.value.fix


def test_what_is_no_step_is_no_checkpoint(tmp_path):
    """Names that a user gives to copies are left alone."""
    for name in ("step-10", "step-9", "step-9-copy", "damaged-step-11", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list(RunFolder(tmp_path).checkpoints) == [9, 10]


def test_a_run_says_on_what_it_runs(tmp_path, monkeypatch):
    """Versions of what results depend on, the hardware, and the commit of the sources around it."""
    git = shutil.which("git") or pytest.skip("no git")

    def run(*arguments):
        command = [git, "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None
    run("init", "-q")
    run("commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "script.py").write_text("1")
    found = environment()
    assert found["git"] == {"commit": run("rev-parse", "HEAD"), "changed_files": 0}
    run("add", "script.py")
    assert environment()["git"] == {**found["git"], "changed_files": 1}
    assert found["versions"] == versions()
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == version("torch")
    assert found["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert str(tmp_path) not in json.dumps(found)

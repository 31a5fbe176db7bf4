"""The folder of a run: one process at a time writes it, and what is in it can be read at any time."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.errors import CheckpointError, DamagedError
from qwenft.specs.codec import write_atomically
from qwenft.training.folder import cannot_be_written, flush, require_free
from qwenft.training.results import FINISHED, INTERRUPTED, RUNNING, STOPPED_EARLY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_LOCK = ".lock"


@attrs.frozen
class RunFolder:
    """The files of a run: ``plan.json``, ``environment.json``, ``metrics.jsonl``, ``checkpoints/step-N``, results.

    Args:
        path: of the folder.
    """

    path: Path

    @contextmanager
    def locked(self) -> Iterator[list[str]]:
        """Keep other processes from writing here; a folder that is not there is made, for its user alone.

        Where no run has begun in the end, nothing is left of it.

        Yields:
            What the user is to be told: that the file system has no locks, as some of clusters have none.

        Raises:
            CheckpointError: another process trains here, or the place is taken or cannot be written.
        """
        is_new = not self.path.exists()
        if not is_new and not self.is_claimed:
            self.require_free()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = (self.path / _LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise cannot_be_written(self.path, error) from error
        notices: list[str] = []
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CheckpointError(
                    f"{self.path}: another process trains here: {file.read().strip()}",
                    fix=f'another folder, or its end; qf.open_run("{self.path}") shows it meanwhile',
                    path=self.path,
                ) from None
            except OSError as error:
                notices.append(
                    f"{self.path} cannot be locked on its file system ({error.strerror}): that no other process "
                    "trains here is not watched"
                )
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            try:
                yield notices
            finally:
                self._leave_unclaimed(is_new=is_new)

    def _leave_unclaimed(self, *, is_new: bool) -> None:
        if self.path.is_dir() and all(path.name == _LOCK for path in self.path.iterdir()):
            (self.path / _LOCK).unlink(missing_ok=True)
            if is_new:
                self.path.rmdir()

    @property
    def is_locked(self) -> bool:
        """Whether a process trains here now."""
        try:
            with (self.path / _LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextmanager
    def claimed(self, plan: dict[str, Any]) -> Iterator[None]:
        """Begin a run in the folder, which is locked; where what follows fails, it can be begun anew.

        Args:
            plan: the JSON value of ``plan.json``, which tells that a run has begun.

        Raises:
            CheckpointError: the place is taken, or cannot be written.
        """
        self.require_free()
        try:
            self.write("plan.json", plan)
            yield
        except BaseException:
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _LOCK:
                    path.unlink()
            raise

    def require_free(self) -> None:
        """Refuse a folder that holds something else than a lock, and what a killed claim has left.

        Raises:
            CheckpointError: such.
        """
        if not self.path.is_dir() or {path.name for path in self.path.iterdir()} - {_LOCK, ".plan.json.writing"}:
            require_free(self.path)

    def write(self, name: str, value: Any) -> None:
        """Put a JSON value into a file, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise cannot_be_written(self.path / name, error) from error

    @property
    def is_claimed(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "plan.json").is_file()

    @property
    def identity(self) -> dict[str, Any]:
        """What the run was begun with: all that its result depends on.

        Raises:
            CheckpointError: the file that says so is damaged, or is no plan of a run.
        """
        return self._planned("identity")

    @property
    def steps(self) -> int:
        """How many are planned.

        Raises:
            CheckpointError: as of :attr:`identity`.
        """
        return int(self._planned("data")["steps"])

    def _planned(self, name: str) -> dict[str, Any]:
        path = self.path / "plan.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))[name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no plan of a run: {error!r}", path=path) from None

    @property
    def ending(self) -> str:
        """How the run ended, or that it is running."""
        if self.is_locked:
            return RUNNING
        if not any((self.path / name).exists() for name in ("adapter", "model")):
            return INTERRUPTED
        return FINISHED if self.history[-1]["step"] == self.steps else STOPPED_EARLY

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Steps and folders of the checkpoints, the earliest first."""
        found = [path for path in self.path.glob("checkpoints/step-*") if _step_of(path).isdecimal()]
        return {int(_step_of(path)): path for path in sorted(found, key=lambda path: int(_step_of(path)))}

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint, there or not."""
        return self.path / "checkpoints" / f"step-{step}"

    def mark_latest(self, step: int) -> None:
        """Let ``checkpoints/latest`` name the checkpoint that a run continues from."""
        try:
            write_atomically(place := self.path / "checkpoints" / "latest", f"step-{step}\n")
        except OSError as error:
            raise cannot_be_written(place, error) from error

    def set_aside(self, step: int) -> Path:
        """Give a damaged checkpoint another name, under which nothing continues from it."""
        place = self.path / "checkpoints" / f"damaged-step-{step}"
        shutil.rmtree(place, ignore_errors=True)
        return self.checkpoint(step).rename(place)

    def set_results_aside(self) -> list[str]:
        """Give what the run came to another name, before it goes on with other numbers to another end.

        Returns:
            A sentence of each for the user.

        Raises:
            CheckpointError: it cannot be renamed.
        """
        said: list[str] = []
        if not (history := self.history):
            return said
        step = history[-1]["step"]
        for name in ("adapter", "model", "merged"):
            if (place := self.path / name).exists():
                aside = self.path / f"{name}-step-{step}"
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}-again")
                try:
                    place.rename(aside)
                except OSError as error:
                    raise cannot_be_written(aside, error) from error
                said.append(f"the run goes on: its {name} of step {step:,} is {aside.name} now")
        return said

    def drop_checkpoints(self, *, keep: int, best: int | None) -> None:
        """Remove all but the newest ``keep`` checkpoints and that of the step ``best``."""
        checkpoints = self.checkpoints
        for step in [step for step in list(checkpoints)[:-keep] if step != best]:
            leaving = checkpoints[step].with_name(f".step-{step}.leaving")
            try:
                checkpoints[step].rename(leaving)  # what is half removed must not look like a checkpoint
                shutil.rmtree(leaving)
            except OSError as error:
                raise cannot_be_written(leaving, error) from error

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of the metrics."""
        return self.lines(self.metrics.name)

    @property
    def notices(self) -> Path:
        """One JSON object, with its `time`, for every `notice` that the user was given."""
        return self.path / "notices.jsonl"

    def notice(self, sentence: str) -> None:
        """Keep what the user is told."""
        self.append(self.notices.name, {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "notice": sentence})

    @property
    def trackers(self) -> dict[str, str]:
        """By what the trackers of the run know it, by their names.

        Raises:
            DamagedError: the file that says so is no JSON object.
        """
        path = self.path / "trackers.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{path} is damaged: {error}", fix="remove this file", path=path) from None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON objects of a file, none where it is not there; a last line that was cut by a crash is none.

        Raises:
            DamagedError: a line is no JSON.
        """
        path, found = self.path / name, []
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                found.append(json.loads(line))
            except ValueError:
                problem = f"{path}, line {number}: is damaged: {line[:60]!r}"
                raise DamagedError(problem, fix="remove this line, or the file", path=path) from None
        return found

    def append(self, name: str, values: dict[str, Any]) -> None:
        """Add a line to a file of JSON lines.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            with (self.path / name).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as error:
            raise cannot_be_written(self.path / name, error) from error

    def list_skipped(self, errors: Iterable[str]) -> None:
        """Add the errors of rows that are left out to ``skipped.jsonl``, each once."""
        new = dict.fromkeys(errors)
        for line in self.lines("skipped.jsonl") if new else ():
            new.pop(line["error"], None)
        for error in new:
            self.append("skipped.jsonl", {"error": error})

    def flush(self) -> None:
        """Wait until the metrics are on the disk: a checkpoint must not outlive its history.

        Raises:
            CheckpointError: they cannot be written.
        """
        try:
            if self.metrics.exists():
                flush(self.metrics)
        except OSError as error:
            raise cannot_be_written(self.metrics, error) from error

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Cut the files of JSON lines behind ``step``, and return the metrics up to there.

        A run that was stopped between two checkpoints wrote lines of steps that it is going to repeat; what it
        left half written is removed.

        Raises:
            DamagedError: a line of them is no JSON.
            CheckpointError: they cannot be written.
        """
        try:
            for unfinished in self.path.glob("checkpoints/.*"):
                shutil.rmtree(unfinished)
            for name in ("metrics.jsonl", "samples.jsonl"):
                if lines := self.lines(name):
                    kept = [record for record in lines if record["step"] <= step]
                    texts = (json.dumps(record, ensure_ascii=False) for record in kept)
                    write_atomically(self.path / name, "".join(f"{text}\n" for text in texts))
        except CheckpointError:
            raise
        except OSError as error:
            raise cannot_be_written(self.path, error) from error
        self.flush()
        return self.history


def _step_of(path: Path) -> str:
    return path.name.removeprefix("step-")

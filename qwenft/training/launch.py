"""The processes of a run, started and watched through torch's elastic launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import uuid
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qwenft.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from qwenft.training.run_folder import RunFolder

_POLL = 0.5  # seconds
#: What a process says that could not reach another one.
_ECHOES = ("RankError", "Connection closed by peer", "Connection reset by peer", "recvWait", "DistBackendError")


def launch(
    arguments: Sequence[str],
    *,
    processes: int,
    max_restarts: int,
    folder: RunFolder,
    on_record: Callable[[dict[str, Any]], Any],
    on_notice: Callable[[str], Any],
) -> None:
    """Run ``python -m qwenft`` in several processes on this machine, until all of them have ended.

    Where one fails, the others are ended, and all are started again as often as is allowed. Ctrl-C, a notebook's
    interrupt and SIGTERM are handed on to them: they end after their step, with a checkpoint.

    Args:
        arguments: of the command.
        processes: how many.
        max_restarts: how often all are started again.
        folder: of the run, to whose metrics the first of them adds a line a step.
        on_record: called with the line of each new step while they run.
        on_notice: called with each sentence that they have for the user.

    Raises:
        RankError: one failed; with its traceback.
        KeyboardInterrupt: they were interrupted before the first step was written.
    """
    with tempfile.TemporaryDirectory(prefix="qwenft-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any port that is free
            max_restarts=max_restarts,
            monitor_interval=_POLL,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.ALL),
        )
        over = Event()
        watcher = Thread(target=_watch, args=(folder, on_record, on_notice, over), daemon=True)
        watcher.start()
        try:
            with _own_handlers():
                elastic_launch(config, sys.executable)("-m", "qwenft", *arguments)
        except ChildFailedError as failed:
            raise _first_failure(failed) from None
        except (KeyboardInterrupt, SignalException):  # they were told, and waited for
            if not folder.metrics.exists():
                raise KeyboardInterrupt from None
        finally:
            over.set()
            watcher.join()


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Leave the handlers of signals as they were: the launcher puts its own in their place, for good."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in signal.valid_signals()} if in_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _watch(
    folder: RunFolder, on_record: Callable[[dict[str, Any]], Any], on_notice: Callable[[str], Any], over: Event
) -> None:
    """Hand on what is new: of every step its record, once, those that are repeated not again; and all notices."""
    after = folder.history[-1]["step"] if folder.history else -1
    metrics, notices = _Tail(folder.metrics), _Tail(folder.notices)
    notices.lines()
    while True:
        is_over = over.wait(_POLL)
        for record in metrics.lines():
            if record["step"] > after:
                after = record["step"]
                on_record(record)
        for record in notices.lines():
            on_notice(record["notice"])
        if is_over:
            return


class _Tail:
    """The lines that a file of JSON lines gets; of one that is written anew all of them again.

    Args:
        path: of the file, there or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self.done = -1, 0

    def lines(self) -> list[Any]:
        """Those since the last time, whole ones alone."""
        if not self.path.exists():
            return []
        found = []
        with self.path.open("rb") as lines:
            if (file := os.fstat(lines.fileno()).st_ino) != self.file:
                self.file, self.done = file, 0
            lines.seek(self.done)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self.done += len(line)
                found.append(json.loads(line))
        return found


def _first_failure(failed: ChildFailedError) -> RankError:
    """What went wrong in the process that the others failed for."""
    rank, failure = min(failed.failures.items(), key=lambda item: (_is_echo(item[1]), item[1].timestamp))
    problem = f"rank {rank}: {_said(failure)}"
    if failure.exitcode < 0:
        problem = f"rank {rank} was ended by {failure.signal_name()}, and the others with it"
    traceback = (
        failure.message.get("extraInfo", {}).get("py_callstack") if isinstance(failure.message, dict) else None
    )
    fix = "the same launch() again: it goes on from the last checkpoint"
    return RankError(problem, fix=fix, rank=rank, traceback=traceback)


def _is_echo(failure: ProcessFailure) -> bool:
    """Whether a process failed since another one had, or was ended for it."""
    return failure.signal_name() == "SIGTERM" or any(sign in _said(failure) for sign in _ECHOES)


def _said(failure: ProcessFailure) -> str:
    message: Any = failure.message
    return str(message["message"] if isinstance(message, dict) else message)

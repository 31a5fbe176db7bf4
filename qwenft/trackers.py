"""Where the numbers of a run are shown beside its folder: in TensorBoard, and wherever the user names."""

from __future__ import annotations

import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import attrs

from qwenft.errors import BackendUnavailable, SpecError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

_PROJECT = "qwenft"
FAILED = "failed"


@attrs.frozen
class TrackedRun:
    """What a tracker is told of a run when it starts.

    Args:
        folder: of the run.
        config: the recipe and what it became here, as a JSON value.
        steps_done: before; a run that was killed repeats the steps behind them.
        id: what the tracker returned when the run was begun; None of a new one.
    """

    folder: Path
    config: dict[str, Any]
    steps_done: int
    id: str | None


class Tracker(ABC):
    """Where the numbers of runs go; it is told of by the first process alone.

    A subclass may be defined in a notebook cell. What it raises at its start ends the run; what it raises later
    does not: the user is told, and nothing goes there any more.
    """

    @abstractmethod
    def start(self, run: TrackedRun) -> str | None:
        """Begin or continue a run.

        Returns:
            By what it is known there, which is told when the run is continued; None if by nothing.
        """

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, such as ``train/loss``, or of an evaluation, such as ``held_out/loss``."""

    def log_answers(self, answers: Mapping[str, str], step: int) -> None:  # noqa: B027 - not all show texts
        """Take the answers to the sample prompts."""

    def finish(self, ending: str) -> None:  # noqa: B027 - not all have something to close
        """Close; the run is "finished", "stopped early", "interrupted" or "failed"."""


class TensorBoard(Tracker):
    """TensorBoard's event files in the folder of the run, through tensorboardX."""

    def start(self, run: TrackedRun) -> None:
        """Begin another file; a run that continues takes later steps, of the time before, away."""
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(
            str(run.folder / "tensorboard"),
            purge_step=run.steps_done + 1 if run.steps_done else None,
            filename_suffix=f".{run.steps_done}",  # one that is continued within a second keeps the file before
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_answers(self, answers: Mapping[str, str], step: int) -> None:
        """Write texts."""
        for prompt, answer in answers.items():
            self.writer.add_text(prompt, answer, step)

    def finish(self, ending: str) -> None:
        """Close the file."""
        self.writer.close()


@attrs.define
class Wandb(Tracker):
    """Weights & Biases; its files lie in the folder of the run.

    Args:
        project: ``WANDB_PROJECT``, or else "qwenft", where None.
        name: of the run; that of its folder where None.
        options: further arguments of ``wandb.init``.
    """

    project: str | None = None
    name: str | None = None
    options: dict[str, Any] = attrs.Factory(dict)
    _run: Any = attrs.field(init=False, default=None)

    def start(self, run: TrackedRun) -> str:
        """Begin or resume it; of steps that are repeated, W&B keeps the first."""
        import wandb

        self._run = wandb.init(
            **{
                "project": self.project or os.environ.get("WANDB_PROJECT", _PROJECT),
                "name": self.name or run.folder.name,
                "dir": str(run.folder),
                "config": run.config,
                "id": run.id,
                "resume": "allow" if run.id else None,
                **self.options,
            }
        )
        return str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand them to its own process."""
        self._run.log(dict(values), step=step)

    def log_answers(self, answers: Mapping[str, str], step: int) -> None:
        """Put them into a table."""
        import wandb

        table = wandb.Table(columns=["prompt", "answer"], data=[list(pair) for pair in answers.items()])
        self._run.log({"answers": table}, step=step)

    def finish(self, ending: str) -> None:
        """Wait until everything is handed on."""
        self._run.finish(exit_code=0 if ending in ("finished", "stopped early") else 1)


@attrs.define
class Mlflow(Tracker):
    """MLflow, at its own tracking URI.

    Args:
        experiment: ``MLFLOW_EXPERIMENT_NAME``, or else "qwenft", where None.
        name: of the run; that of its folder where None.
    """

    experiment: str | None = None
    name: str | None = None
    _client: Any = attrs.field(init=False, default=None)
    _id: str = attrs.field(init=False, default="")

    def start(self, run: TrackedRun) -> str:
        """Begin or continue it, with the parts of its recipe as parameters."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run.id is not None:
            self._id = run.id
            self._client.set_terminated(self._id, "RUNNING")
            return self._id
        wanted = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(wanted)
        place = self._client.create_experiment(wanted) if found is None else found.experiment_id
        self._id = self._client.create_run(place, run_name=self.name or run.folder.name).info.run_id
        params = [Param(name, str(value)[:_PARAM]) for name, value in _flat(run.config)]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS])
        return self._id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send them in the background."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics, synchronous=False)

    def log_answers(self, answers: Mapping[str, str], step: int) -> None:
        """Send them as a file."""
        self._client.log_dict(self._id, dict(answers), f"answers/step-{step}.json")

    def finish(self, ending: str) -> None:
        """Wait until everything is sent."""
        import mlflow

        mlflow.flush_async_logging()
        self._client.set_terminated(self._id, _MLFLOW[ending])


_MLFLOW = {"finished": "FINISHED", "stopped early": "FINISHED", "interrupted": "KILLED", FAILED: "FAILED"}
_PARAMS, _PARAM = 100, 500  # parameters that MLflow takes at a time, and characters of each that every store takes


@attrs.define
class Trackio(Tracker):
    """Trackio, on this machine unless the options name another.

    Args:
        project: "qwenft" where None.
        name: of the run, no other one's in the project; that of its folder and some letters where None.
        options: further arguments of ``trackio.init``, such as ``space_id``.
    """

    project: str | None = None
    name: str | None = None
    options: dict[str, Any] = attrs.Factory(dict)
    _run: Any = attrs.field(init=False, default=None)

    def start(self, run: TrackedRun) -> str:
        """Begin or resume it, by its name."""
        import trackio

        name = run.id or self.name or f"{run.folder.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            self.project or _PROJECT,
            name=name,
            **{"config": run.config, "resume": "allow" if run.id else "never", "embed": False, **self.options},
        )
        return name

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand them to its own thread."""
        self._run.log(dict(values), step=step)

    def log_answers(self, answers: Mapping[str, str], step: int) -> None:
        """Put them into a table."""
        import pandas as pd
        import trackio

        table = pd.DataFrame({"prompt": list(answers), "answer": list(answers.values())})
        self._run.log({"answers": trackio.Table(dataframe=table)}, step=step)

    def finish(self, ending: str) -> None:
        """Wait until everything is written."""
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def tracker(named: str | Tracker) -> Tracker:
    """The tracker of a name, which is imported now; a tracker as it is.

    Raises:
        SpecError: no such name.
        BackendUnavailable: its package is not installed.
    """
    if isinstance(named, Tracker):
        return named
    if named not in TRACKERS:
        problem = f"trackers: {named!r} is none of {', '.join(TRACKERS)}{nearest(str(named), TRACKERS)}"
        raise SpecError(problem, fix='trackers=["wandb"], or an object of a subclass of qf.Tracker', got=named)
    if find_spec(named) is None:
        raise BackendUnavailable(f"trackers: {named!r} is not installed", fix=f"pip install {named}")
    return TRACKERS[named]()


class Trackers:
    """All trackers of a run.

    Args:
        trackers: that are told.
        run_of: what each is told at its start, by the name of its class and, of several of one, its number.
        keep: called with what the trackers returned at their start.
        on_notice: told of one that fails.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        run_of: Callable[[str], TrackedRun],
        keep: Callable[[dict[str, str]], Any],
        on_notice: Callable[[str], Any],
    ) -> None:
        self.told = list(trackers)
        self.run_of, self.keep, self.on_notice = run_of, keep, on_notice
        self.ending = FAILED

    def step(self, record: dict[str, Any]) -> None:
        """Tell the record of a step."""
        self._tell("log", dict(_numbers("train", record)), record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """Tell the record of an evaluation, with its answers."""
        held_out = {name.removeprefix("held_out_"): value for name, value in record.items() if "held_out" in name}
        if held_out:
            self._tell("log", dict(_numbers("held_out", held_out)), record["step"])
        if record["samples"]:
            answers = {sample["prompt"]: sample["answer"] for sample in record["samples"]}
            self._tell("log_answers", answers, record["step"])

    def __enter__(self) -> Self:
        ids = {}
        for number, each in enumerate(self.told):
            name, before = type(each).__name__, sum(type(other) is type(each) for other in self.told[:number])
            name += f"-{before + 1}" if before else ""
            if (known := each.start(self.run_of(name))) is not None:
                ids[name] = known
        self.keep(ids)
        return self

    def __exit__(self, *_: object) -> None:
        self._tell("finish", self.ending)

    def _tell(self, method: str, *values: Any) -> None:
        for each in list(self.told):
            try:
                getattr(each, method)(*values)
            except Exception as error:  # noqa: BLE001 - whatever a tracker meets, the run is worth more
                self.told.remove(each)
                # Notices are kept in a file, and an address may have a password in it.
                said = re.sub(r"//[^/@\s]*@", "//", repr(error))
                self.on_notice(f"{type(each).__name__} is told nothing any more: {said}")


_APART = ("step", "epoch", "ranks")


def _numbers(place: str, record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record under their names there, those of a list each by its own."""
    for name, value in record.items():
        if name in _APART or name.startswith("held_out"):
            continue
        if isinstance(value, int | float):
            yield f"{place}/{name}", value
        elif isinstance(value, list | tuple):
            yield from ((f"{place}/{name}/{number}", one) for number, one in enumerate(value))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value under dotted names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value

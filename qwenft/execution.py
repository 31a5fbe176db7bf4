"""How a plan is executed: a run is begun or continued, here or in other processes, and leaves its results."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwenft.errors import CheckpointError, OutOfMemoryError, SpecError, nearest
from qwenft.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qwenft.reports.live import Watched
    from qwenft.trackers import Tracker, Trackers
    from qwenft.training.engine import Prepared
    from qwenft.training.run_folder import RunFolder
    from qwenft.training_plan import TrainingPlan

RESUME = ("auto", "must", "never")


def train(
    plan: TrainingPlan,
    path: Path,
    *,
    resume: str,
    accept: Sequence[str],
    verbose: int,
    trackers: Sequence[str | Tracker],
    on_step: Callable[[dict[str, Any]], Any] | None,
    on_evaluate: Callable[[dict[str, Any]], Any] | None,
    on_save: Callable[[Path], Any] | None,
    on_end: Callable[[Run], Any] | None,
) -> Run:
    """Begin or continue a run; see :meth:`qwenft.TrainingPlan.train`."""
    from qwenft.reports.live import Live, require_verbose
    from qwenft.trackers import TensorBoard, tracker
    from qwenft.training import loop
    from qwenft.training.allocator import return_freed_memory
    from qwenft.training.results import INTERRUPTED
    from qwenft.training.run_folder import RunFolder

    _require_resume(resume)
    require_verbose(verbose)
    chosen = [TensorBoard(), *map(tracker, trackers)]
    folder = RunFolder(path)
    with ExitStack() as stack:
        notices = plan.ranks.by_first(lambda: stack.enter_context(folder.locked()))
        prepared, history, found = _begin(plan, folder, resume, accept)
        speaks = prepared.ranks.is_first
        stack.callback(return_freed_memory)
        shown = stack.enter_context(Live(_watched(plan, path, history), verbose if speaks else 0))
        told: list[Any] = [shown]
        on_notice = _all(shown.notice, folder.notice if speaks else None)
        if speaks:
            told.append(stack.enter_context(_tracked(plan, folder, chosen, prepared.steps_done, on_notice)))
        listeners = loop.Listeners(
            on_step=_all(*(one.step for one in told), on_step),
            on_evaluate=_all(*(one.evaluation for one in told), on_evaluate),
            on_save=_all(on_save),
            on_notice=on_notice,
        )
        for notice in (*notices, *found) if speaks else ():
            listeners.on_notice(notice)
        with _memory_planned(plan):
            ending = loop.train(prepared, folder, history, listeners, state_bytes=plan.state.total)
        for one in told:
            one.ending = ending.kind
        run = Run(path, prepared.ranks.by_first(lambda: folder.history), ending.kind, ending.signal)
        run.plan, run.prepared = plan, prepared
        if ending.kind != INTERRUPTED:
            _leave_results(run)
    if on_end is not None and speaks:
        on_end(run)
    return run


def _watched(plan: TrainingPlan, path: Path, history: Sequence[dict[str, Any]]) -> Watched:
    """What a view of the run knows before."""
    from qwenft.reports.live import Watched

    planned = None
    if plan.forecast.memory_is_known:
        # Of a process on a CPU all of its memory is measured, of a GPU the live tensors.
        memory = plan.memory
        planned = memory.needed_bytes if plan.machine.device == "cpu" else memory.peak_bytes
    return Watched(f"Run in {path}", plan.data, plan.recipe.training, planned, history)


def _tracked(
    plan: TrainingPlan,
    folder: RunFolder,
    chosen: Sequence[Tracker],
    steps_done: int,
    on_notice: Callable[[str], Any],
) -> Trackers:
    """The trackers, which continue what they were told of the run before."""
    from qwenft.trackers import TrackedRun, Trackers
    from qwenft.training.environment import environment

    summary, known = plan.summary(), folder.trackers
    config = {
        "recipe": plan.identity["recipe"],
        **{name: summary[name] for name in ("model", "machine", "trained_parameters", "fingerprint")},
        "versions": environment()["versions"],
    }

    def run_of(name: str) -> TrackedRun:
        return TrackedRun(folder.path, config, steps_done, known.get(name))

    def keep(ids: dict[str, str]) -> None:
        if ids:
            folder.write("trackers.json", {**known, **ids})

    return Trackers(chosen, run_of, keep, on_notice)


@contextmanager
def _memory_planned(plan: TrainingPlan) -> Iterator[None]:
    """Put what was planned, and what would help, beside a shortage of memory."""
    from qwenft.display import bytes_text
    from qwenft.reports.text import memory_text

    try:
        yield
    except OutOfMemoryError as error:
        used = ", ".join(f"{name.replace('_', ' ')} {bytes_text(count)}" for name, count in error.used.items())
        fix = "recipe.fit(qf.Machine.detect()), which finds what makes it fit"
        if error.documents:
            fix += f"; or .with_max_length below {error.tokens:,}"
        values = {**error.values, "planned": plan.memory if plan.forecast.memory_is_known else None}
        problem = f"{error.problem}\n     used: {used}\n     planned: {memory_text(plan)}"
        raise OutOfMemoryError(problem, fix=fix, **values) from error


def launch(
    plan: TrainingPlan,
    path: Path,
    *,
    processes: int,
    resume: str,
    accept: Sequence[str],
    max_restarts: int,
    verbose: int,
    trackers: Sequence[str],
) -> Run:
    """Train in other processes; see :meth:`qwenft.TrainingPlan.launch`."""
    from qwenft.reports.live import Live, require_verbose
    from qwenft.trackers import tracker
    from qwenft.training.launch import launch as launch_processes
    from qwenft.training.run_folder import RunFolder

    _require_resume(resume)
    require_verbose(verbose)
    for each in trackers:
        if not isinstance(each, str):
            problem = f"launch(trackers=...): {each!r} cannot be handed to other processes"
            raise SpecError(problem, fix='its name, trackers=["wandb"] say', got=each)
        tracker(each)
    plan.require_runnable()
    plan = plan.for_processes(processes)
    _require_places(plan, accept)
    plan.forecast.require_fit()
    folder = RunFolder(path)
    _continues(folder, resume)
    with TemporaryDirectory(prefix="qwenft-") as place:
        recipe = plan.recipe.save(Path(place) / "recipe.json")
        done = max(folder.checkpoints, default=0)
        history = [record for record in folder.history if record["step"] <= done]
        # Their tokens are read by all of them, and by none anew.
        with Live(_watched(plan, path, history), verbose) as shown:

            def on_record(record: dict[str, Any]) -> None:
                if "evaluation_seconds" in record:
                    answers = [line for line in folder.lines("samples.jsonl") if line["step"] == record["step"]]
                    shown.evaluation({**record, "samples": answers})
                if "loss" in record:
                    shown.step(record)

            options = [
                *(f"--allow-module={module}" for module in plan.modules),
                *(f"--accept={place}" for place in accept),
                *(f"--tracker={name}" for name in trackers),
            ]
            launch_processes(
                ["train", str(recipe), f"--run-dir={path}", f"--resume={resume}", *options],
                processes=processes,
                max_restarts=max_restarts,
                folder=folder,
                on_record=on_record,
                on_notice=shown.notice,
            )
            shown.ending = folder.ending
    run = Run(path, folder.history, folder.ending)
    run.plan = plan.for_processes(1)
    return run


def _begin(
    plan: TrainingPlan, folder: RunFolder, resume: str, accept: Sequence[str]
) -> tuple[Prepared, list[dict[str, Any]], list[str]]:
    """The prepared model and the history of a run, where it stands, and what the user is to be told."""
    from qwenft.training.environment import environment
    from qwenft.training.saving import load_newest

    ranks, path = plan.ranks, folder.path
    continues = ranks.by_first(lambda: _continues(folder, resume))
    plan.require_runnable()
    _ = plan.data
    if ranks.count == 1:  # else who launched them has asked
        plan.forecast.require_fit()
    ranks.require_equal(plan.identity, "trains something else")
    _require_places(plan, accept)
    notices = ranks.by_first(lambda: _accepted(plan, folder, accept)) if continues else []
    ranks.together(plan.verify)
    with ExitStack() as stack:
        if not continues:
            ranks.by_first(lambda: stack.enter_context(folder.claimed(plan.summary())))
        ranks.by_first(lambda: folder.write("environment.json", environment()))
        if plan.is_saved_whole:
            ranks.by_first(lambda: plan.recipe.save(path / "recipe.json"))
        prepared = plan.prepare()
        changed = bool(notices)
        notices += load_newest(prepared, folder, accept)
        if changed and prepared.steps_done < plan.data.steps:
            notices += ranks.by_first(folder.set_results_aside)
        if notices and continues:
            ranks.by_first(lambda: folder.write("plan.json", plan.summary()))
    return prepared, ranks.by_first(lambda: folder.rewind(prepared.steps_done)), notices


def _accepted(plan: TrainingPlan, folder: RunFolder, accept: Sequence[str]) -> list[str]:
    """What the plan changes of the run that it continues, which has to be accepted.

    Raises:
        CheckpointError: something else is changed too.
    """
    from qwenft.training.checkpoint import require_same
    from qwenft.training.differences import differences

    path, begun = folder.path, folder.identity
    changed = differences(begun, plan.identity)
    if any(line.startswith("recipe.training.optimizer:") for line in changed):
        accept = [place for place in accept if not "recipe.training.optimizer".startswith(place)]
    fix = (
        f'the recipe of the run, Recipe.load("{path}/recipe.json"), or another folder, "{path}-2" say; '
        'what is meant to change can be accepted: train(..., accept=["recipe.training.learning_rate"])'
    )
    require_same(begun, plan.identity, subject="recipe", fix=fix, path=path, accept=accept)
    return [f"changed, and accepted: {line}" for line in changed]


def _require_places(plan: TrainingPlan, accept: Sequence[str]) -> None:
    """Refuse to accept changes of what a run's identity has not."""
    files = ("weights", "data", "adapter")  # each with digests by name, which may be gone or new
    known = ["recipe", *(f"recipe.{place}" for place in _places(plan.identity["recipe"])), *files]
    for place in accept:
        if place.partition(".")[0] not in files and place not in known:
            problem = f"accept={place!r}: no such place in a recipe{nearest(place, known)}"
            raise SpecError(problem, fix='accept=["recipe.training.learning_rate"]', got=place, expected=known)


def _places(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from (f"{name}.{place}" for place in _places(inner))


def _require_resume(resume: str) -> None:
    if resume not in RESUME:
        problem = f"train(resume={resume!r}): expected one of {', '.join(RESUME)}{nearest(str(resume), RESUME)}"
        raise SpecError(problem, fix='resume="auto"', got=resume, expected=RESUME)


def _continues(folder: RunFolder, resume: str) -> bool:
    """Whether a run goes on, and does not begin; the place allows what is asked."""
    path = folder.path
    if resume == "must" and not folder.checkpoints:
        raise CheckpointError(f"{path} holds no checkpoint to continue from", fix='resume="auto"', path=path)
    if resume != "never" and folder.is_claimed:
        return True
    folder.require_free()
    return False


def _leave_results(run: Run) -> None:
    """Write the adapter or the trained model, of the best step where it is kept."""
    from qwenft.training.run_folder import RunFolder
    from qwenft.training.saving import load_weights

    best = run.best_step
    if best is not None and best != run.prepared.steps_done:
        load_weights(run.prepared, RunFolder(run.folder).checkpoint(best))
    try:
        run.plan.leave_results(run.prepared, run.folder)
    except CheckpointError as error:
        again = f"room on the disk, then the same train() again: every step is in {run.folder}/checkpoints"
        raise CheckpointError(error.problem, fix=error.fix or again, path=error.path) from error


def _all(*functions: Callable[[Any], Any] | None) -> Callable[[Any], None]:
    """One function that calls each of these."""

    def call(value: Any) -> None:
        for function in functions:
            if function is not None:
                function(value)

    return call

"""How a plan is executed: a run is begun or continued, here or in other processes, and leaves its results."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qwenft.errors import CheckpointError, SpecError, nearest
from qwenft.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenft.training.engine import Prepared
    from qwenft.training.folder import RunFolder
    from qwenft.training_plan import TrainingPlan

RESUME = ("auto", "must", "never")


def train(
    plan: TrainingPlan,
    path: Path,
    *,
    resume: str,
    progress: bool,
    on_step: Callable[[dict[str, Any]], Any] | None,
    on_evaluate: Callable[[dict[str, Any]], Any] | None,
    on_save: Callable[[Path], Any] | None,
    on_end: Callable[[Run], Any] | None,
) -> Run:
    """Begin or continue a run; see :meth:`qwenft.TrainingPlan.train`."""
    from qwenft.reports.events import EventFile
    from qwenft.reports.live import Progress
    from qwenft.training import loop
    from qwenft.training.allocator import return_freed_memory

    folder, prepared, history = _begin(plan, path, resume)
    speaks = prepared.ranks.is_first
    with ExitStack() as stack:
        stack.callback(return_freed_memory)
        shown = stack.enter_context(
            Progress(plan.data, plan.recipe.training, prepared.steps_done, shown=progress and speaks)
        )
        told: list[Any] = [shown]
        if speaks:
            told.append(stack.enter_context(EventFile(path / "tensorboard", prepared.steps_done)))
        listeners = loop.Listeners(
            on_step=_all(*(one.step for one in told), on_step),
            on_evaluate=_all(*(one.evaluation for one in told), on_evaluate),
            on_save=_all(on_save),
            on_notice=shown.notice,
        )
        ending = loop.train(prepared, folder, history, listeners, state_bytes=plan.state.total)
    run = Run(path, plan, history, ending)
    run.prepared = prepared
    if ending != loop.INTERRUPTED:
        _leave_results(run)
    if on_end is not None and speaks:
        on_end(run)
    return run


def launch(
    plan: TrainingPlan, path: Path, *, processes: int, resume: str, max_restarts: int, progress: bool
) -> Run:
    """Train in other processes; see :meth:`qwenft.TrainingPlan.launch`."""
    from qwenft.reports.live import Progress
    from qwenft.training import loop
    from qwenft.training.folder import RunFolder
    from qwenft.training.launch import launch as launch_processes

    plan.require_runnable()
    plan = plan.for_processes(processes)
    _ = plan.data
    plan.forecast.require_fit()
    folder = RunFolder(path)
    _continues(folder, resume)
    with TemporaryDirectory(prefix="qwenft-") as place:
        recipe = plan.recipe.save(Path(place) / "recipe.json")
        done = max(folder.checkpoints, default=0)
        # Their tokens are read by all of them, and by none anew.
        with Progress(plan.data, plan.recipe.training, done, shown=progress) as shown:

            def on_record(record: dict[str, Any]) -> None:
                if "evaluation_seconds" in record:
                    shown.evaluation(record)
                if "loss" in record:
                    shown.step(record)

            modules = [f"--allow-module={module}" for module in plan.modules]
            launch_processes(
                ["train", str(recipe), f"--run-dir={path}", f"--resume={resume}", *modules],
                processes=processes,
                max_restarts=max_restarts,
                metrics=folder.metrics,
                after=folder.history[-1]["step"] if folder.history else -1,
                on_record=on_record,
            )
    history = folder.history
    ended = (path / "adapter").exists() or (path / "model").exists()
    is_early = ended and history[-1]["step"] < plan.data.steps
    ending = loop.STOPPED_EARLY if is_early else loop.FINISHED if ended else loop.INTERRUPTED
    return Run(path, plan.for_processes(1), history, ending)


def _begin(plan: TrainingPlan, path: Path, resume: str) -> tuple[RunFolder, Prepared, list[dict[str, Any]]]:
    """The folder, the prepared model and the history of a run, where it stands."""
    from qwenft.training.checkpoint import require_same
    from qwenft.training.folder import RunFolder

    if resume not in RESUME:
        problem = f"train(resume={resume!r}): expected one of {', '.join(RESUME)}{nearest(str(resume), RESUME)}"
        raise SpecError(problem, fix='resume="auto"', got=resume, expected=RESUME)
    ranks, folder = plan.ranks, RunFolder(path)
    continues = ranks.by_first(lambda: _continues(folder, resume))
    plan.require_runnable()
    _ = plan.data
    if ranks.count == 1:  # else who launched them has asked
        plan.forecast.require_fit()
    ranks.require_equal(plan.identity, "trains something else")
    if continues:
        fix = f'the recipe of the run, Recipe.load("{path}/recipe.json"), or another folder, "{path}-2" say'
        ranks.together(lambda: require_same(folder.identity, plan.identity, subject="recipe", fix=fix, path=path))
    ranks.together(plan.verify)
    with ExitStack() as stack:
        ranks.by_first(lambda: _claim(plan, folder, stack, is_new=not continues))
        prepared = plan.prepare()
        if folder.checkpoints:
            prepared.load(next(reversed(folder.checkpoints.values())))
    return folder, prepared, ranks.by_first(lambda: folder.rewind(prepared.steps_done))


def _continues(folder: RunFolder, resume: str) -> bool:
    """Whether a run goes on, and does not begin; the place allows what is asked."""
    from qwenft.training.folder import require_free

    path = folder.path
    if resume == "must" and not folder.checkpoints:
        raise CheckpointError(f"{path} holds no checkpoint to continue from", fix='resume="auto"', path=path)
    if resume != "never" and folder.is_claimed:
        return True
    require_free(path)
    return False


def _claim(plan: TrainingPlan, folder: RunFolder, stack: ExitStack, *, is_new: bool) -> None:
    """Make the folder of a new run, which is gone again where what follows in ``stack`` fails."""
    from qwenft.training.folder import removed_on_error

    if is_new:
        folder.claim(folder.path, {"plan.json": plan.summary()})
        stack.enter_context(removed_on_error(folder.path))
    if plan.is_saved_whole:
        plan.recipe.save(folder.path / "recipe.json")


def _leave_results(run: Run) -> None:
    """Write the adapter or the trained model, of the best step where it is kept."""
    from qwenft.training.folder import RunFolder
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

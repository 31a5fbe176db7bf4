"""A run: how it is begun, continued and ended, and what it leaves."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.errors import CheckpointError, SpecError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenft.specs.data import DataSpec
    from qwenft.training.engine import Prepared
    from qwenft.training.folder import RunFolder
    from qwenft.training_plan import TrainingPlan

RESUME = ("auto", "must", "never")


@attrs.define(eq=False, repr=False, slots=False)
class Run:
    """A run that has ended.

    Args:
        folder: where it lies.
        plan: what it executed.
        history: a record a step, as in ``metrics.jsonl``.
        ending: "finished", "stopped early" (its patience ended) or "interrupted" (by Ctrl-C or a signal).
    """

    folder: Path
    plan: TrainingPlan
    history: list[dict[str, Any]]
    ending: str

    @cached_property
    def prepared(self) -> Prepared:
        """The trained model, its tokenizer and data; with ``keep_best``, as they were at the best step.

        A run of other processes is loaded from its checkpoint when this is first asked for.
        """
        from qwenft.training.folder import RunFolder
        from qwenft.training.saving import load_weights

        prepared = self.plan.prepare()
        checkpoints = RunFolder(self.folder).checkpoints
        load_weights(prepared, checkpoints[self.best_step or max(checkpoints)])
        return prepared

    @property
    def adapter_path(self) -> Path | None:
        """The adapter's folder; None after full fine-tuning, which leaves ``model/``, and while unfinished."""
        path = self.folder / "adapter"
        return path if path.exists() else None

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, from which ``train()`` continues."""
        from qwenft.training.folder import RunFolder

        return next(reversed(RunFolder(self.folder).checkpoints.values()), None)

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every evaluation on held-out data."""
        return [(record["step"], record["held_out_loss"]) for record in self.history if "held_out_loss" in record]

    @property
    def best_step(self) -> int | None:
        """With ``keep_best`` the step of the lowest held-out loss, whose weights the run ends with."""
        from qwenft.training.loop import best_step

        return best_step(self.history) if self.plan.recipe.training.keep_best else None

    @property
    def samples(self) -> list[dict[str, Any]]:
        """``step``, ``prompt`` and ``answer`` of every sample prompt at every evaluation."""
        path = self.folder / "samples.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def evaluate(self, data: DataSpec | None = None) -> dict[str, float]:
        """Loss (nats a token), perplexity and accuracy on data of your own, or on the held-out part.

        Args:
            data: conversations; the held-out part where None.

        Raises:
            DataError: there is nothing to evaluate on.
        """
        return self.plan.evaluate(self.prepared, data)

    def generate(
        self,
        messages: str | list[dict[str, Any]],
        *,
        max_new_tokens: int = 256,
        base: bool = False,
        adapter: str | None = None,
        **options: Any,
    ) -> str:
        """The model's answer.

        Args:
            messages: a conversation, with images and videos as in training, whose paths may be any, or the text of
                one user turn.
            max_new_tokens: at the most.
            base: let the model answer without its adapter.
            adapter: let it answer with another one, that :meth:`load_adapter` named so.
            **options: of transformers' ``generate``; greedy where none are given.
        """
        from qwenft.models.generate import answer

        return answer(
            self.prepared.model,
            self.plan.encoder,
            messages,
            max_new_tokens,
            base=base,
            adapter=adapter,
            **options,
        )

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Put a further adapter, of a run or of peft, beside the one that was trained; it waits to be named.

        ``run.generate(messages, adapter=name)`` answers with it; ``run.prepared.model.set_adapter(name)`` makes it
        the active one.

        Args:
            path: its folder.
            name: by which it is known from now on.

        Raises:
            CheckpointError: it is no adapter, or one of another base.
            SpecError: there is one of that name, or the run trained no adapter.
        """
        self.plan.load_adapter(self.prepared.model, Path(path), name)

    def save_adapter(self, path: str | Path, *, text_only_names: bool = False) -> Path:
        """Write the adapter as peft's files into a folder of its own.

        Args:
            path: a new or empty folder.
            text_only_names: under the names of the text half, ``...ForCausalLM``, for what loads that class alone.
                Servers expect those of the class that is published, and load anything else as nothing.

        Raises:
            CheckpointError: the place is taken or cannot be written.
            SpecError: the run trained no adapter, or one of the vision tower, which that class has not.
        """
        return self.plan.save_adapter(self.prepared.model, Path(path), text_only_names=text_only_names)

    def export(self, path: str | Path, *, base: str = "checkpoint") -> Path:
        """Write the original checkpoint with what was learned merged in, for plain transformers.

        It has the files, keys, shapes and dtypes of the checkpoint. Before it takes its name every tensor is read
        again and compared to the bit, and some logits are compared: of the base, of base plus adapter as peft
        computes it, of the export, and of the run. ``export.json`` says how far these are apart; in float32 the
        export's are those of what was merged (1e-4), or it is refused.

        Args:
            path: a new or empty folder.
            base: what it is merged into where the run's weights are quantized: the "checkpoint" as it is, or its
                "dequantized" weights, with which the result computes what the run did.

        Raises:
            CheckpointError: the place is taken or cannot be written, the checkpoint is quantized itself, or what
                was written does not compute what was merged.
            SpecError: no such base.
        """
        return self.plan.export(self.prepared, Path(path), base)

    def card(
        self, repo_id: str = "your-name/your-model", *, merged: bool = False, revision: str | None = None
    ) -> str:
        """The model card with which :meth:`push` publishes, as Markdown.

        Args:
            repo_id: of the repository on the hub.
            merged: of the whole model instead of the adapter.
            revision: the branch.

        Raises:
            CheckpointError: the run is unfinished, and has no result yet.
        """
        from qwenft.models.publish import terms_of
        from qwenft.reports.card import Place, render_card

        adapter = self._result(merged=merged).name == "adapter"
        picture = "loss.png" if find_spec("matplotlib") else None
        environment = json.loads((self.folder / "environment.json").read_text("utf-8"))
        place = Place(repo_id, revision, picture)
        return render_card(self, place, adapter=adapter, environment=environment, terms=terms_of(self._base))

    def push(
        self, repo_id: str, *, merged: bool = False, private: bool = True, revision: str | None = None
    ) -> str:
        """Publish the adapter, or the whole model, on the hub in one commit, with a model card.

        Nothing but safetensors, JSON, chat templates, text and pictures is uploaded, and no path of this machine.
        Other files that the repository holds are left there.

        Args:
            repo_id: "name/model"; made where it is not there yet.
            merged: the whole model instead of the adapter, exported to the run's ``merged/`` where it is not there
                yet. Full fine-tuning always publishes the whole model.
            private: whether nobody else sees it; a repository that is there already must be so.
            revision: a branch, made where it is not there yet.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: the run is unfinished, a file is of another kind, weights of something else lie in the
                repository, or the hub refuses or cannot be reached. Nothing here has changed then.
        """
        from qwenft.models.publish import Repository, files_of_adapter, files_of_model
        from qwenft.reports.card import base_name

        result = self._result(merged=merged)
        repository = Repository.claim(repo_id, private=private, revision=revision)
        if not result.exists():
            self.export(result)
        if result.name == "adapter":
            files = files_of_adapter(result, self._base, base_name(self.plan))
        else:
            files = files_of_model(result)
        files["README.md"] = self.card(repo_id, merged=merged, revision=revision).encode()
        if find_spec("matplotlib"):
            files["loss.png"] = self.plot()._repr_png_()
        return repository.commit(files, f"Run of {self.history[-1]['step']:,} steps with qwenft")

    def _result(self, *, merged: bool) -> Path:
        """The folder of the adapter or the whole model; that of a merged one need not be there yet."""
        full = self.plan.recipe.adapter.kind == "full"
        learned = self.folder / ("model" if full else "adapter")
        if not learned.exists():
            raise CheckpointError(
                f"{self.folder} holds no {learned.name}: the run is {self.ending}",
                fix=f'plan.train("{self.folder}") to its end',
                path=self.folder,
            )
        return self.folder / "merged" if merged and not full else learned

    @property
    def _base(self) -> Path:
        """The folder of the base checkpoint."""
        return Path(self.prepared.tokenizer.name_or_path)

    def plot(self) -> Any:
        """The loss over the steps, as a matplotlib figure."""
        from qwenft.reports.plots import plot_loss

        return plot_loss(self.history)

    def __repr__(self) -> str:
        from qwenft.reports.text import render_run

        return render_run(self)


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

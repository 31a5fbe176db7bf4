"""A run, and what it left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import attrs

from qwenft.errors import CheckpointError, SpecError
from qwenft.specs.parallel import ParallelSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from qwenft.recipe import Recipe
    from qwenft.reports.answers import Answers
    from qwenft.specs.data import DataSpec
    from qwenft.training.engine import Prepared
    from qwenft.training_plan import TrainingPlan

    Messages = list[dict[str, Any]]


def open_run(path: str | os.PathLike[str], *, allow_modules: Sequence[str] = ()) -> Run:
    """A run by its folder: one that has ended, or one that goes on, as it is at this moment.

    Nothing is written, and no weight is read before the model is asked for something.

    Args:
        path: of the folder.
        allow_modules: modules outside the package whose backends and losses the recipe may name: that runs their
            code.

    Raises:
        CheckpointError: no run was begun there.
    """
    from qwenft.training.run_folder import RunFolder

    folder = RunFolder(Path(path))
    if not folder.is_claimed:
        fix = f'plan.train("{path}"), or the folder that was given to it'
        raise CheckpointError(f"{path} is no folder of a run: it holds no plan.json", fix=fix, path=folder.path)
    return Run(folder.path, folder.history, folder.ending, allow_modules=tuple(allow_modules))


@attrs.define(eq=False, repr=False, slots=False)
class Run:
    """A run that has ended, or that :func:`open_run` found.

    Args:
        folder: where it lies.
        history: a record a step, as in ``metrics.jsonl``.
        ending: "finished", "stopped early" (its patience ended), "interrupted" (by Ctrl-C, a signal or a crash)
            or "running".
        signal: the name of the one that interrupted it, where this process was told.
        allow_modules: see :func:`open_run`.
    """

    folder: Path
    history: list[dict[str, Any]]
    ending: str
    signal: str | None = None
    allow_modules: tuple[str, ...] = ()

    @cached_property
    def plan(self) -> TrainingPlan:
        """What it executed; of a run that was opened, compiled from its recipe for one process here.

        Raises:
            CheckpointError: the folder holds no recipe, as of a run with a backend that was defined in a notebook.
        """
        return self.recipe.with_parallel(ParallelSpec.single()).compile()

    @property
    def recipe(self) -> Recipe:
        """What was asked for.

        Raises:
            CheckpointError: as of :attr:`plan`.
        """
        from qwenft.recipe import Recipe

        if "plan" in self.__dict__:
            return self.plan.recipe
        return Recipe.load(self.folder / "recipe.json", allow_modules=self.allow_modules)

    @property
    def steps(self) -> int:
        """How many were planned."""
        from qwenft.training.run_folder import RunFolder

        return RunFolder(self.folder).steps

    @property
    def environment(self) -> dict[str, Any]:
        """What it ran on, when it was begun or continued last: `versions`, `hardware`, `git`."""
        return dict(json.loads((self.folder / "environment.json").read_text("utf-8")))

    @property
    def notices(self) -> list[str]:
        """What the user was told on the way."""
        from qwenft.training.run_folder import RunFolder

        return [line["notice"] for line in RunFolder(self.folder).lines("notices.jsonl")]

    @cached_property
    def prepared(self) -> Prepared:
        """The trained model, its tokenizer and data; with ``keep_best``, as they were at the best step.

        A run of other processes is loaded from its checkpoint when this is first asked for.
        """
        from qwenft.training.run_folder import RunFolder
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
        from qwenft.training.run_folder import RunFolder

        return next(reversed(RunFolder(self.folder).checkpoints.values()), None)

    @property
    def held_out_losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every evaluation on held-out data."""
        return [(record["step"], record["held_out_loss"]) for record in self.history if "held_out_loss" in record]

    @property
    def best_step(self) -> int | None:
        """With ``keep_best`` the step of the lowest held-out loss, whose weights the run ends with."""
        from qwenft.training.loop import best_step

        return best_step(self.history) if self.recipe.training.keep_best else None

    @property
    def samples(self) -> list[dict[str, Any]]:
        """``step``, ``prompt`` and ``answer`` of every sample prompt at every evaluation."""
        from qwenft.training.run_folder import RunFolder

        return RunFolder(self.folder).lines("samples.jsonl")

    def evaluate(
        self, data: DataSpec | None = None, *, base: bool = False, adapter: str | None = None
    ) -> dict[str, float]:
        """How trained tokens of your own data, or of the held-out part, are predicted.

        Args:
            data: conversations; the held-out part where None.
            base: by the model without its adapter.
            adapter: with another one, that :meth:`load_adapter` named so.

        Returns:
            `loss` (nats a token), `perplexity`, `accuracy`, the share of tokens that are the likeliest, and
            `exact_match`, the share of conversations in which all of them are. Where only the last answer is
            trained, a model that generates greedily writes it so to the letter.

        Raises:
            DataError: there is nothing to evaluate on.
            SpecError: no such adapter, or the base was trained itself.
        """
        from qwenft.models.lora import active_adapter

        with active_adapter(self.prepared.model, adapter, base=base):
            return self.plan.evaluate(self.prepared, data)

    @overload
    def generate(self, messages: str | Messages, **options: Any) -> str: ...

    @overload
    def generate(self, messages: Sequence[str] | Sequence[Messages], **options: Any) -> list[str]: ...

    def generate(
        self,
        messages: str | Messages | Sequence[str] | Sequence[Messages],
        *,
        max_new_tokens: int = 256,
        batch_size: int = 8,
        base: bool = False,
        adapter: str | None = None,
        on_text: Callable[[str], Any] | None = None,
        **options: Any,
    ) -> str | list[str]:
        """The model's answer, or its answers.

        Args:
            messages: a conversation, with images and videos as in training, whose paths may be any, or the text of
                one user turn; or a list of such, which are answered in batches.
            max_new_tokens: of an answer, at the most.
            batch_size: how many of a list are answered at a time.
            base: let the model answer without its adapter.
            adapter: let it answer with another one, that :meth:`load_adapter` named so.
            on_text: called with the pieces of a single answer as they are written.
            **options: of transformers' ``generate``; greedy where none are given.

        Returns:
            A text; of a list, a text each.

        Raises:
            DataError: a message is none, or holds an image that cannot be seen.
            SpecError: no such adapter, or the base was trained itself.
        """
        from qwenft.models.generate import answers
        from qwenft.models.lora import active_adapter

        is_one = isinstance(messages, str) or (len(messages) > 0 and isinstance(messages[0], Mapping))
        conversations: Any = [messages] if is_one else messages
        if on_text is not None and not is_one:
            problem = f"generate(on_text=...): {len(conversations)} answers are written together"
            raise SpecError(problem, fix="one conversation at a time", got=len(conversations), expected=1)
        with active_adapter(self.prepared.model, adapter, base=base):
            texts = answers(
                self.prepared.model,
                self.plan.encoder,
                conversations,
                max_new_tokens,
                batch_size=batch_size,
                on_text=on_text,
                **options,
            )
        return texts[0] if is_one else texts

    def side_by_side(self, prompts: Sequence[str] | Sequence[Messages], **options: Any) -> Answers:
        """What the base answers, and what the model answers with its adapter.

        Args:
            prompts: conversations, or the texts of user turns.
            **options: of :meth:`generate`.

        Returns:
            A table of `prompt`, `base` and `adapter`, which is a sequence of such rows too.

        Raises:
            DataError, SpecError: as of :meth:`generate`.
        """
        from qwenft.reports.answers import Answers

        return Answers.of(prompts, self.generate(prompts, base=True, **options), self.generate(prompts, **options))

    def chat(self, *, system: str | None = None, **options: Any) -> Messages:
        """Talk with the model, in a terminal or in a cell; an empty line, Ctrl-C or Ctrl-D ends it.

        Args:
            system: what the model is told before.
            **options: of :meth:`generate`.

        Returns:
            What was said, as messages.

        Raises:
            DataError, SpecError: as of :meth:`generate`.
        """
        from qwenft.reports.answers import converse

        return converse(self, system, options)

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
        place = Place(repo_id, revision, picture)
        return render_card(self, place, adapter=adapter, environment=self.environment, terms=terms_of(self._base))

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

    def plot(self, *panels: str) -> Any:
        """What happened over the steps, as a matplotlib figure.

        Args:
            panels: one below the other: "loss" (as it is, smoothed, and held out), which is drawn where none is
                named, "gradient", "rate", "throughput" or "experts".

        Raises:
            SpecError: no such panel, or no experts.
        """
        from qwenft.reports.plots import RUN, plot

        return plot(self, panels or ("loss",), RUN)

    def compare(self, *others: Run | str | os.PathLike[str]) -> Any:
        """The losses of this run and others, smoothed, and their held-out losses, as a matplotlib figure.

        Args:
            others: runs, or their folders.

        Raises:
            CheckpointError: a folder holds no run.
        """
        from qwenft.reports.plots import plot_runs

        runs = [self, *(other if isinstance(other, Run) else open_run(other) for other in others)]
        names = [run.folder.name for run in runs]
        # Folders of one name are told by where they lie.
        return plot_runs(
            {
                name if names.count(name) == 1 else str(run.folder): run
                for name, run in zip(names, runs, strict=True)
            }
        )

    def __repr__(self) -> str:
        from qwenft.reports.text import render_run

        return render_run(self)

    def _repr_html_(self) -> str:
        from qwenft.reports.html import render_run

        return render_run(self)

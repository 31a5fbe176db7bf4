"""A compiled recipe: what will run, checked, and the running of it."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from qwenft.errors import CheckpointError, DataError, PlanError, SpecError, nearest
from qwenft.family.inventory import role_of
from qwenft.forecast import Forecast
from qwenft.models.adapter import TENSORS, Adapter
from qwenft.models.checkpoint import checkpoint_folder
from qwenft.plan.coverage import Coverage, coverage
from qwenft.plan.findings import LEVELS, Finding, Findings, error
from qwenft.plan.records import DataReport, StateBytes, state_bytes
from qwenft.plan.rules.run import unsaved
from qwenft.plan.storage import Storage, StorageRow, storage_rows
from qwenft.specs.base import checked
from qwenft.specs.codec import Codec
from qwenft.specs.parallel import ParallelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qwenft.comparison import Verification
    from qwenft.data.stream import Stream
    from qwenft.machine import Machine
    from qwenft.plan.draft import Draft
    from qwenft.plan.memory import MemoryReport
    from qwenft.plan.time import TimeReport
    from qwenft.recipe import Recipe
    from qwenft.run import Run
    from qwenft.specs.data import DataSpec
    from qwenft.specs.model import ModelSpec
    from qwenft.trackers import Tracker
    from qwenft.training.engine import Prepared
    from qwenft.training.ranks import Ranks


@attrs.define(eq=False, repr=False, slots=False)
class TrainingPlan:
    """What a recipe comes to on a machine.

    Args:
        recipe: what was asked.
        draft: what it was resolved to.
        found: all that the rules found: errors first, then what blocks it here, then what is worth knowing.
    """

    #: Arguments of other trainers, and of earlier versions, each refused with what stands for it.
    RENAMED: ClassVar[dict[str, str]] = {
        "progress": "verbose=0",
        "output_dir": 'run_dir="runs/first"',
        "resume_from_checkpoint": 'resume="must"',
        "report_to": 'trackers=["wandb"]',
        "callbacks": "on_step=function",
        "nproc_per_node": "processes=8",
    }

    recipe: Recipe
    draft: Draft
    found: tuple[Finding, ...]

    @property
    def findings(self) -> Findings:
        """All that was found: errors first, then what blocks it here, then what is worth knowing.

        Where :attr:`memory` is known and the plan does not fit, what would help is tried at first use.
        """
        if not self.forecast.memory_is_known or self.fits:
            return Findings(self.found)
        return Findings(
            sorted((self.forecast.too_large, *self.found), key=lambda finding: LEVELS.index(finding.level))
        )

    @property
    def architecture(self) -> Any:
        """The part of the checkpoint's architecture that is loaded."""
        return self.draft.architecture

    @property
    def machine(self) -> Machine:
        """What the plan is for."""
        return self.draft.machine

    @property
    def coverage(self) -> Coverage:
        """What is trained of each role."""
        return coverage(self.draft.architecture, self.draft.trained)

    @property
    def trained_parameters(self) -> int:
        """How many parameters are trained."""
        return sum(entry.parameters for entry in self.draft.trained)

    @property
    def state(self) -> StateBytes:
        """The bytes of weights, gradients and optimizer, in each process."""
        return self.draft.state

    @property
    def checkpoint_bytes(self) -> int:
        """What a checkpoint of a run takes, whatever its processes share: trained parameters and their moments."""
        draft = self.draft
        whole = state_bytes(draft.architecture, draft.trained, draft.training, draft.storage)
        return whole.trained + whole.optimizer

    @property
    def storage(self) -> tuple[StorageRow, ...]:
        """How the weights of each role are held, and the bytes that takes; those that are trained included."""
        masters = tuple(entry.weight for entry in self.draft.trained if entry.how == "itself")
        asked = self.recipe.training.master_weights
        return storage_rows(self.draft.architecture, self.draft.storage, masters if asked else ())

    @property
    def fingerprint(self) -> str:
        """sha256 of the recipe, the architecture and what was chosen: equal plans run alike."""
        chosen = [repr(slot.backend) for slot in self.draft.slots]
        resolved = [self.recipe.fingerprint, attrs.asdict(self.draft.checkpoint), chosen, self.draft.compute_dtype]
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()

    @cached_property
    def data(self) -> DataReport:
        """The data counted; tokenises all of it at first use.

        Raises:
            DataError: a row is wrong, or no token is trained.
            PlanError: there are no data, or no tokenizer.
        """
        report: DataReport = self._corpus.report
        return report

    @property
    def stream(self) -> Stream:
        """The data as they are trained on."""
        stream: Stream = self._corpus.train
        return stream

    @property
    def has_met_ranks(self) -> bool:
        """Whether this process has met the others of the run."""
        return "ranks" in self.__dict__

    @property
    def data_is_known(self) -> bool:
        """Whether the data have been counted already."""
        return "_corpus" in self.__dict__

    @cached_property
    def forecast(self) -> Forecast:
        """What a step takes, simulated at first use; where that is known of it, and what of it is assumed."""
        return Forecast(self)

    @property
    def memory(self) -> MemoryReport:
        """The most that a step holds at once; simulates the largest micro-batch at first use, in seconds.

        It is that of the data where they have been counted (:attr:`data`), and else a full row of one document of
        which every token is trained: of ``max_length`` tokens, or of 2,048 where the recipe has no data.

        Raises:
            PlanError: the recipe has something that is not simulated.
        """
        return self.forecast.memory

    def memory_of(
        self, lengths: Sequence[int], *, supervised: int | None = None, accumulates: bool = False
    ) -> MemoryReport:
        """The most that a step on some micro-batch holds at once.

        Args:
            lengths: tokens of its documents.
            supervised: how many of them are trained; all where None.
            accumulates: other micro-batches of its step were before it.

        Raises:
            PlanError: the recipe has something that is not simulated.
        """
        trained = sum(lengths) if supervised is None else supervised
        return self.forecast.of_row(lengths, trained, accumulates=accumulates).memory

    @property
    def time(self) -> TimeReport:
        """How long a step takes: on another machine the least that it can take, by a roofline.

        On this machine that is multiplied by how much slower a short step is, measured at first use, in seconds.

        Raises:
            PlanError: the recipe has something that is not simulated, or nothing is known of the machine's rates.
        """
        return self.forecast.time

    @property
    def fits(self) -> bool:
        """Whether the machine has the memory that a step needs: :attr:`memory`, with what is assumed beside it."""
        return self.forecast.fits

    def plot(self, *panels: str) -> Any:
        """What is planned, as a matplotlib figure.

        Args:
            panels: one below the other: "memory" (of a process at the peak, by component; where none is named),
                "lengths" (of the source's rows) or "fill" (of the stream's rows by their documents).

        Raises:
            SpecError: no such panel.
            PlanError: what is drawn is not known here; see :attr:`memory`.
        """
        from qwenft.reports.plots import PLAN, plot

        return plot(self, panels or ("memory",), PLAN)

    def explain(self) -> str:
        """The plan as text."""
        from qwenft.reports.text import render_plan

        return render_plan(self)

    def verify(self) -> Verification:
        """Prove the backends on this machine: one layer of each kind, forward and gradients, packed and alone.

        Every run begins with it; it takes seconds, reads no weight, and is measured once for a plan.

        Raises:
            PlanError: the plan is for another machine, or a backend cannot run here.
            LeakError: a document reached another one (`.half` is "attention", "conv" or "scan").
            ConformanceError: nothing leaked, and outputs or gradients are wrong.
        """
        return self._verification

    def prepare(self) -> Prepared:
        """The model, bound and adapted, with its data and optimizer.

        Raises:
            PlanError: something blocks the run here.
            DataError: the data are wrong; no weight has been read then.
            LeakError, ConformanceError: see :meth:`verify`; no weight has been read then either.
            CheckpointError: the weights cannot be loaded.
        """
        from qwenft.models.lora import base_name
        from qwenft.training.engine import Prepared
        from qwenft.training.prepare import prepare_model

        corpus = self._corpus
        self.verify()
        model = prepare_model(
            self._folder,
            self.draft.architecture,
            adapter=self.draft.adapter,
            trained=self.draft.trained,
            begun=None if self.recipe.adapter.path is None else Adapter.of_folder(Path(self.recipe.adapter.path)),
            training=self.recipe.training,
            backends=self.draft.backends,
            storage=self.draft.storage,
            compute_dtype=self.draft.compute_dtype,
            device=self.machine.device,
            source=self.recipe.model.source,
            parallel=self.recipe.parallel,
            ranks=self.ranks,
        )
        return Prepared(
            model,
            self._tokenizer,
            corpus,
            self.recipe.training,
            device=self.machine.device,
            role_of=lambda name: role_of(self.draft.architecture, base_name(name)),
            mtp_weight=self.recipe.adapter.mtp_weight,
            identity=self.identity,
            ranks=self.ranks,
        )

    @cached_property
    def ranks(self) -> Ranks:
        """The processes of the run, met at first use.

        Raises:
            RankError: they cannot be reached, or run other versions of libraries.
        """
        from qwenft.training.ranks import Ranks

        return Ranks() if self.draft.ranks == 1 else Ranks.join(device=self.machine.device)

    def train(
        self,
        run_dir: str | os.PathLike[str],
        resume: str = "auto",
        *,
        accept: Sequence[str] = (),
        verbose: int = 2,
        trackers: Sequence[str | Tracker] = (),
        on_step: Callable[[dict[str, Any]], Any] | None = None,
        on_evaluate: Callable[[dict[str, Any]], Any] | None = None,
        on_save: Callable[[Path], Any] | None = None,
        on_end: Callable[[Run], Any] | None = None,
    ) -> Run:
        """Train, and leave everything in a folder; a run that was stopped there is continued, to the bit.

        Ctrl-C, a notebook's interrupt and SIGTERM end it after the step that it is at, with a checkpoint; a second
        one ends it at once.

        Args:
            run_dir: a new or empty folder, or that of a run of the same recipe, weights and data.
            resume: "auto" continues what is there, "must" refuses to begin anew, "never" to continue.
            accept: what may differ from the run that is continued, by its place, such as
                ``"recipe.training.learning_rate"``, ``"recipe.data"`` or ``"data"``: the rest of the run is then
                trained with what is new. Anything else that differs is refused, and so is another optimizer.
            verbose: 0 shows notices alone, 1 a line of progress, 2 in a notebook a view with curves, memory and
                answers, and elsewhere each evaluation above the line.
            trackers: beside TensorBoard's files in the folder: "wandb", "mlflow", "trackio", objects of
                ``qwenft.trackers`` with options, or of your own subclass of ``qf.Tracker``.
            on_step: called with the record of each step, as in ``metrics.jsonl``.
            on_evaluate: called with the record of each evaluation, and its answers under "samples".
            on_save: called with the folder of each checkpoint.
            on_end: called with the run.

        Returns:
            The run; its ``.ending`` says how it ended.

        Raises:
            PlanError: something blocks the run here.
            BackendUnavailable: a tracker is not installed.
            DataError: the data are wrong.
            LeakError, ConformanceError: see :meth:`verify`.
            CheckpointError: the folder holds something else, another process trains there, no checkpoint is whole,
                or something cannot be written; checkpoints that were there are whole.
            NonFiniteError: a loss or gradient is not finite.
            OutOfMemoryError: a step found too little memory.
        """
        from qwenft.execution import train

        return train(
            self,
            Path(run_dir),
            resume=resume,
            accept=accept,
            verbose=verbose,
            trackers=trackers,
            on_step=on_step,
            on_evaluate=on_evaluate,
            on_save=on_save,
            on_end=on_end,
        )

    def launch(
        self,
        run_dir: str | os.PathLike[str],
        processes: int | None = None,
        *,
        resume: str = "auto",
        accept: Sequence[str] = (),
        max_restarts: int = 0,
        verbose: int = 2,
        trackers: Sequence[str] = (),
    ) -> Run:
        """Train in several processes on this machine; a notebook needs nothing else.

        They are what ``torchrun -m qwenft train`` starts, which for several machines has options of its own. Where
        one of them fails, all are ended.

        Args:
            run_dir: as for :meth:`train`.
            processes: how many; one for each GPU where None.
            resume: as for :meth:`train`.
            accept: as for :meth:`train`.
            max_restarts: how often all are started again after a failure; they go on from the last checkpoint.
            verbose: as for :meth:`train`.
            trackers: as for :meth:`train`, by name.

        Returns:
            The run; its model is loaded into this process when it is first asked for something.

        Raises:
            PlanError: something blocks the run here, or the recipe shares nothing out.
            SpecError: the recipe holds a backend or a loss that other processes could not find.
            DataError: the data are wrong.
            RankError: a process failed; its traceback is in `.traceback`.
        """
        from qwenft.execution import launch

        return launch(
            self,
            Path(run_dir),
            processes=processes or max(1, self.machine.accelerators),
            resume=resume,
            accept=accept,
            max_restarts=max_restarts,
            verbose=verbose,
            trackers=trackers,
        )

    def evaluate(self, prepared: Prepared, data: DataSpec | None = None) -> dict[str, float]:
        """How a prepared model predicts; see :meth:`qwenft.run.Run.evaluate`."""
        from qwenft.data.corpus import read_corpus

        stream: Stream | None = prepared.corpus.held_out
        if data is not None:
            whole = attrs.evolve(data, held_out=None)
            stream = read_corpus(whole, self.recipe.training, self.encoder).train
        if stream is None:
            raise DataError("there is no held-out data", fix="run.evaluate(DataSpec.messages(...))", row=None)
        found = prepared.evaluate(stream)
        return {
            "loss": found.loss,
            "perplexity": found.perplexity,
            "accuracy": found.accuracy,
            "exact_match": found.exact_match,
        }

    def export(self, prepared: Prepared, path: Path, base: str = "checkpoint") -> Path:
        """Write the merged checkpoint; see :meth:`qwenft.run.Run.export`."""
        from qwenft.merging import write_export
        from qwenft.models.export import dequantized, updates
        from qwenft.models.lora import stored_adapter
        from qwenft.models.probe import probe_ids
        from qwenft.training.saving import trained_weights

        model = prepared.model
        checkpoint, storage, bases = self.draft.checkpoint, self.draft.storage, ("checkpoint", "dequantized")
        if base not in bases:
            problem = f"export(base={base!r}): expected one of {', '.join(bases)}{nearest(base, bases)}"
            raise SpecError(problem, fix='base="checkpoint"', got=base, expected=bases)
        if storage.stored and base == "checkpoint":
            raise CheckpointError(
                f"{self._folder} is quantized itself: it holds no weights of 16 bits to merge into",
                fix='export(path, base="dequantized"), or a run from the checkpoint that it was made of',
                path=path,
            )
        if base == "dequantized" and self.ranks.count > 1 and self.recipe.parallel.kind == "fsdp2":
            raise CheckpointError(
                f"the quantized weights of {self._folder} are shared out over {self.ranks.count} processes",
                fix="the same in one process, of the finished run",
                path=path,
            )
        adapter = None if self.draft.adapter.kind == "full" else stored_adapter(model)
        # All processes have to take part in these, and one in what follows.
        logits = prepared.logits_of(probe_ids(checkpoint.text_only(), adapter))
        # Frozen weights that the run rounded are in the export as they were.
        exact = self.recipe.model.dtype == "float32" and all(slot.backend.exact for slot in self.draft.slots)
        with ExitStack() as stack:
            if adapter is None:
                learned = stack.enter_context(trained_weights(prepared, path))
            else:
                learned = updates(adapter, checkpoint)
            self.ranks.by_first(
                lambda: write_export(
                    learned,
                    self._folder,
                    path,
                    checkpoint,
                    adapter=adapter,
                    computed=dequantized(model) if base == "dequantized" else {},
                    run=logits,
                    exact=exact and self.draft.compute_dtype == "float32",
                )
            )
        return path

    def save_quantized(self, path: str | os.PathLike[str]) -> ModelSpec:
        """Write the whole checkpoint with its weights quantized: runs start from it without the original.

        Weights are quantized one by one; what is not quantized is copied, a tower and ``mtp.*`` too.

        Args:
            path: a new or empty folder; it is there whole, or not at all.

        Returns:
            The spec of the copy.

        Raises:
            PlanError: the recipe quantizes nothing, or its checkpoint is quantized already.
            CheckpointError: the checkpoint cannot be read, or the folder not be written.
        """
        from qwenft.models.quantize import write_quantized
        from qwenft.training.folder import new_folder

        model, held = self.recipe.model, self.draft.storage
        if held.kind is None or held.stored:
            problem = "the checkpoint is quantized already" if held.stored else "nothing is quantized"
            raise PlanError([error("model.quantize", problem, 'recipe.with_model(model.quantize("nf4"))')])
        with new_folder(Path(path)) as folder:
            checkpoint = self.draft.checkpoint
            write_quantized(checkpoint_folder(model), folder, checkpoint, Storage.of(model, checkpoint))
        return attrs.evolve(model, source=os.fspath(path), revision=None, quantization=None)

    def summary(self) -> dict[str, Any]:
        """The plan as a JSON value."""
        return {
            "fingerprint": self.fingerprint,
            "machine": attrs.asdict(self.machine),
            "model": self.draft.checkpoint.name,
            "compute_dtype": self.draft.compute_dtype,
            "attention": {slot.name: slot.backend.name for slot in self.draft.slots},
            "verified": repr(self._verification).splitlines() if self.is_verified else None,
            "coverage": [attrs.asdict(row) for row in self.coverage],
            "trained_parameters": self.trained_parameters,
            "state_bytes": attrs.asdict(self.state),
            "memory": attrs.asdict(self.memory) if self.forecast.memory_is_known else None,
            "time": attrs.asdict(self.time) if self.forecast.time_is_known else None,
            "storage": [attrs.asdict(row) for row in self.storage],
            "data": attrs.asdict(self.data) if self.data_is_known else None,
            "identity": self.identity if self.data_is_known else None,
            "findings": [attrs.asdict(finding) for finding in self.findings],
        }

    def __repr__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        from qwenft.reports.html import render_plan

        return render_plan(self)

    def leave_results(self, prepared: Prepared, folder: Path) -> None:
        """Write what was learned into a run's folder, where it is not yet: the adapter, or the whole model."""
        is_full = self.recipe.adapter.kind == "full"
        place = folder / ("model" if is_full else "adapter")
        if not self.ranks.by_first(place.exists):
            self.export(prepared, place) if is_full else self.save_adapter(prepared.model, place)

    def save_adapter(self, model: Any, path: Path, *, text_only_names: bool = False) -> Path:
        """Write a model's adapter; see :meth:`qwenft.run.Run.save_adapter`."""
        from qwenft.models.lora import adapter_of, write_adapter
        from qwenft.training.folder import new_folder

        self._require_adapter()
        if text_only_names and any(entry.weight.half == "vision" for entry in self.draft.trained):
            raise SpecError(
                "the adapter reaches the vision tower, which has no names in the text half's class",
                fix="save_adapter(path)",
                got=text_only_names,
            )
        text_only_names = text_only_names or self.draft.checkpoint.is_text_only
        config, tensors = adapter_of(model, text_only_names=text_only_names)

        def write() -> None:
            with new_folder(path) as folder:
                write_adapter(config, tensors, folder)

        self.ranks.by_first(write)
        return path

    def load_adapter(self, model: Any, path: Path, name: str) -> None:
        """Put a further adapter beside a model's own; see :meth:`qwenft.run.Run.load_adapter`."""
        from qwenft.models.lora import load_adapter, lora_config

        self._require_adapter()
        adapter, loaded = Adapter.of_folder(path), self.draft.architecture
        trained = adapter.trained_weights(loaded)
        config = lora_config(loaded, adapter.spec, trained, self.recipe.model.source)
        load_adapter(model, name, config, adapter, loaded)

    def _require_adapter(self) -> None:
        if self.recipe.adapter.kind == "full":
            raise SpecError(
                "full fine-tuning trains the weights themselves: there is no adapter",
                fix="run.export(path), or AdapterSpec.lora()",
                got="full",
            )

    @property
    def is_verified(self) -> bool:
        """Whether the backends have been proven already."""
        return "_verification" in self.__dict__

    @cached_property
    def _verification(self) -> Verification:
        from qwenft.models.verify import verify

        hindrances = [
            f for f in self.findings if f.level != "note" and f.place.startswith(("attention", "machine"))
        ]
        if hindrances:
            raise PlanError(hindrances, subject="before this can be verified")
        return verify(
            self.draft.architecture,
            **self.draft.backends,
            device=self.machine.device,
            dtype=self.draft.compute_dtype,
        )

    def require_runnable(self) -> None:
        """Raise PlanError with all that blocks the run here."""
        hindrances = [finding for finding in self.found if finding.level != "note"]
        if hindrances:
            raise PlanError(hindrances, subject="before this can run")

    def for_processes(self, count: int) -> TrainingPlan:
        """The same recipe planned for so many processes on this machine; for one, nothing of it is shared out."""
        from qwenft.compilation import compile_recipe

        recipe = self.recipe if count > 1 else self.recipe.with_parallel(ParallelSpec.single())
        return compile_recipe(recipe, None, strict=True, ranks=count)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules outside the package that the recipe names classes or functions of."""
        named = [type(slot.backend) for slot in self.draft.slots]
        loss = self.recipe.training.loss
        found = {one.__module__ for one in (*named, *(() if isinstance(loss, str) else (loss,)))}
        return tuple(sorted(module for module in found if not module.startswith("qwenft.")))

    @property
    def is_saved_whole(self) -> bool:
        """Whether a saved recipe can be loaded again: nothing in it is defined where it could not be found."""
        return not any(True for _ in unsaved(self.draft))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """JSON values of all that a run's result depends on: the recipe, the base's weights, the tokenised data.

        When it is saved, what is done where something fails, and what processes share, is not among them.
        """
        from qwenft.models.checkpoint import file_digest, weight_digests

        recipe = Codec(folder=None).dump(self.recipe)
        for name in ("save_every", "keep_checkpoints", "failed_save", "non_finite", "max_skipped"):
            del recipe["training"][name]
        del recipe["parallel"], recipe["notes"]
        values = {"recipe": recipe, "weights": weight_digests(self._folder), "data": self._corpus.digests}
        if self.recipe.adapter.path is not None:
            values["adapter"] = {TENSORS: file_digest(Path(self.recipe.adapter.path) / TENSORS)}
        return dict(json.loads(json.dumps(values)))

    @cached_property
    def _folder(self) -> Path:
        self.require_runnable()
        return checkpoint_folder(self.recipe.model)

    @cached_property
    def _tokenizer(self) -> Any:
        from qwenft.models.load import load_tokenizer

        return load_tokenizer(self._folder)

    @cached_property
    def encoder(self) -> Any:
        """What makes documents of conversations, with the images that the model sees."""
        from qwenft.data.chat import ChatEncoder
        from qwenft.data.media import load_media_encoder

        media = load_media_encoder(self._folder, self.draft.architecture, self._tokenizer)
        return ChatEncoder(self._tokenizer, media)

    @cached_property
    def _corpus(self) -> Any:
        from qwenft.data.corpus import read_corpus

        self.require_runnable()
        data, ranks = self.recipe.data, self.ranks
        assert data is not None
        return ranks.first_then_others(
            lambda: read_corpus(data, self.recipe.training, self.encoder, rank=ranks.rank, ranks=self.draft.ranks)
        )


for _method in ("train", "launch"):
    setattr(TrainingPlan, _method, checked(getattr(TrainingPlan, _method), f"plan.{_method}", TrainingPlan))

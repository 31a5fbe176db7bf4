"""A recipe: what is trained, on what, and how."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.capabilities import Backend
from qwenft.errors import CheckpointError, SpecError
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.base import Check, kind_of, spec
from qwenft.specs.codec import Codec, cannot_be_saved, write_atomically
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.parallel import ParallelSpec
from qwenft.specs.training import TrainingSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from qwenft.machine import Machine
    from qwenft.training_plan import TrainingPlan


_SAVED = "Recipe.load of a file by recipe.save"


@spec
@attrs.frozen
class Recipe:
    """The six specs of a run.

    Args:
        model: the checkpoint.
        data: the conversations; a recipe without them can be planned and not trained.
        adapter: what is trained.
        attention: the backends.
        training: the loop.
        parallel: the processes.
        notes: what is worth knowing of how the recipe came about, which its plans show; two recipes that differ in
            nothing else are equal.

    Examples:
        >>> recipe = Recipe(ModelSpec("qwen3.5-27b"))
        >>> recipe.with_training(learning_rate=1e-4).training.learning_rate
        0.0001
    """

    model: ModelSpec = attrs.field(validator=kind_of(ModelSpec, 'Recipe(model=ModelSpec("Qwen/Qwen3.5-4B"))'))
    data: DataSpec | None = attrs.field(
        default=None,
        validator=Check(
            lambda value: value is None or isinstance(value, DataSpec),
            "a DataSpec or None",
            'Recipe(..., data=DataSpec.messages("chats.jsonl"))',
        ),
    )
    adapter: AdapterSpec = attrs.field(
        factory=AdapterSpec.lora, validator=kind_of(AdapterSpec, "Recipe(..., adapter=AdapterSpec.lora())")
    )
    attention: AttentionSpec = attrs.field(
        factory=AttentionSpec, validator=kind_of(AttentionSpec, "Recipe(..., attention=AttentionSpec())")
    )
    training: TrainingSpec = attrs.field(
        factory=TrainingSpec, validator=kind_of(TrainingSpec, "Recipe(..., training=TrainingSpec())")
    )
    parallel: ParallelSpec = attrs.field(
        factory=ParallelSpec.single,
        validator=kind_of(ParallelSpec, "Recipe(..., parallel=ParallelSpec.single())"),
    )
    notes: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        eq=False,
        validator=Check(
            lambda value: isinstance(value, tuple) and all(isinstance(note, str) for note in value),
            "a tuple of texts",
            'Recipe(..., notes=("from config.yaml",))',
        ),
    )

    def with_model(self, model: ModelSpec | None = None, **changes: Any) -> Recipe:
        """The recipe with another model, or with changes of this one."""
        return self._with("model", model, changes)

    def with_data(self, data: DataSpec | None = None, **changes: Any) -> Recipe:
        """The recipe with other data, or with changes of these."""
        return self._with("data", data, changes)

    def with_adapter(self, adapter: AdapterSpec | None = None, **changes: Any) -> Recipe:
        """The recipe with another adapter, or with changes of this one."""
        return self._with("adapter", adapter, changes)

    def with_attention(self, attention: AttentionSpec | None = None, **changes: Any) -> Recipe:
        """The recipe with other attention, or with changes of this."""
        return self._with("attention", attention, changes)

    def with_training(self, training: TrainingSpec | None = None, **changes: Any) -> Recipe:
        """The recipe with another loop, or with changes of this one."""
        return self._with("training", training, changes)

    def with_parallel(self, parallel: ParallelSpec | None = None, **changes: Any) -> Recipe:
        """The recipe with other processes, or with changes of these."""
        return self._with("parallel", parallel, changes)

    def compile(self, machine: Machine | None = None, *, strict: bool = True) -> TrainingPlan:
        """Check everything that can be checked without weights, and plan the run.

        Args:
            machine: what the plan is for; this machine where None.
            strict: raise where there are errors; else the plan holds them.

        Raises:
            PlanError: with all that is wrong.
            CheckpointError: the model cannot be found, or is of another family.
        """
        from qwenft.compilation import compile_recipe

        return compile_recipe(self, machine, strict=strict)

    def fit(self, machine: Machine | None = None) -> Recipe:
        """The fastest recipe like this one that fits a machine; its ``notes`` say what was changed, with bytes.

        Levers are tried in simulation, which takes a minute for a large model: those that leave results as they
        are (checkpointing, offloading, embeddings on the host, more processes) before those that do not (moments
        in 8 bits, the update in backward, 4 bits, shorter rows). A recipe without data is taken to have rows of
        2,048 tokens.

        Args:
            machine: what it is to fit; this machine where None.

        Raises:
            PlanError: nothing makes it fit, and by how much; or it has errors, or something not simulated.
        """
        from qwenft.fit import fit

        return fit(self, machine)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe as JSON; rows in memory go beside it as ``data-<hash>.jsonl``.

        Raises:
            SpecError: it holds a backend or a loss that a saved recipe could not find again.
            CheckpointError: the place cannot be written.
        """
        path = Path(path)
        for value in (self.attention.full, self.attention.linear, self.attention.vision, self.training.loss):
            problem = cannot_be_saved(value) if isinstance(value, Backend | FunctionType) else None
            if problem is not None:
                raise problem  # before anything is written
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = Codec(path.parent).dump(self)
            write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror}", path=path) from None
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_modules: Sequence[str] = ()) -> Recipe:
        """Read a saved recipe; it equals the one that was saved.

        Args:
            path: of the JSON file.
            allow_modules: modules outside the package whose backends and losses may be loaded.

        Raises:
            SpecError: a field is unknown or ill-typed, or a backend's module is not allowed.
            CheckpointError: the file cannot be read.
        """
        path = Path(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}", path=path) from None
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{path}: is no JSON: {error}", fix=_SAVED) from None
        try:
            return Codec(path.parent, allow_modules).load(value, cls)
        except SpecError as error:
            problem = f"{path}: {error.problem}"
            raise SpecError(problem, fix=error.fix or _SAVED, **error.values) from None

    @property
    def fingerprint(self) -> str:
        """sha256 of the recipe as JSON, rows in memory by their content: equal for equal recipes."""
        content = Codec(folder=None).dump(self)
        del content["notes"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _with(self, field: str, value: Any, changes: dict[str, Any]) -> Recipe:
        if value is not None and changes:
            raise SpecError(
                f"Recipe.with_{field}: expected a spec or changes, got both", fix=f"with_{field}(spec)"
            )
        if changes:
            current = getattr(self, field)
            if current is None:
                raise SpecError(f"Recipe.with_{field}: there is no {field} to change", fix=f"with_{field}(spec)")
            value = attrs.evolve(current, **changes)
        return attrs.evolve(self, **{field: value})

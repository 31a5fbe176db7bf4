"""A recipe resolved on a machine and checked: what a plan is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenft import backends
from qwenft.capabilities import AttentionProblem, LinearAttentionProblem
from qwenft.data.sources import check_head
from qwenft.errors import DataError, PlanError, SpecError
from qwenft.machine import Machine
from qwenft.models.adapter import Adapter
from qwenft.models.checkpoint import architecture_of, has_weights
from qwenft.models.weights import storage_of
from qwenft.plan.choice import Choice, choose
from qwenft.plan.coverage import trained_weights
from qwenft.plan.draft import Draft, Slot
from qwenft.plan.findings import LEVELS, Finding, error, note
from qwenft.plan.rules import check
from qwenft.specs.data import DataSpec
from qwenft.training_plan import TrainingPlan

if TYPE_CHECKING:
    from qwenft.recipe import Recipe


def compile_recipe(
    recipe: Recipe, machine: Machine | None, *, strict: bool, ranks: int | None = None
) -> TrainingPlan:
    """Check a recipe and plan it; see :meth:`qwenft.Recipe.compile`.

    ``ranks`` is the number of processes that are going to be started; where None, that of those that are.
    """
    here = Machine.detect()
    machine = machine or here
    checkpoint = architecture_of(recipe.model)
    loaded = checkpoint if recipe.model.vision and not checkpoint.is_text_only else checkpoint.text_only()
    if recipe.adapter.mtp_weight:
        loaded = loaded.with_mtp()
    native = recipe.model.dtype != "bfloat16" or machine.native_bfloat16
    compute_dtype = recipe.model.dtype if native else "float32"
    slots, problems = _slots(recipe, loaded, machine, compute_dtype)
    asked = recipe.adapter
    begun = None if asked.path is None else Adapter.of_folder(Path(asked.path))
    count = ranks or _ranks(recipe, machine, here=machine == here)
    draft = Draft(
        model=recipe.model,
        data=recipe.data,
        asked_adapter=asked,
        adapter=asked if begun is None else begun.spec,
        trained=trained_weights(loaded, asked) if begun is None else begun.trained_weights(loaded),
        attention=recipe.attention,
        training=recipe.training,
        parallel=recipe.parallel,
        ranks=count,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", count)) if machine == here else count,
        checkpoint=checkpoint,
        architecture=loaded,
        storage=storage_of(recipe.model, loaded),
        has_weights=has_weights(recipe.model),
        machine=machine,
        here=machine == here,
        compute_dtype=compute_dtype,
        slots=slots,
    )
    notes = [note("recipe", text) for text in recipe.notes]
    found = [*problems, *_data_problems(recipe.data), *check(draft), *notes]
    findings = tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))
    plan = TrainingPlan(recipe=recipe, draft=draft, found=findings)
    errors = [finding for finding in findings if finding.level == "error"]
    if strict and errors:
        raise PlanError(errors)
    return plan


def _ranks(recipe: Recipe, machine: Machine, *, here: bool) -> int:
    """The processes that a plan is for: those that were started, or one for each card of another machine."""
    if here:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return 1 if recipe.parallel.kind == "single" else max(1, machine.accelerators)


def _data_problems(data: DataSpec | None) -> list[Finding]:
    """What the first rows of each source show."""
    problems = []
    for place, spec in (("data", data), ("data.held_out", getattr(data, "held_out", None))):
        if isinstance(spec, DataSpec):
            try:
                check_head(spec)
            except DataError as problem:
                problems.append(error(f"{place}.source", problem.problem, problem.fix))
    return problems


def _slots(
    recipe: Recipe, loaded: Any, machine: Machine, compute_dtype: str
) -> tuple[tuple[Slot, ...], list[Finding]]:
    """The backend of each attention slot; a name that is unknown is a finding, and "auto" stands in for it."""
    longest = recipe.data.max_length if recipe.data is not None else loaded.context
    common: dict[str, Any] = {
        "device": machine.device,
        "dtype": compute_dtype,
        "max_length": longest,
        "compute_capability": machine.compute_capability,
    }
    problems: dict[str, AttentionProblem | LinearAttentionProblem] = {
        "full": AttentionProblem(
            query_heads=loaded.query_heads,
            key_value_heads=loaded.key_value_heads,
            head_dim=loaded.head_dim,
            **common,
        ),
        "linear": LinearAttentionProblem(
            key_heads=loaded.gdn_key_heads,
            value_heads=loaded.gdn_value_heads,
            key_dim=loaded.gdn_key_dim,
            value_dim=loaded.gdn_value_dim,
            **common,
        ),
    }
    if loaded.vision is not None:
        tower = loaded.vision
        problems["vision"] = AttentionProblem(
            query_heads=tower.heads,
            key_value_heads=tower.heads,
            head_dim=tower.hidden_size // tower.heads,
            # Patches of the learned grid; how large images really are is known when data hold some.
            **common | {"max_length": tower.position_embeddings},
        )
    packed = recipe.data is not None and recipe.data.packed
    slots, findings = [], []
    for name, problem in problems.items():
        asked = getattr(recipe.attention, name)
        choice: Choice[Any] = choose(
            backends.automatic(name), problem, machine, packed=packed, compute_dtype=compute_dtype
        )
        if asked != "auto":
            try:
                choice = Choice(backends.find(name, asked) if isinstance(asked, str) else asked, ())
            except SpecError as unknown:
                place = f"attention.{name}"
                findings.append(error(place, unknown.problem.removeprefix(f"{place}: "), unknown.fix))
        slots.append(Slot(name, choice, automatic=asked == "auto", problem=problem))
    return tuple(slots), findings

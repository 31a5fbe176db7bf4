"""What would make a recipe fit a machine, found by trying it in simulation."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.display import bytes_text
from qwenft.errors import PlanError
from qwenft.plan.findings import blocked
from qwenft.specs.parallel import ParallelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from qwenft.machine import Machine
    from qwenft.plan.findings import Finding
    from qwenft.recipe import Recipe
    from qwenft.training_plan import TrainingPlan

#: The shortest rows that are tried.
_SHORTEST = 256
#: How many combinations that should fit are simulated before it is given up.
_TRIED = 6


@attrs.frozen
class Lever:
    """A change of a recipe that may save memory, or time.

    Args:
        line: the change as one would write it.
        change: gives the changed recipe.
        slot: of those that share one, a recipe takes one at most.
        is_exact: results stay the same, but for the order of sums.
        saves: memory; else time, for memory.
    """

    line: str
    change: Callable[[Recipe], Recipe]
    slot: str
    is_exact: bool = True
    saves: bool = True


@attrs.frozen
class Remedy:
    """A lever that was tried alone.

    Args:
        lever: what was changed.
        saved: bytes of what a device needs; negative where it needs more.
        slower: the time of a step over that of the recipe as it is.
        fits: it alone is enough.
    """

    lever: Lever
    saved: int
    slower: float
    fits: bool

    def __str__(self) -> str:
        enough = ", which is enough" if self.fits else ""
        time = f"a token takes {self.slower:.2f} of the time"
        return f"{self.lever.line} saves {bytes_text(self.saved)}{enough}; {time}"


def levers(recipe: Recipe, machine: Machine) -> Iterator[Lever]:
    """Those that are left to a recipe on a machine."""
    yield from _exact(recipe, machine)
    yield from _inexact(recipe)


def _exact(recipe: Recipe, machine: Machine) -> Iterator[Lever]:
    """Those that leave results as they are, but for the order of sums."""
    training = recipe.training
    checkpointing = training.activation_checkpointing
    for every in (0, 2, 1):
        if checkpointing != every:
            saves = checkpointing == 0 or 0 < every < checkpointing
            yield _of_training("checkpointing", saves=saves, activation_checkpointing=every)
    if machine.device == "cuda":
        if not training.embeddings_on_host:
            yield _of_training("embeddings", embeddings_on_host=True)
        if not training.activation_offloading and training.activation_checkpointing:
            yield _of_training("offloading", activation_offloading=True)
    if machine.accelerators > 1 and recipe.parallel.kind != "fsdp2":
        yield Lever(
            "recipe.with_parallel(ParallelSpec.fsdp2())",
            lambda changed: changed.with_parallel(ParallelSpec.fsdp2()),
            slot="parallel",
        )


def _inexact(recipe: Recipe) -> Iterator[Lever]:
    """Those that change what is trained, or on what."""
    training, data, is_lora = recipe.training, recipe.data, recipe.adapter.kind == "lora"
    if training.optimizer in ("adamw", "paged_adamw"):
        yield _of_training("optimizer", is_exact=False, optimizer=f"{training.optimizer}_8bit")
    if not is_lora and not training.optimizer_in_backward and training.tokens_per_step is None:
        yield _of_training("update", is_exact=False, optimizer_in_backward=True, max_grad_norm=None)
    if is_lora and recipe.model.quantization is None:
        yield Lever(
            'recipe.with_model(model.quantize("nf4"))',
            lambda changed: changed.with_model(changed.model.quantize("nf4")),
            slot="model",
            is_exact=False,
        )
    if data is not None:
        yield from (_shorter(data.max_length // part) for part in (2, 4) if data.max_length // part >= _SHORTEST)


def _of_training(slot: str, *, is_exact: bool = True, saves: bool = True, **changes: Any) -> Lever:
    listed = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    return Lever(
        f"recipe.with_training({listed})",
        lambda recipe: recipe.with_training(**changes),
        slot,
        is_exact=is_exact,
        saves=saves,
    )


def _shorter(length: int) -> Lever:
    def change(recipe: Recipe) -> Recipe:
        assert recipe.data is not None
        rows = None if recipe.data.row_tokens is None else length
        return recipe.with_data(max_length=length, row_tokens=rows)

    return Lever(f"recipe.with_data(max_length={length})", change, "length", is_exact=False)


def too_large(plan: TrainingPlan) -> Finding:
    """That a plan does not fit, and what each lever alone would save, in the order of :func:`levers`.

    Raises:
        PlanError: the plan has something that is not simulated.
    """
    saving = [lever for lever in levers(plan.recipe, plan.machine) if lever.saves]
    return _too_large(plan, _tried(plan, saving))


def _too_large(plan: TrainingPlan, tried: Sequence[Remedy]) -> Finding:
    needed, limit = plan.memory.needed_bytes, plan.forecast.memory_limit
    helpful = [remedy for remedy in tried if remedy.saved > 0]
    best: dict[str, int] = {}
    for remedy in helpful:
        best[remedy.lever.slot] = max(best.get(remedy.lever.slot, 0), remedy.saved)
    least = needed - sum(best.values())
    problem = f"a step needs {bytes_text(needed)}, {plan.machine.name} has {bytes_text(limit)} a process"
    if least > limit:
        problem += f"; with all of what is known to help it would be {bytes_text(least - limit)} too large"
    return blocked(
        "memory", problem, "\n          ".join(map(str, helpful)) or "a larger machine, or a smaller model"
    )


def _tried(plan: TrainingPlan, wanted: Iterable[Lever]) -> list[Remedy]:
    """Each lever alone; those that the rules refuse are left out."""
    found = []
    for lever in wanted:
        changed = _compiled(lever.change(plan.recipe), plan.machine)
        if changed is not None:
            found.append(
                Remedy(
                    lever,
                    saved=plan.memory.needed_bytes - changed.memory.needed_bytes,
                    slower=_speed(plan) / _speed(changed),
                    fits=changed.fits,
                )
            )
    return found


def _speed(plan: TrainingPlan) -> float:
    """Tokens a second, as far as the machine is known."""
    return plan.forecast.roofline.tokens_per_second if plan.machine.bandwidth else 1.0


def _compiled(recipe: Recipe, machine: Machine) -> TrainingPlan | None:
    """The plan of a changed recipe, or None where the rules refuse the change."""
    plan = recipe.compile(machine, strict=False)
    return None if any(finding.level == "error" for finding in plan.findings) else plan


def fit(recipe: Recipe, machine: Machine | None) -> Recipe:
    """The fastest recipe that fits; see :meth:`qwenft.Recipe.fit`."""
    plan = recipe.compile(machine)
    tried = _tried(plan, levers(recipe, plan.machine))
    left = _TRIED
    for chosen in _combinations(tried, plan):
        changed = recipe
        for remedy in chosen:
            changed = remedy.lever.change(changed)
        trial = _compiled(changed, plan.machine) if chosen else plan
        if trial is None:
            continue
        if trial.fits:
            return attrs.evolve(changed, notes=(*recipe.notes, *_notes(chosen, plan, trial)))
        left -= 1
        if left == 0:
            break
    raise PlanError([_too_large(plan, tried)], subject="before this can fit")


def _combinations(tried: Sequence[Remedy], plan: TrainingPlan) -> list[tuple[Remedy, ...]]:
    """Sets of remedies that should fit if what each saves adds up: by what they change, and then by time."""
    short = plan.memory.needed_bytes - plan.forecast.memory_limit
    slots: dict[str, list[Remedy | None]] = {}
    for remedy in tried:
        slots.setdefault(remedy.lever.slot, [None]).append(remedy)
    found = []
    for picked in itertools.product(*slots.values()):
        chosen = tuple(remedy for remedy in picked if remedy is not None)
        if sum(remedy.saved for remedy in chosen) >= short:
            found.append(chosen)

    def cost(chosen: tuple[Remedy, ...]) -> tuple[int, float, int]:
        changes = sum(not remedy.lever.is_exact for remedy in chosen)
        return changes, math.prod(remedy.slower for remedy in chosen), len(chosen)

    return sorted(found, key=cost)


def _notes(chosen: Sequence[Remedy], plan: TrainingPlan, trial: TrainingPlan) -> Iterator[str]:
    machine = plan.machine.name
    before, after = (bytes_text(one.memory.needed_bytes) for one in (plan, trial))
    if not chosen:
        yield f"fits {machine} as it is: {before}"
        return
    yield f"made to fit {machine}: {before} became {after}"
    for remedy in chosen:
        exactly = "" if remedy.lever.is_exact else ", and changes results"
        verb = "saves" if remedy.saved >= 0 else "takes"
        yield f"{remedy.lever.line} {verb} {bytes_text(abs(remedy.saved))}{exactly}"

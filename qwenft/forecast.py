"""Memory and time of a plan's step, simulated when first asked for."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import attrs

from qwenft.errors import PlanError
from qwenft.plan.findings import blocked
from qwenft.plan.rules.memory import not_followed
from qwenft.plan.time import TimeReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenft.plan.findings import Finding
    from qwenft.plan.memory import MemoryReport
    from qwenft.training.simulate import Row, Simulated
    from qwenft.training_plan import TrainingPlan

#: Tokens of a row that is simulated where a recipe has no data.
FULL_ROW = 2048


class Forecast:
    """What a step of a plan takes.

    Args:
        plan: the plan.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        self.draft = plan.draft

    @property
    def memory(self) -> MemoryReport:
        """See :attr:`qwenft.TrainingPlan.memory`."""
        return max((step.memory for step in self._steps), key=lambda memory: memory.peak_bytes)

    @property
    def memory_is_known(self) -> bool:
        """Whether the largest step has been simulated already."""
        return "_steps" in self.__dict__

    @property
    def time(self) -> TimeReport:
        """See :attr:`qwenft.TrainingPlan.time`."""
        counted, slower = self.roofline, self._slower
        if slower is None:
            return counted
        return attrs.evolve(
            counted,
            step_seconds=slower * counted.step_seconds,
            update_seconds=slower * counted.update_seconds,
            slower=slower,
        )

    @property
    def time_is_known(self) -> bool:
        """Whether the time has been found already."""
        return self.memory_is_known and "_slower" in self.__dict__

    @property
    def roofline(self) -> TimeReport:
        """How long a step takes at least: counted as :attr:`memory` is, at the highest rates of the machine.

        Raises:
            PlanError: the recipe has something that is not simulated, or nothing is known of the machine's rates.
        """
        machine, training = self.draft.machine, self.draft.training
        if not machine.bandwidth:
            problem = f"how fast {machine.name} is is not known"
            fix = "attrs.evolve(machine, bandwidth=..., operations=(...), link=...)"
            raise PlanError([blocked("machine", problem, fix)])
        step = self._steps[0]
        row, ranks = step.memory.tokens, self.draft.ranks
        tokens = ranks * row if training.tokens_per_step is None else max(row, training.tokens_per_step)
        rows = tokens / ranks / row  # of each process, on average
        return TimeReport(
            step_seconds=rows * step.seconds + step.update_seconds,
            update_seconds=step.update_seconds,
            tokens=tokens,
            operations=rows * step.operations,
            moved=rows * step.moved,
            sent=rows * step.sent,
            steps=self.plan.data.steps if self.plan.data_is_known else None,
        )

    @cached_property
    def _slower(self) -> float | None:
        """How much slower a step is here than counted; None on another machine."""
        from qwenft.training.calibration import slower_than_counted

        hindrances = [f for f in self.plan.found if f.level == "blocked" and f.place.startswith("attention")]
        if not self.draft.here or hindrances:
            return None
        return slower_than_counted(self.draft, self.memory_limit)

    @property
    def fits(self) -> bool:
        """See :attr:`qwenft.TrainingPlan.fits`."""
        return self.memory.needed_bytes <= self.memory_limit

    @property
    def memory_limit(self) -> int:
        """Bytes that a process may use: of a GPU its memory, of a CPU its part of the host's."""
        return self.draft.machine.memory_bytes // (
            self.draft.local_ranks if self.draft.machine.device == "cpu" else 1
        )

    @cached_property
    def _steps(self) -> tuple[Simulated, ...]:
        """Simulated steps: on the longest row, and on others with more chunks or patches."""
        from qwenft.training.simulate import largest_rows

        data = self.draft.data
        if data is not None and self.plan.data_is_known and data.window is None:
            return tuple(map(self._simulated, largest_rows(self.plan.stream)))
        tokens = FULL_ROW if data is None else data.row_tokens or data.max_length
        several = (self.draft.training.tokens_per_step or 0) >= 2 * tokens * self.draft.ranks
        return (self.of_row([tokens], tokens, accumulates=several),)

    @cached_property
    def too_large(self) -> Finding:
        """That a plan does not fit, with what each lever would save, tried at first use."""
        from qwenft.fit import too_large

        return too_large(self.plan)

    def require_fit(self) -> None:
        """Raise PlanError where a step needs more memory than there is, with what would help.

        A plan that could not need half of it is not simulated for this.
        """
        if self._upper_bound() > self.memory_limit / 2 and not self.fits:
            raise PlanError([self.too_large], subject="before this can run")

    def _upper_bound(self) -> int:
        """Bytes that no step takes: 1 GiB, all state thrice, and of a layer a hundred activations a channel."""
        architecture, data = self.draft.architecture, self.draft.data
        tokens = FULL_ROW if data is None else data.row_tokens or data.max_length
        channels = architecture.layers * (100 * architecture.hidden_size + architecture.query_heads * tokens)
        if architecture.vision is not None:  # of several patches a token
            tower = architecture.vision
            channels += 100 * tower.merge**2 * tower.depth * tower.hidden_size
        return 2**30 + 3 * self.draft.state.total + 4 * tokens * (channels + 2 * architecture.vocabulary)

    def of_row(self, lengths: Sequence[int], supervised: int, *, accumulates: bool) -> Simulated:
        """A step on a micro-batch of documents of these lengths."""
        from qwenft.training.simulate import Row

        return self._simulated(Row(tuple(lengths), supervised, accumulates))

    def _simulated(self, row: Row) -> Simulated:
        from qwenft.training.simulate import NOT_FOLLOWED, simulate

        if self.draft.shards > 1 and self.plan.has_met_ranks:
            problem = "this process has met those that share the run, and a simulation has processes of its own"
            hindrance = blocked("parallel", problem, "plan.memory before plan.prepare()")
            raise PlanError([hindrance], subject="before this can be simulated")
        left_out = not_followed(self.draft)
        try:
            return simulate(self.draft, row, left_out)
        except NOT_FOLLOWED as problem:
            own = [
                slot.name for slot in self.draft.slots if not type(slot.backend).__module__.startswith("qwenft.")
            ]
            if own:  # what asks tensors for values has none here
                return simulate(self.draft, row, (*left_out, *own))
            hindrance = blocked("training.loss", f"it asks tensors for values: {problem}", 'loss="auto"')
            raise PlanError([hindrance], subject="before this can be simulated") from problem

"""What rules look at: a recipe with all that it was resolved to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from qwenft.plan.records import StateBytes, state_bytes

if TYPE_CHECKING:
    from qwenft.capabilities import Backend
    from qwenft.family.architectures import Architecture
    from qwenft.machine import Machine
    from qwenft.plan.choice import Choice
    from qwenft.plan.coverage import TrainedWeight
    from qwenft.plan.storage import Storage
    from qwenft.specs.adapter import AdapterSpec
    from qwenft.specs.attention import AttentionSpec
    from qwenft.specs.data import DataSpec
    from qwenft.specs.model import ModelSpec
    from qwenft.specs.parallel import ParallelSpec
    from qwenft.specs.training import TrainingSpec


@attrs.frozen
class Slot:
    """An attention slot of a draft.

    Args:
        name: "full", "linear", or "vision" where the tower is loaded.
        choice: the backend, and what "auto" passed over.
        automatic: "auto" chose it.
        problem: what the layers ask of it.
    """

    name: str
    choice: Choice[Any]
    automatic: bool
    problem: Any

    @property
    def backend(self) -> Backend:
        """The backend of the slot."""
        backend: Backend = self.choice.backend
        return backend


@attrs.frozen
class Draft:
    """A recipe with everything that a rule may look at.

    Args:
        model: what is asked of the checkpoint.
        data: the data, or None.
        asked_adapter: what is asked to be trained.
        adapter: the same, or of an adapter that is loaded what its files say.
        trained: what that comes to.
        attention: the backends that are asked for.
        training: the loop.
        parallel: the processes.
        ranks: how many of them the plan is for.
        local_ranks: those on one node.
        checkpoint: the architecture of the whole checkpoint.
        architecture: the part of it that is loaded.
        storage: how its weights are held.
        has_weights: the source names a folder or hub id, and not an architecture alone.
        machine: what the plan is for.
        here: the machine is this one.
        compute_dtype: in which the layers compute.
        slots: the attention slots.
    """

    model: ModelSpec
    data: DataSpec | None
    asked_adapter: AdapterSpec
    adapter: AdapterSpec
    trained: tuple[TrainedWeight, ...]
    attention: AttentionSpec
    training: TrainingSpec
    parallel: ParallelSpec
    ranks: int
    local_ranks: int
    checkpoint: Architecture
    architecture: Architecture
    storage: Storage
    has_weights: bool
    machine: Machine
    here: bool
    compute_dtype: str
    slots: tuple[Slot, ...]

    @property
    def shards(self) -> int:
        """The processes that each weight is shared out over."""
        if self.parallel.kind != "fsdp2":
            return 1
        return self.local_ranks if self.parallel.hybrid else self.ranks

    @property
    def state(self) -> StateBytes:
        """The bytes of weights, gradients and optimizer, in each process."""
        return self.state_of(self.architecture, self.trained)

    def state_of(self, architecture: Architecture, trained: tuple[TrainedWeight, ...]) -> StateBytes:
        """The same of a model of fewer layers."""
        return state_bytes(
            architecture,
            trained,
            self.training,
            self.storage,
            shards=self.shards,
            offloaded=self.is_offloaded,
        )

    @property
    def is_offloaded(self) -> bool:
        """What the processes share stays in host memory, and not where the model computes."""
        return self.parallel.offload is not None and self.shards > 1 and self.machine.device == "cuda"

    @property
    def backends(self) -> dict[str, Any]:
        """The backend of each slot."""
        return {slot.name: slot.backend for slot in self.slots}

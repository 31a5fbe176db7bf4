"""The processes of a run, and what they tell each other beside the model's own collectives."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from qwenft.errors import RankError
from qwenft.training.differences import differences
from qwenft.training.environment import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

#: How long a process waits for the others in a collective.
_PATIENCE = timedelta(minutes=30)


@attrs.frozen(eq=False)
class Ranks:
    """The processes of a run, seen from one of them; of one alone, every method answers for it.

    Args:
        rank: of this one.
        count: of all.
        local: of this one on its node.
        local_count: of those on its node.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    @classmethod
    def join(cls, *, device: str) -> Ranks:
        """Meet the others that torchrun, or a launcher like it, has started; their versions must be one's own.

        Args:
            device: "cpu", which speaks gloo, or "cuda", which speaks nccl too.

        Raises:
            RankError: the others cannot be reached, or run other versions of the libraries.
        """
        numbers = [int(os.environ.get(name, otherwise)) for name, otherwise in _VARIABLES.items()]
        ranks = cls(*numbers)
        if ranks.count == 1:
            return cls()
        if device == "cuda":
            torch.cuda.set_device(ranks.local)
        if not dist.is_initialized():
            try:
                store, *_ = next(rendezvous("env://", timeout=_PATIENCE))
                # torch 2.13 gives processes that are started again the store with the addresses of those before.
                attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                    timeout=_PATIENCE,
                    store=PrefixStore(f"attempt-{attempt}", store),
                    rank=ranks.rank,
                    world_size=ranks.count,
                )
            except (RuntimeError, ValueError) as error:
                place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
                raise RankError(
                    f"rank {ranks.rank} of {ranks.count} cannot meet the others at {place}: {error}",
                    fix="a port that is free (torchrun --master-port), or plan.launch(...), which finds one",
                    rank=ranks.rank,
                ) from error
        ranks.require_equal(versions(), "runs other versions of libraries")
        return ranks

    def leave(self) -> None:
        """End what :meth:`join` began."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def store(self) -> Any:
        """Torch's, through which they met, while they do; it is not kept, and ends with their group."""
        return _get_default_store() if self.count > 1 and dist.is_initialized() else None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each of them holds, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of some numbers, added up over all."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor, added up over all in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in all of them; where one fails, none goes on.

        Raises:
            RankError: it failed in another one; where it failed here, its own error.
        """
        if self.count == 1:
            return function()
        error: BaseException | None = None
        try:
            found = function()
        except Exception as caught:  # noqa: BLE001 - what failed here must be told to those who wait
            error = caught
        problems = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(rank, problem) for rank, problem in enumerate(problems) if problem is not None]
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RankError(f"rank {failed[0][0]}{more}: {failed[0][1]}", rank=failed[0][0])
        return found

    def by_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first of them; all get what it returns.

        Raises:
            RankError: it failed there.
        """
        held: list[Any] = [self.together(lambda: function() if self.is_first else None)]
        if self.count > 1:
            dist.broadcast_object_list(held)
        found: T = held[0]
        return found

    def first_then_others(self, function: Callable[[], T]) -> T:
        """Call a function in the first of them, and then, where it has left its files, in the others."""
        if self.is_first:
            found = self.together(function)
            self.together(lambda: None)
            return found
        self.together(lambda: None)
        return self.together(function)

    def require_equal(self, values: dict[str, Any], what: str) -> None:
        """Refuse to go on where not all hold the same.

        Args:
            values: JSON values.
            what: is wrong with one that holds others, for the message.

        Raises:
            RankError: such; it says what differs.
        """
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            if found := differences(first, other, names=("on rank 0", f"on rank {rank}")):
                raise RankError(f"rank {rank} {what}: {'; '.join(found)}", rank=rank, differences=found)


#: One process, which shares with nobody.
ALONE = Ranks()
_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

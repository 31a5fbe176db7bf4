"""How many processes a run uses, and what of the model each of them holds."""

from __future__ import annotations

from typing import ClassVar

import attrs

from qwenft.specs.base import Check, flag, one_of, spec

KINDS = ("single", "ddp", "fsdp2")


@spec
@attrs.frozen
class ParallelSpec:
    """What the processes of a run share; how many there are, who starts them says.

    ``plan.launch(run_dir, processes=4)`` starts them from a notebook, and from a shell
    ``torchrun --nproc-per-node 4 -m qwenft train``. Each reads rows of its own.

    Args:
        kind: "single"; "ddp", in which every process holds the whole model; "fsdp2", in which each holds a part of
            every weight, gradient and moment.
        offload: "cpu" keeps the parts in host memory between their uses.
        reshard_after_forward: a layer's weights are let go between forward and backward; False keeps them, and
            gathers them once a step instead of twice.
        hybrid: the model is shared out within each node, and repeated on every node.

    Examples:
        >>> ParallelSpec.fsdp2(offload="cpu").offload
        'cpu'
    """

    NOT_OFFERED: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("tensor_parallel", "tp"), "tensor parallelism"),
        **dict.fromkeys(("expert_parallel", "ep"), "expert parallelism"),
        **dict.fromkeys(("context_parallel", "cp"), "context parallelism"),
        **dict.fromkeys(("pipeline_parallel", "pp"), "pipeline parallelism"),
    }

    kind: str = attrs.field(default="single", validator=one_of(KINDS, "ParallelSpec.fsdp2()"))
    offload: str | None = attrs.field(
        default=None,
        kw_only=True,
        validator=Check(
            lambda value: value in (None, "cpu"), '"cpu" or None', 'ParallelSpec.fsdp2(offload="cpu")'
        ),
    )
    reshard_after_forward: bool = attrs.field(
        default=True, kw_only=True, validator=flag("ParallelSpec.fsdp2(reshard_after_forward=False)")
    )
    hybrid: bool = attrs.field(default=False, kw_only=True, validator=flag("ParallelSpec.fsdp2(hybrid=True)"))

    @classmethod
    def single(cls) -> ParallelSpec:
        """Train in this process alone."""
        return cls()

    @classmethod
    def ddp(cls) -> ParallelSpec:
        """Repeat the model in every process: for models that fit a device with gradients and moments."""
        return cls("ddp")

    @classmethod
    def fsdp2(
        cls,
        offload: str | None = None,
        reshard_after_forward: bool = True,
        *,
        hybrid: bool = False,
    ) -> ParallelSpec:
        """Share weights, gradients and moments out over the processes (PyTorch's ``fully_shard``).

        Tensor, expert, context and pipeline parallelism are not offered: every process computes whole layers on
        rows of its own.
        """
        return cls("fsdp2", offload=offload, reshard_after_forward=reshard_after_forward, hybrid=hybrid)

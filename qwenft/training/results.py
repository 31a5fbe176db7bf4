"""What a loss, a step and an evaluation come to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch


#: How a run can end, or that it goes on.
FINISHED, STOPPED_EARLY, INTERRUPTED, RUNNING = "finished", "stopped early", "interrupted", "running"


@attrs.frozen
class Ending:
    """How a run ended.

    Args:
        kind: FINISHED, STOPPED_EARLY or INTERRUPTED.
        signal: the name of the signal that interrupted it.
    """

    kind: str
    signal: str | None = None


@attrs.frozen(eq=False)
class Loss:
    """The loss of a micro-batch.

    Args:
        total: the weighted sum over its supervised tokens, a scalar with its graph.
        tokens: the sum of their weights.
        mtp: of the multi-token-prediction layer alone, before its weight and without its graph; ``total`` has it
            in it. None where that layer is not trained.
    """

    total: torch.Tensor
    tokens: float
    mtp: Loss | None = None


@attrs.frozen
class StepResult:
    """What a step did.

    Args:
        step: its number, from 1.
        loss: the mean over its supervised tokens, without that of the multi-token-prediction layer.
        tokens: supervised ones (the sum of their weights).
        stream_tokens: all of its tokens.
        grad_norm: of all gradients together, before clipping.
        learning_rate: that it used, where a role has none of its own.
        compile_seconds: that torch.compile took of it.
        expert_load: of a mixture of experts, how often the busiest expert of each layer was chosen, as a multiple
            of an even share.
        idle_experts: how many of each layer were not chosen.
        mtp_loss: of the multi-token-prediction layer, the mean over the tokens that it is trained on; None where
            there are none.
    """

    step: int
    loss: float
    tokens: float
    stream_tokens: int
    grad_norm: float
    learning_rate: float
    compile_seconds: float
    expert_load: tuple[float, ...] = ()
    idle_experts: tuple[int, ...] = ()
    mtp_loss: float | None = None


@attrs.frozen
class Evaluation:
    """How well supervised tokens are predicted, without label smoothing, z-loss, dropout or noise.

    Args:
        loss: the mean negative log-likelihood, in nats a token.
        accuracy: the share of tokens that are the likeliest, by their weights.
        exact_match: the share of documents all of whose supervised tokens are the likeliest. Where only the last
            answer is supervised, a model that generates greedily writes it so, its end included.
        tokens: the sum of their weights.
    """

    loss: float
    accuracy: float
    exact_match: float
    tokens: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

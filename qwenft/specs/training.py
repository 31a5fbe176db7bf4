"""How long, how fast and with what optimizer a run trains."""

from __future__ import annotations

import attrs

from qwenft.errors import SpecError
from qwenft.specs.base import flag, number, one_of, spec, whole

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw",)


@spec
@attrs.frozen
class TrainingSpec:
    """The loop.

    Args:
        epochs: passes over the data; one where neither this nor ``max_steps`` is given.
        max_steps: optimizer steps instead, over as many epochs as they take.
        tokens_per_step: the most tokens that one optimizer step sees, over all its micro-batches; one
            micro-batch where None.
        learning_rate: the peak.
        schedule: after the warmup: "cosine" or "linear" down to 0, or "constant".
        warmup_ratio: the share of all steps in which the learning rate rises from 0.
        optimizer: "adamw" (arXiv:1711.05101).
        weight_decay: on matrices; norms, biases, A_log and dt_bias are spared.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        activation_checkpointing: recompute each layer in backward instead of keeping its activations.
        seed: of shuffling, packing, adapter initialisation and dropout.
        evaluate_every: steps between evaluations on held-out data; None evaluates before and after only.

    Examples:
        >>> TrainingSpec(learning_rate=1e-4, max_steps=500).schedule
        'cosine'
    """

    epochs: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(epochs=3)", optional=True)
    )
    max_steps: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(max_steps=500)", optional=True)
    )
    tokens_per_step: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(tokens_per_step=16_384)", optional=True)
    )
    learning_rate: float = attrs.field(
        default=2e-4, kw_only=True, validator=number("TrainingSpec(learning_rate=2e-4)", above=True)
    )
    schedule: str = attrs.field(
        default="cosine", kw_only=True, validator=one_of(SCHEDULES, 'TrainingSpec(schedule="cosine")')
    )
    warmup_ratio: float = attrs.field(
        default=0.03, kw_only=True, validator=number("TrainingSpec(warmup_ratio=0.03)", high=1.0)
    )
    optimizer: str = attrs.field(
        default="adamw", kw_only=True, validator=one_of(OPTIMIZERS, 'TrainingSpec(optimizer="adamw")')
    )
    weight_decay: float = attrs.field(
        default=0.0, kw_only=True, validator=number("TrainingSpec(weight_decay=0.01)")
    )
    max_grad_norm: float | None = attrs.field(
        default=1.0,
        kw_only=True,
        validator=number("TrainingSpec(max_grad_norm=1.0)", above=True, optional=True),
    )
    activation_checkpointing: bool = attrs.field(
        default=True, kw_only=True, validator=flag("TrainingSpec(activation_checkpointing=True)")
    )
    seed: int = attrs.field(default=0, kw_only=True, validator=whole("TrainingSpec(seed=0)", low=0))
    evaluate_every: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(evaluate_every=50)", optional=True)
    )

    def __attrs_post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise SpecError(
                f"TrainingSpec: expected epochs or max_steps, got both: {self.epochs} and {self.max_steps}",
                fix=f"TrainingSpec(epochs=None, max_steps={self.max_steps})",
                got=(self.epochs, self.max_steps),
            )

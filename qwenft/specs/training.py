"""How long, how fast and with what optimizer a run trains, and what it watches and keeps."""

from __future__ import annotations

from collections.abc import Callable  # noqa: TC003 - cattrs reads the annotations of fields
from types import FunctionType
from typing import Any, ClassVar

import attrs

from qwenft.errors import SpecError
from qwenft.family.roles import ROLES
from qwenft.specs.base import Check, flag, known_roles, number, one_of, spec, whole

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd")
LOSSES = ("auto", "chunked", "cce", "full")
BETAS = (0.9, 0.999)


def _tuple(value: Any) -> Any:
    """A list as a tuple; what is neither is left for the validator."""
    return tuple(value) if isinstance(value, list) else value


def _every(value: Any) -> Any:
    """True and False as 1 and 0."""
    return int(value) if isinstance(value, bool) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_betas(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)


def _is_rated_role(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and value[0] in ROLES
        and _is_number(value[1])
        and value[1] > 0
    )


def _are_rates(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_rated_role(pair) for pair in value)


def _are_prompts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(prompt, str) and prompt for prompt in value)


def _is_loss(value: Any) -> bool:
    return isinstance(value, FunctionType) or (isinstance(value, str) and value in LOSSES)


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
        learning_rates: (role, peak) pairs; see :meth:`with_learning_rate`.
        lora_plus_ratio: the B matrices of LoRA learn so many times faster than the A (LoRA+, arXiv:2402.12354).
        schedule: after the warmup: "cosine" or "linear" down to the floor, "constant", or "warmup_stable_decay":
            constant, and at the end down to the floor by 1 - sqrt (arXiv:2405.18392).
        warmup_ratio: the share of all steps in which the learning rate rises from 0.
        decay_ratio: the share of all steps in which "warmup_stable_decay" decays; a tenth where None.
        floor_ratio: the floor of the learning rate, as a share of the peak.
        optimizer: "adamw" (arXiv:1711.05101), "adamw_8bit" (arXiv:2110.02861), either with "paged_" before it
            (moments that move to host memory when the GPU is full), or "sgd".
        betas: of AdamW's two moments.
        epsilon: of AdamW.
        momentum: of SGD.
        weight_decay: on matrices; norms, biases, A_log and dt_bias are spared.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        master_weights: full fine-tuning of bfloat16 weights holds them in float32; else they stay bfloat16 and
            updates are rounded by chance, right on average (stochastic rounding, arXiv:2010.06192).
        loss: cross entropy on supervised tokens: "chunked" keeps no logits and is exact anywhere; "cce" makes
            none, on a GPU (arXiv:2411.09009); "full" keeps all of them; "auto" is "chunked". Or a function of your
            own: ``loss(hidden, batch, head)`` of hidden states [T, H], the batch and the output head gives the
            weighted sum over the supervised tokens, a float32 scalar; it is given the last layer of all tokens.
        z_loss: adds so many times the squared log of the softmax's sum (arXiv:2204.02311, section 5).
        label_smoothing: the share of each target that is spread over the vocabulary.
        router_aux_loss: adds so many times the load-balancing loss of a mixture of experts (arXiv:2101.03961),
            over all tokens and layers of a micro-batch.
        neftune_alpha: uniform noise of alpha / sqrt(tokens of the document * hidden size) on embeddings in
            training (arXiv:2310.05914).
        activation_checkpointing: recompute every n-th layer in backward instead of keeping its activations
            (arXiv:1604.06174): True or 1 every layer, 2 every second, False or 0 none.
        activation_offloading: keep what checkpointed layers were given in host memory until backward.
        optimizer_in_backward: update each parameter as soon as its gradient is whole, and free the gradient
            (arXiv:2306.09782): the gradients of a model never exist together. A step is one micro-batch then, and
            cannot be clipped.
        embeddings_on_host: leave frozen input embeddings in host memory and look tokens up there.
        compile_elementwise: let torch.compile make single kernels of norms and gates. The first steps take seconds
            longer, which the metrics tell apart; results differ from those of eager code in their last bits.
        deterministic: use only algorithms that give the same bits again; on a CPU they all do.
        seed: of shuffling, packing, adapter initialisation, dropout, noise and rounding.
        evaluate_every: steps between evaluations on held-out data; None evaluates before and after only.
        keep_best: keep the checkpoint of the lowest held-out loss, and end with its weights.
        patience: see :meth:`early_stopping`; None never stops early.
        sample_prompts: user turns that are answered, greedily, at every evaluation.
        sample_tokens: the longest such answer.
        save_every: steps between checkpoints; a tenth of the run where None. The last step is always saved.
        keep_checkpoints: how many of the newest stay on disk, the best one apart.
        failed_save: where a checkpoint cannot be written, "continue" says so and goes on to the next, and "stop"
            ends the run; the last one always does.
        non_finite: where a loss or gradient is not finite, "stop" ends the run, and "skip" leaves the step out:
            nothing learns from its documents, which the records list.
        max_skipped: how many steps of a run may be left out so.

    Examples:
        >>> TrainingSpec(learning_rate=1e-4, max_steps=500).schedule
        'cosine'
        >>> TrainingSpec(evaluate_every=50).early_stopping(patience=3).patience
        3
    """

    #: Arguments of other trainers, each refused with what stands for it.
    RENAMED: ClassVar[dict[str, str]] = {
        "lr": "learning_rate=2e-4",
        "eval_strategy": "evaluate_every=50",
        "num_train_epochs": "epochs=3",
        "num_epochs": "epochs=3",
        "gradient_accumulation_steps": "tokens_per_step=16_384",
        "per_device_train_batch_size": "tokens_per_step=16_384",
        "micro_batch_size": "tokens_per_step=16_384",
        "lr_scheduler_type": 'schedule="cosine"',
        "lr_scheduler": 'schedule="cosine"',
        "warmup_steps": "warmup_ratio=0.03",
        "optim": 'optimizer="adamw"',
        "gradient_checkpointing": "activation_checkpointing=True",
        "torch_compile": "compile_elementwise=True",
        "neftune_noise_alpha": "neftune_alpha=5.0",
        "loraplus_lr_ratio": "lora_plus_ratio=16.0",
        "label_smoothing_factor": "label_smoothing=0.1",
        "output_router_logits": "router_aux_loss=0.001",
        "router_aux_loss_coef": "router_aux_loss=0.001",
        "eval_steps": "evaluate_every=50",
        "save_steps": "save_every=500",
        "save_total_limit": "keep_checkpoints=2",
        "load_best_model_at_end": "keep_best=True",
        "early_stopping_patience": "patience=3",
    }

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
    learning_rates: tuple[tuple[str, float], ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_rates, "roles with rates above 0", ".with_learning_rate(embeddings=1e-5)"),
    )
    lora_plus_ratio: float = attrs.field(
        default=1.0, kw_only=True, validator=number("TrainingSpec(lora_plus_ratio=16.0)", above=True)
    )
    schedule: str = attrs.field(
        default="cosine", kw_only=True, validator=one_of(SCHEDULES, 'TrainingSpec(schedule="cosine")')
    )
    warmup_ratio: float = attrs.field(
        default=0.03, kw_only=True, validator=number("TrainingSpec(warmup_ratio=0.03)", high=1.0)
    )
    decay_ratio: float | None = attrs.field(
        default=None,
        kw_only=True,
        validator=number("TrainingSpec(decay_ratio=0.2)", above=True, high=1.0, optional=True),
    )
    floor_ratio: float = attrs.field(
        default=0.0, kw_only=True, validator=number("TrainingSpec(floor_ratio=0.1)", high=1.0)
    )
    optimizer: str = attrs.field(
        default="adamw", kw_only=True, validator=one_of(OPTIMIZERS, 'TrainingSpec(optimizer="adamw")')
    )
    betas: tuple[float, float] = attrs.field(
        default=BETAS,
        converter=_tuple,
        kw_only=True,
        validator=Check(_are_betas, "two numbers from 0 up to 1", "TrainingSpec(betas=(0.9, 0.95))"),
    )
    epsilon: float = attrs.field(
        default=1e-8, kw_only=True, validator=number("TrainingSpec(epsilon=1e-8)", above=True)
    )
    momentum: float = attrs.field(
        default=0.0, kw_only=True, validator=number('TrainingSpec(optimizer="sgd", momentum=0.9)', high=1.0)
    )
    weight_decay: float = attrs.field(
        default=0.0, kw_only=True, validator=number("TrainingSpec(weight_decay=0.01)")
    )
    max_grad_norm: float | None = attrs.field(
        default=1.0,
        kw_only=True,
        validator=number("TrainingSpec(max_grad_norm=1.0)", above=True, optional=True),
    )
    master_weights: bool = attrs.field(
        default=False, kw_only=True, validator=flag("TrainingSpec(master_weights=True)")
    )
    loss: str | Callable[..., Any] = attrs.field(
        default="auto",
        kw_only=True,
        validator=Check(
            _is_loss,
            f"one of {', '.join(map(repr, LOSSES))}, or a function of (hidden, batch, head)",
            "TrainingSpec(loss=my_loss)",
        ),
    )
    z_loss: float = attrs.field(default=0.0, kw_only=True, validator=number("TrainingSpec(z_loss=1e-4)"))
    label_smoothing: float = attrs.field(
        default=0.0, kw_only=True, validator=number("TrainingSpec(label_smoothing=0.1)", high=1.0)
    )
    router_aux_loss: float = attrs.field(
        default=0.0, kw_only=True, validator=number("TrainingSpec(router_aux_loss=0.001)")
    )
    neftune_alpha: float = attrs.field(
        default=0.0, kw_only=True, validator=number("TrainingSpec(neftune_alpha=5.0)")
    )
    activation_checkpointing: int = attrs.field(
        default=1,
        kw_only=True,
        converter=_every,
        validator=Check(
            lambda value: _is_number(value) and isinstance(value, int) and value >= 0,
            "True, False, or n for every n-th layer",
            "TrainingSpec(activation_checkpointing=True)",
        ),
    )
    activation_offloading: bool = attrs.field(
        default=False, kw_only=True, validator=flag("TrainingSpec(activation_offloading=True)")
    )
    optimizer_in_backward: bool = attrs.field(
        default=False, kw_only=True, validator=flag("TrainingSpec(optimizer_in_backward=True)")
    )
    embeddings_on_host: bool = attrs.field(
        default=False, kw_only=True, validator=flag("TrainingSpec(embeddings_on_host=True)")
    )
    compile_elementwise: bool = attrs.field(
        default=False, kw_only=True, validator=flag("TrainingSpec(compile_elementwise=True)")
    )
    deterministic: bool = attrs.field(
        default=False, kw_only=True, validator=flag("TrainingSpec(deterministic=True)")
    )
    seed: int = attrs.field(default=0, kw_only=True, validator=whole("TrainingSpec(seed=0)", low=0))
    evaluate_every: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(evaluate_every=50)", optional=True)
    )
    keep_best: bool = attrs.field(default=False, kw_only=True, validator=flag("TrainingSpec(keep_best=True)"))
    patience: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(patience=3)", optional=True)
    )
    sample_prompts: tuple[str, ...] = attrs.field(
        default=(),
        converter=_tuple,
        kw_only=True,
        validator=Check(_are_prompts, "a tuple of texts", 'TrainingSpec(sample_prompts=("Who are you?",))'),
    )
    sample_tokens: int = attrs.field(default=64, kw_only=True, validator=whole("TrainingSpec(sample_tokens=64)"))
    save_every: int | None = attrs.field(
        default=None, kw_only=True, validator=whole("TrainingSpec(save_every=500)", optional=True)
    )
    keep_checkpoints: int = attrs.field(
        default=2, kw_only=True, validator=whole("TrainingSpec(keep_checkpoints=2)")
    )

    failed_save: str = attrs.field(
        default="continue",
        kw_only=True,
        validator=one_of(("continue", "stop"), 'TrainingSpec(failed_save="continue")'),
    )
    non_finite: str = attrs.field(
        default="stop", kw_only=True, validator=one_of(("stop", "skip"), 'TrainingSpec(non_finite="skip")')
    )
    max_skipped: int = attrs.field(default=10, kw_only=True, validator=whole("TrainingSpec(max_skipped=10)"))

    def __attrs_post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise SpecError(
                f"TrainingSpec: expected epochs or max_steps, got both: {self.epochs} and {self.max_steps}",
                fix=f"TrainingSpec(epochs=None, max_steps={self.max_steps})",
                got=(self.epochs, self.max_steps),
            )

    def with_learning_rate(self, **rates: float) -> TrainingSpec:
        """Give roles peaks of their own: ``.with_learning_rate(embeddings=1e-5)``; the schedule is common."""
        known_roles(tuple(rates), "TrainingSpec.with_learning_rate")
        return attrs.evolve(self, learning_rates=tuple(sorted({**dict(self.learning_rates), **rates}.items())))

    def early_stopping(self, patience: int) -> TrainingSpec:
        """End after so many evaluations in a row that do not lower the held-out loss."""
        return attrs.evolve(self, patience=patience)

    @property
    def chosen_loss(self) -> str | Callable[..., Any]:
        """The loss, with what "auto" stands for: "chunked", which adds every gradient up in float32."""
        return "chunked" if self.loss == "auto" else self.loss

    def learning_rate_of(self, role: str) -> float:
        """The peak of a role."""
        return dict(self.learning_rates).get(role, self.learning_rate)

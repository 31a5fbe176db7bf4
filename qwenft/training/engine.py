"""The step: a bound model, its optimizer, and what training and research scripts call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.models.bind import causal_of, hidden_states
from qwenft.models.loss import supervised_loss
from qwenft.training.optim import build_optimizer, build_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenft.data.corpus import Corpus
    from qwenft.data.stream import Batch, Stream
    from qwenft.specs.training import TrainingSpec


@attrs.frozen(eq=False)
class Loss:
    """The loss of a micro-batch.

    Args:
        total: the weighted sum over its supervised tokens, a scalar with its graph.
        tokens: the sum of their weights.
    """

    total: torch.Tensor
    tokens: float


@attrs.frozen
class StepResult:
    """What a step did.

    Args:
        step: its number, from 1.
        loss: the mean over its supervised tokens.
        tokens: supervised ones (the sum of their weights).
        stream_tokens: all of its tokens.
        grad_norm: of all gradients together, before clipping.
        learning_rate: that it used.
    """

    step: int
    loss: float
    tokens: float
    stream_tokens: int
    grad_norm: float
    learning_rate: float


class Prepared:
    """A model that is bound, adapted and ready to train; ``train()`` is built on it and on nothing else.

    Args:
        model: a transformers or peft module, bound.
        tokenizer: the checkpoint's.
        corpus: the data.
        training: the loop's numbers.
        device: where the model is.

    Attributes:
        optimizer: torch's, over the trained parameters.
        schedule: torch's, one step an optimizer step.
        steps_done: optimizer steps so far.
    """

    def __init__(self, model: Any, tokenizer: Any, corpus: Corpus, training: TrainingSpec, device: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.training = training
        self.device = device
        self.optimizer = build_optimizer(model.named_parameters(), training)
        self.schedule = build_schedule(self.optimizer, training, corpus.report.steps)
        self.steps_done = 0
        if training.activation_checkpointing:
            causal_of(model).activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        # Dropout must not depend on what the process drew before.
        torch.manual_seed(training.seed)

    def batches(self, epoch: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of every step of an epoch."""
        return self.corpus.train.batches(epoch)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What the output head is given, [T, H]."""
        return hidden_states(self.model, batch.input_ids, batch.layout)

    def loss(self, batch: Batch) -> Loss:
        """The loss of a micro-batch, with its graph; logits are made for supervised tokens alone."""
        batch = batch.to(self.device)
        total = supervised_loss(self.hidden(batch), causal_of(self.model).lm_head, batch.labels, batch.weights)
        return Loss(total, batch.tokens)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[T, vocabulary], for every token."""
        return causal_of(self.model).lm_head(self.hidden(batch.to(self.device)))

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on the mean loss over all supervised tokens of its micro-batches."""
        tokens = sum(batch.tokens for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.loss(batch).total / tokens
            loss.backward()
            total += float(loss.detach())
        grad_norm = self._clip()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.steps_done += 1
        return StepResult(
            step=self.steps_done,
            loss=total,
            tokens=tokens,
            stream_tokens=sum(batch.layout.total for batch in batches),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
        )

    @torch.no_grad()
    def evaluate(self, stream: Stream) -> float:
        """The mean loss over the supervised tokens of a stream, with dropout off."""
        was_training = self.model.training
        self.model.eval()
        total = tokens = 0.0
        for row in stream.rows():
            loss = self.loss(stream.batch(row))
            total += float(loss.total)
            tokens += loss.tokens
        self.model.train(was_training)
        return total / tokens

    def _clip(self) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.training.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit))

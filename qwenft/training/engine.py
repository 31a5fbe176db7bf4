"""The step: a bound model, its optimizer, and what training and research scripts call."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenft.data.stream import Batch, Place, places_text
from qwenft.errors import DataError, NonFiniteError, SpecError
from qwenft.kernels.fusion import compile_seconds
from qwenft.models.lora import base_name, unwrapped
from qwenft.training.allocator import keep_freed_memory
from qwenft.training.diagnosis import first_not_finite, last_not_finite
from qwenft.training.in_backward import step_in_backward
from qwenft.training.learner import Learner
from qwenft.training.optim import build_schedule
from qwenft.training.results import Evaluation, Loss, StepResult
from qwenft.training.saving import begin_save, load
from qwenft.training.trained import state_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from qwenft.data.corpus import Corpus
    from qwenft.data.stream import Stream
    from qwenft.specs.training import TrainingSpec


class Prepared(Learner):
    """A model that is bound, adapted and ready to train; ``train()`` is built on it and on nothing else.

    Args:
        model: a transformers or peft module, bound.
        tokenizer: the checkpoint's.
        corpus: the data.
        training: the loop's numbers.
        identity: JSON values of what the result depends on; a checkpoint of another is refused.
        options: of :class:`Learner`.

    Attributes:
        schedule: torch's, one step an optimizer step.
        steps_done: optimizer steps so far.
        place: behind the last of them in the data.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        corpus: Corpus,
        training: TrainingSpec,
        *,
        identity: Mapping[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(model, training, **options)
        if self.device == "cpu":
            keep_freed_memory()
        if corpus.report.vision_tokens:
            self.refuse_images_for_mtp()
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.identity = identity
        self.schedule = build_schedule(self.optimizer, training, corpus.report.steps)
        self.steps_done = 0
        self.place = Place()
        # Dropout, noise and rounding must not depend on what the process drew before.
        torch.manual_seed(training.seed + self.ranks.rank)

    @property
    def state_bytes(self) -> int:
        """What this process holds of weights, their scales, gradients and optimizer, in bytes."""
        in_backward = self.training.optimizer_in_backward
        return state_bytes(self.model, self.trained, self.optimizer, in_backward=in_backward)

    def batches(self, epoch: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of every step of an epoch."""
        return self.corpus.train.batches(Place(epoch))

    def remaining(self) -> Iterator[tuple[int, list[Batch]]]:
        """Epoch and micro-batches of every step that the recipe has left, from where this stands."""
        place = self.place
        left = self.corpus.report.steps - self.steps_done
        while left > 0:
            before = left
            for batches in self.corpus.train.batches(place):
                yield place.epoch, batches
                left -= 1
                if left == 0:
                    return
            if left == before and place == Place(place.epoch):
                raise DataError(
                    "the data gave no document this time", fix="a source that can be read again", row=None
                )
            place = Place(place.epoch + 1)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on the mean loss over all supervised tokens of its micro-batches, of all processes.

        Raises:
            DataError: no token is supervised.
            NonFiniteError: the loss or the gradient is not finite; nothing was changed, unless it is the gradient
                and the optimizer steps in backward.
            SpecError: there are several micro-batches, and the optimizer steps in backward.
        """
        all_tokens = sum(batch.layout.total for batch in batches if not batch.waits)
        tokens, stream_tokens = self.ranks.sum([sum(batch.tokens for batch in batches), all_tokens])
        if not tokens:
            raise DataError("no token of this step is trained", fix="batches of prepared.batches()", row=None)
        learning_rate, compiled_before = self._learning_rate(), compile_seconds()
        update = self._update_in_backward if self.training.optimizer_in_backward else self._update
        self.expert_counts = None
        with self.algorithms():
            loss, mtp_loss, grad_norm = update(batches, tokens)
        self.micro_batch = None
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.steps_done += 1
        self.place = batches[-1].following or self.place
        return StepResult(
            step=self.steps_done,
            loss=loss,
            tokens=tokens,
            stream_tokens=int(stream_tokens),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            compile_seconds=compile_seconds() - compiled_before,
            mtp_loss=mtp_loss,
            **self._expert_loads(),
        )

    def _expert_loads(self) -> dict[str, tuple[Any, ...]]:
        """How the last step used the experts of each layer."""
        if self.expert_counts is None:
            return {}
        counts = self.ranks.sum_tensor(self.expert_counts.double().cpu())
        busiest = counts.amax(1) / counts.mean(1)
        return {"expert_load": tuple(busiest.tolist()), "idle_experts": tuple((counts == 0).sum(1).tolist())}

    def _update(self, batches: Sequence[Batch], tokens: float) -> tuple[float, float | None, float]:
        """Change the parameters; the mean losses as of :meth:`_apart`, and the norm of the gradient."""
        parts, mtp = self.add_gradients(batches, tokens)
        grad_norm = float(self.clip_gradients())
        losses = torch.stack(parts).tolist()
        total = self.ranks.sum([sum(losses)])[0]
        if not all(math.isfinite(value) for value in (total, grad_norm)):
            layer = None if not math.isfinite(total) else self._last_not_finite()
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(batches, losses, total, grad_norm, layer=layer)
        self.optimizer.step()
        return *self._apart(total, mtp, tokens), grad_norm

    def _update_in_backward(self, batches: Sequence[Batch], tokens: float) -> tuple[float, float | None, float]:
        """The same, parameter by parameter while backward goes on."""
        if len(batches) != 1:
            raise SpecError(
                f"optimizer_in_backward=True: expected one micro-batch a step, got {len(batches)}",
                fix="prepared.step([batch]), or optimizer_in_backward=False",
                got=len(batches),
            )
        self.micro_batch = batches[0]
        found = self.loss(batches[0])
        total = found.total / tokens
        own = float(total.detach())
        loss = self.ranks.sum([own])[0]
        if not math.isfinite(loss):
            raise self._not_finite(batches, [own], loss, math.nan)
        with step_in_backward(self.optimizer, self.shares) as norms:
            total.backward()
        grad_norm = float(self.shares.total_norm(norms.whole, norms.shards))
        if not math.isfinite(grad_norm):
            raise self._not_finite(batches, [own], loss, grad_norm, changed=True)
        return *self._apart(loss, [found.mtp], tokens), grad_norm

    def _apart(self, loss: float, mtp: Sequence[Loss | None], tokens: float) -> tuple[float, float | None]:
        """Of the mean of a step's total loss: the model's, and the mean over its own tokens of the mtp layer's."""
        if not self.mtp_weight:
            return loss, None
        parts = [part for part in mtp if part is not None and part.tokens]
        own = float(torch.stack([part.total for part in parts]).sum()) if parts else 0.0
        total, count = self.ranks.sum([own, sum(part.tokens for part in parts)])
        return (loss - self.mtp_weight * total / tokens, total / count) if count else (loss, None)

    @torch.no_grad()
    def evaluate(self, stream: Stream) -> Evaluation:
        """How well the supervised tokens of a stream are predicted."""
        was_training = self.model.training
        self.model.eval()
        with self.algorithms():
            scores = [self.scores(batch) for batch in stream.evaluated()]
        self.model.train(was_training)
        loss, correct, tokens, exact, documents = self.ranks.sum([sum(each) for each in zip(*scores, strict=True)])
        return Evaluation(loss / tokens, accuracy=correct / tokens, exact_match=exact / documents, tokens=tokens)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all that :meth:`load` needs to go on to the bit: a new folder, whole or not at all.

        It holds the trained parameters, the optimizer's and the schedule's state, torch's random states and the
        place in the data; frozen weights stay in the base checkpoint.

        Raises:
            CheckpointError: the place is taken or cannot be written.
        """
        begin_save(self, Path(path)).finish()
        return Path(path)

    def load(self, path: str | os.PathLike[str], accept: Sequence[str] = ()) -> None:
        """Go on from a checkpoint; where it is refused, nothing was changed.

        In another number of processes than made it, dropout, noise and stochastic rounding draw anew.

        Args:
            path: of its folder.
            accept: what may differ from what it was made with; see :meth:`qwenft.TrainingPlan.train`.

        Raises:
            DamagedError: its files are not what was written.
            CheckpointError: it is of another recipe, model or data.
        """
        load(self, Path(path), accept)

    def _learning_rate(self) -> float:
        groups, peak = self.optimizer.param_groups, self.training.learning_rate
        common = next((group for group in groups if group["initial_lr"] == peak), groups[0])
        return float(common["lr"])

    def skip(self, batches: Sequence[Batch]) -> None:
        """Leave out a step that :meth:`step` refused: the schedule and the place in the data go on without it."""
        with warnings.catch_warnings():
            # Where it is the first, torch expects the optimizer to have stepped before the schedule.
            warnings.filterwarnings("ignore", "Detected call of", UserWarning)
            self.schedule.step()
        self.steps_done += 1
        self.place = batches[-1].following or self.place

    def _not_finite(
        self,
        batches: Sequence[Batch],
        losses: Sequence[float],
        total: float,
        grad_norm: float,
        *,
        layer: str | None = None,
        changed: bool = False,
    ) -> NonFiniteError:
        """The error that names the documents whose own loss is not finite, or those that may have caused it."""
        rows = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        in_forward = any(self.ranks.gather(bool(rows)))
        rows = rows if in_forward else list(batches)
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            guilty = [] if changed or self.ranks.count > 1 else self._not_finite_alone(rows)
            if in_forward:
                layer = self._first_not_finite((guilty or rows or list(batches))[0])
        places = [place for document in guilty or rows for place in document.documents]
        documents = [place for told in self.ranks.gather(places) for place in told]
        began = "" if layer is None else f"; it began in {layer}, {'forward' if in_forward else 'backward'}"
        return NonFiniteError(
            f"step {self.steps_done + 1}: loss {total}, gradient norm {grad_norm}; "
            f"{'in' if guilty else 'in one of'} {places_text(documents)}{began}"
            + ("; the optimizer stepped in backward: parameters are not finite any more" if changed else ""),
            fix="look at these documents; where they are right, a smaller learning_rate or a longer warmup_ratio; "
            'non_finite="skip" leaves such steps out',
            step=self.steps_done + 1,
            loss=total,
            grad_norm=grad_norm,
            documents=tuple(documents),
            layer=layer,
        )

    def _not_finite_alone(self, rows: Sequence[Batch]) -> list[Batch]:
        """The documents whose own loss is not finite; of several processes all would have to ask for as many."""
        alone = [(document, self.loss(document)) for row in rows for document in row.split()]
        return [document for document, loss in alone if not math.isfinite(float(loss.total))]

    def _first_not_finite(self, batch: Batch) -> str | None:
        """The module in which a forward pass, one of each process, stops being finite."""
        with first_not_finite(self.model) as found:
            loss = self.loss(batch).total
        own = found[0] if found else None if math.isfinite(float(loss)) else "the loss"
        return next((layer for layer in self.ranks.gather(own) if layer is not None), None)

    def _last_not_finite(self) -> str | None:
        """The weight with which gradients stop being finite in backward, of the parts of all processes."""
        found = self.ranks.gather(last_not_finite({name: part.grad for name, part in self.trained.items()}))
        order = {unwrapped(base_name(name)): place for place, name in enumerate(self.trained)}
        return max((name for name in found if name is not None), key=order.__getitem__, default=None)

"""The step: a bound model, its optimizer, and what training and research scripts call."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.data.masking import IGNORED
from qwenft.data.stream import Batch, Place, VisionInputs
from qwenft.errors import DataError, NonFiniteError, SpecError
from qwenft.kernels.fusion import compile_seconds, fusion
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import causal_of, decoder_of, hidden_states
from qwenft.models.lora import output_head
from qwenft.models.loss import token_losses, token_scores
from qwenft.models.mtp import one_token_on
from qwenft.models.routing import recorded_routing
from qwenft.training.allocator import keep_freed_memory
from qwenft.training.determinism import deterministic_algorithms
from qwenft.training.in_backward import step_in_backward
from qwenft.training.optim import build_optimizer, build_schedule
from qwenft.training.ranks import ALONE, Ranks
from qwenft.training.results import Evaluation, Loss, StepResult
from qwenft.training.saving import begin_save, load
from qwenft.training.shards import within
from qwenft.training.trained import Trained, state_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from qwenft.data.corpus import Corpus
    from qwenft.data.stream import Stream
    from qwenft.specs.training import TrainingSpec


class Prepared:
    """A model that is bound, adapted and ready to train; ``train()`` is built on it and on nothing else.

    Args:
        model: a transformers or peft module, bound.
        tokenizer: the checkpoint's.
        corpus: the data.
        training: the loop's numbers.
        device: where the model is.
        role_of: the role of a parameter's name.
        identity: JSON values of what the result depends on; a checkpoint of another is refused.
        mtp_weight: of the loss of the multi-token-prediction layer, which is loaded where it is not 0.
        ranks: the processes that share the steps, and the model.

    Attributes:
        trained: the trained parameters by name; where they are shared out, this process's part of each.
        shares: what of the trained parameters this process has.
        optimizer: over these.
        schedule: torch's, one step an optimizer step.
        steps_done: optimizer steps so far.
        place: behind the last of them in the data.
        expert_counts: [layers, experts] how often each was chosen in the last step; in the last layer by
            supervised tokens alone, which are all that reach it. None of a dense model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        corpus: Corpus,
        training: TrainingSpec,
        *,
        device: str,
        role_of: Callable[[str], str],
        identity: Mapping[str, Any],
        mtp_weight: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        if device == "cpu":
            keep_freed_memory()
        self.model = model
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.training = training
        self.device = device
        self.identity = identity
        self.mtp_weight = mtp_weight
        if corpus.report.vision_tokens:
            self._refuse_images()
        self.ranks = ranks
        self.shares = Trained(model, training, ranks)
        self.trained = self.shares.parts
        # A process may have no row of a small parameter.
        parts = [(name, part) for name, part in self.trained.items() if part.numel()]
        self.optimizer = build_optimizer(parts, training, role_of)
        self.schedule = build_schedule(self.optimizer, training, corpus.report.steps)
        self.steps_done = 0
        self.place = Place()
        self.expert_counts: torch.Tensor | None = None
        self.model.train()
        # Dropout, noise and rounding must not depend on what the process drew before.
        torch.manual_seed(training.seed + ranks.rank)

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

    def hidden(self, batch: Batch, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """What the output head is given for all T tokens or S wanted ones; with NEFTune's noise in training."""
        alpha = self.training.neftune_alpha if self.model.training else 0.0
        with fusion(asked=self.training.compile_elementwise):
            return hidden_states(
                self.model,
                batch.input_ids,
                batch.layout,
                vision=batch.vision,
                wanted=wanted,
                neftune_alpha=alpha,
            )

    def loss(self, batch: Batch) -> Loss:
        """The recipe's loss of a micro-batch, with its graph.

        The last layer and the head are computed for supervised tokens alone, unless the loss is a function or more
        is asked of the last layer. The loss of the multi-token-prediction layer is of the same kind, smoothing and
        z-loss included, without noise on its embeddings; weighted, its sum is added to that of the model, and the
        two are divided by the model's tokens.
        """
        following = one_token_on(batch).located().to(self.device) if self.mtp_weight else None
        return self.loss_of(self._on_device(batch), following)

    def loss_of(self, batch: Batch, following: Batch | None = None) -> Loss:
        """The same, of a micro-batch that is on the device, and of what the other layer predicts; both located."""
        mtp: list[Loss] = []
        total = within(causal_of(self.model), lambda: self._total_loss(batch, following, mtp))
        return Loss(total, batch.tokens, *mtp)

    def _total_loss(self, batch: Batch, following: Batch | None, mtp: list[Loss]) -> torch.Tensor:
        """That of a micro-batch with its graph; to ``mtp`` it adds the part of that layer, without."""
        loss, auxiliary = self.training.chosen_loss, self.training.router_aux_loss
        with recorded_routing(self.model) as routing:
            if isinstance(loss, str):
                # The multi-token-prediction layer attends to all tokens.
                hidden = self.hidden(batch) if auxiliary or following is not None else None
                total = self._cross_entropy(batch, self.hidden, hidden, method=loss)
                if following is not None:
                    assert hidden is not None
                    found = self._mtp_loss(following, hidden, method=loss)
                    total = total + self.mtp_weight * found.total
                    mtp.append(Loss(found.total.detach(), found.tokens))
            else:
                total = self._at_head(lambda hidden, head: loss(hidden, batch, head), self.hidden(batch))
        if routing.counts:
            counts = torch.stack(routing.counts)
            self.expert_counts = counts if self.expert_counts is None else self.expert_counts + counts
        if auxiliary:
            per_token = causal_of(self.model).config.get_text_config().num_experts_per_tok
            total = total + auxiliary * batch.tokens * routing.load_balancing_loss(per_token)
        return total

    def _at_head(self, function: Callable[..., Any], hidden: torch.Tensor, *args: Any) -> Any:
        """What a function of hidden states, the head and more returns, where the head's weights are whole."""
        return within(causal_of(self.model).lm_head, function, hidden, output_head(self.model), *args)

    def _on_device(self, batch: Batch) -> Batch:
        """A micro-batch, located, that goes through the tower, if there is one, as that of another process may."""
        batch = batch.located().to(self.device)
        tower = getattr(causal_of(self.model).model, "visual", None)
        if self.ranks.count == 1 or batch.vision is not None or tower is None:
            return batch
        return attrs.evolve(batch, vision=VisionInputs.blank(batch.layout, tower.config))

    def _refuse_images(self) -> None:
        """Before the first step where images are known of; in a stream they may come later."""
        if self.mtp_weight:
            raise DataError(
                "the multi-token-prediction layer is trained on text, and the data hold images",
                fix="AdapterSpec.full() without .train_mtp()",
                row=None,
            )

    def _mtp_loss(self, following: Batch, hidden_TC: torch.Tensor, *, method: str) -> Loss:
        """That of the token after next, with its graph: a sum over the tokens that have a trained one.

        Raises:
            DataError: there are images, of which the layer would see the placeholders.
        """
        if following.vision is not None and len(following.vision.places):
            self._refuse_images()

        def hidden(batch: Batch, wanted: torch.Tensor | None = None) -> torch.Tensor:
            decoder, layer = decoder_of(self.model), causal_of(self.model).mtp
            with fusion(asked=self.training.compile_elementwise):
                return layer(decoder, hidden_TC, batch.input_ids, batch.layout, wanted=wanted)

        return Loss(self._cross_entropy(following, hidden, method=method), following.tokens)

    def _cross_entropy(self, *supervised: Any, method: str) -> torch.Tensor:
        """The recipe's, of what :meth:`_supervised` gives."""
        smoothing, z_loss = self.training.label_smoothing, self.training.z_loss
        function = partial(token_losses, method=method, label_smoothing=smoothing, z_loss=z_loss)
        return self._at_head(function, *self._supervised(*supervised))

    @staticmethod
    def _supervised(
        batch: Batch, hidden: Callable[..., torch.Tensor], everywhere_TC: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states [S, H] of the supervised positions, their labels and their weights.

        ``hidden`` gives them for all tokens or for wanted ones, if they are not known ``everywhere`` already.
        """
        wanted = batch.positions
        assert wanted is not None
        if everywhere_TC is None and not len(wanted):
            everywhere_TC = hidden(batch)  # experts have no answer for no token
        supervised_SC = hidden(batch, wanted) if everywhere_TC is None else everywhere_TC[wanted]
        return supervised_SC, batch.labels[wanted], None if batch.weights is None else batch.weights[wanted]

    def logits(self, batch: Batch) -> torch.Tensor:
        """[T, vocabulary], for every token."""
        batch = self._on_device(batch)
        logits: torch.Tensor = within(
            causal_of(self.model),
            lambda: self._at_head(lambda hidden, head: head.forward(hidden), self.hidden(batch)),
        )
        return logits

    @torch.no_grad()
    def logits_of(self, ids: torch.Tensor) -> torch.Tensor:
        """[T, vocabulary] float32 in host memory, of some text [T] without dropout or noise."""
        was_training = self.model.training
        self.model.eval()
        text = Batch(ids, torch.full_like(ids, IGNORED), SequenceLayout.from_lengths([len(ids)]))
        logits = self.logits(text).float().cpu()
        self.model.train(was_training)
        return logits

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
        with self._algorithms():
            loss, mtp_loss, grad_norm = update(batches, tokens)
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

    @contextmanager
    def _algorithms(self) -> Iterator[None]:
        with (
            deterministic_algorithms(asked=self.training.deterministic),
            fusion(asked=self.training.compile_elementwise),
        ):
            yield

    def _update(self, batches: Sequence[Batch], tokens: float) -> tuple[float, float | None, float]:
        """Change the parameters; the mean losses as of :meth:`_apart`, and the norm of the gradient."""
        parts, mtp = [], []
        for batch in batches:
            loss = self.loss(batch)
            part = loss.total / tokens
            (part * self.shares.averaged_over).backward()
            self.shares.take_gradients()
            parts.append(part.detach())
            mtp.append(loss.mtp)
        self.shares.sum_whole()
        grad_norm = self._clip()
        losses = torch.stack(parts).tolist()
        total = self.ranks.sum([sum(losses)])[0]
        if not all(math.isfinite(value) for value in (total, grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(batches, losses, grad_norm)
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
        found = self.loss(batches[0])
        total = found.total / tokens
        own = float(total.detach())
        loss = self.ranks.sum([own])[0]
        if not math.isfinite(loss):
            raise self._not_finite(batches, [own], math.nan)
        with step_in_backward(self.optimizer, self.shares) as norms:
            total.backward()
        grad_norm = float(self.shares.total_norm(norms.whole, norms.shards))
        if not math.isfinite(grad_norm):
            raise self._not_finite(batches, [own], grad_norm, changed=True)
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
        loss = correct = tokens = 0.0
        with self._algorithms():
            for loaded in stream.evaluated():
                batch = self._on_device(loaded)
                scores = within(causal_of(self.model), partial(self._scores, batch))
                loss, correct, tokens = loss + scores[0], correct + scores[1], tokens + batch.tokens
        self.model.train(was_training)
        loss, correct, tokens = self.ranks.sum((loss, correct, tokens))
        return Evaluation(loss=loss / tokens, accuracy=correct / tokens, tokens=tokens)

    def _scores(self, batch: Batch) -> Any:
        return self._at_head(token_scores, *self._supervised(batch, self.hidden))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all that :meth:`load` needs to go on to the bit: a new folder, whole or not at all.

        It holds the trained parameters, the optimizer's and the schedule's state, torch's random states and the
        place in the data; frozen weights stay in the base checkpoint.

        Raises:
            CheckpointError: the place is taken or cannot be written.
        """
        begin_save(self, Path(path)).finish()
        return Path(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint; where it is refused, nothing was changed.

        In another number of processes than made it, dropout, noise and stochastic rounding draw anew.

        Raises:
            CheckpointError: it is damaged, or of another recipe, model or data.
        """
        load(self, Path(path))

    def _learning_rate(self) -> float:
        groups, peak = self.optimizer.param_groups, self.training.learning_rate
        common = next((group for group in groups if group["initial_lr"] == peak), groups[0])
        return float(common["lr"])

    def _clip(self) -> float:
        """Scale the gradients down to the limit, and return their norm before."""
        norm, limit = self.shares.norm(), self.training.max_grad_norm
        torch.nn.utils.clip_grads_with_norm_(self.trained.values(), math.inf if limit is None else limit, norm)
        return float(norm)

    def _not_finite(
        self, batches: Sequence[Batch], losses: Sequence[float], grad_norm: float, *, changed: bool = False
    ) -> NonFiniteError:
        """The error that names the documents whose own loss is not finite, or those that may have caused it."""
        rows = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        rows = rows if any(self.ranks.gather(bool(rows))) else list(batches)
        guilty = [] if changed or self.ranks.count > 1 else self._not_finite_alone(rows)
        places = [place for document in guilty or rows for place in document.documents]
        documents = [place for told in self.ranks.gather(places) for place in told]
        listed = ", ".join(f"{file}, row {row}" for file, row in documents[:8])
        more = f" and {len(documents) - 8} more" if len(documents) > 8 else ""
        return NonFiniteError(
            f"step {self.steps_done + 1}: loss {sum(losses)}, gradient norm {grad_norm}; "
            f"{'in' if guilty else 'in one of'} {listed}{more}"
            + ("; the optimizer stepped in backward: parameters are not finite any more" if changed else ""),
            fix="look at these documents; where they are right, a smaller learning_rate or a longer warmup_ratio",
            step=self.steps_done + 1,
            loss=sum(losses),
            grad_norm=grad_norm,
            documents=tuple(documents),
        )

    @torch.no_grad()
    def _not_finite_alone(self, rows: Sequence[Batch]) -> list[Batch]:
        """The documents whose own loss is not finite; of several processes all would have to ask for as many."""
        alone = [(document, self.loss(document)) for row in rows for document in row.split()]
        return [document for document, loss in alone if not math.isfinite(float(loss.total))]

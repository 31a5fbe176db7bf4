"""What a step does with a model: losses with their graph, and gradients added up over micro-batches."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.data.masking import IGNORED
from qwenft.data.stream import Batch, VisionInputs
from qwenft.errors import DataError, SpecError
from qwenft.kernels.fusion import fusion
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import causal_of, decoder_of, hidden_states, unpackable
from qwenft.models.lora import output_head
from qwenft.models.loss import token_losses, token_scores
from qwenft.models.mtp import one_token_on
from qwenft.models.routing import recorded_routing
from qwenft.training.determinism import deterministic_algorithms
from qwenft.training.optim import build_optimizer
from qwenft.training.ranks import ALONE, Ranks
from qwenft.training.results import Loss
from qwenft.training.shards import within
from qwenft.training.trained import Trained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from qwenft.specs.training import TrainingSpec


class Learner:
    """A bound model with its optimizer, which knows nothing of data and runs.

    Args:
        model: a transformers or peft module, bound.
        training: the loop's numbers.
        device: where the model is.
        role_of: the role of a parameter's name.
        mtp_weight: of the loss of the multi-token-prediction layer, which is loaded where it is not 0.
        ranks: the processes that share the steps, and the model.

    Attributes:
        trained: the trained parameters by name; where they are shared out, this process's part of each.
        shares: what of the trained parameters this process has.
        optimizer: over these.
        expert_counts: [layers, experts] how often each was chosen in the last step; in the last layer by
            supervised tokens alone, which are all that reach it. None of a dense model.
        unpackable: a backend that has to be given one document at a time.
        micro_batch: the one that a step is at; None between them.
    """

    def __init__(
        self,
        model: Any,
        training: TrainingSpec,
        *,
        device: str,
        role_of: Callable[[str], str],
        mtp_weight: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.training = training
        self.device = device
        self.mtp_weight = mtp_weight
        self.unpackable = unpackable(model)
        self.ranks = ranks
        self.shares = Trained(model, training, ranks)
        self.trained = self.shares.parts
        # A process may have no row of a small parameter.
        parts = [(name, part) for name, part in self.trained.items() if part.numel()]
        self.optimizer = build_optimizer(parts, training, role_of)
        self.expert_counts: torch.Tensor | None = None
        self.micro_batch: Batch | None = None
        self.model.train()

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
            counts = torch.stack(routing.counts) * (not batch.waits)  # another rank counts its tokens
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
        if self.unpackable is not None and (documents := len(batch.layout.lengths)) > 1:
            raise SpecError(
                f"a micro-batch of {documents} documents, but {self.unpackable!r} has supports_packing = False: "
                "a token could attend to another document",
                fix="batch.split(), a micro-batch for each",
                got=documents,
                expected=1,
            )
        batch = batch.located().to(self.device)
        tower = getattr(causal_of(self.model).model, "visual", None)
        if self.ranks.count == 1 or batch.vision is not None or tower is None:
            return batch
        return attrs.evolve(batch, vision=VisionInputs.blank(batch.layout, tower.config))

    def refuse_images_for_mtp(self) -> None:
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
            self.refuse_images_for_mtp()

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

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[float, float, float, int, int]:
        """How a micro-batch is predicted, as sums.

        Returns:
            The negative log-likelihood of its supervised tokens, the weights of those that are the likeliest, the
            weights of all; the documents whose supervised tokens are all the likeliest, and those that have any.
        """
        batch = self._on_device(batch)

        def scores() -> Any:
            hidden_SC, labels, _ = self._supervised(batch, self.hidden)
            return self._at_head(token_scores, hidden_SC, labels)

        losses, likeliest = within(causal_of(self.model), scores)
        documents = batch.layout.document_ids[batch.positions]
        weights = torch.ones_like(losses) if batch.weights is None else batch.weights[batch.positions].float()
        asked, missed = len(documents.unique()), len(documents[~likeliest].unique())
        loss, correct = float(losses @ weights), float(likeliest.float() @ weights)
        return loss, correct, batch.tokens, asked - missed, asked

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

    @contextmanager
    def algorithms(self) -> Iterator[None]:
        """Run what is within as the recipe asks: with fused elementwise kernels, or by algorithms that repeat."""
        with (
            deterministic_algorithms(asked=self.training.deterministic),
            fusion(asked=self.training.compile_elementwise),
        ):
            yield

    def add_gradients(
        self, batches: Sequence[Batch], tokens: float
    ) -> tuple[list[torch.Tensor], list[Loss | None]]:
        """Add up the gradients of the mean loss over so many tokens, of all processes.

        Returns:
            Of each micro-batch its part of the mean, and the loss of the multi-token-prediction layer.
        """
        parts, mtp = [], []
        for batch in batches:
            self.micro_batch = batch
            loss = self.loss(batch)
            part = loss.total / tokens
            (part * self.shares.averaged_over).backward()
            parts.append(part.detach())
            mtp.append(loss.mtp)
        self.micro_batch = None
        self.shares.sum_whole()
        return parts, mtp

    def clip_gradients(self) -> torch.Tensor:
        """Scale the gradients down to the limit, and return their norm before.

        Of those that are not finite, none makes another one so.
        """
        norm, limit = self.shares.norm(), self.training.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained.values(), limit, norm.nan_to_num(math.inf, math.inf))
        return norm

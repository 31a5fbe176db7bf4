"""Cross entropy on supervised tokens: in chunks, through cut cross entropy, or written out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qwenft.data.masking import IGNORED
from qwenft.kernels.cce import cut_cross_entropy
from qwenft.kernels.device import device_type

if TYPE_CHECKING:
    from collections.abc import Iterator

# Large products run nearer to what a processor can do, and what is made of logits is faster in its caches.
_LOGIT_BYTES = 160 * 2**20  # float32 logits of a chunk
CACHED_BYTES = 16 * 2**20  # those of them that are made gradients at a time
_CAST_BYTES = 4 * 2**20  # the part of a head in another dtype that is cast at a time
_PRODUCT_BYTES = 64 * 2**20  # float32, of what is added to the gradient of a head in one product


@attrs.frozen
class _Terms:
    """What is added to plain cross entropy."""

    smoothing: float
    z: float


def supervised_loss(
    hidden: torch.Tensor,
    head: Any,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    method: str = "chunked",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of the cross entropies of the supervised tokens.

    The same as the following, with logits for supervised positions alone::

        logits = head(hidden).float()
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        ((each + z_loss * logits.logsumexp(-1) ** 2) * weights)[labels != -100].sum()

    Args:
        hidden: [T, H].
        head: the output head, a Linear without bias or a peft layer around one.
        labels: [T], aligned with the position that predicts; -100 where not trained.
        weights: [T], 1 everywhere where None.
        method: "chunked" makes logits a chunk at a time and their gradient with them; "cce" makes none, on a GPU,
            for a plain head that is not trained; "full" makes them all at once, and keeps them for backward.
        label_smoothing: the share of each target that is spread over the vocabulary.
        z_loss: the factor on the squared log of the softmax's sum.

    Returns:
        A float32 scalar with its graph; 0 with a zero gradient where nothing is supervised.
    """
    rows = supervised_positions(labels)
    hidden, labels = hidden[rows], labels[rows]
    weights = None if weights is None else weights[rows]
    return token_losses(
        hidden, head, labels, weights, method=method, label_smoothing=label_smoothing, z_loss=z_loss
    )


def token_losses(
    hidden: torch.Tensor,
    head: Any,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    method: str = "chunked",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """What :func:`supervised_loss` gives where every position is supervised: no label is -100."""
    terms = _Terms(label_smoothing, z_loss)
    weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights.float()
    if method == "full":
        return _logits_loss(head, terms, hidden, labels, weights)
    if method == "cce":
        return (cut_cross_entropy(hidden, head.weight, labels) * weights).sum()
    if _is_plain(head):
        return _ChunkedLoss.apply(hidden, head.weight, labels, weights, terms)
    total = hidden.new_zeros((), dtype=torch.float32) + 0.0 * hidden[:1].float().sum()
    for part in _parts(len(labels), _LOGIT_BYTES, head.out_features):
        # A head with an adapter, or in few bits, is called as the module it is; backward makes its logits again.
        rows = (tensor[part] for tensor in (hidden, labels, weights))
        total = total + checkpoint(_logits_loss, head, terms, *rows, use_reentrant=False)
    return total


@torch.no_grad()
def token_scores(hidden: torch.Tensor, head: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How supervised tokens are predicted.

    Args:
        hidden: [S, H].
        head: the output head.
        labels: [S], a token each.

    Returns:
        Of each token, [S], the negative log-likelihood in nats, float32, and whether no other is likelier.
    """
    losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    likeliest = torch.empty_like(labels, dtype=torch.bool)
    for part in _parts(len(labels), _LOGIT_BYTES, head.out_features):
        if _is_plain(head):
            logits = hidden.new_empty((len(labels[part]), head.out_features), dtype=torch.float32)
            _logits(hidden[part], head.weight, logits)
        else:
            logits = head.forward(hidden[part]).float()
        losses[part] = F.cross_entropy(logits, labels[part], reduction="none")
        likeliest[part] = logits.argmax(dim=-1) == labels[part]
    return losses, likeliest


def _is_plain(head: Any) -> bool:
    """Whether a head is its weight [V, H] alone: neither adapted nor packed in few bits."""
    return isinstance(head, torch.nn.Linear) and head.weight.shape == (head.out_features, head.in_features)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Where labels [T] hold a token: [S] int64."""
    return (labels != IGNORED).nonzero()[:, 0]


def _parts(rows: int, limit: int, columns: int) -> Iterator[slice]:
    """Slices of ``rows`` of so many float32 columns, each of ``limit`` bytes at most, and of a row at least."""
    size = max(1, limit // (4 * columns))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _logits_loss(
    head: Any, terms: _Terms, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    # Not as a call: where the head is shared out, its hooks would gather it again for every chunk.
    logits = head.forward(hidden).float()
    each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=terms.smoothing)
    if terms.z:
        each = each + terms.z * logits.logsumexp(dim=-1).square()
    return (each * weights).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient of each chunk together, so that no logits outlive it."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows positional arguments alone
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        terms: _Terms,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        parts = list(_parts(len(labels), _LOGIT_BYTES, len(weight)))
        buffer = hidden.new_empty((parts[0].stop if parts else 0, len(weight)), dtype=torch.float32)
        for part in parts:
            logits = buffer[: part.stop - part.start]
            _logits(hidden[part], weight, logits)
            cached = CACHED_BYTES if device_type(logits) == "cpu" else _LOGIT_BYTES
            for rows in _parts(len(logits), cached, len(weight)):
                total += _differentiate(logits[rows], labels[part][rows], weights[part][rows], terms)
            grad = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = _input_gradient(grad, weight)
            if grad_weight is not None:
                _add_product(grad_weight, grad.T, hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]  # as autograd calls it
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            # In place: they are as large as what they are the gradients of, and nobody else's.
            None if grad_hidden is None else grad_hidden.mul_(grad),
            # float32: autograd casts it to what the weight's gradient is held in.
            None if grad_weight is None else grad_weight.mul_(grad),
            None,
            None,
            None,
        )


def _differentiate(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, terms: _Terms
) -> torch.Tensor:
    """The loss of some tokens, whose logits become its gradient.

    With logits z, n = logsumexp(z), p = softmax(z), V words, smoothing e and z-loss c, a token's loss is
    n - (1 - e) z[label] - e mean(z) + c n^2, and d loss / dz = (1 + 2 c n) p - (1 - e) onehot(label) - e / V.

    Args:
        logits: [R, V] float32, overwritten.
        labels: [R].
        weights: [R], of each token's loss.
        terms: e and c.
    """
    labels, weights = labels[:, None], weights[:, None]
    each = (terms.smoothing - 1) * logits.gather(1, labels)
    if terms.smoothing:
        each -= terms.smoothing * logits.mean(dim=-1, keepdim=True)
    largest = logits.amax(dim=-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    normaliser = sums.log() + largest
    each += normaliser + terms.z * normaliser.square()
    logits *= weights * (1 + 2 * terms.z * normaliser) / sums
    if terms.smoothing:
        logits -= weights * terms.smoothing / logits.shape[1]
    logits.scatter_add_(1, labels, weights * (terms.smoothing - 1))
    return (each * weights).sum()


def _logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write hidden [R, H] times weight [V, H] transposed to float32 ``out`` [R, V]."""
    for words, cast in _blocks(weight, hidden.dtype):
        if hidden.dtype == torch.float32:
            torch.mm(hidden, cast.T, out=out[:, words])
        else:
            out[:, words] = hidden @ cast.T


def _input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Grad [R, V] times weight [V, H], added up in float32."""
    total = grad.new_zeros((len(grad), weight.shape[1]), dtype=torch.float32)
    for words, cast in _blocks(weight, grad.dtype):
        _add_product(total, grad[:, words], cast)
    return total


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for rows in _parts(len(total), _PRODUCT_BYTES, total.shape[1]):
        total[rows] += left[rows] @ right


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The head in ``dtype``: as it is, or some words at a time, so that no copy of it is made."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    for words in _parts(len(weight), _CAST_BYTES, weight.shape[1]):
        yield words, weight[words].to(dtype)

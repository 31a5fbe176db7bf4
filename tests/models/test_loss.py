from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qwenft.models import loss as module
from qwenft.models.loss import supervised_loss, token_scores


def _problem(tokens=40, width=16, vocabulary=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    head = torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, width, generator=generator))
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    weights = torch.rand(tokens, generator=generator)
    return hidden, head, labels, weights


def _reference(hidden, head, labels, weights):
    each = F.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction="none")
    return (each * weights).sum()


@pytest.mark.parametrize("method", ["chunked", "full"])
@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 7 * 50 * 4])
@pytest.mark.parametrize("trains_head", [True, False])
def test_loss_and_gradients_equal_full_cross_entropy(monkeypatch, method, chunk_bytes, trains_head):
    """The loss and its gradients are those of torch's cross entropy over all logits."""
    monkeypatch.setattr(module, "_LOGIT_BYTES", chunk_bytes)
    hidden, head, labels, weights = _problem()
    head.weight.requires_grad_(trains_head)
    got = supervised_loss(hidden, head, labels, weights, method=method)
    wanted = _reference(hidden, head, labels, weights)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    inputs = [hidden, head.weight] if trains_head else [hidden]
    for mine, reference in zip(
        torch.autograd.grad(2.5 * got, inputs),
        torch.autograd.grad(2.5 * wanted, inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_a_head_that_is_a_module_gives_the_same(monkeypatch):
    """A head that is no plain Linear, such as one with an adapter, goes through its own forward."""
    monkeypatch.setattr(module, "_LOGIT_BYTES", 7 * 50 * 4)
    hidden, head, labels, weights = _problem()

    class Adapted(torch.nn.Module):
        out_features = 50

        def __init__(self):
            super().__init__()
            self.base = head

        def forward(self, x):
            return self.base(x)

    got = supervised_loss(hidden, Adapted(), labels, weights)
    wanted = _reference(hidden, head, labels, weights)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(got, hidden)[0],
        torch.autograd.grad(wanted, hidden)[0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("method", ["chunked", "full"])
def test_nothing_supervised_is_zero_with_a_zero_gradient(method):
    """A batch without supervised tokens has loss 0 and gradient 0, not NaN."""
    hidden, head, labels, _ = _problem()
    labels[:] = -100
    total = supervised_loss(hidden, head, labels, method=method)
    total.backward()
    assert total.item() == 0.0
    assert hidden.grad.abs().max() == 0.0
    assert head.weight.grad.abs().max() == 0.0


def test_logits_are_made_for_supervised_tokens_alone(monkeypatch):
    """No matrix product with the head has more rows than there are supervised tokens."""
    hidden, head, labels, _ = _problem()
    rows = []
    original = module._logits
    monkeypatch.setattr(module, "_logits", lambda x, *rest: (rows.append(len(x)), original(x, *rest))[1])
    supervised_loss(hidden, head, labels)
    assert rows == [int((labels != -100).sum())]


@pytest.mark.parametrize("block_bytes", [16 * 2**20, 7 * 16 * 4])
@pytest.mark.parametrize("trains_head", [True, False])
def test_a_bfloat16_head_is_upcast_some_words_at_a_time(monkeypatch, block_bytes, trains_head):
    """Under float32 hidden states a bfloat16 head gives what its float32 copy gives, whatever the blocks; none of its
    casts is larger than a block.
    """
    monkeypatch.setattr(module, "_CAST_BYTES", block_bytes)
    hidden, head, labels, weights = _problem()
    head.to(torch.bfloat16).weight.requires_grad_(trains_head)
    head.weight.grad_dtype = torch.float32
    wide = torch.nn.Linear(16, 50, bias=False)
    wide.weight.data = head.weight.detach().float()
    wide.weight.requires_grad_(trains_head)
    casts = []
    original = module._blocks
    monkeypatch.setattr(
        module, "_blocks", lambda *a: (casts.append(block[1].nbytes) or block for block in original(*a))
    )
    got = supervised_loss(hidden, head, labels, weights)
    wanted = _reference(hidden, wide, labels, weights)
    assert max(casts) <= max(block_bytes, 64)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    gradients = []
    for total, weight in ((got, head.weight), (wanted, wide.weight)):
        total.backward()
        gradients.append((hidden.grad.clone(), weight.grad))
        hidden.grad = None
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    if trains_head:
        torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-5, atol=1e-6)


def test_bfloat16_hidden_states_have_a_float32_loss():
    """Products are made in bfloat16, and all that is made of logits in float32."""
    hidden, head, labels, weights = _problem(dtype=torch.bfloat16)
    got = supervised_loss(hidden, head, labels, weights)
    logits = (hidden @ head.weight.T).float()
    each = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (each * weights).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 7 * 50 * 4])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_smoothing_and_z_loss_equal_torch_over_all_logits(
    monkeypatch, chunk_bytes, adapted, label_smoothing, z_loss
):
    """With both terms the chunked loss and its gradients are those of torch's cross entropy and of logsumexp."""
    monkeypatch.setattr(module, "_LOGIT_BYTES", chunk_bytes)
    hidden, head, labels, weights = _problem()
    used = torch.nn.Sequential(head) if adapted else head
    used.out_features = 50
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    got = supervised_loss(hidden, used, labels, weights, **options)
    logits = head(hidden)
    each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    wanted = ((each + z_loss * logits.logsumexp(-1) ** 2) * weights)[labels != -100].sum()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    for mine, reference in zip(
        torch.autograd.grad(2.5 * got, [hidden, head.weight]),
        torch.autograd.grad(2.5 * wanted, [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [64 * 2**20, 7 * 50 * 4])
def test_scores_are_those_of_all_logits(monkeypatch, chunk_bytes):
    """Of each token they are what torch's cross entropy and argmax give."""
    monkeypatch.setattr(module, "_LOGIT_BYTES", chunk_bytes)
    hidden, head, labels, _ = _problem()
    with torch.no_grad():
        labels[:20] = torch.where(labels[:20] == -100, -100, head(hidden[:20]).argmax(-1))
    supervised = labels != -100
    with torch.no_grad():
        losses, likeliest = token_scores(hidden[supervised], head, labels[supervised])
        logits = head(hidden)[supervised]
    wanted = F.cross_entropy(logits, labels[supervised], reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)
    assert 0 < likeliest.sum() < supervised.sum()
    assert torch.equal(likeliest, logits.argmax(-1) == labels[supervised])


def test_gradients_of_bfloat16_weights_are_added_up_in_float32():
    """Where a weight's gradient is held in float32, two micro-batches leave the float32 sum, to 1e-6."""
    hidden, head, labels, weights = _problem()
    head.to(torch.bfloat16).weight.grad_dtype = torch.float32
    twin = torch.nn.Linear(16, 50, bias=False)
    twin.weight.data = head.weight.detach().float()
    for _ in range(2):
        supervised_loss(hidden, head, labels, weights).backward()
        _reference(hidden, twin, labels, weights).backward()
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(head.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-6)

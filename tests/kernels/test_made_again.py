from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qwenft.kernels.made_again import made_again


def _saved(loss):
    """The data pointers of what autograd keeps, by walking the graph."""
    kept, pending = set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        for name in dir(node):
            if name.startswith("_raw_saved") and isinstance(getattr(node, name), torch._C._autograd.SavedTensor):
                data = getattr(node, name).data
                if isinstance(data, torch.Tensor):
                    kept.add(data.data_ptr())
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    return kept


def _problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator, requires_grad=True)
    return x, torch.randn(4, 3, generator=generator, requires_grad=True)


def _loss(middle, weight):
    return ((middle[:, :4] * middle[:, 4:]) @ weight).sum()  # the product keeps both views


def _forward(x, weight, calls, *, again):
    middle = x.exp()

    def make():
        calls.append(1)
        return x.detach().exp()

    if not again:
        return _loss(middle, weight)
    with made_again(middle, make):
        return _loss(middle, weight)


def test_gradients_are_the_same_to_the_bit_and_it_is_made_once():
    """Two views of a tensor are made again together, and the gradients do not change by a bit."""
    x, weight = _problem()
    wanted = torch.autograd.grad(_forward(x, weight, [], again=False), [x, weight])
    calls = []
    loss = _forward(x, weight, calls, again=True)
    assert not calls
    got = torch.autograd.grad(loss, [x, weight])
    assert len(calls) == 1
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("again", [False, True])
def test_it_is_not_kept(again):
    """The products keep it where nothing is said, and do not inside."""
    x, weight = _problem()
    middle = x.detach().exp()

    def forward():
        if not again:
            return (middle[:, 4:] @ weight).sum()
        with made_again(middle, x.detach().exp):
            return (middle[:, 4:] @ weight).sum()

    loss = forward()
    kept = _saved(loss)
    assert (middle[:, 4:].data_ptr() in kept) != again


def test_checkpointing_decides_for_itself():
    """Under activation checkpointing nothing is kept for it, and gradients are the same."""
    x, weight = _problem()
    wanted = torch.autograd.grad(_forward(x, weight, [], again=False), [x, weight])
    calls = []
    loss = checkpoint(lambda: _forward(x, weight, calls, again=True), use_reentrant=False)
    got = torch.autograd.grad(loss, [x, weight])
    assert not calls
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_nothing_is_made_where_no_gradient_is_wanted():
    """Without gradients the context does nothing."""
    x, weight = _problem()
    calls = []
    with torch.no_grad():
        _forward(x, weight, calls, again=True)
    assert not calls

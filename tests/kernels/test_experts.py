"""Routed experts, against those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as configuration
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.kernels import experts as kernel
from qwenft.kernels.experts import LowRank, routed_experts
from qwenft.kernels.quantized import dense, quantize_experts

EXPERTS, PER_TOKEN, HIDDEN, WIDTH, TOKENS = 8, 3, 48, 32, 57
UNUSED = (0, 5)  # experts that no token is sent to
TOGETHER = [1, 3, EXPERTS]


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).requires_grad_()


@pytest.fixture
def routes():
    """Which experts answer each token, and their weights."""
    scores = random(TOKENS, EXPERTS, seed=7).detach()
    scores[:, UNUSED] = -torch.inf
    weights, chosen = scores.softmax(-1).topk(PER_TOKEN)
    return chosen, (weights / weights.sum(-1, keepdim=True)).requires_grad_()


@pytest.fixture
def stacks():
    """Both stacks."""
    return random(EXPERTS, 2 * WIDTH, HIDDEN, seed=1, scale=0.2), random(EXPERTS, HIDDEN, WIDTH, seed=2, scale=0.2)


def stock(x, chosen, weights, gate_up, down):
    """Transformers' eager experts."""
    config = configuration.Qwen3_5MoeTextConfig(
        num_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, hidden_size=HIDDEN, moe_intermediate_size=WIDTH
    )
    config._experts_implementation = "eager"
    module = moe.Qwen3_5MoeExperts(config)
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = gate_up, down
    return module(x, chosen, weights)


def assert_same(got, wanted, inputs, tolerance=1e-5):
    """Outputs and gradients."""
    grad = random(*wanted.shape, seed=9).detach()
    for mine, its in zip(
        [got, *torch.autograd.grad(got, inputs, grad)],
        [wanted, *torch.autograd.grad(wanted, inputs, grad)],
        strict=True,
    ):
        assert (mine - its).abs().max() <= tolerance * its.abs().max()


def pairs(rank, seed=20):
    """A pair beside each stack."""
    shapes = (
        ((EXPERTS, rank, HIDDEN), (EXPERTS, 2 * WIDTH, rank)),
        ((EXPERTS, rank, WIDTH), (EXPERTS, HIDDEN, rank)),
    )
    return [
        LowRank(random(*a, seed=seed + i), random(*b, seed=seed + 9 + i), 0.3) for i, (a, b) in enumerate(shapes)
    ]


@pytest.mark.parametrize("together", TOGETHER)
def test_outputs_and_gradients_are_those_of_transformers(routes, stacks, together):
    """Of the inputs, of the weights of the answers and of both stacks, however many experts go together."""
    x, (chosen, weights) = random(TOKENS, HIDDEN), routes
    got = routed_experts(x, chosen, weights, *stacks, together=together)
    assert_same(got, stock(x, chosen, weights, *stacks), [x, weights, *stacks])


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("rank", [2, 8])
def test_low_rank_pairs_are_added_to_each_expert(routes, stacks, together, rank):
    """Output and gradients are those of transformers' experts with the pairs' products added to the stacks."""
    x, (chosen, weights), (first, second) = random(TOKENS, HIDDEN), routes, pairs(rank)
    frozen = [stack.detach() for stack in stacks]
    got = routed_experts(x, chosen, weights, *frozen, gate_up_lora=first, down_lora=second, together=together)
    added = [stack + pair.scaling * pair.b @ pair.a for stack, pair in zip(frozen, (first, second), strict=True)]
    assert_same(
        got, stock(x, chosen, weights, *added), [x, weights, first.a, first.b, second.a, second.b], tolerance=1e-4
    )


@pytest.mark.parametrize("beside", ["gate_up_lora", "down_lora"])
def test_one_stack_alone_may_have_pairs(routes, stacks, beside):
    """The other one has none then, and no gradient is made for it."""
    x, (chosen, weights) = random(TOKENS, HIDDEN), routes
    pair = pairs(4)[beside == "down_lora"]
    frozen = [stack.detach() for stack in stacks]
    got = routed_experts(x, chosen, weights, *frozen, **{beside: pair})
    added = list(frozen)
    added[beside == "down_lora"] = added[beside == "down_lora"] + pair.scaling * pair.b @ pair.a
    assert_same(got, stock(x, chosen, weights, *added), [x, weights, pair.a, pair.b])


@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_experts_are_their_dense_ones(routes, stacks, kind, together):
    """Output and gradients are those of the dequantized stacks, with pairs beside them."""
    x, (chosen, weights), (first, second) = random(TOKENS, HIDDEN), routes, pairs(4)
    held = [quantize_experts(iter(s.detach()), s.shape, kind, double_quant=True) for s in stacks]
    options = {"gate_up_lora": first, "down_lora": second, "together": together}
    got = routed_experts(x, chosen, weights, *held, **options)
    wanted = routed_experts(x, chosen, weights, *(dense(s, torch.float32) for s in held), **options)
    assert_same(got, wanted, [x, weights, first.a, first.b, second.a, second.b], tolerance=1e-6)


def test_weights_in_bfloat16_are_multiplied_in_float32(routes, stacks):
    """Stored small and computed large: what float32 stacks of the same values give, gradients of the stacks too."""
    x, (chosen, weights) = random(TOKENS, HIDDEN), routes
    small = [stack.detach().bfloat16().requires_grad_() for stack in stacks]
    large = [stack.detach().float().requires_grad_() for stack in small]
    grad = random(TOKENS, HIDDEN, seed=9).detach()
    got, wanted = (routed_experts(x, chosen, weights, *held) for held in (small, large))
    assert torch.equal(got, wanted)
    for mine, its in zip(
        torch.autograd.grad(got, small, grad), torch.autograd.grad(wanted, large, grad), strict=True
    ):
        assert torch.equal(mine, its.bfloat16())


@pytest.mark.parametrize("rank", [4, 8])
def test_grouped_products_in_16_bits(routes, stacks, rank):
    """Together in bfloat16, as on a GPU: what one by one gives but for rounding, for odd ranks too."""
    x, (chosen, weights) = random(TOKENS, HIDDEN).detach().bfloat16().requires_grad_(), routes
    first, second = ({"a": p.a.detach().requires_grad_(), "b": p.b.detach().requires_grad_()} for p in pairs(rank))
    held = [stack.detach().bfloat16() for stack in stacks]
    inputs = [x, *first.values(), *second.values()]
    results = []
    for together in (1, EXPERTS):
        options = {"gate_up_lora": LowRank(**first, scaling=0.1), "down_lora": LowRank(**second, scaling=0.1)}
        y = routed_experts(x, chosen, weights, *held, **options, together=together)
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for one, together in zip(*results, strict=True):
        assert (one - together).abs().max() <= 3e-2 * one.abs().max()


def test_only_experts_that_are_asked_are_made_dense(routes, stacks, monkeypatch):
    """Of the others nothing is made, and never is more than one dense at a time on a CPU."""
    x, (chosen, weights) = random(TOKENS, HIDDEN), routes
    made = []
    whole = kernel.dense_experts
    monkeypatch.setattr(
        kernel,
        "dense_experts",
        lambda s, first, last, dtype: (made.append((first, last)), whole(s, first, last, dtype))[1],
    )
    routed_experts(x, chosen, weights, *(stack.detach() for stack in stacks)).sum().backward()
    assert all(last - first == 1 for first, last in made)
    assert {first for first, _ in made} == set(range(EXPERTS)) - set(UNUSED)
    assert len(made) == 4 * (EXPERTS - len(UNUSED))


def test_experts_without_a_token_get_zeros(routes, stacks):
    """Their gradients are there, and zero."""
    x, (chosen, weights) = random(TOKENS, HIDDEN), routes
    for together in TOGETHER:
        grads = torch.autograd.grad(routed_experts(x, chosen, weights, *stacks, together=together).sum(), stacks)
        for grad in grads:
            assert not grad[list(UNUSED)].any()
            assert grad[[e for e in range(EXPERTS) if e not in UNUSED]].flatten(1).any(1).all()


def test_saved_tensors_may_be_moved(routes, stacks):
    """Hooks that copy what is saved leave quantized weights usable."""
    x, (chosen, weights) = random(TOKENS, HIDDEN), routes
    held = [quantize_experts(iter(s.detach()), s.shape, "nf4", double_quant=True) for s in stacks]
    wanted = torch.autograd.grad(routed_experts(x, chosen, weights, *held).sum(), x)[0]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        got = routed_experts(x, chosen, weights, *held)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], wanted)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_and_a_stack_that_is_not_asked_a_gradient(routes, stacks, tokens):
    """A single token of generation, and one stack trained beside a frozen one."""
    chosen, weights = routes[0][:tokens], routes[1][:tokens].detach()
    x, frozen = random(tokens, HIDDEN), stacks[0].detach()
    got = routed_experts(x, chosen, weights, frozen, stacks[1])
    assert_same(got, stock(x, chosen, weights, frozen, stacks[1]), [x, stacks[1]])

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as dense
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.kernels.elementwise import rms_norm, swiglu
from qwenft.models.elementwise import fuse_elementwise

SHAPES = [(1, 8), (7, 64), (3, 65, 16), (2, 5, 3, 256)]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [dense.Qwen3_5RMSNorm, moe.Qwen3_5MoeRMSNorm])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_is_that_of_transformers(shape, cls, dtype):
    """Forward to the bit, and the gradients of input and weight, whose zero stands for one."""
    x = random(*shape, dtype=dtype)
    stock = cls(shape[-1])
    stock.weight.data = random(shape[-1], seed=1).detach() / 3
    wanted = stock(x)
    grad = random(*shape, dtype=dtype, seed=2).detach()
    wanted_x, wanted_weight = torch.autograd.grad(wanted, [x, stock.weight], grad)
    fused = fuse_elementwise(stock)
    assert type(fused) is not cls
    got = fused(x)
    got_x, got_weight = torch.autograd.grad(got, [x, fused.weight], grad)
    assert torch.equal(got, wanted)
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative(got_x, wanted_x) < limit
    assert relative(got_weight, wanted_weight) < limit
    assert got_x.dtype == dtype


@pytest.mark.parametrize("cls", [dense.Qwen3_5RMSNormGated, moe.Qwen3_5MoeRMSNormGated])
@pytest.mark.parametrize("rows", [1, 63, 130])
def test_the_gated_norm_is_that_of_transformers(rows, cls):
    """Forward to the bit, and the gradients of input, gate and weight."""
    x, gate = random(rows, 32), random(rows, 32, seed=1)
    stock = cls(32)
    stock.weight.data = random(32, seed=3).detach()
    wanted = stock(x, gate)
    grad = random(rows, 32, seed=2).detach()
    wanted_grads = torch.autograd.grad(wanted, [x, gate, stock.weight], grad)
    fused = fuse_elementwise(stock)
    got = fused(x, gate=gate)
    assert torch.equal(got, wanted)
    for mine, theirs in zip(torch.autograd.grad(got, [x, gate, fused.weight], grad), wanted_grads, strict=True):
        assert relative(mine, theirs) < 1e-6


def test_swiglu_is_its_composition():
    """silu(gate) * up and its gradients, to the bit, also on the two halves of one tensor."""
    both = random(50, 2 * 24)
    gate, up = both.chunk(2, dim=-1)
    grad = random(50, 24, seed=1).detach()
    got, wanted = swiglu(gate, up), F.silu(gate) * up
    assert torch.equal(got, wanted)
    mine, theirs = (torch.autograd.grad(y, both, grad)[0] for y in (got, wanted))
    assert relative(mine, theirs) < 1e-7


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_differences(gated):
    """In float64 every gradient is the limit of finite differences."""
    x, weight = (random(*shape, dtype=torch.float64) for shape in ((4, 6), (6,)))
    gate = random(4, 6, dtype=torch.float64, seed=5) if gated else None
    inputs = (x, weight, gate) if gated else (x, weight)
    torch.autograd.gradcheck(lambda x, w, g=None: rms_norm(x, w, 1e-3, gate=g), inputs)
    torch.autograd.gradcheck(swiglu, (x, random(4, 6, dtype=torch.float64, seed=7)))


def test_nothing_but_the_inputs_is_kept_for_backward():
    """What a norm, a gated norm and SwiGLU keep as large as their input is their input."""
    x, gate, weight = random(64, 32), random(64, 32, seed=1), torch.ones(32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rms_norm(x, weight, 1e-6)
        rms_norm(x, weight, 1e-6, gate=gate)
        swiglu(x, gate)
    large = [t.data_ptr() for t in kept if t.numel() == x.numel()]
    assert sorted(large) == sorted([x.data_ptr()] * 3 + [gate.data_ptr()] * 2)


def test_an_mlp_of_another_activation_is_left_alone():
    """Only SiLU is SwiGLU; what is fused keeps its class's name as an ancestor, and no other module is touched."""
    config = dense.Qwen3_5TextConfig(hidden_size=8, intermediate_size=16, hidden_act="gelu")
    mlp = fuse_elementwise(dense.Qwen3_5MLP(config, 16))
    assert type(mlp) is dense.Qwen3_5MLP
    config = dense.Qwen3_5TextConfig(hidden_size=8, intermediate_size=16)
    stock = dense.Qwen3_5MLP(config, 16)
    x = random(5, 8)
    wanted = stock(x)
    assert torch.equal(fuse_elementwise(stock)(x), wanted)
    assert isinstance(stock, dense.Qwen3_5MLP)
    assert type(stock) is not dense.Qwen3_5MLP
    assert type(dense.Qwen3_5MLP(config, 16)) is dense.Qwen3_5MLP

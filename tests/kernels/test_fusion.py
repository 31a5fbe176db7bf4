from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from qwenft.kernels.elementwise import rms_norm, swiglu
from qwenft.kernels.fusion import compile_seconds, fusible, fusion

# torch's own compiler uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

FUNCTIONS = {
    "norm": lambda x, weight, _: rms_norm(x, weight, 1e-6),
    "gated norm": lambda x, weight, gate: rms_norm(x, weight, 1e-6, gate=gate),
    "swiglu": lambda x, _, gate: swiglu(x, gate),
}


def answers(function, tokens, dtype):
    """A result and its gradients."""
    generator = torch.Generator().manual_seed(tokens)
    x, gate, grad = (torch.randn(tokens, 48, generator=generator).to(dtype) for _ in range(3))
    leaves = [x.requires_grad_(), torch.linspace(0.5, 1.5, 48).requires_grad_(), gate.requires_grad_()]
    result = function(*leaves)
    gradients = torch.autograd.grad(result, leaves, grad, allow_unused=True)
    return [result, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_kernels_compute_what_eager_ones_do(name, dtype):
    """Results and gradients agree to the dtype's rounding, and another number of tokens compiles nothing new."""
    limit = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    graphs, before = [], compile_seconds()
    for tokens in (5, 64, 33):
        wanted = answers(FUNCTIONS[name], tokens, dtype)
        with fusion(asked=True):
            found = answers(FUNCTIONS[name], tokens, dtype)
        graphs.append(counters["stats"]["unique_graphs"])
        for got, expected in zip(found, wanted, strict=True):
            assert got.dtype == expected.dtype
            assert (got - expected).norm() <= limit * expected.norm()
    assert graphs[-1] == graphs[0] > 0
    assert compile_seconds() > before


def test_nothing_is_compiled_unless_it_is_asked_for():
    """Outside of fusion a function is called as it was written, also after an error within."""
    compiling = []

    @fusible
    def doubled(x):
        compiling.append(torch.compiler.is_compiling())
        return 2 * x

    x = torch.ones(3)
    with fusion(asked=True):
        assert torch.equal(doubled(x), 2 * x)
    assert not compiling or all(compiling)
    compiling.clear()
    with pytest.raises(ZeroDivisionError), fusion(asked=True):
        raise ZeroDivisionError
    doubled(x)
    assert compiling == [False]

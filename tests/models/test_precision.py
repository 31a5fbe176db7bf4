from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

from qwenft.models.precision import CastEmbedding, RoutedExperts, cast_matmul

from .helpers import bound, documents, packed_logits, relative


def test_a_stored_weight_is_multiplied_as_its_upcast_copy():
    """A bfloat16 weight under float32 inputs gives, forward and backward, what its float32 copy gives, to the bit."""
    x = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(5, 8).bfloat16()
    got, wanted = cast_matmul(x, weight), F.linear(x, weight.float())
    assert torch.equal(got, wanted)
    grad = torch.randn(9, 5)
    assert torch.equal(torch.autograd.grad(got, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])


def test_no_float32_copy_of_a_stored_weight_is_kept_for_backward():
    """What backward keeps of a bfloat16 weight is the weight itself."""
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(5, 8).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.dtype), t)[1], lambda t: t):
        cast_matmul(x, weight)
    assert torch.float32 not in kept


def test_a_trained_weight_gets_its_gradient_in_its_own_dtype():
    """A float32 weight under bfloat16 inputs receives a float32 gradient near the exact one."""
    x = torch.randn(64, 8)
    weight = torch.randn(5, 8, requires_grad=True)
    cast_matmul(x.bfloat16(), weight).float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert relative(weight.grad, x.sum(0).expand(5, 8)) < 2e-2


def test_bfloat16_storage_computes_in_float32(checkpoint):
    """A checkpoint stored in bfloat16 and computed in float32 gives the logits of its upcast copy."""
    stored = bound(checkpoint, dtype="bfloat16", compute="float32")
    weights = {p.dtype for n, p in stored.named_parameters() if "A_log" not in n and ".norm." not in n}
    assert torch.bfloat16 in weights
    upcast = bound(checkpoint, dtype="bfloat16", compute="float32").float()
    with torch.no_grad():
        for got, wanted in zip(
            packed_logits(stored, documents()),
            packed_logits(upcast, documents()),
            strict=True,
        ):
            assert got.dtype == torch.float32
            assert relative(got, wanted) < 1e-6


def test_float32_islands_survive_bfloat16_loading(checkpoint):
    """A_log, dt_bias and the GDN norm stay float32, and keep the values of the file."""
    model = bound(checkpoint, dtype="bfloat16", compute="float32")
    layer = model.model.layers[0].linear_attn
    assert {layer.A_log.dtype, layer.dt_bias.dtype, layer.norm.weight.dtype} == {torch.float32}
    assert torch.allclose(layer.A_log, torch.tensor(-3.0))


def test_sorted_experts_equal_the_experts_of_transformers():
    """Experts over sorted tokens give output and gradients of transformers' loop over experts."""
    config = moe.Qwen3_5MoeTextConfig(
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=6,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    stock = moe.Qwen3_5MoeExperts(config)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(40, 16, requires_grad=True)
    scores, chosen = torch.rand(40, 6).topk(2)
    chosen[:, 0] = chosen[:, 0] % 4  # some experts are visited by nobody
    results = []
    for cls in (moe.Qwen3_5MoeExperts, RoutedExperts):
        stock.__class__ = cls
        output = stock(x, chosen, scores)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *stock.parameters()])])
    for wanted, got in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-5


def test_a_frequent_token_keeps_its_gradient():
    """2,000 uses of one bfloat16 row add up in the compute dtype; the padding row is spared, as torch spares it."""
    table = CastEmbedding(8, 4, padding_idx=3, dtype=torch.bfloat16)
    table.compute_dtype = torch.float32
    table.weight.grad_dtype = torch.float32
    ids = torch.cat([torch.full((2000,), 5), torch.tensor([3, 1, 5])])
    grad = torch.rand(len(ids), 4)
    assert torch.equal(table(ids), table.weight.detach().float()[ids])
    table(ids).backward(grad)
    wanted = torch.zeros(8, 4, dtype=torch.float64).index_add_(0, ids, grad.double())
    wanted[3] = 0
    assert relative(table.weight.grad.double(), wanted) < 1e-6

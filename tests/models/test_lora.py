from __future__ import annotations

import copy

import peft
import pytest
import torch

from qwenft.kernels.lora import lora_product
from qwenft.models.lora import add_lora
from qwenft.models.lora_layers import LoraLinear
from qwenft.models.precision import CastLinear

ROWS = [(1, 8), (5, 8), (2, 7, 8)]


class Two(torch.nn.Module):
    """Two projections of one input."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 12, bias=False, dtype=dtype)
        self.second = torch.nn.Linear(8, 6, bias=False, dtype=dtype)
        self.config = {}
        for linear in (self.first, self.second):
            linear.__class__ = CastLinear

    def forward(self, x):
        """Both outputs side by side."""
        return torch.cat([self.first(x), self.second(x)], dim=-1)


def adapted(dtype=torch.float32, **options):
    """A model with LoRA whose B is not zero."""
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["first", "second"], **options)
    model = add_lora(Two(dtype), config, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def stock(model):
    """The same model with peft's own layers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = peft.tuners.lora.Linear
    return twin


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).requires_grad_()


def count_products(monkeypatch):
    """How often the fused node is used."""
    calls = []
    monkeypatch.setattr(
        "qwenft.models.lora_layers.lora_product", lambda *a: (calls.append(1), lora_product(*a))[1]
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_output_and_gradients_are_those_of_peft(shape, dtype, monkeypatch):
    """The fused layer gives what peft's gives: output, and the gradients of input, A and B; the base gets none."""
    calls = count_products(monkeypatch)
    model = adapted(dtype)
    twin = stock(model)
    x, grad = random(*shape), random(*shape[:-1], 18, seed=1).detach()
    results = []
    for each in (model, twin):
        y = each(x)
        trained = {name: p for name, p in each.named_parameters() if p.requires_grad}
        results.append([y, *torch.autograd.grad(y, [x, *trained.values()], grad)])
        assert all("lora_" in name for name in trained)
    assert len(calls) == 2
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_differences():
    """In float64 every gradient is the limit of finite differences."""
    x, a, b = (random(*shape).detach().double().requires_grad_() for shape in ((4, 8), (3, 8), (5, 3)))
    weight = random(5, 8).detach().double()
    torch.autograd.gradcheck(lambda x, a, b: lora_product(x, weight, a, b, 0.7), (x, a, b))


@pytest.mark.filterwarnings("ignore:.*merging LoRA weights won't be possible")
@pytest.mark.parametrize(
    ("options", "training"),
    [({"use_dora": True}, False), ({"lora_dropout": 0.5}, True), ({"lora_bias": True}, False)],
    ids=["dora", "dropout", "bias"],
)
def test_what_is_not_plain_goes_through_peft(monkeypatch, options, training):
    """DoRA, dropout in training and biases are peft's own."""
    calls = count_products(monkeypatch)
    model = adapted(**options).train(training)
    twin = stock(model)
    x = random(5, 8)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    assert calls == []


def test_dropout_in_evaluation_is_plain(monkeypatch):
    """Where nothing is dropped the node is used."""
    calls = count_products(monkeypatch)
    model = adapted(lora_dropout=0.5).eval()
    torch.testing.assert_close(model(random(5, 8)), stock(model)(random(5, 8)))
    assert len(calls) == 2


def test_several_adapters_disabled_and_merged_ones_go_through_peft(monkeypatch):
    """Peft's switches work: two active adapters, none, and one that is merged into the weight."""
    model = adapted()
    x = random(5, 8)
    plain = model(x)
    calls = count_products(monkeypatch)
    with model.disable_adapter():
        assert torch.equal(model(x), Two()(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain)
    model.unmerge_adapter()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(model.first(x), stock(model).first(x))
    assert calls == []


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_hooks_are_called(part):
    """A hook on a module inside the layer sees it called, and changes what it changes."""
    model = adapted()
    layer = model.base_model.model.first
    module = getattr(layer, part)
    module = module["default"] if part != "base_layer" else module
    seen = []
    module.register_forward_hook(lambda _module, _inputs, output: (seen.append(1), output * 2)[1])
    x = random(5, 8)
    assert torch.equal(model(x), stock(model)(x))
    assert len(seen) >= 1


def test_projections_of_one_input_keep_it_once():
    """What backward keeps of the input is the input itself, for every projection of it."""
    model, x, kept = adapted(), random(64, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    tall = [t for t in kept if t.shape[0] == 64]
    assert {t.data_ptr() for t in tall if t.shape[1] == 8} == {x.data_ptr()}
    assert sorted(t.shape[1] for t in tall) == [3, 3, 8, 8]  # and a column for each rank


def test_nothing_as_large_as_the_output_is_made_beside_it():
    """The low-rank part is added in place: forward makes one tensor of the output's size."""
    made = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == 64 * 12:
                made.append(out.untyped_storage().data_ptr())
            return out

    x, layer = random(64, 8), adapted().base_model.model.first
    with Counting():
        y = layer(x)
    assert set(made) == {y.data_ptr()}

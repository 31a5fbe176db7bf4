"""Adapters beside quantized weights: trained, saved, merged, and taken up by stock peft and transformers."""

from __future__ import annotations

import copy
import itertools

import peft
import pytest
import torch
import transformers

import qwenft as qf
from qwenft.kernels.quantized import dense, is_quantized
from qwenft.models.bind import causal_of
from qwenft.models.precision import CastRouter, RoutedExperts
from qwenft.models.weights import canonical

from .helpers import relative

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four", "five", "six")
]
ALL = ("full_attention", "linear_attention", "linear_attention_gates", "shared_expert", "routed_experts", "router")
EXPERTS = qf.AdapterSpec.lora(rank=4).on(*ALL).with_rank(routed_experts=2)
CASES = {
    "nf4": ("dense", "nf4", {}, qf.AdapterSpec.lora(rank=4)),
    "int8": ("dense", "int8", {}, qf.AdapterSpec.lora(rank=4)),
    "nf4-dora": ("dense", "nf4", {}, qf.AdapterSpec.lora(rank=4, dora=True)),
    "int8-dora": ("dense", "int8", {}, qf.AdapterSpec.lora(rank=4, dora=True)),
    "nf4-experts": ("moe", "nf4", {}, EXPERTS),
    "int8-experts": ("moe", "int8", {}, EXPERTS),
    "nf4-rslora": ("moe", "nf4", {"double_quant": False}, qf.AdapterSpec.lora(rank=4, rslora=True).on(*ALL)),
    "plain-experts": ("moe", "nf4", {"experts": False}, EXPERTS),
    "frozen-experts": ("moe", "nf4", {}, qf.AdapterSpec.lora(rank=4)),
    "tower": ("dense", "nf4", {"vision": True}, qf.AdapterSpec.lora(rank=4)),
    "int8-tower": ("moe", "int8", {"vision": True}, EXPERTS),
}


def plan_of(case, checkpoints, **training):
    kind, quantization, options, adapter = CASES[case]
    return qf.Recipe(
        qf.ModelSpec(checkpoints[kind], dtype="float32", vision="vision" in options).quantize(
            quantization, **options
        ),
        qf.DataSpec.messages(CHATS).with_max_length(64).pack(),
        adapter,
        training=qf.TrainingSpec(**{"learning_rate": 1e-2, "epochs": 3, "warmup_ratio": 0.0, **training}),
    ).compile()


@pytest.fixture(scope="module")
def checkpoints(dense_checkpoint, moe_checkpoint):
    """By kind."""
    return {"dense": dense_checkpoint, "moe": moe_checkpoint}


#: The others are tried in `make test-long`.
ALWAYS = ("nf4", "nf4-dora", "int8", "nf4-experts", "int8-experts", "tower")


@pytest.fixture(
    scope="module",
    params=[case if case in ALWAYS else pytest.param(case, marks=pytest.mark.long) for case in CASES],
)
def run(request, checkpoints, tmp_path_factory):
    """A short run of each kind, in float32."""
    return plan_of(request.param, checkpoints).train(tmp_path_factory.mktemp(request.param) / "run", verbose=0)


def logits(run, model):
    """The run's logits on a batch, and another model's, document by document."""
    batch = next(run.prepared.batches())[0]
    run.prepared.model.eval()
    with torch.no_grad():
        mine = run.prepared.logits(batch)
        rows = [model(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(batch.layout.lengths)]
    return mine, torch.cat(rows)


def dense_base(run):
    """The stock class that is published, with the weights that the run computes with."""
    base = transformers.AutoModelForImageTextToText.from_pretrained(run.plan.recipe.model.source)
    named = {canonical(name): parameter for name, parameter in base.named_parameters()}
    count = 0
    with torch.no_grad():
        for name, held in causal_of(run.prepared.model).named_parameters():
            if is_quantized(held):
                named[canonical(name.replace(".base_layer", ""))].copy_(dense(held, torch.float32))
                count += 1
    assert count > 10
    return base


# peft asks transformers by the older of two names, and looks for ranks of parameters among modules alone.
PEFT_WARNS = (
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:The following rank_pattern:RuntimeWarning",
)


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.usefixtures("without_fla")
def test_adapter_in_stock_peft_gives_the_runs_logits(run):
    """The saved adapter, put by stock peft on the unquantized stock class with the dequantized weights."""
    mine, theirs = logits(run, peft.PeftModel.from_pretrained(dense_base(run), run.adapter_path).eval())
    assert relative(mine, theirs) < 1e-5


@pytest.mark.usefixtures("without_fla")
def test_merged_into_dequantized_weights_it_gives_the_runs_logits(run, tmp_path):
    """Plain transformers loads it and computes what the run did."""
    path = run.export(tmp_path / "merged", base="dequantized")
    mine, theirs = logits(run, transformers.AutoModelForCausalLM.from_pretrained(path).eval())
    assert relative(mine, theirs) < 1e-4


@pytest.mark.filterwarnings(*PEFT_WARNS)
@pytest.mark.usefixtures("without_fla")
def test_merged_into_the_checkpoint_it_gives_the_base_with_the_adapter(run, tmp_path):
    """The weights of the original, with the adapter as stock peft puts it there."""
    source = run.plan.recipe.model.source
    merged = transformers.AutoModelForCausalLM.from_pretrained(run.export(tmp_path / "merged")).eval()
    base = transformers.AutoModelForImageTextToText.from_pretrained(source)
    with_adapter = peft.PeftModel.from_pretrained(base, run.adapter_path).eval()
    mine, wanted = logits(run, with_adapter)
    assert relative(logits(run, merged)[1], wanted) < 1e-5
    assert relative(mine, wanted) > 1e-3  # what quantization rounds


def test_exporting_leaves_the_run_as_it_was(run, tmp_path):
    """No weight of the model, and no adapter, is another one afterwards."""
    before = {name: p.detach().clone() for name, p in run.prepared.model.named_parameters()}
    for base in ("checkpoint", "dequantized"):
        run.export(tmp_path / base, base=base)
    after = dict(run.prepared.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], p) for name, p in after.items())


def test_every_adapter_tensor_learns(run):
    """After a step every A and every B has a gradient."""
    prepared = run.prepared
    prepared.model.train()
    prepared.optimizer.zero_grad()
    for batches in prepared.batches():
        for batch in batches:
            prepared.loss(batch).total.backward()
    gradients = {name: parameter.grad for name, parameter in prepared.trained.items()}
    prepared.optimizer.zero_grad()
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    experts = [name for name in gradients if "experts" in name and "shared" not in name]
    assert len(experts) == (16 if "routed_experts" in (run.plan.recipe.adapter.roles or ()) else 0)


@pytest.mark.parametrize("case", ["nf4", "nf4-experts", "int8-experts"])
def test_losses_under_checkpointing_are_the_same_to_the_bit(case, checkpoints):
    """Computing layers again makes the same routes and dequantizes the same weights."""
    losses = []
    for every in (0, 1):
        prepared = plan_of(case, checkpoints, activation_checkpointing=every).prepare()
        losses.append(
            [prepared.step(batches).loss for batches in itertools.chain(*map(prepared.batches, range(3)))]
        )
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == len(losses[0])


def test_routes_are_the_same_when_layers_are_computed_again(checkpoints):
    """Each router is asked twice a step under checkpointing, and chooses the same experts to the bit."""
    prepared = plan_of("nf4-experts", checkpoints, activation_checkpointing=1).prepare()
    chosen = {}
    for name, module in prepared.model.named_modules():
        if isinstance(module, CastRouter):
            module.register_forward_hook(
                lambda _, __, output, name=name: chosen.setdefault(name, []).append(
                    [part.detach() for part in output]
                )
            )
    prepared.step(next(prepared.batches()))
    assert len(chosen) == 4
    for asked in chosen.values():
        assert len(asked) == 2
        assert all(torch.equal(first, again) for first, again in zip(*asked, strict=True))


@pytest.mark.parametrize("case", ["nf4-experts", "int8"])
def test_a_run_goes_on_from_its_checkpoint(case, checkpoints, tmp_path):
    """The trained parameters alone are saved, and the rest is quantized again to the same bits."""
    whole = plan_of(case, checkpoints).prepare()
    steps = list(itertools.chain(*map(whole.batches, range(4))))
    whole.step(steps[0])
    whole.save(tmp_path / "checkpoint")
    wanted = [whole.step(batches).loss for batches in steps[1:]]
    again = plan_of(case, checkpoints).prepare()
    again.load(tmp_path / "checkpoint")
    assert [again.step(batches).loss for batches in steps[1:]] == wanted


def test_weights_in_bfloat16_and_a_quantized_tower_answer(checkpoints):
    """Stored in 16 and 4 bits and computed in float32, every part of the model runs, with its cache too."""
    spec = qf.ModelSpec(checkpoints["moe"], vision=True).quantize("nf4", vision=True)
    plan = plan_of("nf4-experts", checkpoints).recipe.with_model(spec).compile()
    prepared = plan.prepare()
    assert prepared.step(next(prepared.batches())).loss > 0
    model = prepared.model.eval()
    ids = prepared.tokenizer("Say one", return_tensors="pt")["input_ids"]
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    for _ in range(len(generated)):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert ids[0, -len(generated) :].tolist() == generated.tolist()
    pixels = torch.randn(64, 3 * 2 * 16 * 16)
    features = causal_of(model).model.visual(pixels, torch.tensor([[1, 8, 8]]))
    assert features.last_hidden_state.isfinite().all()


@pytest.mark.long
def test_a_run_from_a_quantized_copy_is_the_same(checkpoints, tmp_path):
    """Without the original: losses equal to the bit; exported with dequantized weights, or not at all."""
    plan = plan_of("nf4-experts", checkpoints)
    copied = plan.recipe.with_model(plan.save_quantized(tmp_path / "copy")).compile()
    runs = [p.train(tmp_path / name, verbose=0) for name, p in (("of", plan), ("from", copied))]
    losses = [[record["loss"] for record in run.history if "loss" in record] for run in runs]
    assert losses[0] == losses[1]
    with pytest.raises(qf.CheckpointError, match=r"(?s)no weights of 16 bits to merge into.*dequantized"):
        runs[1].export(tmp_path / "merged")
    exported = [run.export(tmp_path / f"{n}-merged", base="dequantized") for n, run in enumerate(runs)]
    models = [transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in exported]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], rtol=0, atol=1e-6), name
    with pytest.raises(qf.SpecError, match=r"base='dequantised'\).*did you mean"):
        runs[0].export(tmp_path / "other", base="dequantised")


@pytest.mark.filterwarnings(*PEFT_WARNS)
def test_several_adapters_on_experts_add_up(checkpoints):
    """Two active adapters give what their sum gives, and a disabled one gives the base."""
    model = plan_of("nf4-experts", checkpoints).prepare().model
    layer = next(m for m in model.modules() if getattr(m, "parameter_name", "") in ("down_proj", "gate_up_proj"))
    experts = layer.get_base_layer()
    assert isinstance(experts, RoutedExperts)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    inputs = (torch.randn(9, 64), torch.randint(0, 8, (9, 2)), torch.rand(9, 2))
    once = layer(*inputs)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    for each in (layer, layer.base_layer):
        for half in (each.lora_A, each.lora_B):
            half["second"].weight.data.copy_(half["default"].weight.data)
        each.set_adapter(["default", "second"])
    twice = layer(*inputs)
    for each in (layer, layer.base_layer):
        each.scaling["default"] *= 2
        each.set_adapter(["default"])
    assert relative(twice, layer(*inputs)) < 1e-5
    assert relative(twice, once) > 1e-2
    layer.enable_adapters(enabled=False)
    layer.base_layer.enable_adapters(enabled=False)
    assert torch.equal(layer(*inputs), experts(*inputs))
    with pytest.raises(qf.SpecError, match="cannot be merged in memory"):
        layer.merge()

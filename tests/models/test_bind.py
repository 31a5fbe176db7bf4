from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref

import pytest
import torch
import transformers

from qwenft import backends
from qwenft.models.bind import bind, causal_of, hidden_states
from qwenft.models.loss import supervised_loss
from qwenft.plan.storage import Storage
from qwenft.testing import TinySizes, stock_logits, tiny_checkpoint

from .helpers import LENGTHS, batch_of, bound, documents, next_token_labels, packed_logits, relative


@pytest.fixture(scope="module")
def stock(dense_checkpoint, moe_checkpoint):
    """What stock transformers says of each document alone, by checkpoint."""
    docs = documents()
    labels = [next_token_labels(document) for document in docs]
    return {
        path: stock_logits(path, docs, labels=labels, gradients=True)
        for path in (dense_checkpoint, moe_checkpoint)
    }


@pytest.mark.parametrize(
    ("full", "linear"), [("sdpa", "torch"), ("eager", "reference"), ("flex_attention", "torch")]
)
def test_packed_logits_equal_stock_document_by_document(checkpoint, stock, full, linear):
    """Every document of a packed row has the logits that stock transformers gives it alone."""
    model = bound(checkpoint, full=full, linear=linear)
    with torch.no_grad():
        packed = packed_logits(model, documents())
    for length, got, wanted in zip(LENGTHS, packed, stock[checkpoint].logits, strict=True):
        assert relative(got, wanted) < 1e-4, length


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_equal_stock(checkpoint, stock, checkpointing):
    """The packed loss and the gradient of each parameter are those of stock, with checkpointing and without."""
    model = bound(checkpoint).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(documents())
    total = supervised_loss(hidden_states(model, batch.input_ids, batch.layout), model.lm_head, batch.labels)
    loss = total / batch.tokens
    loss.backward()
    assert loss.item() == pytest.approx(stock[checkpoint].loss, rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == stock[checkpoint].gradients.keys()
    for name, wanted in stock[checkpoint].gradients.items():
        assert relative(gradients[name], wanted) < 1e-4, name


@pytest.fixture(scope="module")
def ends_with_gated_deltanet(tmp_path_factory):
    """A model whose last layer is no full attention."""
    return tiny_checkpoint(tmp_path_factory.mktemp("five") / "model", sizes=TinySizes(layers=5), a_log=-3.0)


@pytest.mark.parametrize("kind", ["dense", "moe", "five"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_leaves_out_what_nobody_asks_for(
    kind, checkpointing, dense_checkpoint, moe_checkpoint, ends_with_gated_deltanet
):
    """Wanted positions have the hidden states and the gradients of a full pass; the last MLP sees no others."""
    path = {"dense": dense_checkpoint, "moe": moe_checkpoint, "five": ends_with_gated_deltanet}[kind]
    model = bound(path).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(documents())
    wanted = torch.arange(batch.layout.total)[2::3]
    weight = torch.randn(len(wanted), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    seen = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    found = []
    for asked in (None, wanted):
        hidden = hidden_states(model, batch.input_ids, batch.layout, wanted=asked)
        hidden = hidden[wanted] if asked is None else hidden
        gradients = torch.autograd.grad((hidden * weight).sum(), list(model.parameters()), allow_unused=True)
        found.append((hidden.detach(), gradients))
    (all_hidden, all_gradients), (hidden, gradients) = found
    assert set(seen) == {batch.layout.total, len(wanted)}
    assert relative(hidden, all_hidden) < 1e-6
    for (name, _), got, expected in zip(model.named_parameters(), gradients, all_gradients, strict=True):
        assert (got is None) == (expected is None), name
        assert got is None or relative(got, expected) < 1e-5, name


def test_what_is_made_again_is_not_kept(dense_checkpoint):
    """After the forward pass nobody holds the inputs of the projections that end attention, GDN and MLP, trained."""
    model = bound(dense_checkpoint).train()
    inputs = {}

    def watch(name):
        def hook(_, arguments):
            inputs[name] = weakref.ref(arguments[0].untyped_storage())

        return hook

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "out_proj", "down_proj", "gate_proj")):
            module.register_forward_pre_hook(watch(name))
    batch = batch_of(documents())
    hidden = hidden_states(model, batch.input_ids, batch.layout)
    kept = {name.split(".")[-1] for name, storage in inputs.items() if storage() is not None}
    assert kept == {"gate_proj"}
    hidden.sum().backward()


def test_changing_one_document_changes_no_other(checkpoint):
    """The logits of other documents stay, to the bit where all tokens go through the same products."""
    model = bound(checkpoint)
    docs = documents()
    with torch.no_grad():
        before = packed_logits(model, docs)
        for changed in range(len(docs)):
            other = copy.deepcopy(docs)
            other[changed] = [(token + 7) % 500 for token in other[changed]]
            after = packed_logits(model, other)
            for index, (first, second) in enumerate(zip(before, after, strict=True)):
                if index == changed:
                    assert not torch.equal(first, second)
                elif "moe" in model.config.model_type:
                    assert relative(second, first) < 1e-6
                else:
                    assert torch.equal(first, second), (changed, index)


def test_activation_checkpointing_recomputes_every_layer(dense_checkpoint):
    """With checkpointing each layer's backend is called twice a step, without it once."""
    calls = {}
    for checkpointing in (False, True):
        count = 0

        class Counting(backends.TorchDeltaRule):
            def delta_rule(self, *args, **kwargs):
                nonlocal count
                count += 1
                return super().delta_rule(*args, **kwargs)

        model = bound(dense_checkpoint).train()
        bind(model, full=backends.full("sdpa"), linear=Counting())
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = batch_of(documents([20, 30]))
        supervised_loss(
            hidden_states(model, batch.input_ids, batch.layout),
            model.lm_head,
            batch.labels,
        ).backward()
        calls[checkpointing] = count
    assert calls == {False: 3, True: 6}


def test_another_model_of_the_process_stays_stock(dense_checkpoint):
    """Binding one model changes neither the classes of another nor the library's."""
    before = transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet.forward
    bound(dense_checkpoint)
    other = transformers.AutoModelForCausalLM.from_pretrained(dense_checkpoint)
    names = {type(module).__name__ for module in other.modules()}
    assert not [name for name in names if name.startswith(("Bound", "Cast", "Sorted"))]
    assert transformers.models.qwen3_5.modeling_qwen3_5.Qwen3_5GatedDeltaNet.forward is before


def test_config_and_class_stay_as_they_were(checkpoint):
    """A bound model still is the class of transformers, with its own configuration."""
    model = bound(checkpoint)
    stock_class = getattr(transformers, type(model).__name__)
    assert type(model) is stock_class
    assert stock_class._keep_in_fp32_modules_strict is None
    assert type(model).__module__.startswith("transformers.")


def test_without_a_layout_it_behaves_as_stock(checkpoint, stock):
    """A bound model that is called as transformers calls it gives stock's logits, FLA installed or not."""
    model = bound(checkpoint)
    with torch.no_grad():
        for document, wanted in zip(documents(), stock[checkpoint].logits, strict=True):
            got = model(input_ids=torch.tensor([document])).logits[0]
            assert relative(got, wanted) < 1e-4


STOCK_GENERATION = """
import json, sys
for package in ("fla", "causal_conv1d"):
    sys.modules[package] = None  # transformers would choose their kernels, which need a GPU
import torch, transformers
checkpoint, ids, mask, tokens = json.loads(sys.stdin.read())
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
answers = model.generate(
    input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=tokens, min_new_tokens=tokens,
    do_sample=False, pad_token_id=0,
)
print(json.dumps(answers.tolist()))
"""


@pytest.mark.parametrize("linear", ["torch", pytest.param("one by one", marks=pytest.mark.long)])
def test_greedy_generation_equals_stock_token_for_token(checkpoint, linear):
    """64 tokens of four left-padded prompts are stock's, with a backend that packs and one that cannot."""

    class OneByOne(backends.TorchDeltaRule):
        supports_packing = False

        def delta_rule(self, *inputs, layout, **options):
            assert len(layout) == 1
            return super().delta_rule(*inputs, layout=layout, **options)

    prompts = documents((5, 70, 1, 33), seed=3)
    width, tokens = max(map(len, prompts)), 64
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    done = subprocess.run(
        [sys.executable, "-c", STOCK_GENERATION],
        input=json.dumps([str(checkpoint), ids, mask, tokens]),
        capture_output=True,
        text=True,
        check=True,
    )
    model = bound(checkpoint)
    bind(
        model, full=backends.full("sdpa"), linear=OneByOne() if linear == "one by one" else backends.linear(linear)
    )
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    answers = model.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    assert answers.shape == (4, width + tokens)
    assert answers.tolist() == json.loads(done.stdout.splitlines()[-1])


def test_the_model_inside_a_peft_model_is_found(dense_checkpoint):
    """causal_of gives the model of transformers, wrapped or not."""
    model = bound(dense_checkpoint)
    assert causal_of(model) is model


def test_vision_language_class_trains_on_the_same_stream(dense_checkpoint, stock):
    """The whole vision-language class, bound, gives the text half's logits."""
    from qwenft.models.checkpoint import architecture_of
    from qwenft.models.load import load_model
    from qwenft.specs.model import ModelSpec

    model = load_model(
        dense_checkpoint, architecture_of(ModelSpec(dense_checkpoint)), storage=Storage("float32")
    ).eval()
    bind(model, full=backends.full("sdpa"), linear=backends.linear("torch"))
    with torch.no_grad():
        packed = packed_logits(model, documents())
    for got, wanted in zip(packed, stock[dense_checkpoint].logits, strict=True):
        assert relative(got, wanted) < 1e-4


GRIDS = [[1, 4, 6], [2, 2, 4], [1, 8, 2]]


@pytest.fixture(scope="module", params=["vision", "moe-vision"])
def tower(request, tmp_path_factory):
    """The stock tower of a tiny checkpoint."""
    from qwenft.models.checkpoint import architecture_of
    from qwenft.models.load import load_model
    from qwenft.specs.model import ModelSpec

    path = tiny_checkpoint(tmp_path_factory.mktemp("tower") / "checkpoint", request.param)
    return load_model(path, architecture_of(ModelSpec(path)), storage=Storage("float32")).model.visual.eval()


class _OneImage(backends.EagerAttention):
    """An attention that cannot keep images apart."""

    supports_packing = False

    def attend(self, query, key, value, *, layout, scale, causal=True):
        assert len(layout) == 1
        return super().attend(query, key, value, layout=layout, scale=scale, causal=causal)


@pytest.mark.parametrize(
    "backend",
    [backends.full("eager"), backends.full("sdpa"), backends.full("flex_attention"), _OneImage()],
    ids=repr,
)
def test_a_bound_tower_equals_the_stock_one(tower, backend):
    """Images and frames of every size have the features, and the tower the gradients, that stock gives them."""
    ours = bind(copy.deepcopy(tower), full=backend, linear=backends.linear("torch"), vision=backend)
    patches = sum(frames * height * width for frames, height, width in GRIDS)
    pixels = torch.randn(patches, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    features = [model(pixels, grid_thw=torch.tensor(GRIDS)).pooler_output for model in (ours, tower)]
    assert relative(*features) < 1e-5
    weights = torch.randn(features[0].shape, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad(f, list(model.parameters()), weights)
        for f, model in zip(features, (ours, tower), strict=True)
    ]
    for name, got, wanted in zip(dict(tower.named_parameters()), *gradients, strict=True):
        assert relative(got, wanted) < 1e-4 or wanted.abs().max() < 1e-6, name
    assert type(tower).__name__.startswith("Qwen3_5")


def test_a_bound_tower_keeps_images_apart(tower):
    """Other pixels in one image leave the features of the others as they were, to the bit."""
    ours = bind(
        copy.deepcopy(tower),
        full=backends.full("sdpa"),
        linear=backends.linear("torch"),
        vision=backends.full("sdpa"),
    )
    pixels = torch.randn(24 + 16 + 16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    other = torch.cat([pixels[:24], -pixels[24:40], pixels[40:]])
    with torch.no_grad():
        before, after = (ours(x, grid_thw=torch.tensor(GRIDS)).pooler_output for x in (pixels, other))
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[10:], after[10:])
    assert not torch.equal(before[6:10], after[6:10])

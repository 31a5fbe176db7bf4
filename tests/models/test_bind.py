from __future__ import annotations

import copy

import pytest
import torch
import transformers

from qwenft import backends
from qwenft.models.bind import bind, causal_of, hidden_states
from qwenft.models.loss import supervised_loss
from qwenft.testing import stock_logits

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


@pytest.mark.parametrize(("full", "linear"), [("sdpa", "torch"), ("eager", "reference")])
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


def test_left_padding_and_cache_change_nothing(checkpoint):
    """Greedy answers of a left-padded batch are those of each prompt alone, token by token without a cache."""
    model = bound(checkpoint)
    prompts = documents([5, 12, 30, 70])
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    answers = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
    for prompt, answer in zip(prompts, answers, strict=True):
        stream = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                stream.append(int(packed_logits(model, [stream])[0][-1, : model.config.vocab_size].argmax()))
        assert answer.tolist() == stream[len(prompt) :]


def test_the_model_inside_a_peft_model_is_found(dense_checkpoint):
    """causal_of gives the model of transformers, wrapped or not."""
    model = bound(dense_checkpoint)
    assert causal_of(model) is model


def test_vision_language_class_trains_on_the_same_stream(dense_checkpoint, stock):
    """The whole vision-language class, bound, gives the text half's logits."""
    from qwenft.models.checkpoint import architecture_of
    from qwenft.models.load import load_model
    from qwenft.specs.model import ModelSpec

    model = load_model(dense_checkpoint, architecture_of(ModelSpec(dense_checkpoint)), dtype="float32").eval()
    bind(model, full=backends.full("sdpa"), linear=backends.linear("torch"))
    with torch.no_grad():
        packed = packed_logits(model, documents())
    for got, wanted in zip(packed, stock[dense_checkpoint].logits, strict=True):
        assert relative(got, wanted) < 1e-4

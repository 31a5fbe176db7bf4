from __future__ import annotations

import json
import math
import shutil

import attrs
import pytest
import torch

import qwenft as qf
from qwenft.data.stream import Batch
from qwenft.training.prepare import checkpoint_activations

from .helpers import chats, recipe

SPLITS = ((9,), (1,) * 9, (2, 1, 6), (1, 5, 3), (2, 7))


# Nine sums of float32 in place of one: 4e-7 is measured for the dense model, 1.03e-6 for the routed one.
@pytest.mark.parametrize(("kind", "limit"), [("dense", 1e-6), ("moe", 2e-6)])
@pytest.mark.parametrize("adapter", [None, qf.AdapterSpec.lora(rank=4)], ids=["full", "lora"])
def test_gradients_do_not_depend_on_the_micro_batches(request, kind, limit, adapter):
    """However documents are split over micro-batches, a step has the same loss and gradient, to float32's rounding."""
    prepared = recipe(request.getfixturevalue(f"{kind}_checkpoint"), adapter=adapter).compile().prepare()
    documents = prepared.corpus.train.documents[:9]
    assert len({document.supervised for document in documents}) > 1
    found = []
    for sizes in SPLITS:
        left = iter(documents)
        batches = [Batch.from_documents([next(left) for _ in range(size)]) for size in sizes]
        tokens = sum(batch.tokens for batch in batches)
        loss = 0.0
        for batch in batches:
            part = prepared.loss(batch).total / tokens
            part.backward()
            loss += part.item()
        found.append((loss, {n: p.grad.clone() for n, p in prepared.trained.items() if p.grad is not None}))
        prepared.optimizer.zero_grad()
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        errors = {name: (gradients[name] - wanted).norm() for name, wanted in found[0][1].items()}
        norms = {name: wanted.norm() for name, wanted in found[0][1].items()}
        assert torch.stack([*errors.values()]).norm() <= limit * torch.stack([*norms.values()]).norm()
        assert all(errors[name] <= 5e-6 * norms[name] for name in norms)


def test_a_step_does_not_depend_on_the_micro_batches(dense_checkpoint):
    """Uneven micro-batches give a step the loss and the gradient norm of one large one."""
    results = []
    for sizes in SPLITS:
        prepared = recipe(dense_checkpoint).compile().prepare()
        documents = iter(prepared.corpus.train.documents[:9])
        batches = [Batch.from_documents([next(documents) for _ in range(size)]) for size in sizes]
        results.append(prepared.step(batches))
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-6)
        assert result.tokens == results[0].tokens


def test_bfloat16_gradients_are_added_up_as_float32(dense_checkpoint):
    """With bfloat16 weights, the gradient of many micro-batches is their sum, far below bfloat16's rounding."""
    prepared = recipe(dense_checkpoint, dtype="bfloat16", tokens_per_step=4096).compile().prepare()
    batches = [Batch.from_documents([document]) for document in prepared.corpus.train.documents]
    wanted = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in prepared.trained.items()}
    for batch in batches:
        prepared.loss(batch).total.backward()
        for name, p in prepared.trained.items():
            wanted[name] += p.grad
        prepared.optimizer.zero_grad()
    for batch in batches:
        prepared.loss(batch).total.backward()
    for name, p in prepared.trained.items():
        assert p.grad.dtype == torch.float32
        assert (p.grad - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


def test_activation_checkpointing_is_what_the_recipe_says(dense_checkpoint):
    """A prepared step computes every, every second or no layer twice, of which three are Gated DeltaNet."""
    calls = []

    class Counting(qf.backends.TorchDeltaRule):
        def delta_rule(self, *args, **kwargs):
            calls.append(1)
            return super().delta_rule(*args, **kwargs)

    for checkpointing, expected in ((True, 6), (2, 5), (False, 3)):
        asked = recipe(dense_checkpoint, activation_checkpointing=checkpointing).with_attention(linear=Counting())
        prepared = asked.compile().prepare()
        calls.clear()  # preparing verifies the backend
        prepared.step(next(prepared.batches())[:1])
        assert len(calls) == expected


def gradients(prepared, batch):
    """Of a batch's loss, by name."""
    prepared.loss(batch).total.backward()
    found = {name: p.grad.clone() for name, p in prepared.trained.items()}
    prepared.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_checkpointing_leaves_gradients_as_they_are(request, kind):
    """What is computed again is the same to the bit, in every layer and in every second."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    kept, *again = (
        gradients(prepared, next(prepared.batches())[0])
        for prepared in (
            recipe(checkpoint, activation_checkpointing=every).compile().prepare() for every in (False, True, 2)
        )
    )
    for name, wanted in kept.items():
        assert all(torch.equal(found[name], wanted) for found in again), name


def test_offloading_keeps_what_layers_are_given_on_the_host(dense_checkpoint, monkeypatch):
    """It is the input of each layer, nothing else, and the gradients stay as they are to the bit."""
    prepared = recipe(dense_checkpoint).compile().prepare()
    batch = next(prepared.batches())[0]
    wanted, offloaded = gradients(prepared, batch), []

    class Unpinned(torch.autograd.graph.save_on_cpu):
        """As transformers sets it, without pinned memory, which only an accelerator's driver hands out."""

        def __init__(self, pin_memory, device_type):
            super().__init__(pin_memory=False, device_type=device_type)
            copy = self.pack_hook
            self.pack_hook = lambda x: offloaded.append(x.shape) or copy(x)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Unpinned)
    # A plan for a CPU refuses it.
    checkpoint_activations(prepared.model, attrs.evolve(prepared.training, activation_offloading=True))
    found = gradients(prepared, batch)
    config = prepared.model.config
    assert offloaded == [(1, len(batch.input_ids), config.hidden_size)] * config.num_hidden_layers
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("adapter", [None, qf.AdapterSpec.lora(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_optimizer_in_backward_gives_the_same_weights(request, kind, adapter, checkpointing, optimizer):
    """Three steps end with the same losses, norms and weights, to the bit, and never hold two gradients."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    results = []
    for in_backward in (False, True):
        prepared = (
            recipe(
                checkpoint,
                adapter=adapter,
                optimizer=optimizer,
                max_grad_norm=None,
                activation_checkpointing=checkpointing,
                optimizer_in_backward=in_backward,
            )
            .compile()
            .prepare()
        )
        held = []
        for p in prepared.trained.values():
            p.register_post_accumulate_grad_hook(
                lambda _, trained=prepared.trained, held=held: held.append(
                    sum(p.grad is not None for p in trained.values())
                )
            )
        steps = [prepared.step(batches) for batches in list(prepared.batches())[:3]]
        results.append((steps, max(held), prepared.trained))
    (steps, most, trained), (steps_in_backward, most_in_backward, trained_in_backward) = results
    assert most == len(trained)
    assert most_in_backward == 1
    for wanted, got in zip(steps, steps_in_backward, strict=True):
        assert got.loss == wanted.loss
        assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
    for name, wanted in trained.items():
        assert torch.equal(trained_in_backward[name], wanted), name


def test_an_optimizer_in_backward_rounds_bfloat16_weights_too(dense_checkpoint):
    """Weights that are rounded by chance are changed in backward, every one, and keep no gradient."""
    training = {"max_grad_norm": None, "optimizer_in_backward": True, "learning_rate": 0.1}
    prepared = recipe(dense_checkpoint, dtype="bfloat16", **training).compile().prepare()
    before = {name: p.detach().clone() for name, p in prepared.trained.items()}
    prepared.step(next(prepared.batches()))
    assert not any(torch.equal(p, before[name]) for name, p in prepared.trained.items())
    assert all(p.grad is None for p in prepared.trained.values())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo looks at what it is given
def test_compiled_kernels_train_alike_and_say_what_compiling_took(dense_checkpoint, tmp_path):
    """Losses stay those of eager code to float32's rounding; the metrics tell the seconds of the compiler apart."""
    eager, compiled = (
        recipe(dense_checkpoint, max_steps=3, compile_elementwise=asked)
        .compile()
        .train(tmp_path / str(asked), verbose=0)
        for asked in (False, True)
    )
    for wanted, got in zip(eager.history, compiled.history, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert wanted["compile_seconds"] == 0
    first, *_, last = (record["compile_seconds"] for record in compiled.history)
    assert 0 < first < compiled.history[0]["seconds"]
    assert last == 0
    assert "compiling took " in repr(compiled)
    assert "compiling" not in repr(eager)


def test_an_optimizer_in_backward_takes_one_micro_batch(dense_checkpoint):
    """Two are refused, before anything is changed."""
    training = {"max_grad_norm": None, "optimizer_in_backward": True}
    prepared = recipe(dense_checkpoint, **training).compile().prepare()
    batch = next(prepared.batches())[0]
    with pytest.raises(qf.SpecError, match=r"expected one micro-batch a step, got 2\n\s+Fix: prepared.step"):
        prepared.step([batch, batch])
    assert prepared.steps_done == 0


def test_an_optimizer_in_backward_says_that_it_changed_what_is_not_finite(dense_checkpoint):
    """An infinite gradient of a finite loss ends the run, and the message says what it did."""
    training = {"max_grad_norm": None, "optimizer_in_backward": True, "adapter": qf.AdapterSpec.lora(rank=4)}
    prepared = recipe(dense_checkpoint, **training).compile().prepare()
    last = next(reversed(prepared.trained.values()))
    last.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(qf.NonFiniteError, match=r"in one of .*parameters are not finite any more"):
        prepared.step(next(prepared.batches()))


def test_a_backend_of_a_notebook_trains(dense_checkpoint, tmp_path):
    """A backend that a saved recipe could not find again trains all the same; the plan says what is not kept."""

    class Mine(qf.backends.SdpaAttention):
        name = "mine"

    plan = recipe(dense_checkpoint, max_steps=1).with_attention(full=Mine()).compile()
    assert "no recipe.json" in plan.explain()
    plan.train(tmp_path / "run", verbose=0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "recipe.json" not in names
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["attention"]["full"] == "mine"


def test_weights_reach_the_loss(dense_checkpoint):
    """The weight of a position scales its part of the loss, and the tokens that the mean divides by."""
    prepared = recipe(dense_checkpoint).compile().prepare()
    batch = next(prepared.batches())[0]
    halved = attrs.evolve(batch, weights=torch.full(batch.labels.shape, 0.5))
    whole, half = prepared.loss(batch), prepared.loss(halved)
    assert half.total.item() == pytest.approx(whole.total.item() / 2, rel=1e-6)
    assert half.tokens == whole.tokens / 2


def test_a_loop_of_ones_own_gives_what_train_gives(dense_checkpoint, tmp_path):
    """A script that calls batches and step itself ends with the weights of train(), to the bit."""
    plan = recipe(dense_checkpoint, epochs=2).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    prepared = plan.prepare()
    losses = [prepared.step(batches).loss for epoch in range(2) for batches in prepared.batches(epoch)]
    assert losses == [record["loss"] for record in run.history if "loss" in record]
    for wanted, got in zip(run.prepared.model.parameters(), prepared.model.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_clipping_limits_the_update(dense_checkpoint):
    """The reported norm is that before clipping, and the gradients that are used have the limit's."""
    prepared = recipe(dense_checkpoint, max_grad_norm=1e-3).compile().prepare()
    seen = []
    prepared.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            math.sqrt(sum(p.grad.square().sum().item() for g in optimizer.param_groups for p in g["params"])),
        ),
    )
    result = prepared.step(next(prepared.batches()))
    assert result.grad_norm > 1e-2
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_warms_up_and_falls(dense_checkpoint, tmp_path):
    """Metrics hold the learning rate of each step: up to the peak, then down by the cosine."""
    plan = recipe(dense_checkpoint, max_steps=20, warmup_ratio=0.2).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    rates = [record["learning_rate"] for record in run.history if "loss" in record]
    assert len(rates) == 20
    assert rates[:4] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4])
    assert max(rates) == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-4


def test_metrics_hold_a_line_a_step_and_the_held_out_losses(dense_checkpoint, tmp_path):
    """metrics.jsonl is the history; held-out data are evaluated before, at intervals, and after."""
    data = qf.DataSpec.messages(chats()).with_max_length(128).pack().hold_out(0.2)
    plan = recipe(dense_checkpoint, max_steps=5, evaluate_every=2).with_data(data).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.history
    assert [step for step, _ in run.held_out_losses] == [0, 2, 4, 5]
    last = lines[-1]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "ranks", "state_bytes"} <= last.keys()
    assert last["held_out_loss"] == pytest.approx(run.evaluate()["loss"])
    assert run.evaluate()["perplexity"] == pytest.approx(math.exp(last["held_out_loss"]))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.json", "plan.json", "environment.json", "metrics.jsonl", "model"} <= names
    assert qf.Recipe.load(tmp_path / "run" / "recipe.json") == plan.recipe


@pytest.mark.long
def test_full_fine_tuning_overfits_and_answers(dense_checkpoint, tmp_path):
    """A tiny model learns 20 chats to a loss below 0.1 and then writes their answers."""
    plan = recipe(dense_checkpoint, epochs=60, learning_rate=4e-3, activation_checkpointing=False).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    assert run.history[-1]["loss"] < 0.1
    for chat in chats()[:5]:
        question, answer = (message["content"] for message in chat["messages"])
        assert run.generate(question, max_new_tokens=20) == answer


def test_bfloat16_base_trains_a_float32_adapter(dense_checkpoint, tmp_path):
    """With weights stored in bfloat16 a LoRA learns."""
    plan = recipe(dense_checkpoint, epochs=8, learning_rate=1e-2).with_model(dtype="bfloat16")
    run = plan.with_adapter(qf.AdapterSpec.lora(rank=8)).compile().train(tmp_path / "run", verbose=0)
    steps = [record["loss"] for record in run.history]
    assert steps[-1] < 0.7 * steps[0]


def test_a_run_folder_that_holds_something_is_refused(dense_checkpoint, tmp_path):
    """Nothing is overwritten, and no weight is read first."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(qf.CheckpointError, match="exists already"):
        recipe(dense_checkpoint).compile().train(tmp_path / "run", verbose=0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_an_unwritable_run_folder_is_refused(dense_checkpoint, tmp_path):
    """A run folder below a file cannot be made, and is an error of the root family."""
    (tmp_path / "file").write_text("")
    with pytest.raises(qf.CheckpointError, match="cannot be written"):
        recipe(dense_checkpoint).compile().train(tmp_path / "file" / "run", verbose=0)


def test_damaged_weights_leave_no_run_folder(dense_checkpoint, tmp_path):
    """A run that cannot load its weights leaves nothing, so that the same line works once they are mended."""
    shutil.copytree(dense_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(qf.CheckpointError, match="damaged"):
        recipe(tmp_path / "copy").compile().train(tmp_path / "run", verbose=0)
    assert not (tmp_path / "run").exists()


def test_wrong_data_stops_before_any_weight_is_read(dense_checkpoint, tmp_path, monkeypatch):
    """A row that is wrong far down a file stops the run by name, and leaves no folder."""
    rows = [*chats(20), {"messages": [{"role": "narrator", "content": "x"}]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setattr("qwenft.training.prepare.load_model", lambda *_, **__: pytest.fail("weights were read"))
    plan = recipe(dense_checkpoint).with_data(qf.DataSpec.messages(tmp_path / "chats.jsonl")).compile()
    with pytest.raises(qf.DataError, match=r"row 21: .*narrator"):
        plan.train(tmp_path / "run", verbose=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_micro_batch_without_supervised_tokens_adds_nothing(kind, dense_checkpoint, moe_checkpoint):
    """A row that trains nothing has loss 0 and a zero gradient, whatever the layers are."""
    ready = recipe(dense_checkpoint if kind == "dense" else moe_checkpoint).compile().prepare()
    _, (batch, *_) = next(ready.remaining())
    loss = ready.loss(attrs.evolve(batch, labels=torch.full_like(batch.labels, -100)))
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in ready.trained.values())


class Alone(qf.backends.SdpaAttention):
    """Takes a row for one document."""

    name = "alone"
    supports_packing = False


def test_documents_that_a_backend_cannot_keep_apart_are_not_trained_together(dense_checkpoint):
    """A packed micro-batch that is given by hand is refused wherever it is computed; its documents one by one are not."""
    packed = recipe(dense_checkpoint).compile().prepare()
    batch = next(row for step in packed.batches() for row in step if len(row.layout.lengths) > 1)
    alone = recipe(dense_checkpoint, packed=False).with_attention(full=Alone()).compile().prepare()
    for compute in (alone.logits, alone.loss, lambda row: alone.step([row])):
        with pytest.raises(qf.SpecError, match=r"documents, but Alone\(\) has supports_packing = False"):
            compute(batch)
    assert alone.steps_done == 0
    wanted = packed.loss(batch)
    found = [alone.loss(one) for one in batch.split()]
    assert sum(one.total.item() for one in found) == pytest.approx(wanted.total.item(), rel=1e-5)

"""Routers of a mixture of experts in training: the load-balancing loss, and how experts are used."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as moe

import qwenft as qf
from qwenft.models.lora import require_reached
from qwenft.plan.coverage import trained_weights
from qwenft.training import prepare

from .helpers import recipe

LORA = qf.AdapterSpec.lora(rank=4).on("full_attention", "routed_experts", "router")
COEFFICIENT = 0.5


def prepared_with(checkpoint, coefficient, **training):
    return recipe(checkpoint, adapter=LORA, router_aux_loss=coefficient, **training).compile().prepare()


def decided(prepared, batch):
    """Router logits and choices of a forward pass over all tokens."""
    found = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: found.append(output))
        for module in prepared.model.modules()
        if isinstance(module, moe.Qwen3_5MoeTopKRouter)
    ]
    prepared.hidden(batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("every", "loss"), [(0, "own"), (1, "chunked")])
def test_the_loss_that_is_added_is_that_of_transformers(moe_checkpoint, every, loss):
    """In value and gradients, for each supervised token, over all tokens of all layers, with checkpointing too."""

    def own(hidden, batch, head):
        logits = head(hidden).float()
        return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")

    options = {"activation_checkpointing": every, "loss": own if loss == "own" else loss}
    plain, balanced = (prepared_with(moe_checkpoint, c, **options) for c in (0.0, COEFFICIENT))
    batch = next(plain.batches())[0]
    logits = tuple(output[0] for output in decided(plain, batch))
    assert len(logits) == 4
    assert all(len(layer) == batch.layout.total for layer in logits)
    wanted = plain.loss(batch).total + COEFFICIENT * batch.tokens * moe.load_balancing_loss_func(logits, 8, 2)
    got = balanced.loss(batch).total
    assert torch.allclose(got, wanted, rtol=1e-6)
    assert got > 1.01 * plain.loss(batch).total
    wanted.backward()
    got.backward()
    for name, parameter in plain.trained.items():
        assert torch.allclose(balanced.trained[name].grad, parameter.grad, rtol=1e-4, atol=1e-5), name


def test_routers_are_left_as_they_were(moe_checkpoint):
    """Nothing listens to them when the loss is made, and an error in between changes nothing of that."""
    prepared = prepared_with(moe_checkpoint, COEFFICIENT)
    batch = next(prepared.batches())[0]
    routers = [m for m in prepared.model.modules() if isinstance(m, moe.Qwen3_5MoeTopKRouter)]
    assert len(routers) == 4
    prepared.loss(batch)
    assert not any(router._forward_hooks for router in routers)
    with pytest.raises(IndexError):
        prepared.loss(attrs.evolve(batch, input_ids=batch.input_ids + 10**6))
    assert not any(router._forward_hooks for router in routers)


def test_held_out_losses_are_without_it(moe_checkpoint):
    """Evaluation is of the predictions alone."""
    losses = []
    for coefficient in (0.0, COEFFICIENT):
        prepared = (
            recipe(moe_checkpoint, adapter=LORA, router_aux_loss=coefficient, held_out=0.2).compile().prepare()
        )
        losses.append(prepared.evaluate(prepared.corpus.held_out).loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("every", [0, 1])
def test_the_load_of_experts_is_in_the_metrics(moe_checkpoint, tmp_path, every):
    """How often the busiest was chosen and how many were not, layer by layer, each choice counted once."""
    plan = recipe(moe_checkpoint, adapter=LORA, max_steps=2, activation_checkpointing=every).compile()
    prepared = plan.prepare()
    batches = next(prepared.batches())
    wanted = torch.zeros(4, 8)
    for batch in batches:
        for layer, (_, _, chosen) in enumerate(decided(prepared, batch)):
            # The last layer is computed for supervised tokens alone.
            rows = chosen if layer < 3 else chosen[batch.labels != -100]
            wanted[layer] += rows.flatten().bincount(minlength=8)
    result = prepared.step(batches)
    assert torch.equal(prepared.expert_counts, wanted.long())
    assert result.expert_load == pytest.approx((wanted.amax(1) / wanted.mean(1)).tolist())
    assert result.idle_experts == tuple((wanted == 0).sum(1).tolist())
    plan.train(tmp_path / "run", verbose=0)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["step"]]
    assert steps[0]["expert_load"] == pytest.approx(list(result.expert_load))
    assert all(len(record["idle_experts"]) == 4 for record in steps)


def test_a_dense_model_has_no_load(dense_checkpoint, tmp_path):
    """Nothing of it is in the metrics."""
    run = (
        recipe(dense_checkpoint, max_steps=1, adapter=qf.AdapterSpec.lora())
        .compile()
        .train(tmp_path / "run", verbose=0)
    )
    assert run.prepared.expert_counts is None
    assert not {"expert_load", "idle_experts"} & set(run.history[-1])


def test_an_adapter_that_reaches_something_else_is_refused(moe_checkpoint):
    """What peft built is compared with the plan, so that nothing is left out without a word."""
    prepared = prepared_with(moe_checkpoint, 0.0)
    loaded = qf.Recipe(qf.ModelSpec(moe_checkpoint)).compile().architecture
    require_reached(prepared.model, trained_weights(loaded, LORA))
    others = trained_weights(loaded, LORA.on("full_attention", "shared_expert", "router"))
    with pytest.raises(
        qf.SpecError, match=r"has 33,936 parameters, and its plan 9,872: it does not reach what was meant"
    ):
        require_reached(prepared.model, others)


def test_a_run_whose_adapter_misses_something_does_not_begin(moe_checkpoint, monkeypatch):
    """As when another version of peft finds no stack of experts."""
    build = prepare.lora_config

    def without_parameters(*arguments):
        config = build(*arguments)
        config.target_parameters = None
        return config

    monkeypatch.setattr(prepare, "lora_config", without_parameters)
    with pytest.raises(qf.SpecError, match="does not reach what was meant"):
        prepared_with(moe_checkpoint, 0.0)

"""What a step makes of the multi-token-prediction layer's loss."""

from __future__ import annotations

import attrs
import pytest
import torch

import qwenft as qf
from qwenft.data.masking import IGNORED

from .helpers import recipe, written

MTP = qf.AdapterSpec.full().train_mtp(0.5)


def prepared_with(checkpoint, adapter=MTP, **training):
    return recipe(checkpoint, adapter=adapter, **training).compile().prepare()


def test_a_step_tells_both_losses_apart(dense_checkpoint):
    """Each is the mean over its own tokens of all micro-batches, in the model's own as much as without that layer."""
    prepared, without = (prepared_with(dense_checkpoint, adapter) for adapter in (MTP, qf.AdapterSpec.full()))
    batches = [batch for step in list(prepared.batches())[:2] for batch in step]
    assert len(batches) == 2
    with torch.no_grad():
        losses = [prepared.loss(batch) for batch in batches]
        plain = [without.loss(batch) for batch in batches]
    for loss, alone in zip(losses, plain, strict=True):
        assert torch.allclose(loss.total, alone.total + 0.5 * loss.mtp.total, rtol=1e-6)
        assert alone.mtp is None
    assert not prepared.loss(batches[0]).mtp.total.requires_grad
    result = prepared.step(batches)
    tokens = sum(loss.tokens for loss in losses)
    assert result.loss == pytest.approx(sum(float(loss.total) for loss in plain) / tokens, rel=1e-6)
    of_layer = [loss.mtp for loss in losses]
    assert result.mtp_loss == pytest.approx(
        sum(float(loss.total) for loss in of_layer) / sum(loss.tokens for loss in of_layer), rel=1e-6
    )
    assert without.step(batches).mtp_loss is None


def test_a_step_in_backward_is_the_same(dense_checkpoint):
    """The head and the embedding, which both losses reach, are updated once, and all numbers are equal."""
    options = {"max_grad_norm": None, "optimizer": "sgd", "learning_rate": 0.1}
    plain, early = (prepared_with(dense_checkpoint, optimizer_in_backward=b, **options) for b in (False, True))
    batches = next(plain.batches())
    results = [attrs.asdict(prepared.step(batches)) for prepared in (plain, early)]
    assert results[0]["mtp_loss"] == results[1]["mtp_loss"] is not None
    assert results[0]["loss"] == results[1]["loss"]
    for name, parameter in plain.trained.items():
        assert torch.allclose(early.trained[name], parameter, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_row_whose_trained_tokens_all_come_first(kind, dense_checkpoint, moe_checkpoint):
    """Where no token after next is trained the step is the model's own, and the layer gets no gradient but zeros."""
    prepared = prepared_with({"dense": dense_checkpoint, "moe": moe_checkpoint}[kind])
    batch = next(prepared.batches())[0]
    first = torch.zeros_like(batch.labels, dtype=torch.bool)
    first[list(batch.layout.starts[:-1])] = True
    alone = attrs.evolve(batch, labels=torch.where(first, 5, IGNORED))
    loss = prepared.loss(alone)
    assert loss.tokens == len(batch.layout)
    assert (loss.mtp.tokens, float(loss.mtp.total)) == (0, 0)
    loss.total.backward()
    assert all(p.grad is None or not p.grad.any() for n, p in prepared.trained.items() if n.startswith("mtp."))
    assert prepared.trained["model.norm.weight"].grad.any()
    assert prepared.step([alone]).mtp_loss is None


def test_held_out_losses_are_of_the_models_own_head(dense_checkpoint):
    """Evaluation is of the predictions of the next token alone."""
    prepared, without = (
        prepared_with(dense_checkpoint, adapter, held_out=0.2) for adapter in (MTP, qf.AdapterSpec.full())
    )
    found = [each.evaluate(each.corpus.held_out) for each in (prepared, without)]
    assert found[0] == found[1]


def test_its_loss_is_in_the_metrics_where_it_is_trained(dense_checkpoint, tmp_path):
    """Records of other runs have nothing of it, and resuming a run with another weight is refused."""
    asked = recipe(dense_checkpoint, adapter=MTP, max_steps=2)
    asked.compile().train(tmp_path / "run", verbose=0)
    assert all(record["mtp_loss"] > 0 for record in written(tmp_path / "run") if record["step"])
    other = asked.with_adapter(qf.AdapterSpec.full()).compile()
    with pytest.raises(qf.CheckpointError, match=r"recipe\.adapter\.mtp_weight: 0\.5 there"):
        other.train(tmp_path / "run", verbose=0)
    other.train(tmp_path / "other", verbose=0)
    assert not any("mtp_loss" in record for record in written(tmp_path / "other"))


def test_a_learning_rate_of_its_own(dense_checkpoint):
    """The role of its parameters is "mtp", and everything of the plan counts them."""
    plan = recipe(dense_checkpoint, adapter=MTP).compile()
    rated = plan.recipe.with_training(plan.recipe.training.with_learning_rate(mtp=1e-5)).compile()
    prepared = rated.prepare()
    of_layer = sum(p.numel() for name, p in prepared.trained.items() if name.startswith("mtp."))
    (row,) = [row for row in rated.coverage if row.role == "mtp"]
    assert row.parameters == row.held == of_layer
    assert rated.trained_parameters == sum(p.numel() for p in prepared.trained.values())
    groups = prepared.optimizer.param_groups
    assert of_layer == sum(p.numel() for group in groups if group["initial_lr"] == 1e-5 for p in group["params"])
    without = recipe(dense_checkpoint).compile()
    assert plan.state.trained - without.state.trained == 4 * of_layer
    assert plan.trained_parameters - without.trained_parameters == of_layer

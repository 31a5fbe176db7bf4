"""The layer that predicts the token after next, against the checkpoint's files and transformers' own modules."""

from __future__ import annotations

import attrs
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import qwenft as qf
from qwenft.data.masking import IGNORED
from qwenft.family.inventory import inventory
from qwenft.models.bind import decoder_of, hidden_states
from qwenft.models.checkpoint import architecture_of, weight_files
from qwenft.models.load import load_model
from qwenft.models.mtp import one_token_on
from qwenft.plan.storage import Storage
from tests.training.helpers import recipe

from .helpers import batch_of, documents, relative

LENGTHS = (1, 2, 3, 63, 64, 65, 130)
WEIGHT = 0.3
MTP = qf.AdapterSpec.full().train_mtp(WEIGHT)


def prepared_with(checkpoint, adapter=MTP, **training):
    return recipe(checkpoint, adapter=adapter, **training).compile().prepare()


def weighted_batch(lengths=LENGTHS, seed=0):
    """Documents of which a third of the tokens are not trained, and the others with weights of their own."""
    batch = batch_of(documents(lengths, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    untrained = torch.rand(batch.layout.total, generator=generator) < 1 / 3
    weights = torch.rand(batch.layout.total, generator=generator) + 0.5
    return attrs.evolve(batch, labels=batch.labels.masked_fill(untrained, IGNORED), weights=weights)


def files_of(folder):
    """The tensors of a checkpoint."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def in_memory(tensors):
    """The tensors of ``mtp.*`` with the experts of the layer in stacks."""
    found = {name.removeprefix("mtp."): tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    experts = [name for name in found if ".mlp.experts." in name]
    each = {tuple(name.split(".")[4:6]): found.pop(name) for name in experts}
    if each:
        count = len(each) // 3
        parts = {part: [each[str(n), f"{part}_proj"] for n in range(count)] for part in ("gate", "up", "down")}
        pairs = zip(parts["gate"], parts["up"], strict=True)
        found["layers.0.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        found["layers.0.mlp.experts.down_proj"] = torch.stack(parts["down"])
    return found


class Reference:
    """Model and layer in transformers' own modules, unbound, and the formulas of vLLM's qwen3_5_mtp.py."""

    def __init__(self, checkpoint):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
        decoder = self.model.model
        full = self.model.config.layer_types.index("full_attention")
        self.layer = type(decoder.layers[full])(self.model.config, full)
        tensors = in_memory(files_of(checkpoint))
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.0.")}
        self.layer.load_state_dict({name.removeprefix("layers.0."): tensor for name, tensor in inside.items()})
        self.outside = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items() if name not in inside}

    def parameters(self):
        """By the names that they have in a run."""
        yield from self.model.named_parameters()
        for name, parameter in self.layer.named_parameters():
            yield f"mtp.layers.0.{name}", parameter
        for name, parameter in self.outside.items():
            yield f"mtp.{name}", parameter

    def norm(self, x, name):
        """The zero-centred norm of the family."""
        mean_square = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.model.config.rms_norm_eps) * (1 + self.outside[f"{name}.weight"])

    def losses(self, ids, labels, weights):
        """Of one document: the sums for the next token, and for the one after it."""
        decoder, places = self.model.model, torch.arange(len(ids))[None]
        hidden = decoder(input_ids=ids[None]).last_hidden_state
        first = self.loss(hidden[0], labels, weights)
        if len(ids) < 2:
            return first, torch.zeros(())
        embedded = decoder.embed_tokens(ids[None, 1:])
        joined = [self.norm(embedded, "pre_fc_norm_embedding"), self.norm(hidden[:, :-1], "pre_fc_norm_hidden")]
        x = F.linear(torch.cat(joined, dim=-1), self.outside["fc.weight"])
        mixed = self.layer(x, position_embeddings=decoder.rotary_emb(x, places[:, :-1].expand(3, 1, -1)))
        return first, self.loss(self.norm(mixed, "norm")[0], labels[1:], weights[1:])

    def loss(self, hidden, labels, weights):
        """The weighted sum of the cross entropies of what is trained."""
        each = F.cross_entropy(self.model.lm_head(hidden), labels, reduction="none", ignore_index=IGNORED)
        return (each * weights).sum()


@pytest.mark.usefixtures("without_fla")
@pytest.mark.parametrize("every", [0, 1])
def test_packed_losses_and_gradients_are_those_of_each_document_alone(checkpoint, every):
    """Both losses and the gradient of every parameter, with checkpointing too."""
    prepared, reference = prepared_with(checkpoint, activation_checkpointing=every), Reference(checkpoint)
    batch = weighted_batch()
    got = prepared.loss(batch)
    alone = [reference.losses(one.input_ids, one.labels, one.weights) for one in batch.split()]
    first, second = (sum(losses) for losses in zip(*alone, strict=True))
    assert got.mtp.total.item() == pytest.approx(second.item(), rel=1e-5)
    assert got.total.item() == pytest.approx((first + WEIGHT * second).item(), rel=1e-5)
    behind_first = [label for one in batch.split() for label in (one.labels[1:] != IGNORED) * one.weights[1:]]
    assert got.mtp.tokens == pytest.approx(float(sum(behind_first)), rel=1e-6)
    got.total.backward()
    (first + WEIGHT * second).backward()
    wanted = dict(reference.parameters())
    assert wanted.keys() == prepared.trained.keys()
    for name, parameter in prepared.trained.items():
        assert relative(parameter.grad, wanted[name].grad) < 1e-4, name


def test_no_document_reaches_another(checkpoint):
    """Changing one of the packed documents changes what is predicted in no other, at the bounds neither."""
    model = prepared_with(checkpoint).model.eval()
    docs = documents(LENGTHS)
    seen = []
    for changed in (docs, [*docs[:4], documents([64], seed=9)[0], *docs[5:]]):
        batch = batch_of(changed)
        with torch.no_grad():
            hidden = hidden_states(model, batch.input_ids, batch.layout)
            after = model.mtp(decoder_of(model), hidden, one_token_on(batch).input_ids, batch.layout)
        seen.append(after.split(batch.layout.lengths))
    # Experts take the rows of all documents in one product, which rounds otherwise for another number of rows.
    limit = 0.0 if architecture_of(qf.ModelSpec(checkpoint)).experts is None else 1e-5
    for place, (before, now) in enumerate(zip(*seen, strict=True)):
        assert (relative(now, before) > 0.1) if place == 4 else (relative(now, before) <= limit), place


def test_every_place_gets_the_next_token_of_its_document():
    """Ids, labels and weights move together; the last token of a document stays, untrained."""
    batch = batch_of([[1, 2, 3], [4], [5, 6]])
    # Labels behind the ends of documents too, as no data has them.
    batch = attrs.evolve(batch, labels=torch.tensor([2, 3, 9, 9, 6, 9]), weights=torch.arange(6.0))
    shifted = one_token_on(batch)
    assert shifted.input_ids.tolist() == [2, 3, 3, 4, 6, 6]
    assert shifted.labels.tolist() == [3, 9, IGNORED, IGNORED, 9, IGNORED]
    assert shifted.weights.tolist() == [1, 2, 2, 3, 5, 5]
    assert shifted.tokens == 1 + 2 + 5
    assert one_token_on(batch_of([[1, 2]])).weights is None


def test_the_layer_is_the_checkpoints(checkpoint):
    """Names, shapes and numbers of the loaded layer are those of the files; without it, nothing of it is there."""
    whole = architecture_of(qf.ModelSpec(checkpoint))
    for loaded in (whole.with_mtp(), whole.text_only().with_mtp()):
        model = load_model(checkpoint, loaded, storage=Storage("float32"))
        wanted = in_memory(files_of(checkpoint))
        found = dict(model.mtp.named_parameters())
        assert found.keys() == wanted.keys()
        assert all(torch.equal(parameter, wanted[name]) for name, parameter in found.items())
        planned = {
            name: weight.shape for weight in inventory(loaded) if weight.role == "mtp" for name in weight.names()
        }
        assert planned == {f"mtp.{name}": tuple(parameter.shape) for name, parameter in found.items()}
    assert not hasattr(load_model(checkpoint, whole.text_only(), storage=Storage("float32")), "mtp")


@pytest.mark.parametrize("name", ["mtp.fc.weight", "mtp.layers.0.self_attn.q_norm.weight"])
def test_a_layer_that_a_config_promises_and_no_file_holds(tmp_path, name):
    """As in a checkpoint that transformers saved: to train that layer is refused with the name, and nothing else."""
    folder = qf.testing.tiny_checkpoint(tmp_path / "checkpoint")
    tensors = files_of(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(qf.CheckpointError, match=rf"1 weights are in none of its 1 files, {name} first"):
        prepared_with(folder)
    prepared_with(folder, qf.AdapterSpec.full())


@pytest.mark.parametrize("roles", [pytest.param((), marks=pytest.mark.long), ("mtp",)], ids=["all", "alone"])
def test_training_lowers_its_loss(checkpoint, tmp_path, roles):
    """In bfloat16 and many steps the loss falls; alone, every other weight stays as it was to the bit."""
    adapter = MTP.on(*roles) if roles else MTP
    asked = recipe(checkpoint, adapter=adapter, max_steps=40, learning_rate=5e-3, dtype="bfloat16")
    run = asked.compile().train(tmp_path / "run", verbose=0)
    losses = [record["mtp_loss"] for record in run.history if record["step"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    before = load_model(checkpoint, run.plan.architecture, storage=Storage("bfloat16"))
    for name, parameter in before.named_parameters():
        changed = not torch.equal(parameter, dict(run.prepared.model.named_parameters())[name].to(parameter))
        assert changed or not name.startswith("mtp."), name
        if roles:
            assert changed == name.startswith("mtp."), name


def test_an_export_has_the_layer_as_it_was_trained(checkpoint, tmp_path):
    """Keys, shapes and dtypes of the files stay, the numbers of ``mtp.*`` are the run's; off, they are the source's."""
    source = files_of(checkpoint)
    of_layer = {name for name in source if name.startswith("mtp.")}
    for adapter in (MTP, qf.AdapterSpec.full()):
        folder = tmp_path / str(adapter.mtp_weight)
        run = recipe(checkpoint, adapter=adapter, max_steps=2).compile().train(folder / "run", verbose=0)
        exported = files_of(run.export(folder / "merged"))
        assert exported.keys() == source.keys()
        assert all((t.shape, t.dtype) == (source[n].shape, source[n].dtype) for n, t in exported.items())
        same = {name for name in of_layer if torch.equal(exported[name], source[name])}
        if adapter is MTP:
            assert not same
            wanted = dict(run.prepared.model.mtp.named_parameters())
            found = in_memory(exported)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
        else:
            assert same == of_layer

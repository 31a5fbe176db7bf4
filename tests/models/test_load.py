from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import qwenft as qf
from qwenft.models.checkpoint import architecture_of
from qwenft.models.load import load_model, load_tokenizer
from qwenft.models.precision import compute_in
from qwenft.plan.storage import Storage
from qwenft.testing import tiny_checkpoint


def test_text_half_never_allocates_the_tower(dense_checkpoint):
    """Without vision the model has no tower at all."""
    model = load_model(
        dense_checkpoint,
        architecture_of(qf.ModelSpec(dense_checkpoint)).text_only(),
        storage=Storage("float32"),
    )
    assert not [name for name, _ in model.named_parameters() if "visual" in name]
    assert not [name for name, _ in model.named_parameters() if "mtp" in name]


@pytest.mark.parametrize("kind", ["dense", "moe", "fused"])
@pytest.mark.parametrize("vision", [True, False])
def test_weights_are_those_that_transformers_loads(kind, vision, tmp_path):
    """Every tensor, tied heads and stacks of experts too, in the order of transformers; buffers as well."""
    path = tiny_checkpoint(
        tmp_path / kind, "moe" if kind == "fused" else kind, experts="fused" if kind == "fused" else "each"
    )
    whole = architecture_of(qf.ModelSpec(path))
    part = whole if vision else whole.text_only()
    model = load_model(path, part, storage=Storage("float32"))
    stock = getattr(transformers, part.class_name).from_pretrained(path, dtype=torch.float32)
    assert type(model) is type(stock)
    for kind_of in ("named_parameters", "named_buffers"):
        mine, theirs = (list(getattr(m, kind_of)()) for m in (model, stock))
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        for (name, got), (_, wanted) in zip(mine, theirs, strict=True):
            assert torch.equal(got, wanted), name
            assert got.dtype == wanted.dtype
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == whole.tied
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert not model.training


@pytest.mark.parametrize("damage", ["shape", "float8"])
def test_weights_of_another_shape_or_format_are_refused(dense_checkpoint, tmp_path, damage):
    """A tensor that is not what config.json says is named, and so is one of 8 bits without scales."""
    shutil.copytree(dense_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone() if damage == "shape" else tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    text = architecture_of(qf.ModelSpec(dense_checkpoint)).text_only()
    problem = "has the shape" if damage == "shape" else r"is held in torch\.float8_e4m3fn"
    with pytest.raises(qf.CheckpointError, match=rf"layers\.1\.mlp\.up_proj\.weight {problem}"):
        load_model(tmp_path / "copy", text, storage=Storage("float32"))


def test_text_only_checkpoints_load_too(dense_checkpoint, tmp_path):
    """A checkpoint of the text half alone, as transformers saves it, is read as itself."""
    text = architecture_of(qf.ModelSpec(dense_checkpoint)).text_only()
    model = load_model(dense_checkpoint, text, storage=Storage("float32"))
    model.save_pretrained(tmp_path / "text")
    load_tokenizer(dense_checkpoint).save_pretrained(tmp_path / "text")
    again = architecture_of(qf.ModelSpec(tmp_path / "text"))
    assert again.model_type == "qwen3_5_text"
    reloaded = load_model(tmp_path / "text", again, storage=Storage("float32"))
    for (name, wanted), got in zip(model.named_parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(wanted, got), name


def test_embeddings_may_stay_on_the_host(moe_checkpoint):
    """They alone are left behind when the model moves, and hand their rows to the device of the ids."""
    text = architecture_of(qf.ModelSpec(moe_checkpoint)).text_only()
    model = load_model(moe_checkpoint, text, storage=Storage("bfloat16"), device="meta", embeddings_on_host=True)
    places = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert [name for name, device in places.items() if device == "cpu"] == ["model.embed_tokens.weight"]
    assert next(iter(places)) == "model.embed_tokens.weight"  # in its old place among the modules
    embeddings = compute_in(model, "float32").model.embed_tokens.requires_grad_(requires_grad=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = embeddings(torch.zeros(2, 3, dtype=torch.int64, device="cuda"))
    assert (rows.device.type, rows.dtype) == ("cuda", torch.float32)


def test_missing_weights_are_an_error(dense_checkpoint, tmp_path):
    """A checkpoint that lacks a tensor is refused by its name, and never filled with random values."""
    shutil.copytree(dense_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(qf.CheckpointError, match=r"1 weights.*layers\.1\.mlp\.up_proj\.weight"):
        load_model(
            tmp_path / "copy",
            architecture_of(qf.ModelSpec(tmp_path / "copy")).text_only(),
            storage=Storage("float32"),
        )


def test_a_damaged_file_is_an_error(dense_checkpoint, tmp_path):
    """A truncated weight file is named."""
    shutil.copytree(dense_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(qf.CheckpointError, match="damaged"):
        load_model(
            tmp_path / "copy",
            architecture_of(qf.ModelSpec(tmp_path / "copy")).text_only(),
            storage=Storage("float32"),
        )


def test_the_tokenizer_keeps_ignore_merges(dense_checkpoint):
    """The flag that tokenizer.json sets is set in the loaded tokenizer."""
    saved = json.loads((dense_checkpoint / "tokenizer.json").read_text())
    assert saved["model"]["ignore_merges"] is True
    assert load_tokenizer(dense_checkpoint).backend_tokenizer.model.ignore_merges is True

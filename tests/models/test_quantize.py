"""Weights that are quantized as they are read, and copies of checkpoints that hold them so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qwenft as qf
from qwenft import backends
from qwenft.family.inventory import inventory
from qwenft.kernels.quantized import dense, is_quantized
from qwenft.models.bind import bind
from qwenft.models.checkpoint import architecture_of, weight_files
from qwenft.models.load import load_model
from qwenft.models.precision import compute_in
from qwenft.models.quantize import read_dense, stored_shape
from qwenft.models.weights import Weights, storage_of
from qwenft.plan.coverage import trained_weights
from qwenft.plan.records import state_bytes
from qwenft.plan.storage import storage_rows

from .helpers import batch_of, documents, packed_logits, relative

STAY = ("in_proj_a", "in_proj_b", "mlp.gate.", "shared_expert_gate", "embed_tokens", "lm_head", "norm", "conv1d")


def loaded(model):
    """A model as its spec holds it."""
    whole = architecture_of(model)
    part = whole if model.vision else whole.text_only()
    return load_model(Path(model.source), part, storage=storage_of(model, part))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_large_matrices_are_quantized_and_nothing_else(checkpoint, kind):
    """Gates, router, embeddings, head, norms and convolutions stay; all other matrices are held in 4 or 8 bits."""
    model = loaded(qf.ModelSpec(checkpoint, dtype="bfloat16").quantize(kind))
    for name, parameter in model.named_parameters():
        stays = any(part in name for part in (*STAY, "A_log", "dt_bias"))
        assert is_quantized(parameter) != stays, name
        float32 = any(part in name for part in ("A_log", "dt_bias", "linear_attn.norm"))
        if stays:
            assert parameter.dtype == (torch.float32 if float32 else torch.bfloat16), name


def test_experts_or_the_tower_may_be_told_apart(moe_checkpoint):
    """``experts=False`` leaves the stacks; ``vision=True`` takes the tower's matrices too, and no bias."""
    spec = qf.ModelSpec(moe_checkpoint, vision=True)
    without = loaded(spec.quantize("nf4", experts=False))
    names = {name for name, parameter in without.named_parameters() if is_quantized(parameter)}
    assert not any("experts" in name and "shared" not in name for name in names)
    assert not any("visual" in name for name in names)
    with_tower = loaded(spec.quantize("nf4", vision=True))
    names = {name for name, parameter in with_tower.named_parameters() if is_quantized(parameter)}
    assert {name for name in names if "visual" in name} == {
        name
        for name, parameter in with_tower.named_parameters()
        if "visual" in name
        and any(part in name for part in ("qkv.weight", "proj.weight", "linear_fc"))
        and "patch_embed" not in name
        and name.endswith("weight")
    }


@pytest.mark.parametrize("experts", ["each", "fused"])
def test_files_of_either_kind_give_the_same_stacks(tmp_path, experts):
    """Experts each alone or fused in the files, quantized one by one, are what bitsandbytes makes of the stack."""
    path = qf.testing.tiny_checkpoint(tmp_path / experts, "moe", experts=experts)
    plain = loaded(qf.ModelSpec(path, dtype="float32")).state_dict()
    for name, parameter in loaded(qf.ModelSpec(path, dtype="float32").quantize()).named_parameters():
        if is_quantized(parameter):
            packed, state = bnb.functional.quantize_4bit(plain[name], quant_type="nf4", compress_statistics=True)
            assert torch.equal(packed, parameter.data), name
            assert state == parameter.quant_state


@pytest.mark.parametrize("quantization", [None, "nf4", "plain-nf4", "int8"])
def test_the_plan_counts_the_bytes_that_are_held(checkpoint, quantization):
    """Bytes by role are those of the loaded model's tensors, scales and scales of scales included."""
    spec = qf.ModelSpec(checkpoint, dtype="bfloat16", vision=True)
    if quantization is not None:
        kind = quantization.removeprefix("plain-")
        spec = spec.quantize(kind, double_quant=quantization == "nf4", vision=True)
    architecture = architecture_of(spec)
    held: dict[str, int] = {}
    parameters = dict(loaded(spec).named_parameters())
    for weight in inventory(architecture):
        for name in weight.names():
            held[weight.role] = held.get(weight.role, 0) + bytes_of(parameters.pop(name))
    assert not parameters
    counted: dict[str, int] = {}
    for row in storage_rows(architecture, storage_of(spec, architecture)):
        counted[row.role] = counted.get(row.role, 0) + row.bytes
    assert counted == held
    lora = qf.AdapterSpec.lora()
    state = state_bytes(
        architecture, trained_weights(architecture, lora), qf.TrainingSpec(), storage_of(spec, architecture)
    )
    assert state.weights == sum(held.values())


def bytes_of(parameter):
    """What a parameter takes, without the tables that all share."""
    beside = 0
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        beside = state.absmax.nbytes
        if state.state2 is not None:
            beside += state.state2.absmax.nbytes + state.offset.nbytes
    elif getattr(parameter, "SCB", None) is not None:
        beside = parameter.SCB.nbytes
    return parameter.nbytes + beside


@pytest.fixture(scope="module", params=["nf4", "int8"])
def copies(request, dense_checkpoint, moe_checkpoint, tmp_path_factory):
    """Quantized copies of both checkpoints, with the specs that they were made of."""
    folder = tmp_path_factory.mktemp("copies")
    made = {}
    for name, path in (("dense", dense_checkpoint), ("moe", moe_checkpoint)):
        spec = qf.ModelSpec(path, dtype="float32").quantize(request.param)
        made[name] = spec, qf.Recipe(spec).compile().save_quantized(folder / name)
    return made


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_copy_is_loaded_as_what_it_was_made_of(copies, name):
    """To the bit, without the original, and the plan counts the same bytes."""
    spec, copy = copies[name]
    assert copy.quantization is None
    wanted, got = (dict(loaded(model).named_parameters()) for model in (spec, copy))
    assert wanted.keys() == got.keys()
    for parameter in wanted:
        assert torch.equal(wanted[parameter].data, got[parameter].data), parameter
        assert torch.equal(dense(wanted[parameter], torch.float32), dense(got[parameter], torch.float32))
    plans = [qf.Recipe(model).compile() for model in (spec, copy)]
    assert plans[0].storage == plans[1].storage
    assert plans[0].state == plans[1].state


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_copy_holds_the_whole_checkpoint(copies, name):
    """What is not quantized is the original's, to the bit: the tower, ``mtp.*``, the tokenizer."""
    spec, copy = copies[name]
    tensors = [{}, {}]
    for model, into in zip((spec, copy), tensors, strict=True):
        for file in weight_files(Path(model.source)):
            into.update(load_file(file))
    original, copied = tensors
    same = [key for key in original if key in copied and torch.equal(original[key], copied[key])]
    quantized = {key for key, tensor in copied.items() if tensor.dtype in (torch.uint8, torch.int8)}
    left = {key for key in set(original) - set(same) - quantized if ".mlp.experts." not in key or "mtp" in key}
    assert not left
    # Experts that are quantized in a stack are not there a second time.
    assert not [key for key in copied if re.search(r"layers\.\d+\.mlp\.experts\.\d", key) and "mtp" not in key]
    assert {key for key in original if key.startswith(("mtp.", "model.visual."))} <= set(same)
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (Path(spec.source) / file).read_bytes() == (Path(copy.source) / file).read_bytes()


def test_a_dense_copy_is_loaded_by_transformers(copies):
    """Plain transformers takes it for what bitsandbytes quantized, and computes the same but for its own rounding."""
    spec, copy = copies["dense"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(copy.source, dtype=torch.float32)
    mine = dict(loaded(copy).named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter.data.cpu(), mine[name].data), name
    if spec.quantization.kind == "nf4":
        for name, parameter in theirs.named_parameters():
            if is_quantized(parameter):
                assert torch.equal(dense(parameter, torch.float32), dense(mine[name], torch.float32)), name


def test_a_copy_of_nothing_or_of_a_copy_is_refused(copies, dense_checkpoint, tmp_path):
    """Only what is quantized now can be written."""
    for model, problem in (
        (qf.ModelSpec(dense_checkpoint), "nothing is quantized"),
        (copies["dense"][1], "already"),
    ):
        with pytest.raises(qf.PlanError, match=problem):
            qf.Recipe(model).compile().save_quantized(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    spec = copies["dense"][0]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(qf.CheckpointError, match="exists already"):
        qf.Recipe(spec).compile().save_quantized(tmp_path / "taken")


def changed(model, folder, change):
    """A copy of a checkpoint whose tensors were changed."""
    shutil.copytree(model.source, folder)
    for file in weight_files(folder):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return qf.ModelSpec(folder, dtype="float32")


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_quantization_state_that_is_missing_or_wrong_is_an_error(copies, name, tmp_path):
    """Bitsandbytes' weights without their scales are refused by name, and never trained on as they are."""
    spec, copy = copies[name]

    def drop(*suffixes):
        return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith(suffixes)]

    def cut(tensors):
        for key in tensors:
            if key.endswith(("absmax", "SCB")):
                tensors[key] = tensors[key][:-1].clone()

    parts = ("quant_map", "nested_absmax", "bitsandbytes__nf4") if spec.quantization.kind == "nf4" else ()
    for number, change in enumerate([cut, *map(drop, parts)]):
        broken = changed(copy, tmp_path / str(number), change)
        with pytest.raises(
            qf.CheckpointError, match=r"weight is held in \w+, and its quantization state is missing"
        ):
            loaded(broken)
    gone = changed(copy, tmp_path / "gone", drop(*("absmax", "SCB"), *parts))
    with pytest.raises(
        qf.CheckpointError, match=r"is held in torch\.u?int8; expected 16 or 32 bits, or a quantization state"
    ):
        loaded(gone)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({}, "unknown"),
    ],
)
def test_other_formats_are_refused_when_the_plan_is_made(dense_checkpoint, tmp_path, config, named):
    """With the format that it is in, and what to load instead."""
    shutil.copytree(dense_checkpoint, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(
        qf.CheckpointError, match=rf"(?s)is quantized already, by {named};.*Fix: .*quantize\(.nf4.\)"
    ):
        qf.Recipe(qf.ModelSpec(tmp_path / "copy")).compile()


def test_packed_logits_of_a_quantized_model_are_those_of_its_dense_weights(checkpoint):
    """The bound, packed model computes what the same model computes with its weights made dense."""

    def bound(model):
        bind(model, full=backends.full("sdpa"), linear=backends.linear("torch"))
        return compute_in(model, "float32").eval()

    docs = documents((3, 40, 65))
    quantized = bound(loaded(qf.ModelSpec(checkpoint, dtype="float32").quantize()))
    plain = bound(loaded(qf.ModelSpec(checkpoint, dtype="float32")))
    before = packed_logits(plain, docs)
    held = dict(quantized.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dense(held[name], torch.float32))
        assert batch_of(docs).layout.total == 108
        for got, wanted, other in zip(
            packed_logits(quantized, docs), packed_logits(plain, docs), before, strict=True
        ):
            assert relative(got, wanted) < 1e-5
            assert relative(got, other) > 1e-2


def test_numbers_of_8_bits_without_scales_are_no_weights(tmp_path):
    """An export copies them as they are, and does not take them for rows to be made dense."""
    tensors = {"mtp.counts": torch.arange(-3, 3, dtype=torch.int8), "a.weight": torch.ones(2, 4, dtype=torch.int8)}
    save_file({**tensors, "a.SCB": torch.full((2,), 127.0)}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert stored_shape(weights, "mtp.counts") is None
    assert torch.equal(read_dense(weights, "mtp.counts"), tensors["mtp.counts"])
    assert stored_shape(weights, "a.weight") == (2, 4)
    assert torch.equal(read_dense(weights, "a.weight"), torch.ones(2, 4))

"""Base checkpoints of somebody else: nothing of them is run, and what is no checkpoint is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenft as qf
from qwenft.models.load import load_tokenizer

from .hostile import DEEP, change_json, header_of, link_out, load, pickled, refused, write_raw

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(dense_checkpoint, tmp_path):
    """A copy of a tiny checkpoint."""
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "copy"))


def with_header(change, behind=b""):
    def damage(folder):
        header, data = header_of(folder / WEIGHTS)
        change(header, len(data))
        write_raw(folder / WEIGHTS, header, data + behind)

    return damage


def with_tensor(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors[NAME] = change(tensors[NAME])
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def another_of_its_shape(header):
    return next(name for name, one in header.items() if name != NAME and one.get("shape") == header[NAME]["shape"])


def torch_archive(folder):
    torch.save({"a": torch.ones(3)}, folder / WEIGHTS)


def twice(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors[NAME.replace("language_model.", "")] = torch.zeros_like(tensors[NAME])
    save_file(tensors, folder / WEIGHTS)


FILES = {
    "a pickle": (lambda folder: (folder / WEIGHTS).write_bytes(pickled(folder / "ran")), "header too"),
    "an archive of torch": (torch_archive, "header too large"),
    "nothing": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "header too small"),
    "a header of 2^60 bytes": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "header too large",
    ),
    "a header longer than the file": (
        lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10_000) + b"{}" * 100),
        "invalid header length",
    ),
    "no JSON": (lambda folder: write_raw(folder / WEIGHTS, b"x" * 64), "invalid JSON"),
    "deep JSON": (lambda folder: write_raw(folder / WEIGHTS, b'{"a":' * 100_000), "recursion limit"),
    "a list": (lambda folder: write_raw(folder / WEIGHTS, b"[]"), "invalid JSON"),
    "numbers": (lambda folder: write_raw(folder / WEIGHTS, {"a": 3}), "invalid JSON"),
    "overlapping tensors": (
        with_header(
            lambda header, _: header[NAME].update(
                data_offsets=header[another_of_its_shape(header)]["data_offsets"]
            )
        ),
        "invalid offset",
    ),
    "a hole": (
        with_header(
            lambda header, end: header.update(
                x={"dtype": "F32", "shape": [1], "data_offsets": [end + 4, end + 8]}
            ),
            bytes(8),
        ),
        "invalid offset for tensor `x`",
    ),
    "bytes behind the tensors": (with_header(lambda *_: None, b"more"), "not fully covered"),
    "a tensor beyond the file": (
        with_header(
            lambda header, end: header.update(x={"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]})
        ),
        "not fully covered|incomplete|invalid",
    ),
    "a place below 0": (with_header(lambda header, _: header[NAME].update(data_offsets=[-8, 8])), "invalid JSON"),
    "a shape that overflows": (
        with_header(lambda header, _: header[NAME].update(shape=[2**40, 2**40])),
        "overflow",
    ),
    "an unknown dtype": (with_header(lambda header, _: header[NAME].update(dtype="F1024")), "unknown variant"),
    "a folder": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), "is no checkpoint"),
    "a FIFO": (lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)), "is no checkpoint"),
    "a pickle beside it": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        r"holds no model\.safetensors or",
    ),
    "another dtype": (with_tensor(torch.Tensor.long), rf"{NAME} is held in torch\.int64; expected 16 or 32 bits"),
    "64 bits": (with_tensor(torch.Tensor.double), rf"{NAME} is held in torch\.float64; expected 16 or 32 bits"),
    "truths": (with_tensor(torch.Tensor.bool), rf"{NAME} is held in torch\.bool"),
    "another shape": (with_tensor(lambda one: one.T.contiguous()), rf"{NAME} has the shape \(64, 128\)"),
    "a number": (with_tensor(lambda _: torch.tensor(1.0)), rf"{NAME} has the shape \(\)"),
    "a tensor twice": (twice, "a second time: which of them is meant cannot be told"),
}


@pytest.mark.parametrize("case", FILES)
def test_weights_that_are_none_are_refused(copy, case):
    """Whatever lies in the place of the weights is refused with the folder and a remedy, and no code of it runs."""
    damage, problem = FILES[case]
    damage(copy)
    refused(qf.CheckpointError, lambda: load(copy), copy, problem)
    assert not (copy / "ran").exists()


def everything_in(target):
    def places(folder):
        return {
            "weight_map": {
                name: target(folder) for name in header_of(folder / WEIGHTS)[0] if name != "__metadata__"
            }
        }

    return places


INDEXES = {
    "the folder above": (everything_in(lambda _: "../elsewhere/model.safetensors"), "names '../elsewhere/model"),
    "a file of the system": (everything_in(lambda _: "../../../etc/passwd"), "names '../../../etc/passwd'"),
    "an absolute path": (everything_in(lambda folder: str(folder / WEIGHTS)), "as a file of weights"),
    "a device": (everything_in(lambda _: "/dev/zero"), "names '/dev/zero'"),
    "the folder": (everything_in(lambda _: "."), r"names '\.'"),
    "a pickle": (everything_in(lambda _: "pytorch_model.bin"), r"names 'pytorch_model\.bin'"),
    "a number": (everything_in(lambda _: 3), "names 3 as a file"),
    "an object": (everything_in(lambda _: {}), "names {} as a file"),
    "a null byte": (everything_in(lambda _: "a\0.safetensors"), "as a file of weights"),
    "a name of 5,000 letters": (everything_in(lambda _: "a" * 5000 + ".safetensors"), "as a file of weights"),
    "what is missing": (everything_in(lambda _: "gone.safetensors"), r"names gone\.safetensors, which is missing"),
    "nothing": (lambda _: {"weight_map": {}}, "88 weights are in none of its 0 files"),
    "no map": (lambda _: {}, "holds no weight_map"),
    "a list": (lambda _: [], "expected a JSON object, got list"),
    "deep JSON": (lambda _: DEEP, "cannot be read: maximum recursion"),
    "no UTF-8": (lambda _: b"\xff\xfe", "cannot be read: 'utf-8' codec"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_names_files_beside_it_alone(copy, case):
    """An index that leads elsewhere, or is none, is refused, though what it names be a whole file of weights."""
    make, problem = INDEXES[case]
    shutil.copytree(copy, copy.with_name("elsewhere"))
    value = make(copy)
    raw = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
    (copy / INDEX).write_bytes(raw)
    refused(qf.CheckpointError, lambda: load(copy), copy, problem)


def test_a_stack_of_fewer_experts_than_its_config_says_is_refused(tmp_path):
    """What a fused file lacks is named, and is neither left unset nor an IndexError."""
    folder = qf.testing.tiny_checkpoint(tmp_path / "moe", "moe", experts="fused")
    file, name = next(
        (file, name)
        for file in sorted(folder.glob("*.safetensors"))
        for name in header_of(file)[0]
        if name.endswith("experts.down_proj")
    )
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(qf.CheckpointError, lambda: load(folder), folder, r"experts\.down_proj has the shape \(0, ")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "notes.txt"])
def test_a_link_out_of_the_folder_is_refused(copy, name):
    """Whatever it is: an export would copy it, and publish what it leads to."""
    (copy / "notes.txt").write_text("a secret")
    link_out(copy / name)
    refused(qf.CheckpointError, lambda: load(copy), copy / name, "is a link to .*outside of the folder")


def test_the_cache_of_the_hub_links_its_files_and_is_read(dense_checkpoint, tmp_path):
    """Snapshots are links to blobs; one that leads on from there, or past them, is refused."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(dense_checkpoint, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load(snapshot).num_parameters() == load(dense_checkpoint).num_parameters()
    link_out(blobs / "tokenizer.json")
    refused(qf.CheckpointError, lambda: load(snapshot), snapshot, "is a link to")


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').mkdir()\n"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"},
        ),
        ("generation_config.json", {"custom_generate": "own"}),
    ],
)
def test_code_beside_a_checkpoint_is_not_run(copy, monkeypatch, file, changes):
    """What names classes of its own loads as what the package knows, and nobody is asked at the keyboard."""
    (copy / "own.py").write_text(CODE)
    change_json(copy / file, **changes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may run"))
    load(copy)
    assert not (copy / "ran").exists()


def test_a_tokenizer_that_is_code_is_refused_and_nobody_is_asked(copy, monkeypatch):
    """Without False transformers would ask at the keyboard, and run it when the answer is y."""
    (copy / "own.py").write_text(CODE)
    asked = []
    loading = "transformers.AutoTokenizer.from_pretrained"
    monkeypatch.setattr(
        loading, lambda *_, **options: asked.append(options) or (_ for _ in ()).throw(ValueError("no"))
    )
    with pytest.raises(qf.CheckpointError, match="its tokenizer cannot be loaded: ValueError: no"):
        load_tokenizer(copy)
    assert asked == [{"trust_remote_code": False}]


@pytest.mark.parametrize("place", ["top", "text_config", "vision_config"])
@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_names_are_not_fetched(copy, monkeypatch, name, place):
    """Transformers would load "org/kernel" of a config.json from the hub, and run it."""
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: pytest.fail("fetched"), raising=False
    )
    config = json.loads((copy / "config.json").read_text())
    (config if place == "top" else config[place])[name] = "org/kernel"
    (copy / "config.json").write_text(json.dumps(config))
    model = load(copy)
    assert "org/kernel" not in repr(vars(model.config)) + repr(vars(model.config.get_text_config()))


SIZES = {
    "hidden_size": (10**18, "at most 16,777,216"),
    "vocab_size": (10**30, "at most 16,777,216"),
    "num_hidden_layers": (10**9, "at most 4,096"),
    "intermediate_size": (-3, "a positive integer"),
    "head_dim": (0, "a positive integer"),
    "rms_norm_eps": ("x", "expected float"),
    "hidden_act": ("nope", "its config.json makes no model: KeyError"),
    "dtype": ("os.system", "has no attribute 'os.system'"),
    "pad_token_id": (10**12, "its config.json makes no model"),
}


@pytest.mark.parametrize("field", SIZES)
def test_a_config_that_makes_no_model_is_refused(copy, field):
    """Sizes that no model has are refused before there is memory for them."""
    value, problem = SIZES[field]
    config = json.loads((copy / "config.json").read_text())
    config["text_config"][field] = value
    if field == "num_hidden_layers":
        del config["text_config"]["layer_types"]  # which else would be as many
    (copy / "config.json").write_text(json.dumps(config))
    refused(qf.CheckpointError, lambda: load(copy), copy, problem)


def test_a_rope_base_that_is_no_float_is_refused(copy):
    """A number that overflows is named by its field."""
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 10**400
    (copy / "config.json").write_text(json.dumps(config))
    refused(
        qf.CheckpointError,
        lambda: load(copy),
        copy,
        "rope_theta in config.json is 1000.*expected a positive number",
    )


def test_a_config_that_would_fill_the_memory_is_not_read(copy):
    """A sparse file of gigabytes is refused by its size."""
    with (copy / "config.json").open("ab") as file:
        file.truncate(2**40)
    refused(qf.CheckpointError, lambda: load(copy), copy, "more than 268,435,456 are not read")


DAMAGED = {
    "empty": b"",
    "binary": b"\x80\x04\xff",
    "a list": b"[]",
    "a number": b"3",
    "cut": b'{"a": ',
    "deep": DEEP.encode(),
}


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_configs_are_named(copy, file, damage):
    """Each is a CheckpointError with the folder."""
    (copy / file).write_bytes(DAMAGED[damage])
    refused(qf.CheckpointError, lambda: load(copy), copy, "cannot be|expected a JSON object")

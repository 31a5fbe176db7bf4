"""Safetensors files whose headers are changed at random: the tensor that was written, or a CheckpointError."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qwenft as qf
from qwenft.models.weights import Weights

from .hostile import header_of, write_raw

TENSORS = {
    "model.a.weight": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "model.b.weight": torch.arange(12, dtype=torch.bfloat16).reshape(2, 6),
    "model.c": torch.arange(5, dtype=torch.int64),
}
FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=5_000)


@pytest.fixture
def file(tmp_path):
    """A whole file of weights."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def read_all(file):
    """Every tensor that the package finds in a file, in each way in which it reads one."""
    weights = Weights(file.parent)
    found = {}
    for name, stored in weights.stored_names():
        dtype, shape = weights.entry(name)
        found[stored] = weights.read(name)
        assert tuple(found[stored].shape) == shape, dtype
        blocks = [block for _, block in weights.blocks(name)]
        assert torch.equal(as_bytes(torch.cat(blocks) if len(blocks) > 1 else blocks[0]), as_bytes(found[stored]))
    return found


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def check(file, written):
    """What is read is what the bytes of the file are, as safetensors' own reader has them, or it is refused."""
    found, refusal = None, None
    try:
        found = read_all(file)
    except qf.CheckpointError as error:
        refusal = error
    if found is None:
        assert "model.safetensors" in str(refusal)
        assert refusal.fix
        return
    # A header that is read leaves no byte out and names none twice: of the same bytes, all are there once.
    assert sum(tensor.nbytes for tensor in found.values()) == len(written)
    held = load_file(file)
    assert found.keys() == held.keys()
    assert all(torch.equal(as_bytes(tensor), as_bytes(held[name])) for name, tensor in found.items())
    header, data = header_of(file)
    for name, tensor in found.items():
        start, stop = header[name]["data_offsets"]
        assert as_bytes(tensor).numpy().tobytes() == data[start:stop]


def flipped(file, places):
    content = bytearray(file.read_bytes())
    _, data = header_of(file)
    head = len(content) - len(data)
    for place, value in places:
        content[place % head] = value
    file.write_bytes(content)
    return content[head:]


PLACES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)
NUMBERS = st.one_of(st.integers(-4, 300), st.sampled_from([2**31, 2**32, 2**53, 2**63, 2**64, 2**100, -(2**63)]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
DTYPES = st.sampled_from(
    ["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "E8M0", ""]
)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("dtype"), DTYPES),
        st.tuples(st.just("shape"), st.lists(NUMBERS, max_size=4)),
        st.tuples(st.just("data_offsets"), st.lists(NUMBERS, max_size=3)),
        st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", "more", "tensor", "name"]), VALUES),
        st.tuples(st.just("cut"), st.integers(0, 200)),
    ),
    min_size=1,
    max_size=3,
)


def changed(file, name, changes):
    header, data = header_of(file)
    for what, value in changes:
        if what == "cut":
            data = data[: len(data) - value]
        elif what == "tensor":
            header["other"] = value
        elif what == "name":
            header[str(value)] = header.get(name)
        elif isinstance(header.get(name), dict):
            header[name][what] = value
    write_raw(file, json.dumps(header).encode("utf-8", "surrogatepass"), data)
    return data


def fuzz_bytes(file, places):
    save_file(TENSORS, file, metadata={"format": "pt"})
    check(file, flipped(file, places))


def fuzz_json(file, name, changes):
    save_file(TENSORS, file, metadata={"format": "pt"})
    check(file, changed(file, name, changes))


def test_a_file_that_is_not_changed_is_read(file):
    """What is written is read; the checks of the others hold for it."""
    assert read_all(file).keys() == TENSORS.keys()
    check(file, header_of(file)[1])


@FEW
@given(PLACES)
def test_bytes_of_the_header_are_changed(file, places):
    """Whatever bytes of the length and the header are others."""
    fuzz_bytes(file, places)


@FEW
@given(st.sampled_from([*TENSORS, "__metadata__"]), CHANGES)
def test_json_of_the_header_is_changed(file, name, changes):
    """Whatever stands as dtype, shape and place, and however much of the file is there."""
    fuzz_json(file, name, changes)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1])
def test_every_length_of_a_header_is_checked(file, length):
    """It is compared with the file before there is memory for it."""
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(qf.CheckpointError, match="a weight file is damaged"):
        read_all(file)


@pytest.mark.long
@MANY
@given(PLACES)
def test_many_bytes_of_the_header_are_changed(file, places):
    """The same, thousands of times."""
    fuzz_bytes(file, places)


@pytest.mark.long
@MANY
@given(st.sampled_from([*TENSORS, "__metadata__"]), CHANGES)
def test_much_json_of_the_header_is_changed(file, name, changes):
    """The same, thousands of times."""
    fuzz_json(file, name, changes)

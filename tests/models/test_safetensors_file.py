"""Files that are written tensor by tensor, read by safetensors itself."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenft.models.safetensors_file import TensorFile

TENSORS = {
    "matrix": torch.randn(3, 5),
    "small": torch.randn(7).bfloat16(),
    "half": torch.randn(2, 2, 2).half(),
    "scalar": torch.tensor(2.5),
    "numbers": torch.arange(9),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "signed": torch.arange(-2, 3, dtype=torch.int8),
    "flags": torch.tensor([True, False, True]),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 3),
    "ümlaut": torch.randn(1),
}


def entries(path):
    """What a file says of its tensors, in its order."""
    with safe_open(path, framework="pt") as tensors:
        parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    """Every dtype and shape, to the bit, with the metadata."""
    save_file(TENSORS, tmp_path / "wanted.safetensors", metadata={"format": "pt"})
    announced = entries(tmp_path / "wanted.safetensors")
    path = tmp_path / "file.safetensors"
    with TensorFile(path, announced, {"format": "pt"}) as written:
        for name in announced:
            written.write(name, [TENSORS[name]])
    assert entries(path) == announced
    for name, tensor in load_file(path).items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), TENSORS[name].flatten().view(torch.uint8)), name
    with safe_open(path, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    assert path.stat().st_size <= (tmp_path / "wanted.safetensors").stat().st_size


def test_tensors_are_rounded_to_what_was_announced(tmp_path):
    """A sum in float32 lands in the dtype of the file, transposed or not."""
    matrix = torch.randn(4, 3)
    with TensorFile(tmp_path / "file.safetensors", {"a": ("BF16", (3, 4))}, {}) as written:
        written.write("a", matrix.T.split(2))
    assert torch.equal(load_file(tmp_path / "file.safetensors")["a"], matrix.T.bfloat16())


def test_what_was_not_announced_is_refused(tmp_path):
    """Another name, shape or number of tensors; and no file is written over."""
    announced = {"a": ("F32", (2,)), "b": ("F32", (2,))}
    for number, (name, shape) in enumerate([("b", (2,)), ("a", (3,))]):
        with (
            pytest.raises(AssertionError),
            TensorFile(tmp_path / f"{number}.safetensors", announced, {}) as written,
        ):
            written.write(name, [torch.zeros(shape)])
    with (
        pytest.raises(AssertionError, match="1 announced"),
        TensorFile(tmp_path / "few.safetensors", announced, {}) as written,
    ):
        written.write("a", torch.zeros(2))
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "few.safetensors", announced, {})

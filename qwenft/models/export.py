"""The original checkpoint with what was learned: every other tensor and file as it was."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.errors import CheckpointError
from qwenft.kernels.quantized import dense, dense_experts, is_quantized
from qwenft.models.bind import causal_of
from qwenft.models.checkpoint import INDEX
from qwenft.models.quantize import read_dense, stored_shape
from qwenft.models.safetensors_file import TensorFile, as_bytes
from qwenft.models.weights import Weights, canonical, expert_part, is_quantization_state, write_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.models.adapter import Adapter, Beside


@attrs.frozen
class Part:
    """Of a parameter in memory, what is looked at: some rows of all of it, of an expert, or of half of one."""

    expert: int | None = None
    half: int | None = None
    rows: slice = slice(None)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of a weight [E, O, ...] or [O, ...]."""
        if self.expert is not None:
            weight = weight[self.expert]
        if self.half is not None:
            weight = weight.chunk(2, dim=0)[self.half]
        return weight[self.rows] if weight.ndim else weight


@attrs.frozen
class Update:
    """What makes of a part of the source's tensor what it is to be.

    Args:
        apply: the function.
        whole: it needs all rows at once.
    """

    apply: Callable[[torch.Tensor, Part], torch.Tensor]
    whole: bool = False


def write_merged(
    learned: Mapping[str, Update],
    source: Path,
    folder: Path,
    *,
    tied: bool,
    computed: Mapping[str, Callable[[Part], torch.Tensor]],
) -> int:
    """Write a whole checkpoint into an empty folder: what was learned merged in, all other tensors copied.

    Tensors keep the dtype that the source stores them in, and sums are made in float32; towers that were not
    loaded are copied, and ``mtp.*`` unless it was trained. What the source holds quantized is written in the dtype
    of its embeddings.
    One tensor, or a block of its rows, is in memory at a time. What was written is read again and compared, to the
    bit.

    Args:
        learned: of :func:`updates`, or :func:`trained`.
        source: the folder of the base checkpoint.
        folder: exists.
        tied: the output head is the embedding.
        computed: of :func:`dequantized`, to merge into the weights that a run computed with.

    Returns:
        How many tensors of the files were changed.

    Raises:
        CheckpointError: a trained tensor has no place in the source, or one reads otherwise than it was written.
    """
    merge = _Merge(Weights(source), learned, computed, tied)
    for file in merge.weights.files:
        with TensorFile(folder / file.name, merge.announced(file), {"format": "pt"}) as written:
            for stored, name in merge.names(file):
                written.write(stored, (block for _, block in merge.blocks(name)))
    left = sorted(set(learned) - merge.placed)
    if left:
        raise CheckpointError(f"{source}: no place for the trained tensor {left[0]}", path=source, missing=left)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy2(file, folder / file.name)
    _forget_quantization(folder)
    _check_written(merge, Weights(folder))
    return sum(
        _origin(name, tied=tied)[0] in learned for file in merge.weights.files for _, name in merge.names(file)
    )


def _check_written(merge: _Merge, written: Weights) -> None:
    """Compare every tensor with what it is to be."""
    for file in merge.weights.files:
        announced = merge.announced(file)
        if {
            stored: written.entry(name) for name, stored in written.of_file(written.folder / file.name)
        } != announced:
            raise CheckpointError(f"{file.name} holds other tensors than were written", path=written.folder)
        for stored, name in merge.names(file):
            for rows, block in merge.blocks(name):
                found = written.read(stored) if rows == slice(None) else written.rows(stored, rows)
                if not torch.equal(as_bytes(found), as_bytes(block.to("cpu", found.dtype))):
                    raise CheckpointError(
                        f"{stored} in {file.name} reads otherwise than it was written",
                        fix="another disk; what was learned is in the run's checkpoints and adapter as it was",
                        path=written.folder,
                    )


@attrs.define(eq=False)
class _Merge:
    """The tensors of an export, made one by one.

    Args:
        weights: of the source.
        learned: what makes a trained tensor of the source's, by its name in memory.
        computed: what gives a tensor that the run holds quantized, where it is merged into that.
        tied: the output head is the embedding.
        placed: the names of ``learned`` that were met.
    """

    weights: Weights
    learned: Mapping[str, Update]
    computed: Mapping[str, Callable[[Part], torch.Tensor]]
    tied: bool
    placed: set[str] = attrs.field(factory=set)

    def names(self, file: Path) -> Iterator[tuple[str, str]]:
        """The tensors of a file: their names in it, and without ``language_model``."""
        of_file = self.weights.of_file(file)
        return ((stored, name) for name, stored in of_file if not is_quantization_state(stored))

    def announced(self, file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of every tensor of a file."""
        dense_dtype, _ = self.weights.entry("model.embed_tokens.weight")
        found = {}
        for stored, name in self.names(file):
            shape = stored_shape(self.weights, name)
            found[stored] = self.weights.entry(name) if shape is None else (dense_dtype, shape)
        return found

    def blocks(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """A tensor as it is to be, in blocks of rows, in the dtype in which it was made."""
        key, part = _origin(name, tied=self.tied)
        whole = slice(None)
        originals: Iterator[tuple[slice, torch.Tensor]]
        update = self.learned.get(key)
        if key in self.computed:
            originals = iter([(whole, self.computed[key](part))])
        elif stored_shape(self.weights, name) is not None or (update and update.whole):
            originals = iter([(whole, read_dense(self.weights, name))])
        else:
            originals = self.weights.blocks(name)
        if update is not None:
            self.placed.add(key)
        for rows, original in originals:
            yield rows, original if update is None else update.apply(original, attrs.evolve(part, rows=rows))


def _origin(name: str, *, tied: bool) -> tuple[str, Part]:
    """The parameter in memory that a tensor of the file is, or is a part of, and which part."""
    if tied and name == "lm_head.weight":  # some files repeat a tied head
        return "model.embed_tokens.weight", Part()
    found = expert_part(name)
    if found is None:
        return name, Part()
    stack, expert, part = found
    return stack, Part(expert, None if part == "down" else ("gate", "up").index(part))


def _forget_quantization(folder: Path) -> None:
    """Take out of config and index what spoke of a quantized source."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is None:
        return
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places = {name: file for name, file in index["weight_map"].items() if not is_quantization_state(name)}
        write_index(folder, places)


def trained(model: Any) -> dict[str, Update]:
    """What full fine-tuning made of the weights that it trained, by their names without ``language_model``."""

    def update(parameter: torch.Tensor) -> Update:
        return Update(lambda _, part: part.of(parameter))

    return {
        canonical(name): update(parameter.detach())
        for name, parameter in causal_of(model).named_parameters()
        if parameter.requires_grad
    }


def updates(adapter: Adapter, base: Architecture) -> dict[str, Update]:
    """What an adapter makes of the weights that it is beside, in float32.

    Args:
        adapter: of any base of this shape.
        base: the whole checkpoint's architecture.

    Raises:
        CheckpointError: the adapter is of another base.
    """
    return {entry.name: _update(adapter, entry) for entry in adapter.beside(base)}


def _update(adapter: Adapter, entry: Beside) -> Update:
    tensors = entry.tensors
    if entry.how == "copy":
        return Update(lambda _, part: part.of(adapter.read(tensors["copy"])))
    if entry.how == "rows":
        return Update(lambda original, part: _with_rows(original, part, adapter, tensors["rows"]))
    if entry.weight.kind == "experts":
        return Update(lambda original, part: _with_expert_pair(original, part, adapter, entry))
    # The magnitudes of an embedding are the lengths of its columns.
    whole = entry.weight.kind == "embedding" and "magnitude" in tensors
    return Update(lambda original, part: _with_pair(original, part, adapter, entry), whole)


@torch.no_grad()
def _with_pair(original: torch.Tensor, part: Part, adapter: Adapter, entry: Beside) -> torch.Tensor:
    """W + s B A, and with DoRA its rows at the lengths that were trained (arXiv:2402.09353, eq. 5)."""
    a, b = (adapter.read(entry.tensors[name]).float() for name in ("a", "b"))
    if entry.weight.kind == "embedding":
        a, b = b.T, a.T  # peft's are those of the embedding transposed
    merged = original.float() + entry.scaling * (b[part.rows] @ a).to(original.device)
    if "magnitude" not in entry.tensors:
        return merged
    magnitude = adapter.read(entry.tensors["magnitude"]).float().flatten().to(original.device)
    if entry.weight.kind == "embedding":
        return magnitude / torch.linalg.vector_norm(merged, dim=0) * merged
    return (magnitude[part.rows] / torch.linalg.vector_norm(merged, dim=1))[:, None] * merged


@torch.no_grad()
def _with_expert_pair(original: torch.Tensor, part: Part, adapter: Adapter, entry: Beside) -> torch.Tensor:
    """The same of one expert's tensor, of a half of one, or of the whole stack [E, O, I].

    peft lays the experts out as the slow index of A's rows, and the fast one of B's columns.
    """
    a, b = (adapter.read(entry.tensors[name]) for name in ("a", "b"))
    count = entry.weight.shape[0]
    a_XRI = a.view(count, entry.rank, -1)
    b_XOR = b.view(len(b), entry.rank, count).permute(2, 0, 1)
    if part.expert is None:
        a_XRI, b_XOR = a_XRI[part.rows], b_XOR[part.rows]
    else:
        a_XRI, b_XOR = a_XRI[part.expert], part.of(b_XOR)
    return original.float() + entry.scaling * (b_XOR.float() @ a_XRI.float()).to(original.device)


def _with_rows(original: torch.Tensor, part: Part, adapter: Adapter, stored: str) -> torch.Tensor:
    merged = original.to(torch.float32, copy=True)
    start = part.rows.start or 0
    for token, row in zip(adapter.tokens, adapter.read(stored), strict=True):
        if start <= token < start + len(merged):
            merged[token - start] = row.float()
    return merged


def dequantized(model: Any) -> dict[str, Callable[[Part], torch.Tensor]]:
    """What makes a part of each quantized parameter of a model dense, in float32."""
    return {
        canonical(name.replace(".base_layer", "")): _dense_reader(parameter)
        for name, parameter in causal_of(model).named_parameters()
        if is_quantized(parameter)
    }


def _dense_reader(parameter: torch.Tensor) -> Callable[[Part], torch.Tensor]:
    def read(part: Part) -> torch.Tensor:
        if part.expert is None:
            return dense(parameter, torch.float32)
        one = dense_experts(parameter, part.expert, part.expert + 1, torch.float32)
        return attrs.evolve(part, expert=0).of(one)

    return read

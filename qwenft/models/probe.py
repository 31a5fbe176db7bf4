"""Logits of a checkpoint on disk, with a layer of it in memory at a time: what an export is compared by."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.backends.eager import EagerAttention
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import bind, causal_of, decoder_of, hidden_states
from qwenft.models.export import Part, updates
from qwenft.models.load import skeleton
from qwenft.models.lora import add_lora, lora_config, put_adapter, unwrapped
from qwenft.models.precision import compute_in
from qwenft.models.quantize import read_dense
from qwenft.models.weights import Weights, canonical

if TYPE_CHECKING:
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.models.adapter import Adapter

_TOKENS = 16


def probe_ids(text: Architecture, adapter: Adapter | None) -> torch.Tensor:
    """Some tokens [T]: any, and of those whose rows an adapter has the first."""
    ids = torch.randint(text.vocabulary, (_TOKENS,), generator=torch.Generator().manual_seed(0))
    own = () if adapter is None else adapter.tokens[:_TOKENS]
    return torch.cat([ids, torch.tensor(own, dtype=torch.int64)])


@torch.no_grad()
def logits_of_files(
    folder: Path, text: Architecture, ids: torch.Tensor, adapter: Adapter | None = None
) -> torch.Tensor:
    """[T, V] float32 of the text half of a checkpoint, with an adapter of peft beside its layers.

    Args:
        folder: the checkpoint.
        text: the architecture of its text half.
        ids: [T].
        adapter: unmerged, through peft's own layers; merged into the head's rows alone.
    """
    weights = Weights(folder)
    model = compute_in(bind(skeleton(text, folder), full=EagerAttention(), linear=ReferenceDeltaRule()), "float32")
    if adapter is not None:
        adapter = _of_text(adapter)
        config = lora_config(text, adapter.spec, adapter.trained_weights(text), str(folder))
        model = add_lora(model, config, seed=0, on_meta=True)
        put_adapter(model, adapter, text)
    model.eval()
    decoder = decoder_of(model)
    for name, module in causal_of(model).named_modules():
        if module in (decoder.embed_tokens, *decoder.layers, decoder.norm):
            filled: list[tuple[Any, str, Any]] = []
            module.register_forward_pre_hook(partial(_fill, weights, name, filled))
            module.register_forward_hook(partial(_empty, filled))
    hidden = hidden_states(model, ids, SequenceLayout.from_lengths([len(ids)]))
    head = "model.embed_tokens.weight" if text.tied else "lm_head.weight"
    update = None if adapter is None else updates(adapter, text).get(head)
    blocks = [(slice(None), read_dense(weights, head))] if update and update.whole else weights.blocks(head)
    return torch.cat(
        [
            hidden @ (block if update is None else update.apply(block, Part(rows=rows))).float().T
            for rows, block in blocks
        ],
        dim=1,
    )


def _of_text(adapter: Adapter) -> Adapter:
    kept = {name: shape for name, shape in adapter.shapes.items() if ".visual." not in name}
    return attrs.evolve(adapter, shapes=kept)


def _fill(weights: Weights, prefix: str, filled: list[tuple[Any, str, Any]], module: Any, _: Any) -> None:
    """Read what of a module is on the meta device."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            path, _, attribute = name.rpartition(".")
            key = unwrapped(f"{prefix}.{name}")
            owner = module.get_submodule(path)
            filled.append((owner, attribute, parameter))
            held = _read(weights, canonical(key), parameter.shape)
            setattr(owner, attribute, torch.nn.Parameter(held, requires_grad=False))


def _empty(filled: list[tuple[Any, str, Any]], *_: Any) -> None:
    """Let go of it again."""
    for owner, attribute, parameter in filled:
        setattr(owner, attribute, parameter)
    filled.clear()


def _read(weights: Weights, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name in weights:
        return read_dense(weights, name)
    experts = weights.experts(name, shape[0])
    first = next(experts)
    stack = first.new_empty(shape)
    for number, expert in enumerate((first, *experts)):
        stack[number] = expert
    return stack


def distance(of: torch.Tensor, to: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of ``of``."""
    return float((of - to).abs().max() / of.abs().max())

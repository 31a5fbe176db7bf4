"""A checkpoint's weights and tokenizer in memory, as transformers' own classes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from qwenft.errors import CheckpointError
from qwenft.models.checkpoint import weight_files

if TYPE_CHECKING:
    from pathlib import Path

    from qwenft.family.architectures import Architecture

# They ship in float32 and rounding them hurts; transformers keeps no list of its own for this family.
FLOAT32_ISLANDS = ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: the folder holds none.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded: {error}", fix="copy tokenizer.json beside it", path=folder
        ) from error
    # transformers 5.23 builds the BPE anew and forgets this flag, without which some words encode otherwise.
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.backend_tokenizer.model.ignore_merges = bool(saved["model"].get("ignore_merges"))
    return tokenizer


def load_model(
    folder: Path, loaded: Architecture, *, dtype: str, device: str = "cpu", embeddings_on_host: bool = False
) -> Any:
    """The weights of a checkpoint folder, `A_log`, `dt_bias` and the GDN norm in float32.

    Args:
        folder: the checkpoint.
        loaded: the part of it to load: without a tower, the tower's weights are never read.
        dtype: in which the other weights are held.
        device: "cpu" or "cuda".
        embeddings_on_host: leave the input embeddings on the CPU; they must not be tied.

    Returns:
        transformers' ``...ForCausalLM`` or ``...ForConditionalGeneration``.

    Raises:
        CheckpointError: a file is damaged, or lacks weights that the model has.
    """
    cls = getattr(transformers, loaded.class_name)
    # The list of float32 modules belongs to the class, so a subclass of this call alone carries ours.
    # It names transformers as its module, or the conversions of the family's weight names would not apply to it.
    attributes = {"_keep_in_fp32_modules_strict": list(FLOAT32_ISLANDS), "__module__": cls.__module__}
    with_islands: Any = type(cls.__name__, (cls,), attributes)
    files = weight_files(folder)
    try:
        model, report = with_islands.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map=None, output_loading_info=True
        )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder}: a weight file is damaged or missing: {error}", fix="copy the checkpoint again", path=folder
        ) from error
    model.__class__ = cls
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are in none of its {len(files)} files, {missing[0]} first",
            fix="a checkpoint that is whole",
            path=folder,
            missing=missing,
        )
    decoder = getattr(model.model, "language_model", model.model)
    embeddings = decoder.embed_tokens
    if embeddings_on_host:
        decoder.embed_tokens = None
    model.to(device)
    decoder.embed_tokens = embeddings
    return model

"""A checkpoint's weights and tokenizer in memory, as transformers' own classes.

Weights are read tensor by tensor into where they are to be held, so that neither the host nor the device ever has
more than the result and one tensor, or one expert of a stack.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights

from qwenft.errors import CheckpointError
from qwenft.family.inventory import inventory
from qwenft.models.bind import decoder_of
from qwenft.models.mtp import MultiTokenPrediction
from qwenft.models.quantize import put_quantized, read_quantized
from qwenft.models.weights import Weights, checked, require_whole

if TYPE_CHECKING:
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.plan.storage import Storage


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
    folder: Path, loaded: Architecture, *, storage: Storage, device: str = "cpu", embeddings_on_host: bool = False
) -> Any:
    """The weights of a checkpoint folder, each held as ``storage`` says.

    Args:
        folder: the checkpoint.
        loaded: the part of it to load: without a tower, the tower's weights are never read.
        storage: dtypes, and what is quantized.
        device: "cpu" or "cuda".
        embeddings_on_host: leave the input embeddings on the CPU; they must not be tied.

    Returns:
        transformers' ``...ForCausalLM`` or ``...ForConditionalGeneration``, in evaluation mode; its ``.mtp`` is
        the multi-token-prediction layer, where that is loaded.

    Raises:
        CheckpointError: a file is damaged, or lacks weights that the model has.
    """
    weights = Weights(folder)
    require_whole(weights, loaded)
    model = skeleton(folder, loaded)
    for weight in inventory(loaded):
        where = "cpu" if embeddings_on_host and weight.role == "embeddings" else device
        for name in weight.names(text_only=loaded.is_text_only):
            if storage.is_quantized(weight, name):
                put_quantized(model, name, read_quantized(weights, weight, name, storage, where))
            else:
                held = _read(weights, weight, name, getattr(torch, storage.dtype_of(weight)), where)
                path, _, parameter = name.rpartition(".")
                setattr(model.get_submodule(path), parameter, torch.nn.Parameter(held))
    if loaded.tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = storage.kind == "nf4", storage.kind == "int8"  # peft asks
    # Rotary tables are made by the model itself.
    for name, buffer in list(model.named_buffers()):
        path, _, buffered = name.rpartition(".")
        setattr(model.get_submodule(path), buffered, buffer.to(device))
    return model.eval()


def skeleton(folder: Path, loaded: Architecture) -> Any:
    """The model with all its parameters on the meta device."""
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    if loaded.is_text_only:
        config = config.get_text_config()
    config.tie_word_embeddings = loaded.tied
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, loaded.class_name)(config)
        if loaded.loads_mtp:
            model.mtp = MultiTokenPrediction(decoder_of(model))
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _read(weights: Weights, weight: Weight, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A weight as it is, in a tensor of its own, and no view of the file."""
    if weight.kind != "experts":
        return checked(weights, name, weights.read(name), weight.shape).to(device, dtype, copy=True)
    stack = torch.empty(weight.shape, dtype=dtype, device=device)
    for number, expert in enumerate(weights.experts(name, weight.shape[0])):
        stack[number] = checked(weights, name, expert, weight.shape[1:])
    return stack

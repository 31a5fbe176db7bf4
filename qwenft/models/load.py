"""A checkpoint's weights and tokenizer in memory, as transformers' own classes.

Weights are read tensor by tensor into where they are to be held, so that neither the host nor the device ever has
more than the result and one tensor, or one expert of a stack.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
import transformers
from accelerate import init_empty_weights

from qwenft.errors import CheckpointError
from qwenft.family.inventory import inventory
from qwenft.models.bind import decoder_of
from qwenft.models.checkpoint import read_object
from qwenft.models.mtp import MultiTokenPrediction
from qwenft.models.quantize import put_quantized, quantized_on_meta, read_quantized
from qwenft.models.weights import Weights, checked, require_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight
    from qwenft.plan.storage import Storage


_CONFIG_FIX = "config.json as the checkpoint was published"
_TOKENIZER_FIX = "copy tokenizer.json beside it, and the configs as the checkpoint was published"


@contextmanager
def _explained(folder: Path, problem: str, fix: str) -> Iterator[None]:
    """Say of every error which folder it is about: transformers and tokenizers raise what they fall over."""
    try:
        yield
    except Exception as error:
        problem = f"{folder}: {problem}: {type(error).__name__}: {error}"
        raise CheckpointError(problem, fix=fix, path=folder) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: the folder holds none, a damaged one, or one that is code of its own.
    """
    saved = read_object(folder / "tokenizer.json", _TOKENIZER_FIX)
    with _explained(folder, "its tokenizer cannot be loaded", _TOKENIZER_FIX):
        # False, for what is asked without it may be answered at the keyboard.
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # transformers 5.23 builds the BPE anew and forgets this flag, without which some words encode otherwise.
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
    source = WeightSource.of_folder(folder, loaded, storage)
    model = skeleton(loaded, folder)
    for name, weight in source.weights.items():
        where = "cpu" if embeddings_on_host and weight.role == "embeddings" else device
        _put(model, name, source.read(name, where))
    return _finished(model, loaded, storage, device)


def model_on_meta(
    loaded: Architecture, storage: Storage, folder: Path | None = None, *, device: str = "cpu"
) -> Any:
    """The model as :func:`load_model` would give it, with all its weights on the meta device still.

    Args:
        loaded: the part of the checkpoint to load.
        storage: dtypes, and what is quantized.
        folder: of the checkpoint, of which no weight is read; None for an architecture alone.
        device: "cpu" or "cuda", of its rotary tables.
    """
    model = skeleton(loaded, folder)
    for name, weight in named_weights(loaded).items():
        if storage.is_quantized(weight, name):
            held = quantized_on_meta(weight.shape, storage)
        else:
            held = torch.empty(weight.shape, dtype=getattr(torch, storage.dtype_of(weight)), device="meta")
        _put(model, name, held)
    return _finished(model, loaded, storage, device)


def named_weights(loaded: Architecture) -> dict[str, Weight]:
    """The weights of a model by the names of its parameters."""
    return {name: weight for weight in inventory(loaded) for name in weight.names(text_only=loaded.is_text_only)}


def _put(model: Any, name: str, held: torch.Tensor) -> None:
    """Give a model a parameter, quantized or not."""
    if isinstance(held, torch.nn.Parameter):
        put_quantized(model, name, held)
        return
    path, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(path), parameter, torch.nn.Parameter(held))


def _finished(model: Any, loaded: Architecture, storage: Storage, device: str) -> Any:
    if loaded.tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = storage.kind == "nf4", storage.kind == "int8"  # peft asks
    # Rotary tables are made by the model itself.
    for name, buffer in list(model.named_buffers()):
        path, _, buffered = name.rpartition(".")
        setattr(model.get_submodule(path), buffered, buffer.to(device))
    return model.eval()


@attrs.frozen(eq=False)
class WeightSource:
    """The weights of a checkpoint's files as a model holds them, each read when it is asked for.

    Args:
        files: the tensors.
        weights: by the names of parameters in memory.
        storage: dtypes, and what is quantized.
    """

    files: Weights
    weights: Mapping[str, Weight]
    storage: Storage

    @classmethod
    def of_folder(cls, folder: Path, loaded: Architecture, storage: Storage) -> WeightSource:
        """Those of the part of a checkpoint that is loaded.

        Raises:
            CheckpointError: a file is damaged, or lacks weights that the model has.
        """
        files = Weights(folder)
        require_whole(files, loaded)
        return cls(files, named_weights(loaded), storage)

    def read(self, name: str, device: str) -> torch.Tensor:
        """A parameter; quantized, it is one of bitsandbytes, and else a tensor of its own, no view of the file."""
        weight = self.weights[name]
        if self.storage.is_quantized(weight, name):
            return read_quantized(self.files, weight, name, self.storage, device)
        return self.rows(name, slice(None), device)

    def rows(self, name: str, rows: slice, device: str) -> torch.Tensor:
        """Some rows, or experts, of a parameter that is not quantized; no other is read."""
        weight = self.weights[name]
        dtype = getattr(torch, self.storage.dtype_of(weight))
        count, *shape = weight.shape
        if weight.kind != "experts":
            whole = len(range(count)[rows]) == count
            read = self.files.read(name) if whole else self.files.rows(name, rows)
            return checked(self.files, name, read, (len(range(count)[rows]), *shape)).to(device, dtype, copy=True)
        stack = torch.empty((0, *shape), dtype=dtype, device=device)
        for number, expert in enumerate(self.files.experts(name, count, rows)):
            read = checked(self.files, name, expert, tuple(shape))
            if number == 0:  # a stack of the sizes of a wrong config.json may fit in no memory
                stack = torch.empty((len(range(count)[rows]), *shape), dtype=dtype, device=device)
            stack[number] = read
        return stack


def skeleton(loaded: Architecture, folder: Path | None = None) -> Any:
    """The model with all its parameters on the meta device; of a folder with all that its configs say.

    Raises:
        CheckpointError: the configs of the folder make no model.
    """
    if folder is None:
        return _empty_model(loaded, transformers.AutoConfig.for_model(**loaded.to_config()))
    with _explained(folder, "its config.json makes no model", _CONFIG_FIX):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # A config.json may name kernels of the hub here, which transformers would fetch and run.
        config._attn_implementation = config._experts_implementation = None  # noqa: SLF001 - it has no other names
        model = _empty_model(loaded, config)
    if (folder / "generation_config.json").exists():
        with _explained(folder, "its generation_config.json cannot be loaded", "copy it again, or remove it"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _empty_model(loaded: Architecture, config: Any) -> Any:
    if loaded.is_text_only:
        config = config.get_text_config()
    config.tie_word_embeddings = loaded.tied
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, loaded.class_name)(config)
        if loaded.loads_mtp:
            model.mtp = MultiTokenPrediction(decoder_of(model))
    return model

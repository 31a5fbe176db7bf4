"""A tiny checkpoint that lies on disk as the family's do on the hub."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from qwenft.errors import CheckpointError, SpecError
from qwenft.testing.tokenizer import train_tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    import torch
    from transformers import PreTrainedTokenizerFast

Kind = Literal["dense", "moe", "vision", "moe-vision"]
Dtype = Literal["float32", "bfloat16", "float16"]
ExpertFiles = Literal["each", "fused"]

# What the hub ships in float32 in whatever precision the rest is.
_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight")
_INTERVAL = 4  # every 4th layer is full attention
_VOCABULARY_MULTIPLE = 64
_FUSED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_MOE_SHARDS = 3  # at least: a tensor is never split


@attrs.frozen(kw_only=True)
class TinySizes:
    """The sizes of a tiny model; the defaults suit tests, a base that is to learn something takes more.

    Args:
        hidden: width of the residual stream.
        ffn: width of the dense MLP.
        layers: decoder layers; every 4th is full attention, so at least 4.
        heads: query heads of full attention.
        kv_heads: key/value heads of full attention.
        head_dim: width of a head of full attention, a multiple of 8 since a quarter of it is rotated.
        linear_key_heads: key heads of the Gated DeltaNet.
        linear_value_heads: value heads of the Gated DeltaNet, a multiple of its key heads.
        linear_head_dim: width of a key head and of a value head of the Gated DeltaNet.
        experts: routed experts of a MoE layer.
        experts_per_token: how many of them see a token.
        expert_ffn: width of one expert, and of the shared expert.
        vision_hidden: width of the vision tower.
        vision_ffn: width of its MLP.
        vision_depth: its blocks.
        vision_heads: its heads.
        initializer_range: standard deviation of the weights; 1 / sqrt(hidden) when None, so that every layer has
            a say in the logits and a leak between documents shows. A base that is to be trained starts lower
            (transformers takes 0.02).

    Raises:
        SpecError: fewer than 4 layers, or sizes that do not divide each other.
    """

    hidden: int = 64
    ffn: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    linear_key_heads: int = 2
    linear_value_heads: int = 4
    linear_head_dim: int = 16
    experts: int = 8
    experts_per_token: int = 2
    expert_ffn: int = 32
    vision_hidden: int = 32
    vision_ffn: int = 64
    vision_depth: int = 2
    vision_heads: int = 2
    initializer_range: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.layers < _INTERVAL:
            msg = f"TinySizes.layers = {self.layers}, but the 4th layer is the first of full attention"
            raise SpecError(msg, fix="layers=4", got=self.layers, expected=">= 4")
        for whole, part in (
            ("head_dim", 8),
            ("heads", self.kv_heads),
            ("linear_value_heads", self.linear_key_heads),
            ("vision_hidden", 4 * self.vision_heads),
        ):
            got = getattr(self, whole)
            if got % part:
                msg = f"TinySizes.{whole} = {got} is not a multiple of {part}"
                raise SpecError(msg, fix=f"{whole}={part * math.ceil(got / part)}", got=got, expected=part)

    @property
    def std(self) -> float:
        """Standard deviation of the weights at the start."""
        return self.hidden**-0.5 if self.initializer_range is None else self.initializer_range


def tiny_checkpoint(
    path: str | os.PathLike[str],
    kind: Kind = "dense",
    dtype: Dtype = "float32",
    seed: int = 0,
    *,
    texts: Iterable[str] | None = None,
    vocabulary: int = 512,
    sizes: TinySizes | None = None,
    a_log: float | None = None,
    experts: ExpertFiles = "each",
) -> Path:
    """Write a tiny checkpoint of the family, with everything that a checkpoint on the hub has.

    The architecture is always the vision-language one: text weights under `model.language_model.*`, the tower
    under `model.visual.*`, one multi-token-prediction layer under `mtp.*`, `A_log` and the norm of the Gated
    DeltaNet in float32, a tokenizer and a chat template. The MoE kinds lie in several shards; the vision kinds
    add the processor's files.

    Args:
        path: the folder to write; it must not exist, or be empty.
        kind: dense or mixture of experts, with or without the processor's files.
        dtype: precision of the weights on disk.
        seed: the same seed gives the same bytes; the caller's random state is left alone.
        texts: what the tokenizer is trained on; a few English sentences when None.
        vocabulary: tokens of the tokenizer; the embedding has a few rows more, as in the family.
        sizes: the sizes of the model; small ones when None.
        a_log: the value of every `A_log` (-3 or -4 makes the state long-lived, so that a leak through the scan
            shows); drawn as transformers draws it when None.
        experts: how the routed experts of a MoE lie on disk: each alone (`experts.0.gate_proj.weight`, as
            transformers writes them) or fused as in memory (`experts.gate_up_proj`); both are found on the hub.
            Those of the multi-token-prediction layer lie each alone.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder is there already and holds something.
        SpecError: no such kind, dtype or layout of the experts.
    """
    for name, got, allowed in (
        ("kind", kind, get_args(Kind)),
        ("dtype", dtype, get_args(Dtype)),
        ("experts", experts, get_args(ExpertFiles)),
    ):
        if got not in allowed:
            msg = f"tiny_checkpoint: {name} = {got!r}, but it is one of {', '.join(map(repr, allowed))}"
            raise SpecError(msg, fix=f"{name}={allowed[0]!r}", got=got, expected=allowed)
    target = Path(path)
    _refuse_occupied(target)
    sizes = sizes or TinySizes()
    tokenizer = train_tokenizer(texts, vocabulary)
    config = _config(kind, dtype, sizes, tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that no reader ever finds half a checkpoint.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as workshop:
        folder = Path(workshop) / "checkpoint"
        model = _model(config, dtype, seed, a_log)
        _write_weights(folder, model, seed, experts)
        tokenizer.save_pretrained(folder)
        _write_generation_config(folder, tokenizer)
        if kind in ("vision", "moe-vision"):
            _write_processor(folder, config.vision_config)
        _move(folder, target)
    return target


def _refuse_occupied(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        msg = f"tiny_checkpoint: {target} is there already and is not an empty folder"
        raise CheckpointError(msg, fix="remove it, or name another path", path=target)


def _move(folder: Path, target: Path) -> None:
    _refuse_occupied(target)  # another process may have been faster
    if target.exists():
        target.rmdir()
    folder.rename(target)


def _config(kind: Kind, dtype: Dtype, sizes: TinySizes, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig

    moe = kind in ("moe", "moe-vision")
    tied = not moe
    ids = tokenizer.convert_tokens_to_ids
    half = sizes.head_dim // 8  # a quarter of the head is rotated, in pairs
    text = {
        "vocab_size": (len(tokenizer) // _VOCABULARY_MULTIPLE + 1) * _VOCABULARY_MULTIPLE,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "linear_num_key_heads": sizes.linear_key_heads,
        "linear_num_value_heads": sizes.linear_value_heads,
        "linear_key_head_dim": sizes.linear_head_dim,
        "linear_value_head_dim": sizes.linear_head_dim,
        "max_position_embeddings": 262_144,
        "initializer_range": sizes.std,
        "tie_word_embeddings": tied,
        "eos_token_id": ids("<|endoftext|>"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [(half + 2 - axis) // 3 for axis in range(3)],
        },
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "dtype": dtype,
    }
    if moe:
        text |= {
            "num_experts": sizes.experts,
            "num_experts_per_tok": sizes.experts_per_token,
            "moe_intermediate_size": sizes.expert_ffn,
            "shared_expert_intermediate_size": sizes.expert_ffn,
        }
    else:
        text["intermediate_size"] = sizes.ffn
    vision = {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_ffn,
        "num_heads": sizes.vision_heads,
        "out_hidden_size": sizes.hidden,
        "num_position_embeddings": 64,
        "initializer_range": sizes.vision_hidden**-0.5,
    }
    return (Qwen3_5MoeConfig if moe else Qwen3_5Config)(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def _write_weights(folder: Path, model: Any, seed: int, experts: ExpertFiles) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    with _no_progress_bar():
        model.save_pretrained(folder)  # renames the weights, and splits the experts, as they lie on the hub
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
        shard.unlink()
    prediction = _multi_token_prediction(weights, model.config.text_config, seed)
    if experts == "fused":
        fused = {n: w.detach() for n, w in model.state_dict().items() if n.endswith(_FUSED)}
        weights = fused | {name: weight for name, weight in weights.items() if ".mlp.experts." not in name}
    weights |= prediction
    size = sum(weight.nbytes for weight in weights.values())
    shards = _MOE_SHARDS if model.config.model_type == "qwen3_5_moe" else 1
    save_torch_state_dict(weights, folder, max_shard_size=math.ceil(size / shards), metadata={"format": "pt"})


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _model(config: Any, dtype: Dtype, seed: int, a_log: float | None) -> Any:
    import torch

    from qwenft.models.stock import dense, moe

    is_moe = config.model_type == "qwen3_5_moe"
    build = moe.Qwen3_5MoeForConditionalGeneration if is_moe else dense.Qwen3_5ForConditionalGeneration
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(seed)
        model = build(config).float()
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(_inverse_softplus_of_time_steps(parameter))
            elif name.endswith("A_log"):
                if a_log is not None:
                    parameter.fill_(a_log)
            elif name.endswith("conv1d.weight"):
                # One channel sees its few taps only: the width of the model says nothing about its scale.
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 1:
                # Norms and biases away from their identity, so that one that is lost or swapped shows.
                parameter.add_(0.05 * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if not name.endswith(_FLOAT32):
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def _inverse_softplus_of_time_steps(like: torch.Tensor) -> torch.Tensor:
    """Time steps log-uniform in [0.001, 0.1], as FLA draws them (fla/layers/gated_deltanet.py).

    With the constant 1 of transformers a state forgets within a token, and nothing beyond the convolution learns
    or leaks.
    """
    import torch

    step = torch.exp(torch.rand_like(like) * math.log(0.1 / 0.001) + math.log(0.001))
    return step + torch.log(-torch.expm1(-step))


def _multi_token_prediction(
    weights: dict[str, torch.Tensor], text_config: Any, seed: int
) -> dict[str, torch.Tensor]:
    """One layer that predicts the token after next, shaped as the model's last layer of full attention."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    last = max(index for index, kind in enumerate(text_config.layer_types) if kind == "full_attention")
    prefix = f"model.language_model.layers.{last}."
    shapes = {f"layers.0.{name.removeprefix(prefix)}": w for name, w in weights.items() if name.startswith(prefix)}
    norm = weights["model.language_model.norm.weight"]
    shapes |= dict.fromkeys(("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight"), norm)
    shapes["fc.weight"] = norm.new_empty(len(norm), 2 * len(norm))
    return {
        f"mtp.{name}": (torch.randn(like.shape, generator=generator) * text_config.initializer_range).to(
            like.dtype
        )
        for name, like in sorted(shapes.items())
    }


def _write_generation_config(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import GenerationConfig

    ids = tokenizer.convert_tokens_to_ids
    GenerationConfig(eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")).save_pretrained(folder)


def _write_processor(folder: Path, vision_config: Any) -> None:
    """The two files of the hub; written by hand since transformers' video half needs torchvision."""
    common = {
        "patch_size": vision_config.patch_size,
        "temporal_patch_size": vision_config.temporal_patch_size,
        "merge_size": vision_config.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    # Pixels of the smallest and the largest picture: a picture becomes 1 to 64 tokens.
    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    image = {**common, "size": size, "image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {**common, "size": size, "video_processor_type": "Qwen3VLVideoProcessor"}
    for name, content in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

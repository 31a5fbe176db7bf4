"""The model, its attention and its processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from qwenft import backends
from qwenft.axolotl.keys import BITSANDBYTES, FSDP
from qwenft.axolotl.values import ATTENTION_FLAGS
from qwenft.errors import SpecError, nearest
from qwenft.family.architectures import FAMILY, Architecture, find
from qwenft.models.checkpoint import architecture_of
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.parallel import ParallelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.axolotl.config import Config

_COMPUTED = "the model computes in bfloat16 wherever the device does"
_SHARDING = {
    "FULL_SHARD": {},
    "SHARD_GRAD_OP": {"reshard_after_forward": False},
    "HYBRID_SHARD": {"hybrid": True},
    "HYBRID_SHARD_ZERO2": {"hybrid": True, "reshard_after_forward": False},
}


@attrs.frozen
class Base:
    """The model that is fine-tuned.

    Args:
        model: its spec.
        checkpoint: its architecture.
        loaded: what of it is loaded: without the tower where only the text half is.
    """

    model: ModelSpec
    checkpoint: Architecture
    loaded: Architecture


def read_base(config: Config) -> Base:
    """The model, whose architecture decides what can be adapted.

    Raises:
        SpecError: it is not named, or not known here to be of the family.
        CheckpointError: its folder holds no checkpoint of the family.
    """
    source = config.get("base_model")
    if source is None:
        raise SpecError("expected a checkpoint of the family, got none", fix="base_model: Qwen/Qwen3.5-27B")
    for key in ("base_model_config", "tokenizer_config"):
        if config.get(key, source) != source:
            config.refuse(key, "config and tokenizer are those of base_model", "a folder that holds all three")
    revision = config.get("revision_of_model", config.get("model_revision"))
    model = ModelSpec(source, revision=revision)
    checkpoint = _architecture(config, model)
    if config.get("bf16") is False:
        model = model.with_dtype("float32")
    elif config.has("bf16"):
        config.note("bf16", _COMPUTED)
    if config.has("processor_type"):
        model = _with_vision(config, model, checkpoint)
    loaded = checkpoint if model.vision else checkpoint.text_only()
    return Base(_quantized(config, model, loaded), checkpoint, loaded)


def _architecture(config: Config, model: ModelSpec) -> Architecture:
    """The architecture of a folder, or of the size that an id names; the hub is not asked."""
    packaged = find(model.source)
    if packaged is not None or Path(model.source).is_dir():
        return architecture_of(model)
    name = model.source.rpartition("/")[2].lower()
    sizes = [size for size in FAMILY if name.startswith(f"{size}-")]
    if not sizes:
        raise SpecError(
            f"expected a checkpoint of the family, got {model.source!r}{nearest(name, FAMILY)}",
            fix=f"the folder of a checkpoint, or the hub id of one of {', '.join(FAMILY)}",
            got=model.source,
            expected=tuple(FAMILY),
        )
    config.note("base_model", f"taken to be a {sizes[0]} by its name; compile() reads its config")
    return FAMILY[sizes[0]]


def _with_vision(config: Config, model: ModelSpec, checkpoint: Architecture) -> ModelSpec:
    if config.get("processor_type") != "AutoProcessor":
        config.refuse(
            "processor_type", "the processor is the checkpoint's own", "processor_type: AutoProcessor, or none"
        )
    if checkpoint.is_text_only:
        config.refuse("processor_type", f"{checkpoint.name} has no vision tower", "leave it out")
    return model.with_vision()


def _quantized(config: Config, model: ModelSpec, loaded: Architecture) -> ModelSpec:
    few_bits = [bits for bits in (4, 8) if config.get(f"load_in_{bits}bit")]
    options = config.inside("bnb_config_kwargs", BITSANDBYTES)
    if config.get("quantize_moe_experts") and not few_bits:
        config.refuse("quantize_moe_experts", "nothing is quantized", "load_in_4bit: true, or leave it out")
    if len(few_bits) > 1:
        config.refuse("load_in_8bit", "weights are held in 4 bits or in 8", "load_in_8bit: false")
        return model
    if not few_bits:
        if config.get("adapter") == "qlora":
            config.refuse("adapter", "load_in_4bit is not true", "load_in_4bit: true, or adapter: lora")
        return model
    bits = few_bits[0]
    wanted = {4: "qlora", 8: "lora"}[bits]
    if config.get("adapter") != wanted:
        reason = "weights of few bits are read and not trained, and axolotl quantizes for this adapter alone"
        config.refuse(f"load_in_{bits}bit", reason, f"adapter: {wanted}, or load_in_{bits}bit: false")
    return model.quantize(
        {4: "nf4", 8: "int8"}[bits],
        double_quant=options.get("bnb_4bit_use_double_quant") if bits == 4 else None,
        # axolotl quantizes every Linear, those of the tower too; experts are none, and stay unless it is told.
        experts=config.get("quantize_moe_experts", False) if loaded.is_moe else True,
        vision=model.vision,
    )


def read_attention(config: Config) -> AttentionSpec:
    """The backend of full attention, by its name or by one of the older booleans.

    Raises:
        SpecError: no backend has this name, or a kernel of the hub is not pinned to a commit.
    """
    flags = [key for key in ATTENTION_FLAGS if config.get(key)]
    name = config.get("attn_implementation")
    if name is not None and flags:
        config.refuse(
            "attn_implementation",
            f"{', '.join(flags)} would say it a second time, which axolotl refuses too",
            f"attn_implementation: {name} alone",
        )
    elif len(flags) > 1:
        config.refuse(
            flags[0], f"so would {', '.join(flags[1:])}", f"attn_implementation: {ATTENTION_FLAGS[flags[0]]}"
        )
    elif flags:
        name = ATTENTION_FLAGS[flags[0]]
    if name in ("xformers", "sage", "fp8"):
        place = flags[0] if flags else "attn_implementation"
        config.refuse(place, f"{name} attention is not offered", "attn_implementation: flash_attention_2")
    elif name is not None:
        backends.full(name)
        return AttentionSpec(full=name)
    return AttentionSpec()


def read_parallel(config: Config, processes: int) -> ParallelSpec:
    """What the processes share: FSDP2 where any kind of FSDP is asked for, and otherwise nothing."""
    # Its keys had a prefix of their own before; that of the version has it still.
    given = {str(key).removeprefix("fsdp_"): value for key, value in config.get("fsdp_config", {}).items()}
    config.values["fsdp_config"] = given
    sharding = config.inside("fsdp_config", FSDP)
    words = config.get("fsdp", [])
    words = words.split() if isinstance(words, str) else words
    for word in words:
        if word not in (
            "full_shard",
            "auto_wrap",
            "shard_grad_op",
            "hybrid_shard",
            "hybrid_shard_zero2",
            "offload",
        ):
            config.refuse("fsdp", f"{word} is not offered", "fsdp_version: 2 and fsdp_config")
    if not words and not config.has("fsdp_config"):
        if config.has("fsdp_version"):
            config.note("fsdp_version", "without fsdp_config nothing is shared out")
        return ParallelSpec.single() if processes == 1 else ParallelSpec.ddp()
    _version(config, sharding)
    strategy = str(sharding.get("sharding_strategy", next(_strategies(words), "FULL_SHARD"))).upper()
    if strategy not in _SHARDING:
        sharding.refuse("sharding_strategy", "it shares nothing out", f"one of {', '.join(_SHARDING)}")
    if sharding.get("mixed_precision_policy", "bf16") not in ("bf16", "bfloat16"):
        sharding.refuse("mixed_precision_policy", _COMPUTED, "mixed_precision_policy: bf16")
    options: dict[str, Any] = dict(_SHARDING.get(strategy, {}))
    if sharding.has("reshard_after_forward"):
        options["reshard_after_forward"] = sharding.get("reshard_after_forward", True)
    if config.get("dp_replicate_size", 1) > 1:
        options["hybrid"] = True
        config.note("dp_replicate_size", "the model is shared out within each node, and repeated on every node")
    offload = "cpu" if sharding.get("offload_params") or "offload" in words else None
    return attrs.evolve(ParallelSpec.fsdp2(offload=offload), **options)


def _strategies(words: list[str]) -> Iterator[str]:
    return (word.upper() for word in words if word.upper() in _SHARDING)


def _version(config: Config, sharding: Config) -> None:
    """Say that version 1 becomes version 2, which shares out the same."""
    if 2 not in (config.get("fsdp_version"), sharding.get("version")):
        given = "fsdp" if config.has("fsdp") else "fsdp_config"
        config.notes.append(f"{given}: weights are shared out by FSDP2, which computes what version 1 does")

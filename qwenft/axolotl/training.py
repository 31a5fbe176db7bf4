"""The loop: how long, how fast, by which optimizer, and what it watches and keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from qwenft.axolotl.adapter import trained_roles
from qwenft.axolotl.keys import OVERRIDES
from qwenft.specs.training import BETAS, TrainingSpec

if TYPE_CHECKING:
    from qwenft.axolotl.config import Config
    from qwenft.axolotl.model import Base
    from qwenft.specs.adapter import AdapterSpec

_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit", "ao_adamw_8bit"), "adamw_8bit"),
    **dict.fromkeys(("adamw_torch_4bit", "ao_adamw_4bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
}
_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_CCE = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
_PLUGINS = {
    "axolotl.integrations.liger.LigerPlugin": "it computes the same by another kernel; qwenft has its own",
    "axolotl.integrations.kernels.KernelsPlugin": "it computes the same by another kernel; qwenft has its own",
}
_ROUTER_LOSS = 0.001  # of the family's configs, where a file asks for the loss and says no number


def read_training(config: Config, base: Base, adapter: AdapterSpec, processes: int) -> TrainingSpec:
    """The loop of a configuration."""
    config.missing("learning_rate", "learning_rate: 0.0002")
    held_out = bool(config.get("val_set_size")) or config.has("test_datasets")
    roles = trained_roles(base, adapter)
    return TrainingSpec(
        **_length(config),
        tokens_per_step=_tokens_per_step(config, processes),
        **_rates(config, roles, is_lora=adapter.kind == "lora"),
        **_schedule(config),
        **_optimizer(config),
        **_loss(config, base, roles),
        **_memory(config),
        **_evaluation(config, is_held_out=held_out),
        **_saving(config),
    )


def _length(config: Config) -> dict[str, Any]:
    if config.has("max_steps"):
        if config.has("num_epochs"):
            config.note("num_epochs", "max_steps decides")
        return {"max_steps": config.get("max_steps", 1)}
    epochs = config.get("num_epochs", 1)
    if epochs != int(epochs):
        config.refuse("num_epochs", "epochs are whole", "max_steps: 500")
    return {"epochs": max(1, int(epochs))}


def _tokens_per_step(config: Config, processes: int) -> int | None:
    """The tokens of the rows of a step over all processes; None for one row in each."""
    micro, accumulated = config.get("micro_batch_size", 1), config.get("gradient_accumulation_steps", 1)
    if micro * accumulated == 1:
        return None
    length = config.get("sequence_len", 512)
    tokens: int = micro * accumulated * processes * length
    shared = (
        f"each of {processes} processes" if processes > 1 else "one process; from_axolotl(path, processes=8) for 8"
    )
    rows = "rows" if config.get("sample_packing") else "documents, which are counted by their tokens,"
    config.notes.append(
        f"micro_batch_size x gradient_accumulation_steps: a step takes as many {rows} as fit in "
        f"{micro} x {accumulated} x {length} = {micro * accumulated * length:,} tokens in {shared}"
    )
    return tokens


def _rates(config: Config, roles: set[str], *, is_lora: bool) -> dict[str, Any]:
    rate = config.get("learning_rate", 2e-4)
    options: dict[str, Any] = {"learning_rate": rate}
    if config.has("loraplus_lr_ratio") and is_lora:
        options["lora_plus_ratio"] = config.get("loraplus_lr_ratio", 1.0)
    of_tokens = tuple(sorted({"embeddings", "lm_head"} & roles))
    if config.has("loraplus_lr_embedding") and is_lora:
        if "embeddings" in roles:
            config.refuse("loraplus_lr_embedding", "rates are given by role", "embedding_lr: 0.000001")
        else:
            config.note("loraplus_lr_embedding", "no embedding is adapted")
    for key, peak in (
        ("embedding_lr_scale", rate * config.get("embedding_lr_scale", 1.0)),
        ("embedding_lr", config.get("embedding_lr", rate)),
    ):
        if config.has(key) and not of_tokens:
            config.note(key, "neither embeddings nor the output head are trained")
        elif config.has(key):
            options.setdefault("learning_rates", tuple((role, peak) for role in of_tokens))
    return options


def _schedule(config: Config) -> dict[str, Any]:
    name = config.get("lr_scheduler", "cosine")
    if name not in _SCHEDULES:
        config.refuse("lr_scheduler", "is not offered", f"lr_scheduler: {', '.join(_SCHEDULES)}")
        return {}
    # The constant rate of transformers has no warmup.
    warmup = 0.0 if name == "constant" else _warmup(config)
    options: dict[str, Any] = {"schedule": _SCHEDULES[name], "warmup_ratio": warmup}
    if name == "constant":
        for key in ("warmup_ratio", "warmup_steps"):
            if config.has(key):
                config.note(key, "a constant rate has no warmup; lr_scheduler: constant_with_warmup has one")
    if config.has("cosine_min_lr_ratio"):
        if name == "cosine":
            options["floor_ratio"] = config.get("cosine_min_lr_ratio", 0.0)
        else:
            config.note("cosine_min_lr_ratio", f"lr_scheduler: {name} has no floor")
    return options


def _warmup(config: Config) -> float:
    """The share of all steps; steps are one where it is known how many there are."""
    share: float = config.get("warmup_ratio", 0.03)
    steps, of_all = config.get("warmup_steps"), config.get("max_steps")
    if not config.has("warmup_steps"):
        if not config.has("warmup_ratio"):
            config.notes.append("warmup_ratio: not given: 0.03 of all steps, which axolotl ends at 100")
        return share
    if config.has("warmup_ratio"):
        config.refuse("warmup_steps", "warmup_ratio is given too", "one of the two")
    elif steps and of_all is None:
        config.refuse(
            "warmup_steps", "a share of all steps is what can be said here", "warmup_ratio: 0.03, or max_steps"
        )
    elif steps and steps >= of_all:
        config.refuse("warmup_steps", f"the run has {of_all} steps", "fewer")
    elif steps:
        share = steps / of_all
        # What is rounded up to whole steps must come out as these.
        return share if math.ceil(share * of_all) == steps else math.nextafter(share, 0.0)
    return 0.0 if not steps else share


def _optimizer(config: Config) -> dict[str, Any]:
    name = config.get("optimizer", "adamw_torch_fused")
    if name not in _OPTIMIZERS:
        config.refuse("optimizer", "is not offered", f"optimizer: {', '.join(_OPTIMIZERS)}")
        return {}
    if "4bit" in name:
        config.note("optimizer", "moments are held in 8 bits, which is nearer to AdamW, and twice as large")
    options: dict[str, Any] = {"optimizer": _OPTIMIZERS[name], "weight_decay": config.get("weight_decay", 0.0)}
    # 0 turns clipping off, in transformers too.
    options["max_grad_norm"] = config.get("max_grad_norm", 1.0) or None
    numbers = [key for key in ("adam_beta1", "adam_beta2", "adam_epsilon") if config.has(key)]
    if name == "sgd":
        for key in numbers:
            config.note(key, "SGD has none")
        return options
    options["betas"] = (config.get("adam_beta1", BETAS[0]), config.get("adam_beta2", BETAS[1]))
    options["epsilon"] = config.get("adam_epsilon", 1e-8)
    return options


def _loss(config: Config, base: Base, roles: set[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    plugins = config.get("plugins", [])
    for plugin in plugins:
        if plugin in _PLUGINS:
            config.notes.append(f"plugins: {plugin}: {_PLUGINS[plugin]}")
        elif plugin != _CCE:
            config.refuse("plugins", f"{plugin} is not offered", f"plugins: [{_CCE}]")
    cuts = _CCE in plugins and config.get("cut_cross_entropy", True)
    if config.has("cut_cross_entropy") and _CCE not in plugins:
        config.note("cut_cross_entropy", "its plugin is not among the plugins")
    head = "embeddings" if base.loaded.tied else "lm_head"
    if config.get("chunked_cross_entropy"):
        options["loss"] = "chunked"
    elif cuts and head in roles:
        config.notes.append(
            f'plugins: {_CCE}: the output head is trained, and so loss="chunked" stands for it, which keeps no '
            "logits either, and adds gradients up in float32"
        )
    elif cuts:
        options["loss"] = "cce"
    if config.has("label_smoothing_factor"):
        options["label_smoothing"] = config.get("label_smoothing_factor", 0.0)
        if options["label_smoothing"] and options.pop("loss", None) == "cce":
            config.notes.append('plugins: cut cross entropy has no label smoothing, which loss="chunked" has')
    noise = config.get("neftune_noise_alpha", config.get("noisy_embedding_alpha"))
    return {**options, **({} if noise is None else {"neftune_alpha": noise}), **_router_loss(config, base)}


def _router_loss(config: Config, base: Base) -> dict[str, float]:
    places = [config, *(config.inside(key, OVERRIDES) for key in ("model_config", "overrides_of_model_config"))]
    asking = [place for place in places if place.get("output_router_logits")]
    weighing = [place for place in places if place.has("router_aux_loss_coef")]
    if not asking or not base.loaded.is_moe:
        reason = (
            "output_router_logits is not true" if base.loaded.is_moe else f"{base.checkpoint.name} has no router"
        )
        for place in weighing if base.loaded.is_moe else {*asking, *weighing}:
            place.note("router_aux_loss_coef" if place in weighing else "output_router_logits", reason)
        return {}
    return {"router_aux_loss": weighing[0].get("router_aux_loss_coef", _ROUTER_LOSS) if weighing else _ROUTER_LOSS}


def _memory(config: Config) -> dict[str, Any]:
    """What is kept for backward; offloading is of what checkpointed layers were given."""
    asked = [config.get("gradient_checkpointing", False), config.get("activation_offloading", False)]
    for key, value in zip(("gradient_checkpointing", "activation_offloading"), asked, strict=True):
        if value in ("disk", "offload_disk"):
            config.refuse(key, "nothing is kept on disk", "activation_offloading: true")
    offloads = asked[0] == "offload" or bool(asked[1])
    by_fsdp = config.get("fsdp_config", {}).get("activation_checkpointing") is True
    options: dict[str, Any] = {"activation_checkpointing": bool(asked[0]) or offloads or by_fsdp}
    if offloads:
        options["activation_offloading"] = True
    if config.get("torch_compile"):
        config.note("torch_compile", "norms and gates are compiled, and nothing else")
        options["compile_elementwise"] = True
    return options


def _evaluation(config: Config, *, is_held_out: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if not is_held_out:
        for key in ("eval_steps", "evals_per_epoch", "early_stopping_patience", "load_best_model_at_end"):
            if config.get(key):
                config.note(key, "nothing is held out; val_set_size: 0.05 holds a share out")
        return options
    every = _every(config, "eval_steps", "evals_per_epoch", "evaluations are made before and after the run")
    if every is not None:
        options["evaluate_every"] = every
    if config.get("load_best_model_at_end"):
        options["keep_best"] = True
    if config.has("early_stopping_patience"):
        options["patience"] = config.get("early_stopping_patience", 1)
        if every is None:
            config.refuse("early_stopping_patience", "how often to evaluate is said in steps", "eval_steps: 50")
    return options


def _saving(config: Config) -> dict[str, Any]:
    options: dict[str, Any] = {}
    every = _every(config, "save_steps", "saves_per_epoch", "a checkpoint is saved every tenth of the run")
    if every is not None:
        options["save_every"] = every
    if config.has("save_total_limit"):
        options["keep_checkpoints"] = config.get("save_total_limit", 1)
    if config.has("seed"):
        options["seed"] = config.get("seed", 0)
    return options


def _every(config: Config, in_steps: str, per_epoch: str, instead: str) -> int | None:
    """Steps between two events; a share of the run is some where it is known how long that is."""
    steps, times = config.get(in_steps), config.get(per_epoch)
    if config.has(in_steps) and config.has(per_epoch):
        config.refuse(in_steps, f"{per_epoch} is given too", "one of the two")
    if steps is None and times is None:
        return None
    key = in_steps if steps is not None else per_epoch
    if steps is not None and steps >= 1:
        if steps != int(steps):
            config.refuse(in_steps, "steps are whole", f"{in_steps}: {math.ceil(steps)}")
        return int(steps)
    share: float = steps if steps is not None else 1 / (times * config.get("num_epochs", 1))
    if config.has("max_steps"):
        of_all: int = config.get("max_steps", 1)
        return max(1, math.ceil(share * of_all))
    config.note(
        key, f"how many steps there are is known when the data are read; {instead} unless {in_steps} says when"
    )
    return None

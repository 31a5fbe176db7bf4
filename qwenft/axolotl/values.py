"""The keys that are read, and what their values are."""

from __future__ import annotations

from typing import Any

from qwenft.specs.base import Check, flag, number, one_of, text, whole


def _is_list_of(kinds: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)


def _texts(example: str) -> Check:
    return Check(lambda v: _is_list_of(str, v), "a list of texts", example)


def _text_or_texts(example: str) -> Check:
    return Check(lambda v: (isinstance(v, str) and v != "") or _is_list_of(str, v), "a text or a list", example)


def _wholes(example: str) -> Check:
    return Check(lambda v: _is_list_of(int, v), "a list of whole numbers", example)


def _mappings(example: str) -> Check:
    return Check(lambda v: _is_list_of(dict, v), "a list of mappings", example)


def _mapping(example: str) -> Check:
    return Check(lambda v: isinstance(v, dict), "a mapping", example)


def _mapping_of_texts(example: str) -> Check:
    return Check(
        lambda v: isinstance(v, dict) and all(isinstance(w, str) for pair in v.items() for w in pair),
        "a mapping of texts",
        example,
    )


def _roles(example: str) -> Check:
    """The names that rows have for each role."""
    return Check(
        lambda v: isinstance(v, dict) and all(_is_list_of(str, names) for names in v.values()),
        "lists by role",
        example,
    )


def _flags(*keys: str) -> dict[str, Check]:
    return {key: flag(f"{key}: true") for key in keys}


def _either(*known: Any, example: str) -> Check:
    """One of some words and of True and False, which are not 1 and 0."""
    return Check(
        lambda v: any(type(v) is type(one) and v == one for one in known),
        "one of " + ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in known),
        example,
    )


#: Each of the older booleans of attention, and the name that stands for it.
ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
}

#: Keys of LoRA, which full fine-tuning has no use for.
LORA: dict[str, Check] = {
    "lora_model_dir": text("lora_model_dir: runs/a/adapter"),
    "lora_r": whole("lora_r: 16"),
    "lora_alpha": number("lora_alpha: 32", above=True),
    "lora_dropout": number("lora_dropout: 0.05", high=1.0),
    "lora_target_modules": _text_or_texts("lora_target_modules: [q_proj, k_proj, v_proj, o_proj]"),
    "lora_target_parameters": _text_or_texts("lora_target_parameters: [mlp.experts.gate_up_proj]"),
    "lora_modules_to_save": _texts("lora_modules_to_save: [embed_tokens, lm_head]"),
    "peft_layers_to_transform": _wholes("peft_layers_to_transform: [30, 31]"),
    "peft_layers_pattern": _text_or_texts("peft_layers_pattern: layers"),
    "peft_init_lora_weights": Check(
        lambda v: isinstance(v, str | bool), "true or a text", "peft_init_lora_weights: pissa"
    ),
    "peft_trainable_token_indices": Check(
        lambda v: _is_list_of(int, v) or isinstance(v, dict),
        "a list of token ids, or one for each of embed_tokens and lm_head",
        "peft_trainable_token_indices: [248077]",
    ),
    "loraplus_lr_ratio": number("loraplus_lr_ratio: 16", above=True),
    "loraplus_lr_embedding": number("loraplus_lr_embedding: 0.000001", above=True),
    **_flags("lora_target_linear", "peft_use_dora", "peft_use_rslora"),
}

MODEL: dict[str, Check] = {
    "base_model": text("base_model: Qwen/Qwen3.5-27B"),
    "base_model_config": text("base_model_config: Qwen/Qwen3.5-27B"),
    "tokenizer_config": text("tokenizer_config: Qwen/Qwen3.5-27B"),
    "revision_of_model": text("revision_of_model: main"),
    "model_revision": text("revision_of_model: main"),
    "processor_type": text("processor_type: AutoProcessor"),
    "processor_kwargs": _mapping("processor_kwargs: {max_pixels: 1000000}"),
    "bnb_config_kwargs": _mapping("bnb_config_kwargs: {bnb_4bit_use_double_quant: false}"),
    "overrides_of_model_config": _mapping("model_config: {output_router_logits: true}"),
    "model_config": _mapping("model_config: {output_router_logits: true}"),
    "bf16": _either("auto", "full", True, False, example="bf16: auto"),
    "adapter": text("adapter: lora"),
    "unfrozen_parameters": _texts("unfrozen_parameters: [model.language_model.layers, lm_head]"),
    "attn_implementation": text("attn_implementation: flash_attention_2"),
    **_flags("load_in_4bit", "load_in_8bit", "quantize_moe_experts", "freeze_mm_modules", *ATTENTION_FLAGS),
}

DATA: dict[str, Check] = {
    "datasets": _mappings("datasets: [{path: chats.jsonl, type: chat_template}]"),
    "test_datasets": _mappings("test_datasets: [{path: test.jsonl, type: chat_template}]"),
    "val_set_size": number("val_set_size: 0.05"),
    "sequence_len": whole("sequence_len: 2048", low=2),
    "eval_sequence_len": whole("eval_sequence_len: 2048", low=2),
    "excess_length_strategy": one_of(("drop", "truncate", "raise"), "excess_length_strategy: drop"),
    "min_sample_len": whole("min_sample_len: 2", low=0),
    "chat_template": text("chat_template: tokenizer_default"),
    "chat_template_kwargs": _mapping("chat_template_kwargs: {enable_thinking: false}"),
    "eot_tokens": _texts('eot_tokens: ["<|im_end|>"]'),
    "special_tokens": _mapping("special_tokens: {}"),
    **_flags("sample_packing", "eval_sample_packing", "train_on_inputs", "shuffle_merged_datasets"),
}

TRAINING: dict[str, Check] = {
    "num_epochs": number("num_epochs: 3", above=True),
    "max_steps": whole("max_steps: 500"),
    "micro_batch_size": whole("micro_batch_size: 1"),
    "gradient_accumulation_steps": whole("gradient_accumulation_steps: 4"),
    "learning_rate": number("learning_rate: 0.0002", above=True),
    "embedding_lr": number("embedding_lr: 0.00001", above=True),
    "embedding_lr_scale": number("embedding_lr_scale: 0.1", above=True),
    "lr_scheduler": text("lr_scheduler: cosine"),
    "cosine_min_lr_ratio": number("cosine_min_lr_ratio: 0.1", high=1.0),
    "warmup_ratio": number("warmup_ratio: 0.03", high=1.0),
    "warmup_steps": whole("warmup_steps: 10", low=0),
    "weight_decay": number("weight_decay: 0.01"),
    "max_grad_norm": number("max_grad_norm: 1.0"),
    "optimizer": text("optimizer: adamw_torch_fused"),
    "adam_beta1": number("adam_beta1: 0.9", high=1.0),
    "adam_beta2": number("adam_beta2: 0.999", high=1.0),
    "adam_epsilon": number("adam_epsilon: 0.00000001", above=True),
    "neftune_noise_alpha": number("neftune_noise_alpha: 5"),
    "noisy_embedding_alpha": number("neftune_noise_alpha: 5"),
    "label_smoothing_factor": number("label_smoothing_factor: 0.1", high=1.0),
    "router_aux_loss_coef": number("router_aux_loss_coef: 0.001"),
    "gradient_checkpointing": _either(
        True, False, "offload", "offload_disk", example="gradient_checkpointing: true"
    ),
    "activation_offloading": _either(
        True, False, "legacy", "hidden_states", "disk", example="activation_offloading: true"
    ),
    "torch_compile": _either(True, False, "auto", example="torch_compile: true"),
    "eval_steps": number("eval_steps: 50", above=True),
    "evals_per_epoch": whole("evals_per_epoch: 4"),
    "save_steps": number("save_steps: 500", above=True),
    "saves_per_epoch": whole("saves_per_epoch: 1"),
    "save_total_limit": whole("save_total_limit: 2"),
    "early_stopping_patience": whole("early_stopping_patience: 3"),
    "seed": whole("seed: 42", low=0),
    "plugins": _texts("plugins: [axolotl.integrations.liger.LigerPlugin]"),
    **_flags("output_router_logits", "load_best_model_at_end", "cut_cross_entropy", "chunked_cross_entropy"),
}

PARALLEL: dict[str, Check] = {
    "fsdp": _text_or_texts("fsdp: [full_shard, auto_wrap]"),
    "fsdp_config": _mapping("fsdp_config: {reshard_after_forward: true}"),
    "fsdp_version": whole("fsdp_version: 2"),
    "dp_replicate_size": whole("dp_replicate_size: 1"),
}

FSDP: dict[str, Check] = {
    "version": whole("fsdp_version: 2"),
    "sharding_strategy": text("sharding_strategy: FULL_SHARD"),
    "mixed_precision_policy": text("mixed_precision_policy: bf16"),
    **_flags("offload_params", "reshard_after_forward", "activation_checkpointing"),
}

DATASET: dict[str, Check] = {
    "path": text("path: chats.jsonl"),
    "type": Check(lambda v: isinstance(v, str | dict), "a text", "type: chat_template"),
    "split": text("split: train"),
    "revision": text("revision: main"),
    "name": text("name: default"),
    "ds_type": text("ds_type: json"),
    "data_files": _text_or_texts("data_files: [a.jsonl, b.jsonl]"),
    "field": text("field: text"),
    "field_messages": text("field_messages: messages"),
    "field_tools": text("field_tools: tools"),
    "message_field_role": text("message_field_role: role"),
    "message_field_content": text("message_field_content: content"),
    "message_property_mappings": _mapping_of_texts("message_property_mappings: {role: from, content: value}"),
    "roles": _roles("roles: {assistant: [gpt]}"),
    "roles_to_train": _texts("roles_to_train: [assistant]"),
    "train_on_eos": text("train_on_eos: turn"),
    "train_on_eot": text("train_on_eot: turn"),
    "chat_template": text("chat_template: tokenizer_default"),
}

BITSANDBYTES: dict[str, Check] = {
    "bnb_4bit_quant_type": one_of(("nf4",), "bnb_4bit_quant_type: nf4"),
    **_flags("bnb_4bit_use_double_quant"),
}

IMAGES: dict[str, Check] = {
    "min_pixels": whole("min_pixels: 65536"),
    "max_pixels": whole("max_pixels: 1000000"),
}

OVERRIDES: dict[str, Check] = {
    "router_aux_loss_coef": TRAINING["router_aux_loss_coef"],
    **_flags("output_router_logits"),
}

SPECIAL_TOKENS: dict[str, Check] = {
    "eos_token": one_of(("<|im_end|>",), 'eos_token: "<|im_end|>", with which the template ends a turn'),
}

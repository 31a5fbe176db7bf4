"""What every key means: it is read, has no effect here, or is not offered.

The names are those of axolotl's schema (axolotl-ai-cloud/axolotl at 067b021, July 2026), and older ones that its
examples and configurations of people still have.
"""

from __future__ import annotations

from typing import Any

from qwenft.axolotl import values
from qwenft.axolotl.config import Keys, Refused


def _all(reason: str, keys: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), reason)


def _none(reason: str, fix: str, keys: str, fine: tuple[Any, ...] = ()) -> dict[str, Refused]:
    return dict.fromkeys(keys.split(), Refused(reason, fix, fine))


_PREPARED = "documents are tokenised once, cached, and read ahead"
_KERNELS = "it computes the same by another kernel; qwenft has its own"
_OUT = "leave it out"

_NO_EFFECT: dict[str, str] = {
    **_all(
        'run.history and TensorBoard files have the metrics; plan.train(trackers=["wandb"]) tells others',
        """
        use_wandb wandb_name wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch wandb_log_model
        use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts
        use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode
        comet_online comet_experiment_config use_trackio trackio_project_name trackio_run_name
        trackio_space_id use_tensorboard use_otel_metrics otel_metrics_host otel_metrics_port
        include_tokens_per_second include_tkps profiler_steps profiler_steps_start
        """,
    ),
    **_all("every step is logged", "logging_steps"),
    **_all("plan.train(run_dir) says where a run lies", "output_dir"),
    **_all(
        "run.push(name) publishes, when it is called",
        "hub_model_id hub_strategy hub_revision push_dataset_to_hub",
    ),
    **_all("a token of the environment is used where one is needed", "hf_use_auth_token"),
    **_all("plan.train(run_dir) goes on with its own folder by itself", "auto_resume_from_checkpoints"),
    **_all(
        "a checkpoint is safetensors, with all that going on needs; save_every says when it is written",
        "save_safetensors save_only_model save_first_step save_strategy dynamic_checkpoint",
    ),
    **_all("evaluate_every says when, in steps", "eval_strategy evaluation_strategy"),
    **_all("the lowest held-out loss is the best", "greater_is_better"),
    **_all("run.export(path) merges, when it is called", "merge_lora merge_method"),
    **_all(
        "TrainingSpec(sample_prompts=...) shows answers at every evaluation",
        """
        generate_samples num_generation_samples generation_max_new_tokens generation_temperature generation_top_p
        generation_top_k generation_prompt_ratio generation_do_sample eval_table_size eval_max_new_tokens
        """,
    ),
    **_all("a key that is not known is always an error here", "strict"),
    **_all(
        _PREPARED,
        """
        dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory
        num_dataset_shards_to_save skip_prepare_dataset remove_unused_columns dataloader_pin_memory
        dataloader_num_workers dataloader_prefetch_factor shuffle_before_merging_datasets is_preprocess
        """,
    ),
    **_all(
        "no token is padding here, and rows hold whole documents, as many as fit",
        """
        pad_to_sequence_len pad_to_multiple_of batch_flattening sample_packing_group_size
        sample_packing_bin_size sample_packing_eff_est sample_packing_mp_start_method eval_batch_size
        multipack_real_batches total_num_tokens total_supervised_tokens
        """,
    ),
    **_all(
        _KERNELS,
        """
        lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm
        liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy
        liger_fused_linear_cross_entropy use_kernels use_scattermoe use_sonicmoe expert_backend
        experts_implementation moe_grouped_backend moe_bnb_fast moe_dequant_chunk_size fused_attn_kernel
        sdpa_varlen large_head_attention flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_rms_norm
        flash_attn_fuse_mlp flash_optimum tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp
        chunked_cross_entropy_num_chunks torch_compile_backend torch_compile_mode torch_compile_options
        """,
    ),
    **_all(
        "how memory is used changes no result; plan.memory says what a run takes",
        """
        gc_steps torch_empty_cache_steps gc_collect_steps layer_offloading device_map max_memory
        gpu_memory_limit low_cpu_mem_usage qlora_sharded_model_loading selective_checkpointing
        experimental_skip_move_to_device gradient_checkpointing_kwargs embeddings_skip_upcast
        """,
    ),
    **_all(
        "who starts the processes says how many there are, plan.launch(run_dir, processes=8) or torchrun",
        """
        ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters device world_size
        local_rank accelerator_config dp_shard_size
        """,
    ),
    **_all(
        "the checkpoint's own config, tokenizer and template are read, and no code of it",
        """
        trust_remote_code tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files
        model_type type_of_model cls_model_config is_falcon_derived_model is_llama_derived_model
        is_mistral_derived_model is_qwen_derived_model
        """,
    ),
    **_all("a checkpoint has one format, which any number of processes reads", "fsdp_final_state_dict_type"),
    **_all("products of float32 are not rounded to TF32", "tf32"),
    **_all("the model computes in bfloat16 wherever the device does", "bfloat16"),
    **_all("embeddings and output head stay tied where they are", "peft_ensure_weight_tying"),
    **_all(
        "it serves a finished model",
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
    ),
    **_all("it is the configuration's own", "axolotl_config_path"),
}

_NOT_OFFERED: dict[str, Refused] = {
    **_none(
        "supervised fine-tuning is what is offered",
        "leave it out, or train these data with axolotl",
        """
        rl trl vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels
        dpo_use_weighting dpo_label_smoothing precompute_ref_log_probs dpo_loss_type dpo_use_liger_kernel
        dpo_padding_free dpo_loss_weights dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss
        rl_beta orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rpo_alpha
        max_prompt_len use_eaft eaft_alpha eaft_k liger_use_token_scaling trainer_cls
        """,
    ),
    **_none(
        "every process computes whole layers on whole rows of its own",
        "fsdp_version: 2 and fsdp_config, which share weights out",
        "sequence_parallel_degree context_parallel_size tensor_parallel_size heads_k_stride ring_attn_func",
        fine=(1,),
    ),
    **_none("DeepSpeed is not used", "fsdp_version: 2 and fsdp_config", "deepspeed deepcompile"),
    **_none(
        "plan.launch or torchrun starts the processes",
        _OUT,
        "use_ray ray_run_name ray_num_workers resources_per_worker",
        fine=(1,),
    ),
    **_none(
        "an adapter is not merged and begun anew while training goes on",
        "a higher lora_r",
        """
        relora relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps
        jagged_restart_warmup_steps jagged_restart_anneal_steps
        """,
    ),
    **_none(
        "the same layers are trained in every step",
        "peft_layers_to_transform: [30, 31]",
        "lisa_n_layers lisa_step_interval lisa_layers_attribute",
    ),
    **_none("weights are read straight to where they are trained", _OUT, "lora_on_cpu"),
    **_none("weights are multiplied as the family stores them", _OUT, "lora_fan_in_fan_out"),
    **_none(
        "ranks and alphas are given by role",
        "leave it out, then recipe.with_adapter(recipe.adapter.with_rank(mlp=8).with_alpha(mlp=16))",
        "lora_rank_pattern lora_alpha_pattern",
    ),
    **_none("what is adapted is named, and nothing else", "lora_target_modules", "lora_exclude_modules"),
    **_none("LoftQ and repeated layers are not offered", _OUT, "peft peft_layer_replication"),
    **_none("adapters are float32", _OUT, "peft_autocast_adapter_dtype", fine=(True,)),
    **_none(
        "weights are held in nf4 or int8, or in 16 bits",
        "load_in_4bit: true",
        """
        gptq qat quantization model_quantization_config model_quantization_config_kwargs use_onebitllms
        nonexpert_quantization nvfp4_merge_aware nvfp4_merge_aware_start_step
        """,
        fine=("none", "bf16"),
    ),
    **_none("float16 overflows in Gated DeltaNet, whose gradients are NaN then", "bf16: true", "fp16 float16"),
    **_none("bf16 decides", "bf16: false, for float32", "float32"),
    **_none("the model computes in 16 or 32 bits", "bf16: true", "fp8 fp8_enable_fsdp_float8_all_gather"),
    **_none(
        "norms alone are not held in float32",
        "leave it out, then recipe.with_training(master_weights=True), which holds all that is trained so",
        "fp32_norms fp32_norm_classes",
    ),
    **_none("weights are those of the checkpoint", _OUT, "reinit_weights"),
    **_none(
        "the vocabulary stays as it is",
        "tokens that it holds in reserve, and peft_trainable_token_indices",
        """
        tokens added_tokens_overrides resize_token_embeddings_to_32x mean_resizing_embeddings
        shrink_embeddings fix_untrained_tokens
        """,
    ),
    **_none(
        "a checkpoint of another trainer cannot be gone on with",
        "lora_model_dir for an adapter, base_model for a whole model",
        "resume_from_checkpoint",
    ),
    **_none(
        "the checkpoint's own template is used",
        "the template as chat_template.jinja in the folder of the checkpoint",
        "chat_template_jinja default_system_message role_boundaries",
    ),
    **_none(
        "data are streamed where the recipe says so",
        "datasets, then recipe.with_data(recipe.data.stream(window=2048))",
        """
        pretraining_dataset streaming streaming_multipack_buffer_size pretrain_multipack_buffer_size
        pretrain_multipack_attn pretraining_sample_concatenation preprocess_iterable
        """,
    ),
    **_none(
        "documents are shuffled, each epoch anew, and all of them are taken",
        _OUT,
        """
        sample_packing_sequentially curriculum_sampling group_by_length dataset_shard_num dataset_shard_idx
        dataloader_drop_last
        """,
    ),
    **_none(
        "equal rows are all trained; recipe.data.describe(recipe.model) counts them",
        "a file without repetitions",
        "dataset_exact_deduplication",
    ),
    **_none("a step is what it is asked to be; plan.fits says whether it fits", _OUT, "auto_find_batch_size"),
    **_none("two other keys say it", "micro_batch_size and gradient_accumulation_steps", "batch_size"),
    **_none("rows are as long as documents may be", "sequence_len", "max_packed_sequence_len"),
    **_none(
        "images keep their shape",
        "processor_kwargs: {max_pixels: 1000000}, which scales them down",
        "image_size image_resize_algorithm",
    ),
    **_none(
        "the held-out loss decides",
        "metric_for_best_model: eval_loss",
        "metric_for_best_model",
        fine=("eval_loss", "loss"),
    ),
    **_none(
        "the held-out loss, perplexity and accuracy are measured, and nothing else",
        _OUT,
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split",
    ),
    **_none(
        "a run ends by itself where a loss is not finite",
        "early_stopping_patience: 3",
        "loss_watchdog_threshold loss_watchdog_patience",
    ),
    **_none(
        "learning rates are given by role",
        "leave it out, then recipe.with_training(recipe.training.with_learning_rate(mlp=1e-5))",
        "lr_groups",
    ),
    **_none(
        "the optimizers and schedules here have no such number",
        "optimizer: adamw_torch_fused and lr_scheduler: cosine, without it",
        """
        optim_args lr_scheduler_kwargs lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor adam_beta3
        adam_epsilon2 optim_target_modules torchdistx_path dion_lr dion_momentum dion_rank_fraction
        dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type
        qgalore_proj_quant qgalore_proj_bits qgalore_cos_threshold qgalore_proj_group_size
        qgalore_gamma_proj qgalore_queue_size
        """,
    ),
    **_none(
        "attention and positions are those of the checkpoint",
        _OUT,
        """
        s2_attention scaling_softmax scaling_softmax_factor scaling_softmax_bias rope_scaling use_pose
        pose_split_on_token_ids pose_max_context_len pose_num_chunks overrides_of_model_kwargs model_kwargs
        """,
    ),
    **_none(
        "it is for another family",
        _OUT,
        "gemma4_hybrid_attn_impl llama4_linearized_experts tokenizer_use_mistral_common flash_attn_d512",
    ),
}

CONFIG = Keys(
    {**values.MODEL, **values.LORA, **values.DATA, **values.TRAINING, **values.PARALLEL}, _NO_EFFECT, _NOT_OFFERED
)

FSDP = Keys(
    values.FSDP,
    {
        **_all(
            "a checkpoint has one format, which any number of processes reads",
            "state_dict_type final_state_dict_type",
        ),
        **_all(
            "each decoder layer is shared out by itself, and every process reads its own part of it",
            """
            auto_wrap_policy transformer_layer_cls_to_wrap min_num_params sync_module_states
            cpu_ram_efficient_loading cpu_offload_pin_memory use_orig_params limit_all_gathers backward_prefetch
            backward_prefetch_policy forward_prefetch
            """,
        ),
    },
)

DATASET = Keys(
    values.DATASET,
    {
        **_all(_PREPARED, "preprocess_shards"),
        **_all("no code of a data set is run", "trust_remote_code"),
        **_all("reasoning in front of </think> is told from the answer", "split_thinking"),
    },
    {
        **_none(
            "rows are messages, or texts to complete",
            "type: chat_template, of rows that were written so",
            "input_transform input_format conversation field_human field_model logprobs_field temperature",
        ),
        **_none("all rows of a split are taken", "split: train[:50%]", "shards shards_idx"),
        **_none("the checkpoint's own template is used", _OUT, "chat_template_jinja"),
        **_none(
            "a message says by its key `train` whether it is trained",
            "the key renamed to train",
            "message_field_training",
            fine=("train",),
        ),
        **_none(
            "a part of a message says itself whether it is trained",
            'a content in parts, {"type": "text", "text": ..., "train": true}',
            "message_field_training_detail",
        ),
        **_none(
            "reasoning is read from reasoning_content, and given to the template so",
            "the key renamed to reasoning_content",
            "field_thinking template_thinking_key",
            fine=("reasoning_content",),
        ),
        **_none("every message is kept", "rows without it", "drop_system_message"),
    },
)

BITSANDBYTES = Keys(
    values.BITSANDBYTES,
    _all("the device decides in what is computed and packed", "bnb_4bit_compute_dtype bnb_4bit_quant_storage"),
    _none(
        "all large matrices but embeddings and output head are quantized, and all alike",
        _OUT,
        """
        llm_int8_skip_modules llm_int8_threshold llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight
        """,
    ),
)

IMAGES = Keys(values.IMAGES)

OVERRIDES = Keys(values.OVERRIDES, _all("training keeps no cache of keys and values", "use_cache"))

SPECIAL_TOKENS = Keys(
    values.SPECIAL_TOKENS,
    _all("no token is padding, and none begins a text", "pad_token bos_token unk_token"),
    _none("the vocabulary stays as it is", _OUT, "additional_special_tokens"),
)

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qwenft as qf
from qwenft.axolotl import keys
from qwenft.errors import SpecError
from qwenft.family.architectures import architecture
from qwenft.plan.coverage import coverage, trained_weights

CCE = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EMBEDDINGS = "model.language_model.embed_tokens"
H100S = qf.Machine.named("8xH100-80GB")

DENSE_QLORA = """
base_model: Qwen/Qwen3.5-27B
strict: false
plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]
chat_template: qwen3_5
datasets:
  - path: me/talks
    type: chat_template
    split: train[:30%]
    field_messages: turns
    message_property_mappings: {role: from, content: value}
val_set_size: 0.02
output_dir: out
dataset_prepared_path: prepared
sequence_len: 4096
sample_packing: true
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, up_proj, down_proj]
wandb_project:
wandb_entity:
wandb_watch:
wandb_name: first
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 2
optimizer: adamw_torch_4bit
lr_scheduler: linear
learning_rate: 1e-4
bf16: auto
tf32: true
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.05
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.01
special_tokens:
"""

EXPERTS_QLORA = """
base_model: Qwen/Qwen3.5-35B-A3B-Base
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
  - axolotl.integrations.kernels.KernelsPlugin
  - axolotl.integrations.liger.LigerPlugin
use_kernels: true
use_scattermoe: true
liger_layer_norm: true
liger_rope: true
liger_rms_norm: true
liger_glu_activation: true
liger_rms_norm_gated: true
torch_compile: false
chat_template: tokenizer_default
datasets: [{path: chats.jsonl, type: chat_template}]
sequence_len: 2048
sample_packing: true
load_in_4bit: true
quantize_moe_experts: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_dropout: 0
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, linear_attn.in_proj_qkv, linear_attn.in_proj_z,
                      linear_attn.out_proj, shared_expert.gate_proj]
lora_target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight]
lora_qkv_kernel: true
lora_o_kernel: true
lora_mlp_kernel: false
gradient_accumulation_steps: 2
micro_batch_size: 4
max_steps: 200
warmup_steps: 10
save_steps: 50
optimizer: adamw_torch_8bit
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
activation_offloading: true
attn_implementation: flash_attention_3
fsdp_config:
  fsdp_version: 2
  offload_params: true
  cpu_ram_efficient_loading: false
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: Qwen3_5MoeDecoderLayer
  state_dict_type: FULL_STATE_DICT
  sharding_strategy: FULL_SHARD
  reshard_after_forward: true
  activation_checkpointing: true
"""

VISION_LORA = r"""
base_model: Qwen/Qwen3.5-9B
processor_type: AutoProcessor
skip_prepare_dataset: true
remove_unused_columns: false
sample_packing: false
chat_template: qwen3_5
datasets: [{path: me/pictures, type: chat_template, split: "train[:1%]"}]
val_set_size: 0.0
sequence_len: 8192
pad_to_sequence_len: false
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: 'model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj'
gradient_accumulation_steps: 1
micro_batch_size: 1
num_epochs: 1
max_steps: 10
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: true
gradient_checkpointing: true
flash_attention: true
warmup_ratio: 0.1
weight_decay: 0.0
"""

DENSE_FULL = """
base_model: Qwen/Qwen3.5-27B
plugins: [axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin]
datasets:
  - {path: chats.jsonl, type: chat_template}
  - {path: data, data_files: [data/more.parquet], ds_type: parquet, type: chat_template, roles_to_train: [gpt, tool]}
test_datasets: [{path: test.jsonl, type: chat_template}]
sequence_len: 2048
sample_packing: true
eval_sample_packing: false
unfrozen_parameters: [model.language_model.*, lm_head.*]
gradient_accumulation_steps: 2
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_fused
learning_rate: 0.0002
max_grad_norm: 0
warmup_ratio: 0.1
eval_steps: 50
early_stopping_patience: 3
load_best_model_at_end: true
save_total_limit: 3
seed: 7
fsdp_version: 2
fsdp_config:
  offload_params: false
  reshard_after_forward: false
  activation_checkpointing: true
"""

SOME_ROLES = """
base_model: Qwen/Qwen3.5-4B
datasets: [{path: texts.jsonl, type: completion, field: body}]
sequence_len: 1024
sample_packing: true
unfrozen_parameters:
  - model.language_model.layers.[0-9]+.mlp
  - model.language_model.embed_tokens
embedding_lr: 1e-5
learning_rate: 0.0001
lr_scheduler: constant_with_warmup
warmup_ratio: 0.0
optimizer: sgd
neftune_noise_alpha: 5
sdp_attention: true
"""

LOOP = qf.TrainingSpec
CASES = {
    "27b, qlora": (
        DENSE_QLORA,
        qf.Recipe(
            qf.ModelSpec("Qwen/Qwen3.5-27B").quantize("nf4"),
            qf.DataSpec.conversations("me/talks", split="train[:30%]")
            .with_columns(conversations="turns")
            .with_max_length(4096)
            .pack()
            .hold_out(0.02),
            qf.AdapterSpec.lora(rank=8, alpha=16)
            .on("full_attention")
            .with_target_modules("mlp.up_proj", "mlp.down_proj"),
            qf.AttentionSpec(full="flash_attention_2"),
            LOOP(
                epochs=2,
                tokens_per_step=4 * 4096,
                learning_rate=1e-4,
                schedule="linear",
                warmup_ratio=0.05,
                optimizer="adamw_8bit",
                weight_decay=0.01,
                loss="cce",
            ),
        ),
        {"full_attention": 4, "mlp": 2},
    ),
    "35b-a3b, qlora of experts": (
        EXPERTS_QLORA,
        qf.Recipe(
            qf.ModelSpec("Qwen/Qwen3.5-35B-A3B-Base").quantize("nf4"),
            qf.DataSpec.messages("chats.jsonl").with_max_length(2048).pack(),
            qf.AdapterSpec.lora()
            .on("full_attention", "linear_attention", "routed_experts")
            .with_target_modules("mlp.shared_expert.gate_proj")
            .with_target_parameters("mlp.gate.weight"),
            qf.AttentionSpec(full="flash_attention_3"),
            LOOP(
                max_steps=200,
                tokens_per_step=8 * 2048,
                warmup_ratio=0.05,
                save_every=50,
                optimizer="adamw_8bit",
                loss="cce",
                activation_offloading=True,
            ),
            qf.ParallelSpec.fsdp2(offload="cpu"),
        ),
        {"full_attention": 4, "linear_attention": 3, "shared_expert": 1, "routed_experts": 1, "router": 1},
    ),
    "9b, lora with images": (
        VISION_LORA,
        qf.Recipe(
            qf.ModelSpec("Qwen/Qwen3.5-9B").with_vision(),
            qf.DataSpec.messages("me/pictures", split="train[:1%]").with_max_length(8192),
            qf.AdapterSpec.lora(rank=32, alpha=16, dropout=0.05).on("full_attention", "mlp"),
            qf.AttentionSpec(full="flash_attention_2"),
            LOOP(max_steps=10, warmup_ratio=0.1, optimizer="adamw_8bit"),
        ),
        {"full_attention": 4, "mlp": 3},
    ),
    "27b, all of the text half, fsdp2": (
        DENSE_FULL,
        qf.Recipe(
            qf.ModelSpec("Qwen/Qwen3.5-27B"),
            qf.DataSpec.messages("chats.jsonl")
            .mix(qf.DataSpec.messages("data/more.parquet").train_on("assistant", "tool"))
            .with_max_length(2048)
            .pack()
            .hold_out(qf.DataSpec.messages("test.jsonl").with_max_length(2048)),
            qf.AdapterSpec.full(),
            training=LOOP(
                epochs=1,
                tokens_per_step=2 * 2048,
                warmup_ratio=0.1,
                max_grad_norm=None,
                evaluate_every=50,
                patience=3,
                keep_best=True,
                keep_checkpoints=3,
                seed=7,
            ),
            parallel=qf.ParallelSpec.fsdp2(reshard_after_forward=False),
        ),
        None,
    ),
    "4b, some roles": (
        SOME_ROLES,
        qf.Recipe(
            qf.ModelSpec("Qwen/Qwen3.5-4B"),
            qf.DataSpec.text("texts.jsonl")
            .with_columns(text="body")
            .with_max_length(1024, overflow="split")
            .pack(),
            qf.AdapterSpec.full().on("mlp", "embeddings"),
            qf.AttentionSpec(full="sdpa"),
            LOOP(
                epochs=1,
                learning_rate=1e-4,
                schedule="constant",
                warmup_ratio=0.0,
                optimizer="sgd",
                neftune_alpha=5,
                activation_checkpointing=False,
            ).with_learning_rate(embeddings=1e-5),
        ),
        {"mlp": 3, "embeddings": 1},
    ),
}

# What the changes below start from, and what it means.
PLAIN = {
    "base_model": "Qwen/Qwen3.5-27B",
    "datasets": [{"path": "chats.jsonl", "type": "chat_template"}],
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ATTENTION,
    "learning_rate": 2e-4,
}
MEANT = qf.Recipe(
    qf.ModelSpec("Qwen/Qwen3.5-27B"),
    qf.DataSpec.messages("chats.jsonl").with_max_length(512),
    qf.AdapterSpec.lora().on("full_attention"),
    training=LOOP(epochs=1, activation_checkpointing=False),
)
FULL = {"adapter": None, "lora_r": None, "lora_alpha": None, "lora_target_modules": None}
SPARSE = {"base_model": "Qwen/Qwen3.5-35B-A3B"}


@pytest.fixture
def read(tmp_path):
    """Read the plain configuration with changes, of which None takes a key out, or a text."""

    def from_file(changes=(), processes=1):
        path = tmp_path / "config.yaml"
        if isinstance(changes, str):
            path.write_text(changes)
        else:
            values = {key: value for key, value in {**PLAIN, **dict(changes)}.items() if value is not None}
            path.write_text(yaml.safe_dump(values))
        return qf.from_axolotl(path, processes=processes)

    return from_file


def data_set(**changes):
    """The plain data set with changes."""
    return {"datasets": [{**PLAIN["datasets"][0], **changes}]}


@pytest.mark.parametrize(("text", "recipe"), [case[:2] for case in CASES.values()], ids=list(CASES))
def test_a_configuration_is_the_recipe_that_one_would_write(read, tmp_path, monkeypatch, text, recipe):
    """Model, data, adapter, attention, loop and processes are those of the same run written by hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    found = read(text)
    for field in ("model", "data", "adapter", "attention", "training", "parallel"):
        assert getattr(found, field) == getattr(recipe, field), field
    assert found == recipe
    assert qf.Recipe.load(found.save(tmp_path / "recipe.json")) == recipe


@pytest.mark.parametrize("name", [name for name in CASES if "a3b" not in name])
def test_its_plan_trains_what_was_named(read, tmp_path, monkeypatch, name):
    """Compiled for a machine, the plan covers the named modules in all of their layers and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    text, _, modules = CASES[name]
    recipe = read(text).with_training(patience=None, keep_best=False, evaluate_every=None)
    plan = qf.Recipe(
        recipe.model, None, recipe.adapter, recipe.attention, recipe.training, recipe.parallel
    ).compile(H100S)
    rows = {row.role: row for row in plan.coverage if row.parameters}
    if modules is None:
        assert all(row.parameters == row.held for row in plan.coverage)
        return
    assert {role: len(row.modules) for role, row in rows.items()} == modules
    every = {"full_attention": plan.architecture.full_attention_layers, "embeddings": ()}
    for role, row in rows.items():
        assert row.layers == len(every.get(role, range(plan.architecture.layers)))


def test_routed_experts_and_router_are_covered(read):
    """Of a mixture of experts the stacks, the router alone of its role, and one projection of the shared expert."""
    recipe = read(EXPERTS_QLORA)
    loaded = architecture("qwen3.5-35b-a3b").text_only()
    rows = coverage(loaded, trained_weights(loaded, recipe.adapter))
    found = {row.role: row.modules for row in rows if row.parameters}
    assert {role: len(found[role]) for role in found} == CASES["35b-a3b, qlora of experts"][2]
    assert found["router"] == ("mlp.gate",)
    assert found["shared_expert"] == ("mlp.shared_expert.gate_proj",)


def test_a_plan_shows_the_notes(read):
    """What has no effect is among the findings of the plan."""
    plan = read({"wandb_project": "talks", "datasets": None, **data_set(path="chats.jsonl")})
    plan = qf.Recipe(plan.model, adapter=plan.adapter, notes=plan.notes).compile(H100S)
    assert any(
        "wandb_project: talks: run.history and TensorBoard files have the metrics" in str(f) for f in plan.findings
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, MEANT),
        ({"revision_of_model": "v1"}, MEANT.with_model(revision="v1")),
        ({"bf16": False}, MEANT.with_model(dtype="float32")),
        ({"load_in_8bit": True}, MEANT.with_model(MEANT.model.quantize("int8"))),
        (
            {"adapter": "qlora", "load_in_4bit": True, "bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}},
            MEANT.with_model(MEANT.model.quantize("nf4", double_quant=False)),
        ),
        (
            {**SPARSE, "adapter": "qlora", "load_in_4bit": True},
            MEANT.with_model(qf.ModelSpec("Qwen/Qwen3.5-35B-A3B").quantize("nf4", experts=False)),
        ),
        (
            {"processor_type": "AutoProcessor", "processor_kwargs": {"max_pixels": 1000}},
            MEANT.with_model(vision=True).with_data(MEANT.data.with_images(max_pixels=1000)),
        ),
        (
            {"adapter": "qlora", "load_in_4bit": True, "processor_type": "AutoProcessor"},
            MEANT.with_model(MEANT.model.with_vision().quantize("nf4", vision=True)),
        ),
        (
            {"lora_target_modules": ["q_proj", "v_proj"]},
            MEANT.with_adapter(
                qf.AdapterSpec.lora().on().with_target_modules("self_attn.q_proj", "self_attn.v_proj")
            ),
        ),
        (
            {"lora_target_modules": None, "lora_target_linear": True},
            MEANT.with_adapter(roles=("full_attention", "linear_attention", "linear_attention_gates", "mlp")),
        ),
        (
            {**SPARSE, "lora_target_modules": "all-linear"},
            MEANT.with_model(source="Qwen/Qwen3.5-35B-A3B").with_adapter(
                qf.AdapterSpec.lora()
                .on("full_attention", "linear_attention", "linear_attention_gates", "shared_expert")
                .with_target_modules("mlp.shared_expert_gate")
            ),
        ),
        (
            {
                "processor_type": "AutoProcessor",
                "lora_target_modules": ["attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"],
            },
            MEANT.with_model(vision=True).with_adapter(roles=("vision", "vision_merger")),
        ),
        (
            {"peft_use_dora": True, "peft_use_rslora": True, "peft_init_lora_weights": "gaussian"},
            MEANT.with_adapter(dora=True, rslora=True, initialization="gaussian"),
        ),
        ({"peft_layers_to_transform": [3, 7]}, MEANT.with_adapter(layers=(3, 7))),
        (
            {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
            MEANT.with_adapter(copied=("embeddings", "lm_head")),
        ),
        (
            {"lora_target_modules": [*ATTENTION, "lm_head"], "lora_modules_to_save": ["lm_head"]},
            MEANT.with_adapter(copied=("lm_head",)),
        ),
        (
            {"peft_trainable_token_indices": {"embed_tokens": [5, 4], "lm_head": [5, 4]}},
            MEANT.with_adapter(tokens=(4, 5)),
        ),
        ({"lora_model_dir": "runs/a"}, MEANT.with_adapter(qf.AdapterSpec.load("runs/a"))),
        ({"loraplus_lr_ratio": 16}, MEANT.with_training(lora_plus_ratio=16)),
        (
            {**FULL, "freeze_mm_modules": True, "processor_type": "AutoProcessor"},
            MEANT.with_model(vision=True).with_adapter(qf.AdapterSpec.full().freeze("vision", "vision_merger")),
        ),
        ({"flex_attention": True, "sdp_attention": False}, MEANT.with_attention(full="flex_attention")),
        ({"attn_implementation": "eager"}, MEANT.with_attention(full="eager")),
        (
            {"attn_implementation": f"kernels-community/flash-attn3@{'a1' * 20}"},
            MEANT.with_attention(full=f"kernels-community/flash-attn3@{'a1' * 20}"),
        ),
        ({"excess_length_strategy": "raise"}, MEANT.with_data(overflow="error")),
        ({"excess_length_strategy": "truncate"}, MEANT.with_data(overflow="truncate")),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            MEANT.with_data(MEANT.data.with_template(enable_thinking=False)),
        ),
        ({"train_on_inputs": True}, MEANT.with_data(trained_roles=("system", "user", "assistant", "tool"))),
        (data_set(train_on_eos="none"), MEANT.with_data(end_of_turn=False)),
        (data_set(field_tools="functions"), MEANT.with_data(MEANT.data.with_columns(tools="functions"))),
        (
            data_set(message_field_role="speaker", message_field_content="said", roles={"assistant": ["gpt"]}),
            MEANT.with_data(
                qf.DataSpec.conversations("chats.jsonl")
                .with_columns(conversations="messages", role="speaker", content="said")
                .with_max_length(512)
            ),
        ),
        (
            data_set(path="me/chats", revision="v2"),
            MEANT.with_data(qf.DataSpec.messages("me/chats", split="train", revision="v2").with_max_length(512)),
        ),
        ({"num_epochs": 3.0}, MEANT.with_training(epochs=3)),
        (
            {"lr_scheduler": "constant", "warmup_ratio": 0.1},
            MEANT.with_training(schedule="constant", warmup_ratio=0.0),
        ),
        ({"cosine_min_lr_ratio": 0.1}, MEANT.with_training(floor_ratio=0.1)),
        ({"warmup_steps": 0}, MEANT.with_training(warmup_ratio=0.0)),
        ({"optimizer": "paged_adamw_32bit"}, MEANT.with_training(optimizer="paged_adamw")),
        (
            {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": "1e-6"},
            MEANT.with_training(betas=(0.8, 0.95), epsilon=1e-6),
        ),
        ({"label_smoothing_factor": 0.1, "plugins": [CCE]}, MEANT.with_training(label_smoothing=0.1)),
        ({"plugins": [CCE], "cut_cross_entropy": False}, MEANT),
        (
            {**FULL, "unfrozen_parameters": [EMBEDDINGS], "plugins": [CCE]},
            MEANT.with_adapter(qf.AdapterSpec.full().on("embeddings")).with_training(loss="cce"),
        ),
        (
            {**FULL, "unfrozen_parameters": [EMBEDDINGS], "plugins": [CCE], "base_model": "Qwen/Qwen3.5-4B"},
            MEANT.with_model(source="Qwen/Qwen3.5-4B").with_adapter(qf.AdapterSpec.full().on("embeddings")),
        ),
        ({"chunked_cross_entropy": True}, MEANT.with_training(loss="chunked")),
        (
            {**SPARSE, "model_config": {"output_router_logits": True}},
            MEANT.with_model(source="Qwen/Qwen3.5-35B-A3B").with_training(router_aux_loss=0.001),
        ),
        (
            {"gradient_checkpointing": "offload"},
            MEANT.with_training(activation_checkpointing=True, activation_offloading=True),
        ),
        ({"torch_compile": "auto"}, MEANT.with_training(compile_elementwise=True)),
        (
            {"max_steps": 90, "val_set_size": 0.1, "evals_per_epoch": 4, "saves_per_epoch": 2},
            MEANT.with_data(held_out=0.1).with_training(
                epochs=None, max_steps=90, evaluate_every=23, save_every=45
            ),
        ),
        (
            {"fsdp": ["full_shard", "auto_wrap", "offload"], "fsdp_config": {"fsdp_offload_params": True}},
            MEANT.with_parallel(qf.ParallelSpec.fsdp2(offload="cpu")),
        ),
        (
            {"fsdp_config": {"version": 2, "sharding_strategy": "HYBRID_SHARD"}},
            MEANT.with_parallel(qf.ParallelSpec.fsdp2(hybrid=True)),
        ),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_a_key_means(read, changes, expected):
    """Each key changes what its name here says, and nothing else."""
    found = read(changes)
    for field in ("model", "data", "adapter", "attention", "training", "parallel"):
        assert getattr(found, field) == getattr(expected, field), field


def test_processes_share_a_step(read):
    """A step is rows x accumulation x processes; of one row in each process it has no number of tokens."""
    step = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "sequence_len": 1024}
    assert read(step).training.tokens_per_step == 6 * 1024
    assert read(step).parallel == qf.ParallelSpec.single()
    shared = read(step, processes=8)
    assert shared.training.tokens_per_step == 8 * 6 * 1024
    assert shared.parallel == qf.ParallelSpec.ddp()
    assert any("2 x 3 x 1024 = 6,144 tokens in each of 8 processes" in note for note in shared.notes)
    assert read(processes=8).training.tokens_per_step is None
    with pytest.raises(SpecError, match="expected processes to be a whole number of at least 1, got 0"):
        read(processes=0)


@pytest.mark.parametrize("steps", range(1, 101, 9))
def test_a_warmup_in_steps_takes_these(read, steps):
    """The share of the run comes to the same steps again, though it is rounded up."""
    from qwenft.training.optim import learning_rate_factor

    training = read({"warmup_steps": steps, "max_steps": 101}).training
    factors = [learning_rate_factor(step, training=training, steps=101) for step in range(101)]
    assert factors.index(1.0) == steps


REFUSED = [
    ({"rl": "dpo"}, "rl: dpo: supervised fine-tuning is what is offered"),
    ({"use_ray": True}, "use_ray: true: plan.launch or torchrun starts the processes"),
    ({**FULL, "load_in_8bit": True}, "load_in_8bit: true: weights of few bits are read and not trained"),
    ({"load_in_4bit": True}, r"load_in_4bit: true: .*\n     Fix: adapter: qlora, or load_in_4bit: false"),
    ({"adapter": "qlora"}, "adapter: qlora: load_in_4bit is not true"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit: true: weights are held in 4 bits or in 8"),
    ({"quantize_moe_experts": True}, "quantize_moe_experts: true: nothing is quantized"),
    (
        {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}},
        r"bnb_config_kwargs\.bnb_4bit_quant_type: expected one of 'nf4'",
    ),
    ({"sequence_parallel_degree": 2}, "sequence_parallel_degree: 2: every process computes whole layers"),
    ({"context_parallel_size": 4}, "context_parallel_size: 4: every process computes"),
    ({"chat_template": "chatml"}, r"chat_template: chatml: .*\n     Fix: chat_template: tokenizer_default"),
    (data_set(type="alpaca"), r"datasets\[0\]\.type: alpaca: rows hold messages.*\n     Fix: .*DataSpec\.alpaca"),
    (data_set(chat_template="llama3"), r"datasets\[0\]\.chat_template: llama3: the checkpoint's own"),
    (data_set(name="subset"), r"datasets\[0\]\.name: subset: data sets have no configurations"),
    (data_set(path="s3://bucket/a.jsonl"), r"datasets\[0\]\.path: s3://bucket/a\.jsonl: files are read from disk"),
    (data_set(split="train[:10%]"), r"datasets\[0\]\.split: .*: a file is read whole"),
    (data_set(path="me/x", data_files="a.jsonl"), r"datasets\[0\]\.data_files: .*: single files of a data set"),
    (data_set(path="rows.txt", data_files="rows.txt"), "its ending says how a file is read"),
    (data_set(ds_type="arrow"), r"datasets\[0\]\.ds_type: arrow: files are JSON"),
    (data_set(roles={"assistant": ["wizard"]}), "wizard for assistant is not read"),
    (
        data_set(roles_to_train=["narrator"]),
        r"datasets\[0\]\.roles_to_train: .*: expected roles of a conversation",
    ),
    (data_set(train_on_eos="last"), r"datasets\[0\]\.train_on_eos: last: the end of every trained message"),
    (data_set(train_on_eos="turn", train_on_eot="none"), r"datasets\[0\]\.train_on_eos: turn: the end of every"),
    (data_set(message_property_mappings={"content": "text", "name": "who"}), "name is read by that name"),
    (
        data_set(message_field_training="learn"),
        r"message_field_training: learn: a message says by its key `train`",
    ),
    (
        {"datasets": [*PLAIN["datasets"], {"path": "a.jsonl", "type": "completion"}]},
        "a completion that is too long is split",
    ),
    ({"datasets": None}, "datasets: is missing"),
    (data_set(path=None), r"datasets\[0\]\.path: is missing"),
    ({"datasets": [3]}, r"datasets: expected a list of mappings, got \[3\]"),
    ({"special_tokens": {"eos_token": "</s>"}}, r"special_tokens\.eos_token: expected one of '<\|im_end\|>'"),
    ({"eot_tokens": ["</s>"]}, r"eot_tokens: .*: the template ends a turn with <\|im_end\|>"),
    ({"val_set_size": 100}, "val_set_size: 100: a number of rows cannot be held out"),
    ({"val_set_size": 0.1, "test_datasets": PLAIN["datasets"]}, "test_datasets are held out already"),
    ({"val_set_size": 0.1, "eval_sequence_len": 64}, "eval_sequence_len: 64: rows that are held out are as long"),
    ({"min_sample_len": 10}, "min_sample_len: 10: short documents are trained too"),
    ({"shuffle_merged_datasets": False}, "shuffle_merged_datasets: false: documents are shuffled"),
    ({"relora": True}, "relora: true: an adapter is not merged and begun anew"),
    ({"lora_on_cpu": True}, "lora_on_cpu: true: weights are read straight"),
    ({"deepspeed": "zero3.json"}, "deepspeed: zero3.json: DeepSpeed is not used"),
    ({"fp16": True}, "fp16: true: float16 overflows in Gated DeltaNet"),
    ({"adapter": "ia3"}, "adapter: expected lora or qlora, got 'ia3'"),
    ({"lora_r": "x"}, "lora_r: expected a whole number of at least 1, got 'x'\n     Fix: lora_r: 16"),
    ({"lora_r": None}, "lora_r: is missing"),
    ({"lora_dropout": 1.5}, "lora_dropout: expected a number of at least 0 and below 1, got 1.5"),
    ({"peft_init_lora_weights": "loftq"}, r"adapter: AdapterSpec\.initialization: expected one of"),
    ({"peft_init_lora_weights": False}, "peft_init_lora_weights: false: an adapter begins as nothing"),
    ({"lora_target_modules": None}, "lora_target_modules: is missing"),
    ({"lora_target_modules": ["q_prj"]}, r"lora_target_modules: .*'q_prj' names nothing"),
    ({"lora_target_modules": ["gate_up_proj"], **SPARSE}, "'gate_up_proj' names nothing"),
    (
        {"processor_type": "AutoProcessor", "lora_target_modules": ["proj"]},
        r"'proj' names patch_embed\.proj, which LoRA does not reach here",
    ),
    ({"lora_target_modules": ["conv1d"]}, r"'conv1d' names linear_attn\.conv1d, which LoRA does not reach here"),
    (
        {"lora_target_modules": ["3.self_attn.q_proj"]},
        r"names some layers of a module\n     Fix: peft_layers_to_tra",
    ),
    ({"lora_target_modules": "q_proj"}, "'q_proj' names nothing"),
    ({"lora_target_modules": "(q_proj"}, r"'\(q_proj' is no regular expression"),
    ({"lora_target_parameters": ["experts.down_proj"]}, r"lora_target_parameters: .*names nothing"),
    ({"lora_modules_to_save": ["lm_head"], "base_model": "Qwen/Qwen3.5-4B"}, "lm_head is tied to embed_tokens"),
    ({"lora_modules_to_save": ["q_norm"]}, "of full_attention it names a part"),
    ({"peft_trainable_token_indices": [4]}, "the rows of embed_tokens and lm_head are trained together"),
    ({"peft_layers_to_transform": [3], "lora_target_modules": ".*q_proj"}, "it is for modules of decoder layers"),
    ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters: .*: beside an adapter nothing else is trained"),
    (
        {**FULL, "unfrozen_parameters": ["model.language_model.layers"]},
        r"of norms the patterns match a part\n     Fix: patterns of whole roles, here full_attention",
    ),
    ({**FULL, "unfrozen_parameters": ["model.language.model"]}, "model.language.model matches no parameter"),
    ({**FULL, "unfrozen_parameters": ["transformer.h"]}, "transformer.h matches no parameter"),
    ({**FULL, "unfrozen_parameters": ["lm_head.weight[:9]"]}, r"lm_head\.weight\[:9\] is a part of a parameter"),
    ({"lr_scheduler": "rex"}, "lr_scheduler: rex: is not offered"),
    ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "the optimizers and schedules here have no such number"),
    ({"optimizer": "muon"}, "optimizer: muon: is not offered"),
    (
        {"warmup_steps": 10},
        r"warmup_steps: 10: a share of all steps .*\n     Fix: warmup_ratio: 0\.03, or max_steps",
    ),
    ({"warmup_steps": 10, "max_steps": 10}, "warmup_steps: 10: the run has 10 steps"),
    ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps: 1: warmup_ratio is given too"),
    ({"num_epochs": 0.5}, "num_epochs: 0.5: epochs are whole"),
    ({"save_steps": 5, "saves_per_epoch": 1}, "save_steps: 5: saves_per_epoch is given too"),
    ({"val_set_size": 0.1, "early_stopping_patience": 2}, "early_stopping_patience: 2: how often to evaluate"),
    ({"learning_rate": None}, "learning_rate: is missing"),
    ({"learning_rate": -1}, "learning_rate: expected a number above 0, got -1"),
    ({"gradient_checkpointing": "offload_disk"}, "nothing is kept on disk"),
    ({"plugins": ["axolotl.integrations.kd.KDPlugin"]}, r"plugins: .*KDPlugin is not offered"),
    ({"attn_implementation": "flash"}, r"attn_implementation: attention\.full: no backend is called 'flash'"),
    ({"attn_implementation": "kernels-community/flash-attn3"}, "does not pin it to a commit"),
    (
        {"attn_implementation": "sdpa", "flash_attention": True},
        "flash_attention would say it a second time, which axolotl",
    ),
    ({"flash_attention": True, "eager_attention": True}, "flash_attention: true: so would eager_attention"),
    ({"xformers_attention": True}, "xformers_attention: true: xformers attention is not offered"),
    (
        {"fsdp_config": {"offload_params": "yes"}},
        r"fsdp_config\.offload_params: expected True or False, got 'yes'",
    ),
    (
        {"fsdp_config": {"sharding_strategy": "NO_SHARD"}},
        r"fsdp_config\.sharding_strategy: NO_SHARD: it shares nothing",
    ),
    ({"fsdp": ["full_shard", "mystery"]}, "mystery is not offered"),
    ({"base_model": None}, "base_model: expected a checkpoint of the family, got none"),
    ({"base_model": "meta-llama/Llama-3-8B"}, "base_model: expected a checkpoint of the family, got 'meta-llama"),
    ({"tokenizer_config": "Qwen/Qwen3-8B"}, "tokenizer_config: Qwen/Qwen3-8B: config and tokenizer are those"),
    (
        {"processor_type": "LlavaProcessor"},
        "processor_type: LlavaProcessor: the processor is the checkpoint's own",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_followed_is_refused(read, changes, message):
    """A value that is wrong, or that would change the result, is refused with its place, the reason and a remedy."""
    with pytest.raises(SpecError, match=message) as refused:
        read(changes)
    assert all(finding.fix for finding in refused.value.problems)
    assert len(refused.value.problems) == 1, refused.value


def test_all_problems_are_told_at_once(read):
    """Unknown keys, all of them, with the nearest known ones, stand in one error beside what else is wrong."""
    with pytest.raises(SpecError) as refused:
        read(
            {
                "lora_rr": 3,
                "sequence_length": None,
                "rl": "kto",
                "optimizer": "lion",
                "fsdp_config": {"reshard_after_foward": True},
                **data_set(field_mesages="turns"),
            }
        )
    lines = str(refused.value).splitlines()
    assert lines[0].endswith("config.yaml: 5 problems")
    for line in (
        "lora_rr: is not known; did you mean 'lora_r'?",
        "rl: kto: supervised",
        "datasets[0].field_mesages: is not known; did you mean 'field_messages'?",
        "fsdp_config.reshard_after_foward: is not known; did you mean 'reshard_after_forward'?",
        "optimizer: lion: is not offered",
    ):
        assert any(re.match(r"  \d\. " + re.escape(line), found) for found in lines), line


def test_a_key_without_a_value_is_known_or_not_all_the_same(read):
    """An empty key asks for nothing, and a misspelt one is still an error."""
    assert read("\n".join([yaml.safe_dump(PLAIN), "wandb_project:", "rl:", "lora_dropout:"])) == MEANT
    with pytest.raises(SpecError, match="wandb_projct: is not known; did you mean 'wandb_project'"):
        read("\n".join([yaml.safe_dump(PLAIN), "wandb_projct:"]))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"bf16": True}, "bf16: true: the model computes in bfloat16 wherever the device does"),
        (
            {"wandb_project": "talks"},
            "wandb_project: talks: run.history and TensorBoard files have the metrics",
        ),
        ({"output_dir": "out"}, "output_dir: out: plan.train(run_dir) says where a run lies"),
        ({"dataset_prepared_path": "x"}, "dataset_prepared_path: x: documents are tokenised once"),
        ({"pad_to_sequence_len": True}, "pad_to_sequence_len: true: no token is padding here"),
        (
            {"eval_sample_packing": False},
            "eval_sample_packing: false: packed or not, a document is evaluated alike",
        ),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel: true: it computes the same by another kernel"),
        (
            {"plugins": ["axolotl.integrations.liger.LigerPlugin"]},
            "plugins: axolotl.integrations.liger.LigerPlugin: it",
        ),
        ({**FULL, "plugins": [CCE]}, f'plugins: {CCE}: the output head is trained, and so loss="chunked" stands'),
        ({"optimizer": "adamw_torch_4bit"}, "optimizer: adamw_torch_4bit: moments are held in 8 bits"),
        ({"chat_template": "qwen3_5"}, "chat_template: qwen3_5: the checkpoint's own template is used"),
        (
            {"excess_length_strategy": "truncate"},
            "excess_length_strategy: truncate: a document is cut behind the last",
        ),
        ({"num_epochs": 2, "max_steps": 9}, "num_epochs: 2: max_steps decides"),
        ({}, "warmup_ratio: not given: 0.03 of all steps, which axolotl ends at 100"),
        ({"lr_scheduler": "constant", "warmup_steps": 5}, "warmup_steps: 5: a constant rate has no warmup"),
        (
            {"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"},
            "cosine_min_lr_ratio: 0.1: lr_scheduler: linear has no",
        ),
        ({"optimizer": "sgd", "adam_beta1": 0.8}, "adam_beta1: 0.8: SGD has none"),
        ({"embedding_lr": 1e-5}, "embedding_lr: 1e-05: neither embeddings nor the output head are trained"),
        ({"loraplus_lr_embedding": 1e-6}, "loraplus_lr_embedding: 1e-06: no embedding is adapted"),
        ({"adapter": None}, "lora_r: 16: there is no adapter: full fine-tuning has no pairs"),
        (
            {"lora_model_dir": "a"},
            "lora_alpha: 32: what the adapter in lora_model_dir adapts, and how, its files say",
        ),
        ({"lora_target_modules": ["q_proj", "qkv"]}, "'qkv' is in the vision tower, which is not loaded"),
        ({"lora_target_modules": ["q_proj", "proj"]}, "'proj' is in the vision tower, which is not loaded"),
        (
            {**FULL, "unfrozen_parameters": ["model.language_model", "model.visual"]},
            "model.visual is in the vision tower, which is not loaded",
        ),
        ({"fsdp_version": 2}, "fsdp_version: 2: without fsdp_config nothing is shared out"),
        ({"lora_target_linear": True}, "lora_target_linear: true: every linear layer but lm_head"),
        ({"evals_per_epoch": 4}, "evals_per_epoch: 4: nothing is held out"),
        ({"saves_per_epoch": 1}, "saves_per_epoch: 1: how many steps there are is known when the data are read"),
        ({"output_router_logits": True}, "output_router_logits: true: qwen3.5-27b has no router"),
        ({**SPARSE, "router_aux_loss_coef": 0.1}, "router_aux_loss_coef: 0.1: output_router_logits is not true"),
        ({"fsdp": ["full_shard"]}, "fsdp: weights are shared out by FSDP2, which computes what version 1 does"),
        (
            {"fsdp_config": {"version": 2, "use_orig_params": True}},
            "fsdp_config.use_orig_params: true: each decoder layer",
        ),
        (
            {"base_model": "me/Qwen3.5-27B-mine"},
            "base_model: me/Qwen3.5-27B-mine: taken to be a qwen3.5-27b by its name",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_has_no_effect_is_noted(read, changes, note):
    """A key without effect here, or one that means something a little different, is in the notes with the reason."""
    notes = read(changes).notes
    assert [found for found in notes if found.startswith(note) or note in found], notes


def test_a_plain_configuration_needs_few_notes(read):
    """What means the same here as there is not noted."""
    assert read({"warmup_ratio": 0.1}).notes == ()


def test_a_local_checkpoint_is_known_by_its_config(read, dense_checkpoint, tmp_path):
    """The modules of a folder are those that its config.json says; another family's folder is refused."""
    recipe = read({"base_model": str(dense_checkpoint), "lora_target_modules": [*ATTENTION, "gate_proj"]})
    assert recipe.adapter == qf.AdapterSpec.lora().on("full_attention").with_target_modules("mlp.gate_proj")
    assert recipe.model.source == str(dense_checkpoint)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecError, match=r"1 problem\n  1\. base_model: .*llama"):
        read({"base_model": str(other)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: [", "config.yaml: is no YAML of plain values"),
        ("- a\n- b", "config.yaml: expected a mapping, got list"),
        ("", "config.yaml: expected a mapping, got NoneType"),
        ("base_model: a\nseed: 1\nbase_model: b", "config.yaml, line 3: 'base_model' is there twice"),
        ("fsdp_config:\n  version: 2\n  version: 1", "config.yaml, line 3: 'version' is there twice"),
        ("base_model: !!python/object/apply:os.mkdir [made]", "is no YAML of plain values"),
    ],
)
def test_a_file_that_is_no_configuration(read, tmp_path, monkeypatch, text, message):
    """What is no YAML, no mapping, or says a key twice is refused, and nothing that it names is run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=message):
        read(text)
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_missing(tmp_path):
    """A missing file is named."""
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read: No such file"):
        qf.from_axolotl(tmp_path / "none.yaml")


def test_every_key_means_one_thing():
    """No key is in two tables, of which one would never be looked at."""
    for table in (keys.CONFIG, keys.FSDP, keys.DATASET, keys.BITSANDBYTES, keys.OVERRIDES, keys.SPECIAL_TOKENS):
        names = list(table)
        assert len(names) == len(set(names))
        for key, check in table.read.items():
            example = yaml.safe_load(re.split(", (?:with|or) ", check.example)[0])
            (value,) = example.values()
            assert check.accepts(value), (key, check.example)


def test_reading_is_light(tmp_path):
    """A configuration becomes a recipe without torch and without a network."""
    (tmp_path / "config.yaml").write_text(DENSE_QLORA)
    code = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("reading a configuration used the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import qwenft as qf
assert "yaml" not in sys.modules
qf.from_axolotl("config.yaml").save("recipe.json")
assert not {"torch", "transformers", "peft", "datasets", "numpy"} & set(sys.modules), sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(qf.__file__).parents[1])}
    finished = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr

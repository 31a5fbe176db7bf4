"""What plans of all sizes count, against what peft and torch build of them on the meta device."""

from __future__ import annotations

from collections import Counter

import peft
import pytest
import torch
import transformers
from accelerate import init_empty_weights

from qwenft.family.architectures import FAMILY
from qwenft.family.inventory import role_of
from qwenft.family.roles import roles_of
from qwenft.models.lora import base_name, lora_config
from qwenft.plan.coverage import coverage, trained_weights
from qwenft.specs.adapter import AdapterSpec

ADAPTERS = {
    "every role": lambda roles: AdapterSpec.lora(rank=3).on(*roles),
    "ranks and layers": lambda roles: (
        AdapterSpec.lora(rank=2).on(*roles).with_rank(full_attention=5, vision=1).with_layers(1, 3, 17)
    ),
    "in full": lambda roles: (
        AdapterSpec.lora(rank=2)
        .on("full_attention")
        .train_fully(*({"lm_head", "norms", "router", "mlp", "vision_merger"} & {*roles, "norms"}))
    ),
    "tokens": lambda _: AdapterSpec.lora(dora=True).train_tokens(5, 248_000),
}


def build(architecture):
    """The class of transformers that a config.json names, without memory for its weights."""
    model_class = getattr(transformers, architecture.class_name)
    config = model_class.config_class.from_dict(architecture.to_config())
    with init_empty_weights():
        model = model_class(config)
    model.name_or_path = "base"
    if architecture.tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


def counted(architecture, model):
    """Trainable parameters of each role that has some, by torch."""
    found = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[role_of(architecture, base_name(name))] += parameter.numel()
    return dict(found)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "every role" else [pytest.mark.long]) for kind in ADAPTERS]
)
@pytest.mark.parametrize("name", FAMILY)
def test_the_coverage_of_an_adapter_is_what_is_built(name, kind):
    """Of each role as many parameters as peft builds for it, with the tower, in the class that is published."""
    architecture = FAMILY[name]
    tied = {"embeddings"} if architecture.tied else set()
    roles = [role for role in roles_of(architecture) if role not in {"norms", *tied}]
    adapter = ADAPTERS[kind](roles)
    trained = trained_weights(architecture, adapter)
    config = lora_config(architecture, adapter, trained, "base")
    model = peft.get_peft_model(build(architecture), config, low_cpu_mem_usage=True)
    planned = {row.role: row.parameters for row in coverage(architecture, trained) if row.parameters}
    assert planned == counted(architecture, model)


@pytest.mark.parametrize("name", FAMILY)
def test_the_coverage_of_full_fine_tuning_is_what_is_built(name):
    """Of each role as many parameters as the published class holds, all of them, or its norms and biases."""
    architecture = FAMILY[name]
    model = build(architecture)
    for adapter in (AdapterSpec.full(), AdapterSpec.full().only_norms_and_biases()):
        for parameter_name, parameter in model.named_parameters():
            is_one = "norm" in parameter_name or parameter_name.endswith("bias")
            parameter.requires_grad_(not adapter.norms_and_biases or is_one)
        rows = coverage(architecture, trained_weights(architecture, adapter))
        assert {row.role: row.parameters for row in rows if row.parameters} == counted(architecture, model)
    assert sum(torch.numel(p) for p in model.parameters()) == sum(row.held for row in rows)

"""Every kind of training on every kind of model: what is saved, in plain peft and transformers, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import qwenft as qf
from qwenft.models.checkpoint import weight_files

from .helpers import relative

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {a} and {b}"}, {"role": "assistant", "content": f"{a}, {b}!"}]}
    for a in WORDS
    for b in WORDS[:5]
]
MODELS = {
    "dense": ("dense", False, "mlp"),
    "moe": ("moe", False, "shared_expert"),
    "vision": ("vision", True, "mlp"),
    "moe-vision": ("moe-vision", True, "shared_expert"),
}
LORA = qf.AdapterSpec.lora


def kinds(mlp, *, vision):
    """Specs by name, for a model whose MLP of all tokens has this role, with or without its tower."""
    tower = ("vision", "vision_merger") if vision else ()
    experts = ("routed_experts", "router") if mlp == "shared_expert" else (mlp,)
    return {
        "lora": LORA(rank=4),
        "rslora": LORA(rank=4, rslora=True),
        "dora": LORA(rank=4, dora=True),
        "lora+": LORA(rank=4),
        "gaussian": LORA(rank=4, initialization="gaussian"),
        "orthogonal": LORA(rank=4, initialization="orthogonal"),
        "pissa": LORA(rank=4, initialization="pissa"),
        "pissa-niter": LORA(rank=4, rslora=True, initialization="pissa_niter_4"),
        "olora": LORA(rank=4, initialization="olora"),
        "ranks": LORA(rank=4).with_rank(**{mlp: 2}).with_alpha(**{mlp: 3, "full_attention": 64}),
        "gates": LORA(rank=4).on("linear_attention_gates", mlp),
        "layers": LORA(rank=4).with_layers(1, 3),
        "tokens": LORA(rank=4).train_tokens(7, 260, 261, 3),
        "in-full": LORA(rank=4).on("linear_attention").train_fully("embeddings", "norms", mlp),
        "targets": LORA(rank=4).on("full_attention").with_target_modules("out_proj"),
        "tower": LORA(rank=4).on("full_attention", *tower),
        "experts": LORA(rank=2).on(*experts),
        "full": qf.AdapterSpec.full(),
        "text-in-full": qf.AdapterSpec.full().freeze("embeddings", *tower),
        "norms": qf.AdapterSpec.full().only_norms_and_biases(),
        "mtp": qf.AdapterSpec.full().on(mlp, "mtp").train_mtp(),
    }


# Reads ids and folders, and writes logits: stock classes alone, and none of ours.
STOCK = """
import json, sys, warnings
sys.modules["fla"] = None  # stock crashes on a CPU where it is installed
warnings.simplefilter("ignore")
import torch, transformers, peft
from safetensors.torch import save_file
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
base, jobs, out = sys.argv[1], json.loads(sys.argv[2]), {}
for name, (folder, documents) in jobs.items():
    if name.startswith("adapter"):
        model = transformers.AutoModelForImageTextToText.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, folder)
    else:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        out[name] = torch.cat([model.eval()(input_ids=torch.tensor([ids])).logits[0] for ids in documents])
assert "qwenft" not in sys.modules
save_file(out, sys.argv[3])
"""


def tensors_of(folder):
    """All of a checkpoint's files."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.long
@pytest.mark.parametrize("kind_of_model", MODELS)
def test_what_is_saved_works_in_a_fresh_process(kind_of_model, tmp_path):
    """Five steps of every kind: stock peft and stock transformers give the run's logits, and nothing is lost."""
    files, vision, mlp = MODELS[kind_of_model]
    checkpoint = qf.testing.tiny_checkpoint(tmp_path / "checkpoint", files, a_log=-3.0)
    source = tensors_of(checkpoint)
    jobs, wanted = {}, {}
    for kind, adapter in kinds(mlp, vision=vision).items():
        recipe = qf.Recipe(
            qf.ModelSpec(checkpoint, dtype="float32", vision=vision),
            qf.DataSpec.messages(CHATS).with_max_length(96).pack(),
            adapter,
            training=qf.TrainingSpec(
                learning_rate=5e-3,
                max_steps=5,
                warmup_ratio=0.0,
                lora_plus_ratio=4.0 if kind == "lora+" else 1.0,
            ),
        )
        run = recipe.compile().train(tmp_path / kind, verbose=0)
        batch = next(run.prepared.batches())[0]
        documents = [ids.tolist() for ids in batch.input_ids.split(batch.layout.lengths)]
        run.prepared.model.eval()
        with torch.no_grad():
            wanted[kind] = run.prepared.logits(batch)
        if run.adapter_path is not None:
            jobs[f"adapter {kind}"] = (str(run.adapter_path), documents)
        merged = run.export(tmp_path / f"{kind}-merged")
        jobs[f"merged {kind}"] = (str(merged), documents)
        exported = tensors_of(merged)
        assert {name: (t.shape, t.dtype) for name, t in exported.items()} == {
            name: (t.shape, t.dtype) for name, t in source.items()
        }
        roles = {entry.weight.role for entry in run.plan.draft.trained}
        kept = [name for name in source if name.startswith("mtp.") and "mtp" not in roles]
        kept += [n for n in source if n.startswith("model.visual.") and not roles & {"vision", "vision_merger"}]
        assert all(torch.equal(source[name], exported[name]) for name in kept)
        assert any(not torch.equal(source[name], exported[name]) for name in source)
    command = [
        sys.executable,
        "-c",
        STOCK,
        str(checkpoint),
        json.dumps(jobs),
        str(tmp_path / "logits.safetensors"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    got = load_file(tmp_path / "logits.safetensors")
    assert got.keys() == jobs.keys()
    distances = {name: relative(wanted[name.split(" ", 1)[1]], logits) for name, logits in got.items()}
    assert {name: d for name, d in distances.items() if d > (1e-5 if name.startswith("adapter") else 1e-4)} == {}

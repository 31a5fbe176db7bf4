from __future__ import annotations

import json
import resource
import shutil

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwenft as qf
from qwenft.models.checkpoint import architecture_of, weight_files
from qwenft.models.load import load_model, load_tokenizer
from qwenft.models.safetensors_file import TensorFile
from qwenft.plan.storage import Storage

from .helpers import relative

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four", "five", "six")
]
#: Among them what every conversation holds.
TOKENS = (3, 260, 7, 8, 261)
CASES = {
    "lora": ("dense", qf.AdapterSpec.lora(rank=4)),
    "ranks": ("dense", qf.AdapterSpec.lora(rank=4, rslora=True).with_rank(mlp=2)),
    "dora": ("dense", qf.AdapterSpec.lora(rank=4, dora=True)),
    "full": ("dense", qf.AdapterSpec.full()),
    "gaussian-alphas": (
        "dense",
        qf.AdapterSpec.lora(rank=4, initialization="gaussian").with_alpha(mlp=3.5, linear_attention=64),
    ),
    "orthogonal-layers": ("dense", qf.AdapterSpec.lora(rank=4, initialization="orthogonal").with_layers(1, 3)),
    "pissa": ("dense", qf.AdapterSpec.lora(rank=4, initialization="pissa").with_rank(mlp=6).with_alpha(mlp=9)),
    "pissa-dora": ("dense", qf.AdapterSpec.lora(rank=4, dora=True, initialization="pissa_niter_4")),
    "olora": ("moe", qf.AdapterSpec.lora(rank=4, rslora=True, initialization="olora").with_layers(0, 3)),
    "tokens": ("dense", qf.AdapterSpec.lora(rank=4).train_tokens(*TOKENS)),
    "head-tokens": ("moe", qf.AdapterSpec.lora(rank=4).on("full_attention").train_tokens(*TOKENS)),
    "in-full": ("dense", qf.AdapterSpec.lora(rank=4).train_fully("embeddings", "norms", "full_attention")),
    "head-in-full": ("moe", qf.AdapterSpec.lora(rank=4).train_fully("lm_head", "router", "norms")),
    "embeddings": ("moe", qf.AdapterSpec.lora(rank=4).on("embeddings", "lm_head")),
    "embeddings-dora": ("moe", qf.AdapterSpec.lora(rank=4, dora=True).on("embeddings", "lm_head")),
    "norms": ("dense", qf.AdapterSpec.full().only_norms_and_biases()),
    "layers-full": ("moe", qf.AdapterSpec.full().on("shared_expert", "norms").with_layers(2, 3)),
    "experts": (
        "moe",
        qf.AdapterSpec.lora(rank=4).on("full_attention", "shared_expert", "routed_experts", "router", "lm_head"),
    ),
    "full-experts": ("moe", qf.AdapterSpec.full().freeze("embeddings")),
    "frozen-head": ("moe", qf.AdapterSpec.full().freeze("lm_head")),
    "fused": ("fused", qf.AdapterSpec.full()),
    "repeated-head": ("repeated-head", qf.AdapterSpec.full()),
    "text": ("dense-text", qf.AdapterSpec.lora(rank=4)),
    "text-full": ("dense-text", qf.AdapterSpec.full()),
    "moe-text": ("moe-text", qf.AdapterSpec.lora(rank=4).on("full_attention", "routed_experts")),
    "moe-text-full": ("moe-text", qf.AdapterSpec.full()),
    "vision": ("dense", qf.AdapterSpec.lora(rank=4)),
    "vision-lora": (
        "moe",
        qf.AdapterSpec.lora(rank=4).on("full_attention", "vision", "vision_merger"),
    ),
    "vision-in-full": ("dense", qf.AdapterSpec.lora(rank=4).train_fully("vision_merger")),
    "vision-full": ("moe", qf.AdapterSpec.full().freeze("vision", "vision_merger")),
}
#: Every kind goes through a fresh process in test_kinds.py; these go through all that is said of results too.
LONG = {
    "ranks",
    "gaussian-alphas",
    "orthogonal-layers",
    "olora",
    "pissa-dora",
    "head-tokens",
    "head-in-full",
    "embeddings",
    "embeddings-dora",
    "norms",
    "layers-full",
    "frozen-head",
    "moe-text",
    "text",
    "vision-in-full",
    "vision-full",
}


def cases(names):
    """Those of the names that take little time, and the others for the long suite."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in names]


LORA = cases(name for name, (_, adapter) in CASES.items() if adapter.kind == "lora")
FULL = cases(name for name, (_, adapter) in CASES.items() if adapter.kind == "full")


@pytest.fixture(scope="module")
def sources(dense_checkpoint, moe_checkpoint, tmp_path_factory):
    """Checkpoints by kind: whole, with fused experts, with a tied head repeated, and text halves."""
    folder = tmp_path_factory.mktemp("sources")
    found = {"dense": dense_checkpoint, "moe": moe_checkpoint}
    found["fused"] = qf.testing.tiny_checkpoint(folder / "fused", "moe", experts="fused")
    found["repeated-head"] = folder / "repeated-head"
    shutil.copytree(dense_checkpoint, folder / "repeated-head")
    file = folder / "repeated-head" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    for kind in ("dense", "moe"):
        text = architecture_of(qf.ModelSpec(found[kind])).text_only()
        load_model(found[kind], text, storage=Storage("float32")).save_pretrained(folder / kind)
        load_tokenizer(found[kind]).save_pretrained(folder / kind)
        found[f"{kind}-text"] = folder / kind
    return found


@pytest.fixture(scope="module", params=[*LORA, *FULL])
def run(request, sources, tmp_path_factory):
    """A short run of each kind, in float32."""
    kind, adapter = CASES[request.param]
    recipe = qf.Recipe(
        qf.ModelSpec(sources[kind], dtype="float32", vision=request.param.startswith("vision")),
        qf.DataSpec.messages(CHATS).with_max_length(64).pack(),
        adapter,
        training=qf.TrainingSpec(learning_rate=1e-2, epochs=3, warmup_ratio=0.0),
    )
    return recipe.compile().train(tmp_path_factory.mktemp(request.param) / "run", verbose=0)


def _logits(run, model):
    """The run's logits on a batch, and another model's, document by document."""
    batch = next(run.prepared.batches())[0]
    run.prepared.model.eval()
    with torch.no_grad():
        mine = run.prepared.logits(batch)
        theirs = torch.cat(
            [model(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(batch.layout.lengths)],
        )
    return mine, theirs


# peft asks transformers by the older of two names.
@pytest.mark.parametrize("run", LORA, indirect=True)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.usefixtures("without_fla")
def test_adapter_in_stock_peft_gives_the_runs_logits(run):
    """The saved adapter, put by stock peft on the stock class that is published, gives the run's logits."""
    text_only = run.plan.draft.checkpoint.is_text_only
    kind = transformers.AutoModelForCausalLM if text_only else transformers.AutoModelForImageTextToText
    base = kind.from_pretrained(run.plan.recipe.model.source)
    mine, theirs = _logits(run, peft.PeftModel.from_pretrained(base, run.adapter_path).eval())
    assert relative(mine, theirs) < 1e-5


@pytest.mark.usefixtures("without_fla")
def test_merged_export_gives_the_runs_logits(run, tmp_path):
    """The exported checkpoint, in stock transformers, gives the run's logits."""
    path = run.export(tmp_path / "merged")
    mine, theirs = _logits(run, transformers.AutoModelForCausalLM.from_pretrained(path).eval())
    assert relative(mine, theirs) < 1e-5


def test_export_leaves_the_run_as_it_was_and_loses_nothing(run, tmp_path):
    """Exporting changes no weight of the model; tensors that were not trained are the source's, to the bit."""
    before = {name: p.detach().clone() for name, p in run.prepared.model.named_parameters()}
    path = run.export(tmp_path / "merged")
    assert all(torch.equal(before[name], p) for name, p in run.prepared.model.named_parameters())
    source = {}
    exported = {}
    for folder, tensors in ((path, exported), (run.prepared.tokenizer.name_or_path, source)):
        for file in weight_files(type(path)(folder)):
            tensors.update(load_file(file))
    assert source.keys() == exported.keys()
    untouched = [name for name in source if name.startswith(("mtp.", "model.visual."))]
    assert untouched or run.plan.draft.checkpoint.is_text_only
    if "lm_head" in run.plan.recipe.adapter.frozen:
        untouched.append("lm_head.weight")
    assert all(torch.equal(source[name], exported[name]) for name in untouched)
    assert any(not torch.equal(source[name], exported[name]) for name in source)
    if "lm_head.weight" in source and run.plan.draft.checkpoint.tied:
        assert torch.equal(exported["lm_head.weight"], exported["model.language_model.embed_tokens.weight"])
    assert all(source[name].dtype == exported[name].dtype for name in source)


@pytest.mark.parametrize("run", LORA, indirect=True)
def test_adapter_names_are_those_of_the_published_class(run):
    """Tensors are saved under the names by which the published class is served."""
    with safe_open(run.adapter_path / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
    halves = ("",) if run.plan.draft.checkpoint.is_text_only else ("language_model.", "visual.")
    prefixes = (*(f"base_model.model.model.{half}" for half in halves), "base_model.model.lm_head.")
    assert names
    assert all(name.startswith(prefixes) for name in names)
    config = json.loads((run.adapter_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == run.plan.recipe.model.source
    assert config["inference_mode"] is True


def test_trained_parameters_are_those_of_the_plan(run):
    """As many parameters are trained as the plan says, all in float32."""
    trained = [p for p in run.prepared.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == run.plan.trained_parameters
    assert {p.dtype for p in trained} == {torch.float32}


def test_exports_are_never_written_over_something(run, tmp_path):
    """A folder that holds something is refused and stays as it is."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    with pytest.raises(qf.CheckpointError, match="exists already"):
        run.export(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (tmp_path / "taken" / "note").read_text() == "mine"


@pytest.mark.parametrize("run", ["lora", "full", "experts"], indirect=True)
def test_a_failed_export_leaves_nothing(run, tmp_path):
    """When no more can be written halfway, no half of a checkpoint stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(qf.CheckpointError, match="merged: cannot be written: File too large"):
            run.export(tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", ["lora", "full", "experts"], indirect=True)
@pytest.mark.parametrize("where", ["mtp.", "layers.3"])
def test_an_export_that_reads_otherwise_is_refused(run, where, tmp_path, monkeypatch):
    """A single bit that the disk gives back wrong, in a tensor that was merged or copied, and nothing stays."""
    write = TensorFile.write
    spoilt = []

    def spoil(self, name, blocks):
        blocks = list(blocks)
        if where in name and not spoilt:
            spoilt.append(name)
            blocks[-1] = blocks[-1].clone()
            blocks[-1].flatten().view(torch.uint8)[-4] ^= 1
        write(self, name, blocks)

    monkeypatch.setattr(TensorFile, "write", spoil)
    with pytest.raises(qf.CheckpointError, match="reads otherwise than it was written") as refused:
        run.export(tmp_path / "merged")
    assert str(refused.value).startswith(spoilt[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", FULL, indirect=True)
def test_full_fine_tuning_leaves_a_whole_checkpoint(run):
    """A run without an adapter leaves a model folder instead."""
    assert run.adapter_path is None
    assert (run.folder / "model" / "config.json").exists()

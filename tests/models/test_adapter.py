"""Adapters that are there already: trained on, loaded beside another, merged without a model, and refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qwenft as qf
from qwenft.models.adapter import CONFIG, TENSORS, Adapter
from qwenft.models.checkpoint import architecture_of

from .helpers import relative

CHATS = [
    {"messages": [{"role": "user", "content": f"Say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four", "five", "six")
]
#: As other trainers write them: names, and regular expressions over the names of the vision-language class.
FOREIGN = {
    "names": {"target_modules": ["q_proj", "v_proj", "in_proj_qkv", "gate_proj", "down_proj"], "r": 4},
    "all-linear": {"target_modules": "all-linear", "r": 2, "use_rslora": True, "exclude_modules": r".*visual.*"},
    "pattern": {
        "target_modules": r".*language_model\.layers\.[13]\..*(q_proj|k_proj|in_proj_z|up_proj)",
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {r"layers.1.*up_proj": 3},
        "alpha_pattern": {r"layers\.3\..*up_proj": 9},
        "use_dora": True,
    },
    "tokens": {"target_modules": ["o_proj"], "r": 4, "trainable_token_indices": [261, 7]},
    "copies": {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["input_layernorm", "k_proj"]},
    "experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"],
        "r": 2,
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def stock(folder):
    """The class of transformers that a checkpoint is published as."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def recipe(checkpoint, adapter, model=None, **training):
    return qf.Recipe(
        model or qf.ModelSpec(checkpoint, dtype="float32"),
        qf.DataSpec.messages(CHATS).with_max_length(64).pack(),
        adapter,
        training=qf.TrainingSpec(**{"learning_rate": 1e-2, "epochs": 2, "warmup_ratio": 0.0, **training}),
    )


def drawn(model):
    """Values for what an adapter trains that are no zeros."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=list(FOREIGN))
def foreign(request, dense_checkpoint, moe_checkpoint, tmp_path_factory):
    """An adapter that stock peft made and saved, and its checkpoint."""
    checkpoint = moe_checkpoint if request.param == "experts" else dense_checkpoint
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    model = drawn(peft.get_peft_model(stock(checkpoint), peft.LoraConfig(**FOREIGN[request.param])))
    model.save_pretrained(folder)
    return checkpoint, folder


def logits(model, batch):
    """Another model's logits, document by document."""
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=ids[None]).logits[0] for ids in batch.input_ids.split(batch.layout.lengths)]
        )


@pytest.mark.usefixtures("without_fla")
def test_an_adapter_of_peft_is_trained_on(foreign, tmp_path):
    """Before the first step it gives stock peft's logits; after some, the saved one does again, and it has moved."""
    checkpoint, folder = foreign
    plan = recipe(checkpoint, qf.AdapterSpec.load(folder)).compile()
    prepared = plan.prepare()
    assert sum(p.numel() for p in prepared.trained.values()) == plan.trained_parameters
    batch = next(prepared.batches())[0]
    before = logits(peft.PeftModel.from_pretrained(stock(checkpoint), folder).eval(), batch)
    prepared.model.eval()
    with torch.no_grad():
        assert relative(before, prepared.logits(batch)) < 1e-5
    run = plan.train(tmp_path / "run", verbose=0)
    run.prepared.model.eval()
    with torch.no_grad():
        mine = run.prepared.logits(batch)
    again = logits(peft.PeftModel.from_pretrained(stock(checkpoint), run.adapter_path).eval(), batch)
    assert relative(mine, again) < 1e-5
    assert relative(before, mine) > 1e-3


@pytest.mark.usefixtures("without_fla")
def test_an_adapter_is_merged_without_a_model(foreign, tmp_path):
    """The merged checkpoint gives the logits of peft beside the base, and every tensor is what peft merges."""
    checkpoint, folder = foreign
    path = qf.merge_adapter(folder, tmp_path / "merged", model=qf.ModelSpec(checkpoint))
    report = json.loads((path / "export.json").read_text())
    assert report["logits"]["adapter_to_export"] < 1e-4 < report["logits"]["base_to_adapter"]
    wanted = peft.PeftModel.from_pretrained(stock(checkpoint), folder).merge_and_unload().state_dict()
    got = stock(path).state_dict()
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_the_plan_of_a_loaded_adapter_says_what_it_reaches(foreign):
    """Coverage is that of its files: as many parameters as they hold, in the layers that they name."""
    checkpoint, folder = foreign
    plan = recipe(checkpoint, qf.AdapterSpec.load(folder)).compile()
    assert plan.trained_parameters == sum(tensor.numel() for tensor in load_file(folder / TENSORS).values())
    if folder.parent.name.startswith("pattern"):
        rows = {row.role: row for row in plan.coverage if row.parameters}
        assert {role: row.layers for role, row in rows.items()} == {
            "full_attention": 1,
            "linear_attention": 1,
            "mlp": 2,
        }


def test_a_run_goes_on_from_its_own_adapter_on_a_base_in_few_bits(dense_checkpoint, tmp_path):
    """An adapter of 16-bit weights is trained on beside nf4; resumed, it refuses another adapter in its place."""
    first = recipe(dense_checkpoint, qf.AdapterSpec.lora(rank=4)).compile().train(tmp_path / "a", verbose=0)
    folder = tmp_path / "adapter"
    shutil.copytree(first.adapter_path, folder)
    model = qf.ModelSpec(dense_checkpoint, dtype="float32").quantize("nf4")
    plan = recipe(dense_checkpoint, qf.AdapterSpec.load(folder), model).compile()
    run = plan.train(tmp_path / "b", verbose=0)
    was, now = (load_file(path / TENSORS) for path in (folder, run.adapter_path))
    assert was.keys() == now.keys()
    assert any(not torch.equal(was[name], now[name]) for name in was)
    assert all(relative(was[name], now[name]) < 0.9 for name in was if "lora_A" in name)
    changed = {name: tensor + 1 for name, tensor in was.items()}
    save_file(changed, folder / TENSORS)
    with pytest.raises(qf.CheckpointError, match="adapter"):
        recipe(dense_checkpoint, qf.AdapterSpec.load(folder), model).compile().train(tmp_path / "b")


def test_several_adapters_one_active(dense_checkpoint, tmp_path):
    """A further adapter answers as it would alone, and leaves the trained one as it was."""
    runs = [
        recipe(dense_checkpoint, adapter, learning_rate=rate).compile().train(tmp_path / name, verbose=0)
        for name, adapter, rate in (
            ("a", qf.AdapterSpec.lora(rank=4).train_fully("norms"), 1e-2),
            ("b", qf.AdapterSpec.lora(rank=2, initialization="pissa").on("mlp").train_tokens(7), 5e-2),
        )
    ]
    for mine, other in (runs, runs[::-1]):
        batch = next(mine.prepared.batches())[0]
        model = mine.prepared.model.eval()
        with torch.no_grad():
            own, wanted = mine.prepared.logits(batch), None
            mine.load_adapter(other.adapter_path, "other")
            other.prepared.model.eval()
            wanted = other.prepared.logits(batch)
            assert torch.equal(mine.prepared.logits(batch), own)
            model.set_adapter("other")
            assert relative(wanted, mine.prepared.logits(batch)) < 1e-5
            model.set_adapter("default")
            assert torch.equal(mine.prepared.logits(batch), own)
        answer = mine.generate("Say one", max_new_tokens=4)
        assert mine.generate("Say one", max_new_tokens=4, adapter="other") == other.generate(
            "Say one", max_new_tokens=4
        )
        assert mine.generate("Say one", max_new_tokens=4) == answer
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(mine.prepared.trained)
        with pytest.raises(qf.SpecError, match=r"there is an adapter 'other' already"):
            mine.load_adapter(other.adapter_path, "other")
        with pytest.raises(
            qf.SpecError, match=r"no adapter 'othr'; there are default, other; did you mean 'other'"
        ):
            mine.generate("Say one", adapter="othr")


def test_the_base_answers_as_it_did_where_a_pair_was_taken_out(dense_checkpoint, tmp_path):
    """With its adapter off, a model whose initial pairs were taken out of the weights is the base."""
    base = recipe(dense_checkpoint, qf.AdapterSpec.lora(rank=4)).compile().prepare()
    taken = recipe(dense_checkpoint, qf.AdapterSpec.lora(rank=4, initialization="pissa")).compile()
    run = taken.train(tmp_path / "run", verbose=0)
    batch = next(base.batches())[0]
    with torch.no_grad(), run.prepared.model.eval().disable_adapter(), base.model.eval().disable_adapter():
        assert relative(base.logits(batch), run.prepared.logits(batch)) < 1e-5


@pytest.mark.usefixtures("without_fla")
def test_names_of_the_text_half_alone(dense_checkpoint, tmp_path):
    """An adapter under these names gives the run's logits beside ...ForCausalLM, where the others load as nothing."""
    run = recipe(dense_checkpoint, qf.AdapterSpec.lora(rank=4)).compile().train(tmp_path / "run", verbose=0)
    path = run.save_adapter(tmp_path / "text", text_only_names=True)
    batch = next(run.prepared.batches())[0]
    run.prepared.model.eval()
    with torch.no_grad():
        mine = run.prepared.logits(batch)
    base = transformers.AutoModelForCausalLM.from_pretrained(dense_checkpoint)
    assert relative(mine, logits(peft.PeftModel.from_pretrained(base, path).eval(), batch)) < 1e-5
    assert {name.replace("language_model.", "") for name in load_file(run.adapter_path / TENSORS)} == set(
        load_file(path / TENSORS)
    )
    assert qf.merge_adapter(path, tmp_path / "merged").is_dir()


def test_names_of_the_text_half_are_none_for_a_tower(dense_checkpoint, tmp_path):
    """An adapter of the tower cannot be saved for a class without one, nor one that is no adapter."""
    adapter = qf.AdapterSpec.lora(rank=2).on("full_attention", "vision")
    plan = recipe(
        dense_checkpoint, adapter, qf.ModelSpec(dense_checkpoint, dtype="float32", vision=True)
    ).compile()
    with pytest.raises(qf.SpecError, match="reaches the vision tower"):
        plan.save_adapter(plan.prepare().model, tmp_path / "text", text_only_names=True)
    full = recipe(dense_checkpoint, qf.AdapterSpec.full().on("norms")).compile()
    with pytest.raises(qf.SpecError, match="there is no adapter"):
        full.save_adapter(full.prepare().model, tmp_path / "none")


@pytest.fixture
def saved(dense_checkpoint, tmp_path):
    """A function that writes an adapter with another config or other tensors, and its folder."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "out_proj"])
    model = drawn(peft.get_peft_model(stock(dense_checkpoint), config))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)

    def change(config=None, tensors=None):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
        if tensors is not None:
            save_file(tensors(load_file(folder / TENSORS)), folder / TENSORS)
        return folder

    return change


def lm_head(tensors):
    first = "base_model.model.lm_head.lora"
    return {**tensors, f"{first}_A.weight": torch.ones(4, 64), f"{first}_B.weight": torch.ones(576, 4)}


BAD = {
    "rank": (
        {"r": 8},
        None,
        r"beside model\.layers\.0\.linear_attn\.out_proj\.weight is of the shapes .*Fix: its own base",
    ),
    "half": (
        None,
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora_B" not in name},
        r"is of the shapes \{'a': \(4, 64\)\}",
    ),
    "wider": (
        None,
        lambda tensors: {name: torch.cat([tensor, tensor], -1).contiguous() for name, tensor in tensors.items()},
        r"its config and the base make it",
    ),
    "deeper": (
        None,
        lambda tensors: {name.replace("layers.0.", "layers.40."): tensor for name, tensor in tensors.items()},
        r"has no model\.layers\.40\.linear_attn\.out_proj\.weight: its base is another",
    ),
    "tied-head": (None, lm_head, r"it changes the output head alone, which its base ties"),
    "kind": ({"peft_type": "LOHA"}, None, r"peft_type='LOHA' is not read"),
    "bias": ({"bias": "all"}, None, r"bias='all' is not read"),
    "lora-bias": ({"lora_bias": True}, None, r"lora_bias is not read"),
    "pissa": (
        {"init_lora_weights": "pissa"},
        None,
        r"taken out of the base .*path_initial_model_for_weight_conversion",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_is_not_of_this_base_is_refused(case, saved, dense_checkpoint, tmp_path):
    """Loading and merging name what does not fit, and leave adapter, base and target as they were."""
    config, tensors, message = BAD[case]
    folder = saved(config, tensors)
    before = {path: path.read_bytes() for path in (*folder.iterdir(), *dense_checkpoint.iterdir())}
    with pytest.raises(qf.CheckpointError, match=f"(?s){message}"):
        recipe(dense_checkpoint, qf.AdapterSpec.load(folder)).compile()
    with pytest.raises(qf.CheckpointError, match=f"(?s){message}"):
        qf.merge_adapter(folder, tmp_path / "merged", model=qf.ModelSpec(dense_checkpoint))
    assert not (tmp_path / "merged").exists()
    assert before == {path: path.read_bytes() for path in (*folder.iterdir(), *dense_checkpoint.iterdir())}


def test_an_adapter_of_the_tower_needs_the_tower(dense_checkpoint, tmp_path):
    """Loaded for the text half alone, it is refused with the line that loads the tower; with it, it is trained on."""
    config = peft.LoraConfig(r=2, target_modules=["attn.qkv", "q_proj"])
    drawn(peft.get_peft_model(stock(dense_checkpoint), config)).save_pretrained(tmp_path / "adapter")
    adapter = qf.AdapterSpec.load(tmp_path / "adapter")
    with pytest.raises(qf.CheckpointError, match=r"(?s)no tower is loaded.*recipe\.with_model\(vision=True\)"):
        recipe(dense_checkpoint, adapter).compile()
    model = qf.ModelSpec(dense_checkpoint, dtype="float32", vision=True)
    assert recipe(dense_checkpoint, adapter, model).compile().trained_parameters > 0


def test_an_adapter_without_a_tensor_is_refused(dense_checkpoint, saved, tmp_path):
    """It would load as nothing, and merge into an unchanged copy."""
    folder = saved(tensors=lambda _: {})
    for use in (
        lambda: recipe(dense_checkpoint, qf.AdapterSpec.load(folder)).compile(),
        lambda: qf.merge_adapter(folder, tmp_path / "merged", model=qf.ModelSpec(dense_checkpoint)),
    ):
        with pytest.raises(qf.CheckpointError, match="holds no tensor: it would load as nothing"):
            use()
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_no_adapter_is_refused(dense_checkpoint, saved):
    """Nothing there, no JSON, or a file that was cut."""
    for fill in (
        shutil.rmtree,
        lambda folder: (folder / CONFIG).write_text("{"),
        lambda folder: (folder / CONFIG).write_text("[]"),
        lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100]),
        lambda folder: (folder / TENSORS).unlink(),
    ):
        folder = saved()
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept)
        fill(folder)
        with pytest.raises(qf.CheckpointError, match=r"is no adapter of peft, or a damaged one|is not read"):
            recipe(dense_checkpoint, qf.AdapterSpec.load(folder)).compile()
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)


def test_a_base_that_is_damaged_is_refused(moe_checkpoint, tmp_path):
    """A file that is missing, cut or too short for its header is named, and nothing is left of the export."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(stock(moe_checkpoint), config).save_pretrained(tmp_path / "adapter")
    for number, damage in enumerate(
        (
            lambda file: file.unlink(),
            lambda file: file.write_bytes(file.read_bytes()[:-1000]),
            lambda file: file.write_bytes(b"0123"),
        )
    ):
        base = tmp_path / f"base-{number}"
        shutil.copytree(moe_checkpoint, base)
        damage(sorted(base.glob("*.safetensors"))[1])
        with pytest.raises(qf.CheckpointError, match=r"model-00002.*(missing|damaged)|damaged.*model-00002"):
            qf.merge_adapter(tmp_path / "adapter", tmp_path / "merged", model=qf.ModelSpec(base))
    held = tmp_path / "held"
    held.mkdir()
    (held / "note").write_text("mine")
    with pytest.raises(qf.CheckpointError, match="exists already, and is not overwritten"):
        qf.merge_adapter(tmp_path / "adapter", held, model=qf.ModelSpec(moe_checkpoint))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base-0", "base-1", "base-2", "held"]
    assert [path.name for path in held.iterdir()] == ["note"]


def test_a_base_in_few_bits_is_not_merged_into(dense_checkpoint, tmp_path):
    """A quantized copy holds no weights of 16 bits."""
    spec = qf.ModelSpec(dense_checkpoint, dtype="float32").quantize("nf4")
    plan = recipe(dense_checkpoint, qf.AdapterSpec.lora(rank=4), spec).compile()
    copy = plan.save_quantized(tmp_path / "copy")
    run = plan.train(tmp_path / "run", verbose=0)
    with pytest.raises(qf.CheckpointError, match="no weights of 16 bits to merge into"):
        qf.merge_adapter(run.adapter_path, tmp_path / "merged", model=copy)
    report = json.loads((qf.merge_adapter(run.adapter_path, tmp_path / "merged") / "export.json").read_text())
    exported = json.loads((run.export(tmp_path / "of-run") / "export.json").read_text())
    assert exported["logits"].pop("run_to_export") > 1e-3
    assert exported == report


def test_an_adapter_that_learned_nothing_is_not_exported(dense_checkpoint, tmp_path):
    """Pairs that are zero move no logit, and an export of them would only seem to be one."""
    model = peft.get_peft_model(stock(dense_checkpoint), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(qf.CheckpointError, match="it changes no logit"):
        qf.merge_adapter(tmp_path / "adapter", tmp_path / "merged", model=qf.ModelSpec(dense_checkpoint))
    assert not (tmp_path / "merged").exists()


def test_a_loaded_adapter_takes_no_other_options(dense_checkpoint, saved):
    """What a loaded adapter adapts is not changed by the recipe; asked to, it is an error."""
    adapter = qf.AdapterSpec.load(saved()).on("mlp").with_rank(mlp=3)
    with pytest.raises(qf.PlanError, match=r"adapter\.load: roles, ranks: what .* its files say"):
        recipe(dense_checkpoint, adapter).compile()


def test_a_recipe_with_a_loaded_adapter_is_kept(dense_checkpoint, saved, tmp_path):
    """It is saved and read again, equal."""
    kept = recipe(dense_checkpoint, qf.AdapterSpec.load(saved()))
    kept.save(tmp_path / "recipe.json")
    assert qf.Recipe.load(tmp_path / "recipe.json").adapter == kept.adapter


def test_an_adapter_is_found_by_names_of_older_and_text_only_files(saved, dense_checkpoint):
    """The same weights are found under the text half's names."""
    architecture = architecture_of(qf.ModelSpec(dense_checkpoint))
    entries = Adapter.of_folder(saved()).beside(architecture)
    text = saved(
        tensors=lambda tensors: {name.replace("language_model.", ""): tensor for name, tensor in tensors.items()}
    )
    assert [entry.name for entry in Adapter.of_folder(text).beside(architecture)] == [e.name for e in entries]

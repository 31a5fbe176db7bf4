import json

import attrs
import datasets
import pytest

from qwenft.backends import EagerAttention, ReferenceDeltaRule, SdpaAttention, TorchDeltaRule
from qwenft.errors import CheckpointError, SpecError
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.parallel import ParallelSpec
from qwenft.specs.training import TrainingSpec

CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "é"}]} for n in range(3)
]
MODEL = ModelSpec("qwen3.5-4b")


def function_of_its_own(hidden, batch, head):
    """A loss that a saved recipe finds again where its module is allowed."""
    return hidden.sum() * batch.tokens * head.out_features


PLAIN = Recipe(MODEL, DataSpec.messages("chats.jsonl"))

# Recipes that differ from PLAIN in one field each, every field of every spec among them.
CHANGED = {
    "model.source": PLAIN.with_model(source="qwen3.5-9b"),
    "model.revision": PLAIN.with_model(revision="main"),
    "model.dtype": PLAIN.with_model(dtype="float32"),
    "model.vision": PLAIN.with_model(vision=True),
    "model.quantization": PLAIN.with_model(MODEL.quantize("nf4", experts=False)),
    "model.quantization (int8)": PLAIN.with_model(MODEL.quantize("int8")),
    "data.source": PLAIN.with_data(source=["a.jsonl", "b.jsonl"]),
    "data.source (rows)": PLAIN.with_data(source=CHATS),
    "data.source (Dataset)": PLAIN.with_data(source=datasets.Dataset.from_list(CHATS[:2])),
    "data.columns": PLAIN.with_data(columns={"messages": "turns"}),
    "data.trained_roles": PLAIN.with_data(trained_roles=("user", "assistant")),
    "data.turns": PLAIN.with_data(turns="last"),
    "data.end_of_turn": PLAIN.with_data(end_of_turn=False),
    "data.tool_calls": PLAIN.with_data(tool_calls=False),
    "data.thinking": PLAIN.with_data(thinking="mask"),
    "data.template": PLAIN.with_data(template={"enable_thinking": False, "documents": [{"a": 1}]}),
    "data.control_tokens": PLAIN.with_data(control_tokens="encode"),
    "data.mixed": PLAIN.with_data(PLAIN.data.mix(DataSpec.text("notes.jsonl"), 0.5)),
    "data.window": PLAIN.with_data(PLAIN.data.stream(window=7)),
    "data.bad_rows": PLAIN.with_data(bad_rows="skip"),
    "data.images": PLAIN.with_data(PLAIN.data.with_images("pictures", max_pixels=65_536, hosts=("a.org",))),
    "data.overlap": PLAIN.with_data(overflow="split", overlap=64),
    "data.max_length": PLAIN.with_data(max_length=100),
    "data.overflow": PLAIN.with_data(overflow="truncate"),
    "data.packed": PLAIN.with_data(packed=True),
    "data.row_tokens": PLAIN.with_data(row_tokens=5000),
    "data.held_out": PLAIN.with_data(held_out=0.1),
    "data.held_out (DataSpec)": PLAIN.with_data(held_out=DataSpec.messages("other.jsonl").with_max_length(9)),
    "data.held_out (rows)": PLAIN.with_data(held_out=DataSpec.messages(CHATS[:1])),
    "adapter.kind": PLAIN.with_adapter(kind="full"),
    "adapter.rank": PLAIN.with_adapter(rank=4),
    "adapter.alpha": PLAIN.with_adapter(alpha=1.5),
    "adapter.dropout": PLAIN.with_adapter(dropout=0.1),
    "adapter.rslora": PLAIN.with_adapter(rslora=True),
    "adapter.dora": PLAIN.with_adapter(dora=True),
    "adapter.roles": PLAIN.with_adapter(AdapterSpec.lora().on("mlp", "router")),
    "adapter.frozen": PLAIN.with_adapter(frozen=("embeddings",)),
    "adapter.ranks": PLAIN.with_adapter(AdapterSpec.lora().with_rank(mlp=4, router=2)),
    "adapter.alphas": PLAIN.with_adapter(AdapterSpec.lora().with_alpha(mlp=4, router=0.5)),
    "adapter.initialization": PLAIN.with_adapter(initialization="olora"),
    "adapter.layers": PLAIN.with_adapter(layers=(1, 2)),
    "adapter.copied": PLAIN.with_adapter(copied=("norms",)),
    "adapter.tokens": PLAIN.with_adapter(tokens=(9, 7)),
    "adapter.norms_and_biases": PLAIN.with_adapter(norms_and_biases=True),
    "adapter.mtp_weight": PLAIN.with_adapter(mtp_weight=0.3),
    "adapter.path": PLAIN.with_adapter(path="runs/a/adapter"),
    "adapter.target_modules": PLAIN.with_adapter(target_modules=("q_proj",)),
    "adapter.target_parameters": PLAIN.with_adapter(target_parameters=("gate.weight",)),
    "attention.full": PLAIN.with_attention(full="eager"),
    "attention.full (object)": PLAIN.with_attention(full=EagerAttention()),
    "attention.full (another)": PLAIN.with_attention(full=SdpaAttention()),
    "attention.linear": PLAIN.with_attention(linear="reference"),
    "attention.vision": PLAIN.with_attention(vision="eager"),
    "attention.linear (object)": PLAIN.with_attention(linear=TorchDeltaRule()),
    "attention.linear (another)": PLAIN.with_attention(linear=ReferenceDeltaRule()),
    "training.epochs": PLAIN.with_training(epochs=2),
    "training.max_steps": PLAIN.with_training(max_steps=7),
    "training.tokens_per_step": PLAIN.with_training(tokens_per_step=4096),
    "training.learning_rate": PLAIN.with_training(learning_rate=1e-5),
    "training.schedule": PLAIN.with_training(schedule="linear"),
    "training.warmup_ratio": PLAIN.with_training(warmup_ratio=0.5),
    "training.weight_decay": PLAIN.with_training(weight_decay=0.1),
    "training.max_grad_norm": PLAIN.with_training(max_grad_norm=None),
    "training.activation_checkpointing": PLAIN.with_training(activation_checkpointing=False),
    "training.compile_elementwise": PLAIN.with_training(compile_elementwise=True),
    "training.activation_offloading": PLAIN.with_training(activation_offloading=True),
    "training.optimizer_in_backward": PLAIN.with_training(optimizer_in_backward=True),
    "training.embeddings_on_host": PLAIN.with_training(embeddings_on_host=True),
    "training.seed": PLAIN.with_training(seed=1),
    "training.evaluate_every": PLAIN.with_training(evaluate_every=5),
    "training.learning_rates": PLAIN.with_training(learning_rates=(("mlp", 1e-5), ("router", 1e-3))),
    "training.lora_plus_ratio": PLAIN.with_training(lora_plus_ratio=16.0),
    "training.decay_ratio": PLAIN.with_training(decay_ratio=0.2),
    "training.floor_ratio": PLAIN.with_training(floor_ratio=0.1),
    "training.optimizer": PLAIN.with_training(optimizer="sgd"),
    "training.betas": PLAIN.with_training(betas=[0.9, 0.95]),
    "training.epsilon": PLAIN.with_training(epsilon=1e-6),
    "training.momentum": PLAIN.with_training(momentum=0.9),
    "training.master_weights": PLAIN.with_training(master_weights=True),
    "training.loss": PLAIN.with_training(loss=function_of_its_own),
    "training.z_loss": PLAIN.with_training(z_loss=1e-4),
    "training.label_smoothing": PLAIN.with_training(label_smoothing=0.1),
    "training.router_aux_loss": PLAIN.with_training(router_aux_loss=0.001),
    "training.neftune_alpha": PLAIN.with_training(neftune_alpha=5.0),
    "training.deterministic": PLAIN.with_training(deterministic=True),
    "training.keep_best": PLAIN.with_training(keep_best=True),
    "training.patience": PLAIN.with_training(patience=2),
    "training.sample_prompts": PLAIN.with_training(sample_prompts=["Hi", "Who?"]),
    "training.sample_tokens": PLAIN.with_training(sample_tokens=9),
    "training.save_every": PLAIN.with_training(save_every=7),
    "training.keep_checkpoints": PLAIN.with_training(keep_checkpoints=5),
    "training.failed_save": PLAIN.with_training(failed_save="stop"),
    "training.non_finite": PLAIN.with_training(non_finite="skip"),
    "training.max_skipped": PLAIN.with_training(max_skipped=3),
    "parallel.kind": PLAIN.with_parallel(ParallelSpec.fsdp2()),
    "parallel.offload": PLAIN.with_parallel(ParallelSpec.fsdp2(offload="cpu")),
    "parallel.reshard_after_forward": PLAIN.with_parallel(ParallelSpec.fsdp2(reshard_after_forward=False)),
    "parallel.hybrid": PLAIN.with_parallel(ParallelSpec.fsdp2(hybrid=True)),
}
ONE_VALUE = {"data.format"}
RECIPES = {
    **CHANGED,
    "plain": PLAIN,
    "no data": Recipe(MODEL),
    "all at once": Recipe(
        ModelSpec("Qwen/Qwen3.5-35B-A3B", revision="v1", dtype="float32", vision=True),
        DataSpec.messages(CHATS).with_max_length(64, "error").pack(256).hold_out(DataSpec.messages(CHATS[1:])),
        AdapterSpec.lora(rank=2, alpha=3.5, dropout=0.5, rslora=True).on("router").with_rank(router=1),
        AttentionSpec(full=EagerAttention(), linear="torch"),
        TrainingSpec(max_steps=3, tokens_per_step=512, seed=9),
        ParallelSpec.single(),
    ),
}


def test_every_field_is_changed_once():
    """The table above leaves out no field but those with one possible value."""
    specs = {field.name: getattr(PLAIN, field.name) for field in attrs.fields(Recipe) if field.eq}
    fields = {f"{name}.{field.name}" for name, spec in specs.items() for field in attrs.fields(type(spec))}
    assert {name.partition(" ")[0] for name in CHANGED} == fields - ONE_VALUE


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_loads_equal(name, tmp_path):
    """What is saved and loaded equals what was, with an equal fingerprint, and saves the same bytes again."""
    recipe = RECIPES[name]
    path = recipe.save(tmp_path / "deep" / "recipe.json")
    loaded = Recipe.load(path, allow_modules=[__name__])
    assert loaded == recipe
    assert loaded.fingerprint == recipe.fingerprint
    assert hash(loaded) == hash(recipe)
    assert loaded.save(tmp_path / "again.json").read_bytes() == path.read_bytes()
    left = {file.suffix for file in path.parent.iterdir()}
    assert left <= {".json", ".jsonl"}


def test_every_field_changes_the_fingerprint():
    """Recipes that differ in one field have different fingerprints, and none has that of another."""
    prints = {name: recipe.fingerprint for name, recipe in RECIPES.items()}
    assert len(set(prints.values())) == len(prints)


def test_equal_recipes_have_equal_fingerprints():
    """Rows from a list, a tuple and a Dataset with the same content make the same recipe."""
    sources = (CHATS, tuple(CHATS), datasets.Dataset.from_list(CHATS))
    recipes = [PLAIN.with_data(source=source) for source in sources]
    assert recipes[0] == recipes[1] == recipes[2]
    assert len({recipe.fingerprint for recipe in recipes}) == 1


@pytest.mark.parametrize("field", ["model", "data", "adapter", "attention", "training", "parallel"])
def test_with_takes_a_spec_or_changes(field):
    """with_model() and its kind put a spec in its place, and nothing else changes."""
    method = getattr(PLAIN, f"with_{field}")
    other = RECIPES["all at once"]
    assert method(getattr(other, field)) == attrs.evolve(PLAIN, **{field: getattr(other, field)})
    with pytest.raises(SpecError, match=rf"Recipe\.with_{field}: expected a spec or changes, got both"):
        method(getattr(other, field), anything=1)
    with pytest.raises(SpecError, match=r"has no argument 'anything'"):
        method(anything=1)


def test_with_changes_what_is_there():
    """Keyword arguments change the spec that the recipe has, and a recipe without data has none to change."""
    assert PLAIN.with_training(seed=3).with_training(epochs=2).training == TrainingSpec(seed=3, epochs=2)
    assert PLAIN.with_data(None) == Recipe(MODEL)
    with pytest.raises(
        SpecError,
        match=r"Recipe\.with_data: there is no data to change\n  Fix: with_data\(spec\)",
    ):
        Recipe(MODEL).with_data(max_length=5)


def test_the_defaults():
    """A recipe of a model alone trains a LoRA with the backends of the machine."""
    recipe = Recipe(MODEL)
    assert recipe.data is None
    assert recipe.adapter == AdapterSpec.lora(rank=16, alpha=32)
    assert recipe.attention == AttentionSpec("auto", "auto")
    assert recipe.training == TrainingSpec()
    assert recipe.parallel == ParallelSpec.single()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"recipe\.json: is no JSON: .*\n  Fix: Recipe\.load of a file by recipe\.save"),
        (b"", r"recipe\.json: is no JSON"),
        (b'{"model": "\xff"}', r"recipe\.json: is no JSON: .*utf-8"),
        (b"[]", r"Recipe: expected a JSON object, got \[\]"),
        (b"{}", r"Recipe: required field missing @ \$\.model"),
        (b'{"model": {"source": "m"}, "traning": {}}', r"Recipe: extra fields found \(traning\)"),
        (b'{"model": {"source": "m", "revison": "v"}}', r"extra fields found \(revison\) @ \$\.model"),
        (b'{"model": {"source": 5}}', r"ModelSpec\.source: expected a string that is not empty, got 5"),
        (b'{"model": "m"}', r"ModelSpec: expected a JSON object, got 'm'"),
        (b'{"model": {"source": "m"}, "adapter": {"kind": "lora", "rank": 0}}', r"AdapterSpec\.rank: expected"),
        (
            b'{"model": {"source": "m"}, "adapter": {"kind": "lora", "roles": "mlp"}}',
            r"AdapterSpec\.roles: expected",
        ),
        (b'{"model": {"source": "m"}, "training": {"epochs": 1, "max_steps": 1}}', r"got both: 1 and 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    """Broken JSON, unknown fields and ill-typed values are named."""
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        Recipe.load(path)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path):
    """A missing file, and a place below a file, are errors of the checkpoint kind with the path."""
    with pytest.raises(CheckpointError, match=r"gone\.json: cannot be read: No such file") as caught:
        Recipe.load(tmp_path / "gone.json")
    assert caught.value.path == tmp_path / "gone.json"
    assert isinstance(caught.value, OSError)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"recipe\.json: cannot be written: "):
        PLAIN.save(tmp_path / "file" / "recipe.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_recipe_that_cannot_be_saved_leaves_nothing_behind(tmp_path):
    """A notebook's backend is refused before a folder is made or the rows beside it are written."""
    notebook = type("Mine", (EagerAttention,), {"__module__": "__main__"})
    recipe = PLAIN.with_data(source=CHATS).with_attention(full=notebook())
    with pytest.raises(SpecError, match=r"Mine is defined in __main__ and cannot be found again"):
        recipe.save(tmp_path / "deep" / "recipe.json")
    assert not list(tmp_path.iterdir())


def test_a_saved_module_must_be_allowed(tmp_path, monkeypatch):
    """A backend of a module of one's own loads when the module is allowed, and equals the one saved."""
    (tmp_path / "my_backend.py").write_text(
        "from qwenft.backends import EagerAttention\n"
        "class Windowed(EagerAttention):\n"
        "    def __init__(self, width=4):\n"
        "        self.width = width\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_backend

    recipe = PLAIN.with_attention(full=my_backend.Windowed(width=9))
    path = recipe.save(tmp_path / "recipe.json")
    assert json.loads(path.read_text())["attention"]["full"] == {
        "class": "my_backend:Windowed",
        "fields": {"width": 9},
    }
    with pytest.raises(SpecError, match=r'Fix: Recipe\.load\(path, allow_modules=\["my_backend"\]\)'):
        Recipe.load(path)
    assert Recipe.load(path, allow_modules=["my_backend"]) == recipe


def test_notes_are_shown_and_kept_and_change_nothing(tmp_path, dense_checkpoint):
    """How a recipe came about is in its plans and its file; it is the same recipe, with the same fingerprint."""
    recipe = Recipe(ModelSpec(dense_checkpoint))
    noted = attrs.evolve(recipe, notes=("read from config.yaml",))
    assert noted == recipe
    assert noted.fingerprint == recipe.fingerprint
    assert Recipe.load(noted.save(tmp_path / "recipe.json")).notes == noted.notes
    assert "note: recipe: read from config.yaml" in noted.with_training(seed=1).compile().explain()

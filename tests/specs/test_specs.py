import math
import re
from pathlib import Path

import attrs
import pytest

from qwenft.backends import EagerAttention, TorchDeltaRule
from qwenft.errors import QwenftError, SpecError
from qwenft.family.roles import ROLES
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.codec import Codec
from qwenft.specs.data import DataSpec
from qwenft.specs.images import ImageSpec
from qwenft.specs.model import ModelSpec, Quantization
from qwenft.specs.parallel import ParallelSpec
from qwenft.specs.training import TrainingSpec

MODEL = ModelSpec("qwen3.5-4b")
DATA = DataSpec.messages("chats.jsonl")
EXAMPLES = {
    ModelSpec: MODEL,
    Quantization: Quantization("nf4", double_quant=True),
    ImageSpec: ImageSpec(),
    AdapterSpec: AdapterSpec.lora(),
    AttentionSpec: AttentionSpec(),
    DataSpec: DATA,
    TrainingSpec: TrainingSpec(),
    ParallelSpec: ParallelSpec.single(),
    Recipe: Recipe(MODEL),
}
ALL = pytest.mark.parametrize("spec", EXAMPLES.values(), ids=[cls.__name__ for cls in EXAMPLES])


@ALL
def test_a_spec_is_frozen(spec):
    """No field of a spec can be set or removed, and no attribute can be added."""
    for name in [field.name for field in attrs.fields(type(spec))] + ["anything_else"]:
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(spec, name, None)


@ALL
def test_equal_specs_are_equal_and_hash_alike(spec):
    """A spec is a value: a copy is equal and finds the same place in a dict."""
    copy = attrs.evolve(spec)
    assert copy == spec
    assert copy is not spec
    assert {spec: "found"}[copy] == "found"


@pytest.mark.parametrize("cls", EXAMPLES)
def test_no_method_has_the_name_of_a_field_of_any_spec(cls):
    """Fields are nouns and methods verbs, so that no name means two things."""
    fields = {field.name for other in EXAMPLES for field in attrs.fields(other)}
    methods = {name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))}
    # AdapterSpec.full() is full fine-tuning, AttentionSpec.full the slot of full attention.
    shared = {"full"} if cls is AdapterSpec else set()
    assert methods & fields == shared


@pytest.mark.parametrize(
    ("old", "change", "field", "value"),
    [
        (MODEL.with_vision(), lambda s: s.text_only(), "vision", False),
        (MODEL, lambda s: s.with_vision(), "vision", True),
        (MODEL, lambda s: s.with_dtype("float32"), "dtype", "float32"),
        (AdapterSpec.lora(), lambda s: s.on("mlp", "router", "mlp"), "roles", ("mlp", "router")),
        (AdapterSpec.lora(), lambda s: s.on(), "roles", ()),
        (AdapterSpec.full(), lambda s: s.freeze("embeddings"), "frozen", ("embeddings",)),
        (AdapterSpec.full(), lambda s: s.train_mtp(), "mtp_weight", 0.3),
        (AdapterSpec.full().train_mtp(), lambda s: s.train_mtp(weight=0), "mtp_weight", 0),
        (AdapterSpec.lora(), lambda s: s.with_rank(router=2, mlp=4), "ranks", (("mlp", 4), ("router", 2))),
        (AdapterSpec.lora().with_rank(mlp=4), lambda s: s.with_rank(mlp=8), "ranks", (("mlp", 8),)),
        (AdapterSpec.lora(), lambda s: s.with_alpha(router=2, mlp=0.5), "alphas", (("mlp", 0.5), ("router", 2))),
        (AdapterSpec.lora(), lambda s: s.with_layers(3, 1, 3), "layers", (1, 3)),
        (AdapterSpec.lora(), lambda s: s.train_fully("norms", "lm_head"), "copied", ("norms", "lm_head")),
        (AdapterSpec.lora(), lambda s: s.train_tokens(9, 7), "tokens", (7, 9)),
        (AdapterSpec.full(), lambda s: s.only_norms_and_biases(), "norms_and_biases", True),
        (AdapterSpec.lora(), lambda s: s.load(Path("runs/a")), "path", "runs/a"),
        (AdapterSpec.lora(), lambda s: s.lora(initialization="pissa_niter_8"), "initialization", "pissa_niter_8"),
        (AdapterSpec.lora(), lambda s: s.with_target_modules("q_proj"), "target_modules", ("q_proj",)),
        (AdapterSpec.lora(), lambda s: s.with_target_parameters("gate"), "target_parameters", ("gate",)),
        (DATA, lambda s: s.with_columns(messages="turns"), "columns", (("messages", "turns"),)),
        (DATA, lambda s: s.with_max_length(77), "max_length", 77),
        (DATA, lambda s: s.with_max_length(77, overflow="error"), "overflow", "error"),
        (DATA, lambda s: s.with_max_length(77, "split", overlap=9), "overlap", 9),
        (DATA, lambda s: s.train_on("user", "tool"), "trained_roles", ("user", "tool")),
        (DATA, lambda s: s.train_on(turns="last"), "turns", "last"),
        (DATA, lambda s: s.train_on(end_of_turn=False), "end_of_turn", False),
        (DATA, lambda s: s.train_on(tool_calls=False), "tool_calls", False),
        (DATA, lambda s: s.with_thinking("mask"), "thinking", "mask"),
        (DATA, lambda s: s.with_template(b=[1], a=None), "template", (("a", "null"), ("b", "[1]"))),
        (DATA, lambda s: s.with_template(a=1).with_template(b=2), "template_options", {"a": 1, "b": 2}),
        (DATA, lambda s: s.with_control_tokens("encode"), "control_tokens", "encode"),
        (DATA, lambda s: s.on_bad_row("skip"), "bad_rows", "skip"),
        (DATA, lambda s: s.with_images(Path("p"), workers=0), "images", ImageSpec(root="p", workers=0)),
        (DATA, lambda s: s.pack(), "packed", True),
        (DATA, lambda s: s.pack(row_tokens=9000), "row_tokens", 9000),
        (DATA.pack(9000), lambda s: s.unpack(), "row_tokens", None),
        (DATA.pack(), lambda s: s.unpack(), "packed", False),
        (DATA, lambda s: s.hold_out(0.25), "held_out", 0.25),
        (DATA, lambda s: s.hold_out(DATA), "held_out", DATA),
        (TrainingSpec(), lambda s: s.early_stopping(patience=3), "patience", 3),
        (
            TrainingSpec().with_learning_rate(mlp=1e-3, router=1e-4),
            lambda s: s.with_learning_rate(mlp=1e-5),
            "learning_rates",
            (("mlp", 1e-5), ("router", 1e-4)),
        ),
    ],
)
def test_a_fluent_method_returns_a_new_spec_and_leaves_the_old(old, change, field, value):
    """The new spec has the change, and the old one is as it was."""
    before = attrs.evolve(old)
    new = change(old)
    assert type(new) is type(old)
    assert getattr(new, field) == value
    assert new != old
    assert old == before


def test_the_two_kinds_of_adapter():
    """lora() and full() differ in kind, and lora() takes its options by name and place."""
    assert AdapterSpec.full().kind == "full"
    assert AdapterSpec.lora(8, 16, 0.1, True, True) == AdapterSpec.lora(
        rank=8,
        alpha=16,
        dropout=0.1,
        rslora=True,
        dora=True,
    )
    assert AdapterSpec.lora(rank=8).with_rank(mlp=2).rank_of("mlp") == 2
    assert AdapterSpec.lora(rank=8).with_rank(mlp=2).rank_of("router") == 8


def test_the_capacity_of_a_row():
    """A row holds max_length tokens, or row_tokens where rows are packed and it is given."""
    assert DATA.with_max_length(100).capacity == 100
    assert DATA.with_max_length(100).pack().capacity == 100
    assert DATA.with_max_length(100).pack(300).capacity == 300


def test_a_path_is_taken_as_its_string(tmp_path):
    """Sources may be paths, and are held as strings."""
    assert ModelSpec(tmp_path).source == str(tmp_path)
    assert DataSpec.messages(tmp_path / "a.jsonl").source == (str(tmp_path / "a.jsonl"),)
    assert DataSpec.messages([tmp_path / "a", "b"]).source == (str(tmp_path / "a"), "b")


def test_backends_are_taken_as_objects_and_names():
    """Each slot takes a backend or its name, and specs with equal backends are equal."""
    spec = AttentionSpec(full=EagerAttention(), linear=TorchDeltaRule())
    assert spec == AttentionSpec(full=EagerAttention(), linear=TorchDeltaRule())
    assert hash(spec) == hash(AttentionSpec(full=EagerAttention(), linear=TorchDeltaRule()))
    assert AttentionSpec().full == AttentionSpec().linear == "auto"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ModelSpec("m", dtpye="float32"), r"ModelSpec has no argument 'dtpye'; did you mean 'dtype'\?"),
        (
            lambda: ModelSpec("m").with_dtype(dtyp="float32"),
            r"ModelSpec\.with_dtype has no argument 'dtyp'; did you mean 'dtype'\?",
        ),
        (
            lambda: AdapterSpec.lora(rnk=8),
            (
                r"AdapterSpec\.lora has no argument 'rnk'; did you mean 'rank'\?\n"
                r"  Fix: AdapterSpec\.lora\(rank, alpha, dropout, rslora, dora, initialization\)"
            ),
        ),
        (
            lambda: AdapterSpec(kind="lora", drop_out=0.1),
            r"AdapterSpec has no argument 'drop_out'; did you mean 'dropout'\?",
        ),
        (
            lambda: AdapterSpec.lora().with_rank(routed_expert=4),
            r"AdapterSpec\.with_rank: 'routed_expert' is no role of the family; did you mean 'routed_experts'\?",
        ),
        (
            lambda: AdapterSpec.lora().on("full_atention"),
            r"AdapterSpec\.on: 'full_atention' is no role of the family; did you mean 'full_attention'\?",
        ),
        (
            lambda: AdapterSpec.full().freeze("embedding"),
            r"AdapterSpec\.freeze: 'embedding' is no role of the family; did you mean 'embeddings'\?",
        ),
        (lambda: AttentionSpec(fulll="sdpa"), r"AttentionSpec has no argument 'fulll'; did you mean 'full'\?"),
        (
            lambda: DataSpec.messages(sorce="a"),
            r"DataSpec\.messages has no argument 'sorce'; did you mean 'source'\?",
        ),
        (
            lambda: DATA.with_max_length(8, overflw="drop"),
            r"DataSpec\.with_max_length has no argument 'overflw'; did you mean 'overflow'\?",
        ),
        (
            lambda: DATA.pack(row_token=8),
            r"DataSpec\.pack has no argument 'row_token'; did you mean 'row_tokens'\?",
        ),
        (
            lambda: DATA.with_columns(message="turns"),
            r"DataSpec\.with_columns has no argument 'message'; did you mean 'messages'\?",
        ),
        (
            lambda: TrainingSpec(learning_rat=1e-4),
            r"TrainingSpec has no argument 'learning_rat'; did you mean 'learning_rate'\?",
        ),
        (
            lambda: TrainingSpec(lr=1e-4),
            r"TrainingSpec has no argument 'lr': it is written learning_rate=2e-4\n  Fix: TrainingSpec\(learning_rate",
        ),
        (
            lambda: AdapterSpec.lora(lora_alpha=32),
            r"AdapterSpec\.lora has no argument 'lora_alpha': it is written alpha=32\n  Fix: AdapterSpec\.lora\(alpha=",
        ),
        (lambda: ParallelSpec(processes=8), r"ParallelSpec has no argument 'processes'"),
        (
            lambda: ParallelSpec.fsdp2(ofload="cpu"),
            r"ParallelSpec\.fsdp2 has no argument 'ofload'; did you mean 'offload'\?",
        ),
        *(
            (
                lambda name=name: ParallelSpec.fsdp2(**{name: 2}),
                rf"ParallelSpec\.fsdp2\({name}=\.\.\.\): {kind} parallelism is not offered\n  Fix: ParallelSpec\.fsdp2\(\)",
            )
            for name, kind in (
                ("tensor_parallel", "tensor"),
                ("ep", "expert"),
                ("context_parallel", "context"),
                ("pp", "pipeline"),
            )
        ),
        (
            lambda: Recipe(MODEL, traning=TrainingSpec()),
            r"Recipe has no argument 'traning'; did you mean 'training'\?",
        ),
        (
            lambda: Recipe(MODEL).compile(strct=False),
            r"Recipe\.compile has no argument 'strct'; did you mean 'strict'\?",
        ),
        (
            lambda: Recipe(MODEL).with_training(epoch=3),
            r"TrainingSpec has no argument 'epoch'; did you mean 'epochs'\?",
        ),
        (
            lambda: Recipe.load("r.json", allow_module=["a"]),
            r"Recipe\.load has no argument 'allow_module'; did you mean",
        ),
        (ModelSpec, r"ModelSpec: missing a required argument: 'source'"),
        (lambda: TrainingSpec(3), r"TrainingSpec: too many positional arguments"),
        (lambda: DATA.unpack(1), r"DataSpec\.unpack: too many positional arguments"),
    ],
)
def test_a_misspelt_argument_is_named_with_the_nearest(call, message):
    """Constructors and methods name the argument that does not fit, the nearest one, and all there are."""
    with pytest.raises(SpecError, match=message):
        call()


WHOLE_1 = "a whole number of at least 1"
WHOLE_2 = "a whole number of at least 2"
NOT_WHOLE = ["1", 1.5, True, [1]]
NOT_NUMBER = ["1", True, math.nan, math.inf, -math.inf, [1.0]]
NOT_FLAG = ["yes", 1, 0, None]

ILL_TYPED = [
    (ModelSpec, "source", "a string that is not empty", ["", 5, None, b"m", ["m"]]),
    (ModelSpec, "revision", "a string that is not empty or None", ["", 5, b"main"]),
    (
        ModelSpec,
        "dtype",
        "one of 'bfloat16', 'float32' (float16 overflows in Gated DeltaNet: its gradients are NaN)",
        ["bf16", "float16", None, 32, ["float32"]],
    ),
    (ModelSpec, "vision", "True or False", NOT_FLAG),
    (ModelSpec, "quantization", "a Quantization or None", ["nf4", True, {}]),
    (Quantization, "kind", "one of 'nf4', 'int8'", ["fp4", "gptq", None, 4]),
    (Quantization, "double_quant", "True or False", NOT_FLAG),
    (Quantization, "experts", "True or False", NOT_FLAG),
    (Quantization, "vision", "True or False", NOT_FLAG),
    (AdapterSpec, "kind", "one of 'lora', 'full'", ["qlora", None, 1]),
    (AdapterSpec, "rank", WHOLE_1, [0, -1, None, *NOT_WHOLE]),
    (AdapterSpec, "alpha", "a number above 0", [0, -1, None, *NOT_NUMBER]),
    (AdapterSpec, "dropout", "a number of at least 0 and below 1", [-0.1, 1.0, None, *NOT_NUMBER]),
    (AdapterSpec, "rslora", "True or False", NOT_FLAG),
    (AdapterSpec, "dora", "True or False", NOT_FLAG),
    (AdapterSpec, "roles", "roles of the family or None", ["mlp", ["mlp"], ("mpl",), (1,), 5]),
    (AdapterSpec, "frozen", "roles of the family", ["mlp", ["mlp"], ("mpl",), (1,), None, 5]),
    (
        AdapterSpec,
        "ranks",
        "roles with ranks of at least 1",
        [
            5,
            None,
            [("mlp", 4)],
            (("mpl", 4),),
            (("mlp", 0),),
            (("mlp", True),),
            (("mlp", 1.5),),
            (("mlp",),),
            ("mlp",),
        ],
    ),
    (
        AdapterSpec,
        "alphas",
        "roles with alphas above 0",
        [5, None, [("mlp", 4)], (("mpl", 4),), (("mlp", 0),), (("mlp", True),), (("mlp", math.inf),), ("mlp",)],
    ),
    (
        AdapterSpec,
        "initialization",
        "one of 'kaiming', 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_16'",
        ["eva", "pissa_niter_", None, True],
    ),
    (AdapterSpec, "layers", "different indices of layers", [3, [3], (-1,), (1.0,), (True,), (3, 3), None]),
    (AdapterSpec, "copied", "roles of the family", ["mlp", ["mlp"], ("mpl",), (1,), None, 5]),
    (AdapterSpec, "tokens", "different token ids", [3, [3], (-1,), ("<think>",), (3, 3), None]),
    (AdapterSpec, "norms_and_biases", "True or False", NOT_FLAG),
    (AdapterSpec, "path", "a string that is not empty or None", ["", 5, b"runs"]),
    (AdapterSpec, "target_modules", "module suffixes", ["q_proj", ["q_proj"], ("",), (1,), None]),
    (AdapterSpec, "target_parameters", "parameter suffixes", ["gate", ["gate"], ("",), (1,), None]),
    (AdapterSpec, "mtp_weight", "a number of at least 0", [-0.1, None, *NOT_NUMBER]),
    (
        AttentionSpec,
        "full",
        'a backend\'s name, "auto", or an object of AttentionBackend',
        ["", None, True, TorchDeltaRule()],
    ),
    (AttentionSpec, "vision", "an object of AttentionBackend", ["", None, 1, TorchDeltaRule()]),
    (AttentionSpec, "linear", "an object of LinearAttentionBackend", ["", None, False, EagerAttention()]),
    (
        DataSpec,
        "format",
        "one of 'messages', 'conversations', 'prompt_completion', 'alpaca', 'text'",
        ["sharegpt", None],
    ),
    (
        DataSpec,
        "source",
        "a file, a list of them, a list of dicts or a data set",
        [None, 5, {"messages": []}],
    ),
    (
        DataSpec,
        "mixed",
        "pairs of a DataSpec and a number above 0",
        [None, (3,), (("notes.jsonl", 1.0),), ((DataSpec.text("a"), 0.0),), ((DataSpec.text("a"), "1"),)],
    ),
    (DataSpec, "window", "a whole number of at least 1 or None", [0, 1.5, "all"]),
    (
        DataSpec,
        "columns",
        "names of columns",
        [None, "turns", ("messages",), (("messages", ""),), (("messages", 3),)],
    ),
    (
        DataSpec,
        "trained_roles",
        "roles of system, user, assistant, tool",
        [(), "assistant", ("critic",), ["user"], None],
    ),
    (DataSpec, "turns", "one of 'all', 'last'", ["first", None, 1]),
    (DataSpec, "end_of_turn", "True or False", NOT_FLAG),
    (DataSpec, "tool_calls", "True or False", NOT_FLAG),
    (DataSpec, "thinking", "one of 'keep', 'mask', 'drop'", ["no", None, False]),
    (DataSpec, "template", "options by name, of what JSON holds", [None, "a", {"a": object}, (("a", 1),)]),
    (DataSpec, "control_tokens", "one of 'refuse', 'encode'", ["keep", None]),
    (DataSpec, "bad_rows", "one of 'error', 'skip'", ["warn", None]),
    (DataSpec, "images", "an ImageSpec", ["pictures", None, {"root": "pictures"}]),
    (ImageSpec, "root", "a string that is not empty or None", ["", 5, b"pictures"]),
    (ImageSpec, "min_pixels", "a whole number of at least 1 or None", [0, -1, *NOT_WHOLE]),
    (ImageSpec, "max_pixels", "a whole number of at least 1 or None", [0, -1, *NOT_WHOLE]),
    (ImageSpec, "hosts", "names of hosts", ["example.org", ["example.org"], ("",), (1,), None]),
    (ImageSpec, "workers", "a whole number of at least 0", [-1, None, *NOT_WHOLE]),
    (DataSpec, "overlap", "a whole number of at least 0", [-1, None, *NOT_WHOLE]),
    (DataSpec, "max_length", WHOLE_2, [1, 0, -5, None, *NOT_WHOLE]),
    (
        DataSpec,
        "overflow",
        "one of 'drop', 'truncate', 'split', 'resize', 'error'",
        ["cut", None, True],
    ),
    (DataSpec, "packed", "True or False", NOT_FLAG),
    (DataSpec, "row_tokens", f"{WHOLE_2} or None", [1, 0, *NOT_WHOLE]),
    (
        DataSpec,
        "held_out",
        "a fraction above 0 and below 1, or a DataSpec",
        [0.0, 1.0, 1, True, -0.5, math.nan, "a.jsonl"],
    ),
    (TrainingSpec, "epochs", f"{WHOLE_1} or None", [0, -1, *NOT_WHOLE]),
    (TrainingSpec, "max_steps", f"{WHOLE_1} or None", [0, -1, *NOT_WHOLE]),
    (TrainingSpec, "tokens_per_step", f"{WHOLE_1} or None", [0, -1, *NOT_WHOLE]),
    (TrainingSpec, "learning_rate", "a number above 0", [0, -1e-4, None, *NOT_NUMBER]),
    (
        TrainingSpec,
        "schedule",
        "one of 'cosine', 'linear', 'constant', 'warmup_stable_decay'",
        ["cosin", None, 1],
    ),
    (TrainingSpec, "warmup_ratio", "a number of at least 0 and below 1", [-0.1, 1, None, *NOT_NUMBER]),
    (
        TrainingSpec,
        "optimizer",
        "one of 'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit', 'sgd'",
        ["lion", None],
    ),
    (
        TrainingSpec,
        "learning_rates",
        "roles with rates above 0",
        ["mlp", [("mlp", 1e-4)], (("mpl", 1e-4),), (("mlp", 0),), (("mlp", True),), (("mlp",),), None],
    ),
    (TrainingSpec, "lora_plus_ratio", "a number above 0", [0, -1, None, *NOT_NUMBER]),
    (TrainingSpec, "decay_ratio", "a number above 0 and below 1 or None", [0, 1, *NOT_NUMBER]),
    (TrainingSpec, "floor_ratio", "a number of at least 0 and below 1", [-0.1, 1, None, *NOT_NUMBER]),
    (TrainingSpec, "betas", "two numbers from 0 up to 1", [0.9, (0.9,), (0.9, 1.0), (True, 0.9), None]),
    (TrainingSpec, "epsilon", "a number above 0", [0, None, *NOT_NUMBER]),
    (TrainingSpec, "momentum", "a number of at least 0 and below 1", [-0.1, 1, None, *NOT_NUMBER]),
    (TrainingSpec, "master_weights", "True or False", NOT_FLAG),
    (
        TrainingSpec,
        "loss",
        "one of 'auto', 'chunked', 'cce', 'full', or a function of (hidden, batch, head)",
        ["mse", None, 1, print],
    ),
    (TrainingSpec, "z_loss", "a number of at least 0", [-0.1, None, *NOT_NUMBER]),
    (TrainingSpec, "label_smoothing", "a number of at least 0 and below 1", [-0.1, 1, None, *NOT_NUMBER]),
    (TrainingSpec, "neftune_alpha", "a number of at least 0", [-0.1, None, *NOT_NUMBER]),
    (TrainingSpec, "deterministic", "True or False", NOT_FLAG),
    (TrainingSpec, "keep_best", "True or False", NOT_FLAG),
    (TrainingSpec, "patience", f"{WHOLE_1} or None", [0, -1, *NOT_WHOLE]),
    (TrainingSpec, "sample_prompts", "a tuple of texts", ["Hi", ("",), (1,), None]),
    (TrainingSpec, "sample_tokens", WHOLE_1, [0, -1, None, *NOT_WHOLE]),
    (TrainingSpec, "save_every", f"{WHOLE_1} or None", [0, -1, *NOT_WHOLE]),
    (TrainingSpec, "keep_checkpoints", WHOLE_1, [0, -1, None, *NOT_WHOLE]),
    (TrainingSpec, "failed_save", "one of 'continue', 'stop'", ["go on", None, 1]),
    (TrainingSpec, "non_finite", "one of 'stop', 'skip'", ["ignore", None, 1]),
    (TrainingSpec, "max_skipped", WHOLE_1, [0, -1, None, *NOT_WHOLE]),
    (TrainingSpec, "weight_decay", "a number of at least 0", [-0.1, None, *NOT_NUMBER]),
    (TrainingSpec, "max_grad_norm", "a number above 0 or None", [0, -1, *NOT_NUMBER]),
    (
        TrainingSpec,
        "activation_checkpointing",
        "True, False, or n for every n-th layer",
        [-1, None, "yes", 1.5, [1]],
    ),
    (TrainingSpec, "router_aux_loss", "a number of at least 0", [-1e-3, None, *NOT_NUMBER]),
    (TrainingSpec, "compile_elementwise", "True or False", NOT_FLAG),
    (TrainingSpec, "activation_offloading", "True or False", NOT_FLAG),
    (TrainingSpec, "optimizer_in_backward", "True or False", NOT_FLAG),
    (TrainingSpec, "embeddings_on_host", "True or False", NOT_FLAG),
    (TrainingSpec, "seed", "a whole number of at least 0", [-1, None, *NOT_WHOLE]),
    (TrainingSpec, "evaluate_every", f"{WHOLE_1} or None", [0, -1, *NOT_WHOLE]),
    (Recipe, "model", "a ModelSpec", ["qwen3.5-4b", None]),
    (Recipe, "data", "a DataSpec or None", ["chats.jsonl", [], TrainingSpec()]),
    (Recipe, "adapter", "an AdapterSpec", ["lora", None]),
    (Recipe, "attention", "an AttentionSpec", ["sdpa", None]),
    (Recipe, "training", "a TrainingSpec", [{"epochs": 1}, None]),
    (Recipe, "parallel", "a ParallelSpec", [8, None]),
    (ParallelSpec, "kind", "one of 'single', 'ddp', 'fsdp2'", ["fsdp", None, 2]),
    (ParallelSpec, "offload", '"cpu" or None', ["disk", True, False]),
    (ParallelSpec, "reshard_after_forward", "True or False", NOT_FLAG),
    (ParallelSpec, "hybrid", "True or False", NOT_FLAG),
    (Recipe, "notes", "a tuple of texts", ["from a file", ["from a file"], (1,)]),
]


def test_every_field_of_every_spec_is_tried_with_wrong_values():
    """The table below leaves out no field."""
    tried = {(cls, field) for cls, field, _, _ in ILL_TYPED}
    assert tried == {(cls, field.name) for cls in EXAMPLES for field in attrs.fields(cls)}


@pytest.mark.parametrize(
    ("cls", "field", "expected", "value"),
    [(cls, field, expected, value) for cls, field, expected, values in ILL_TYPED for value in values],
)
def test_a_wrong_value_is_refused_with_what_was_expected(cls, field, expected, value):
    """The message names the field, what was expected and what was got, and offers a line that fits."""
    with pytest.raises(SpecError) as caught:
        attrs.evolve(EXAMPLES[cls], **{field: value})
    assert isinstance(caught.value, QwenftError)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(f"{cls.__name__}.{field}: expected ")
    assert f"{expected}, got {value!r}" in str(caught.value)
    assert "\n  Fix: " in str(caught.value)
    assert caught.value.field == field
    assert caught.value.got is value


RENAMED = {
    "flash_attention": 'full="flash_attention_2"',
    "sdp_attention": 'full="sdpa"',
    "flex_attention": 'full="flex_attention"',
    "xformers_attention": 'full="sdpa"',
    "eager_attention": 'full="eager"',
    "attn_implementation": 'full="sdpa"',
}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("load_in_4bit", '.quantize("nf4")'),
        ("load_in_8bit", '.quantize("int8")'),
        ("quantization_config", '.quantize("nf4")'),
        ("torch_dtype", 'dtype="bfloat16"'),
    ],
)
def test_arguments_of_transformers_are_refused_with_what_to_write(name, written):
    """They are methods or have another name here."""
    fix = f"ModelSpec(...){written}" if written.startswith(".") else f"ModelSpec({written})"
    message = re.escape(f"ModelSpec has no argument {name!r}: it is written {written}\n  Fix: {fix}")
    with pytest.raises(SpecError, match=message):
        ModelSpec("qwen3.5-4b", **{name: True})


def test_quantize_says_what_is_held_in_few_bits():
    """Scales of nf4 are quantized unless told otherwise, and those of int8 cannot be."""
    assert (
        MODEL.quantize() == MODEL.quantize("nf4", double_quant=True) != MODEL.quantize("nf4", double_quant=False)
    )
    assert MODEL.quantize().quantization == Quantization("nf4", double_quant=True, experts=True, vision=False)
    assert MODEL.quantize("int8").quantization.double_quant is False
    with pytest.raises(SpecError, match=r"the scales of int8 are not quantized\n  Fix: \.quantize\(\"int8\"\)"):
        MODEL.quantize("int8", double_quant=True)


@pytest.mark.parametrize("beside", [{}, {"full": "sdpa"}, {"linear": "torch"}], ids=str)
@pytest.mark.parametrize("name", RENAMED)
def test_arguments_of_other_trainers_are_refused_with_what_to_write(name, beside):
    """An old boolean, alone or beside a name, in Python or in JSON, is answered with the name to use."""
    message = re.escape(
        f"AttentionSpec has no argument {name!r}: it is written {RENAMED[name]}\n  Fix: AttentionSpec({RENAMED[name]})"
    )
    with pytest.raises(SpecError, match=message):
        AttentionSpec(**{name: True}, **beside)
    with pytest.raises(SpecError, match=message):
        Recipe(MODEL).with_attention(**{name: True}, **beside)
    with pytest.raises(SpecError, match=message):
        Codec(None).load({"attention": {name: False, **beside}, "model": {"source": "m"}}, Recipe)


@pytest.mark.parametrize("name", DataSpec.RENAMED)
def test_options_of_other_data_are_refused_with_what_to_write(name):
    """What stands for them is a call that can be made."""
    make = DataSpec.text if "text=" in DataSpec.RENAMED[name] else DataSpec.messages
    with pytest.raises(SpecError, match=re.escape(f"(...){DataSpec.RENAMED[name]}")):
        make("chats.jsonl", **{name: True})
    written = eval(f"spec{DataSpec.RENAMED[name]}", {"spec": make("chats.jsonl"), "DataSpec": DataSpec})  # noqa: S307 - of our own
    assert isinstance(written, DataSpec)


@pytest.mark.parametrize("capability", ["supports_packing", "uses_flash_lib", "needs_half_precision", "exact"])
def test_a_recipe_cannot_set_what_a_backend_can(capability):
    """Capabilities belong to the backend's class: neither a spec nor a shipped backend takes one."""
    with pytest.raises(SpecError, match=f"AttentionSpec has no argument '{capability}'"):
        AttentionSpec(**{capability: True})
    saved = {"class": "qwenft.backends.eager:EagerAttention", "fields": {capability: True}}
    with pytest.raises(SpecError, match="EagerAttention, which cannot be made"):
        Codec(None).load({"full": saved}, AttentionSpec)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdapterSpec.lora(rank=0), r"AdapterSpec\.rank: expected a whole number of at least 1, got 0"),
        (
            lambda: AdapterSpec.lora().with_rank(mlp=0),
            r"AdapterSpec\.ranks: expected roles with ranks of at least 1",
        ),
        (lambda: AdapterSpec.lora().on(5), r"AdapterSpec\.on: 5 is no role of the family"),
        (lambda: AdapterSpec.lora().on(["mlp"]), r"AdapterSpec\.on: \['mlp'\] is no role of the family"),
        (
            lambda: TrainingSpec(learning_rate=-1e-4),
            r"TrainingSpec\.learning_rate: expected a number above 0, got -0\.0001",
        ),
        (lambda: DATA.with_max_length("long"), r"DataSpec\.max_length: expected .* got 'long'"),
        (
            lambda: DATA.hold_out(2),
            r"DataSpec\.held_out: expected a fraction above 0 and below 1, or a DataSpec, got 2",
        ),
        (
            lambda: MODEL.with_dtype("fp8"),
            r"ModelSpec\.dtype: expected one of 'bfloat16', 'float32' .*, got 'fp8'",
        ),
        (lambda: DataSpec.messages([1]), r"DataSpec: expected every row to be a mapping, got int in row 1"),
        (
            lambda: DataSpec.messages(["a.jsonl", {}]),
            r"DataSpec: expected every row to be a mapping, got str in row 1",
        ),
    ],
)
def test_methods_check_what_they_are_given(call, message):
    """A wrong value is refused where it is given, by the field that it would have filled."""
    with pytest.raises(SpecError, match=message):
        call()


def test_epochs_and_max_steps_exclude_each_other():
    """A run has a number of epochs or of steps, and both are refused with the line that mends it."""
    message = (
        r"TrainingSpec: expected epochs or max_steps, got both: 2 and 9\n"
        r"  Fix: TrainingSpec\(epochs=None, max_steps=9\)"
    )
    with pytest.raises(SpecError, match=message) as caught:
        TrainingSpec(epochs=2, max_steps=9)
    assert caught.value.got == (2, 9)
    with pytest.raises(SpecError, match="got both"):
        Recipe(MODEL, training=TrainingSpec(epochs=2)).with_training(max_steps=9)


def test_every_role_can_be_named():
    """The adapter takes all roles of the family, in the order they are named."""
    assert AdapterSpec.lora().on(*reversed(ROLES)).roles == tuple(reversed(ROLES))


def test_an_error_says_which_values_it_carries():
    """Asking an error for a value that it lacks names those it has."""
    with pytest.raises(SpecError) as caught:
        AdapterSpec.lora(rank=0)
    with pytest.raises(AttributeError, match="SpecError has no 'row'; it carries field, got, expected"):
        caught.value.row  # noqa: B018 - reading it is the test

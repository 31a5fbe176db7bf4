import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
)

from qwenft.errors import CheckpointError, SpecError
from qwenft.testing import TinySizes, tiny_checkpoint

KINDS = ("dense", "moe", "vision", "moe-vision")
CLASSES = {"qwen3_5": Qwen3_5ForConditionalGeneration, "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: tiny_checkpoint(root / kind, kind, dtype="bfloat16") for kind in KINDS}


def weights_of(folder):
    weights = {}
    for shard in folder.glob("*.safetensors"):
        weights |= load_file(shard)
    return weights


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_transformers_loads_every_weight(checkpoints, kind, auto):
    """Both auto classes load the checkpoint with no key missing, unexpected or of another shape."""
    model, info = auto.from_pretrained(checkpoints[kind], output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_the_architecture_is_the_hubs(checkpoints, kind):
    """config.json names the vision-language class, and its token ids are the tokenizer's."""
    config, tokenizer = (
        AutoConfig.from_pretrained(checkpoints[kind]),
        AutoTokenizer.from_pretrained(checkpoints[kind]),
    )
    moe = kind.startswith("moe")
    assert config.model_type == ("qwen3_5_moe" if moe else "qwen3_5")
    assert config.architectures == [CLASSES[config.model_type].__name__]
    assert config.text_config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is not moe
    named = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|endoftext|>": config.text_config.eos_token_id,
    }
    assert tokenizer.convert_tokens_to_ids(list(named)) == list(named.values())
    # As in the family the embedding has rows that no token uses.
    assert config.text_config.vocab_size > len(tokenizer) == 512
    assert sum(config.text_config.rope_parameters["mrope_section"]) == config.text_config.head_dim // 8
    generation = GenerationConfig.from_pretrained(checkpoints[kind])
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decay_and_gated_norm_are_float32_on_disk(tmp_path, kind, dtype):
    """A_log and the norm of the Gated DeltaNet are float32 under any dtype, and nothing else is under bfloat16."""
    weights = weights_of(tiny_checkpoint(tmp_path / kind, kind, dtype=dtype))
    islands = {name for name in weights if name.endswith((".A_log", "linear_attn.norm.weight"))}
    assert len(islands) == 6
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if name in islands else getattr(torch, dtype)), name


def test_names_on_disk_are_the_hubs(checkpoints):
    """The text, the tower and the prediction layer lie under the hub's prefixes; a tied head is not stored."""
    names = set(weights_of(checkpoints["dense"]))
    assert {name.split(".layers.")[0].split(".blocks.")[0] for name in names if ".0." in name} >= {
        "model.language_model",
        "model.visual",
        "mtp",
    }
    assert "lm_head.weight" not in names
    outside = {name for name in names if not name.startswith(("model.language_model.", "model.visual.", "mtp."))}
    assert outside == set()
    assert {name.removeprefix("mtp.") for name in names if name.startswith("mtp.") and ".layers." not in name} == {
        "fc.weight",
        "norm.weight",
        "pre_fc_norm_embedding.weight",
        "pre_fc_norm_hidden.weight",
    }
    attention = {
        name.replace("mtp.layers.0.", "model.language_model.layers.3.") for name in names if "mtp.layers." in name
    }
    assert attention == {name for name in names if name.startswith("model.language_model.layers.3.")}


def test_experts_lie_one_by_one_in_several_shards(checkpoints):
    """A MoE has three files an expert, also in the prediction layer, over at least three shards with an index."""
    folder = checkpoints["moe"]
    weights = weights_of(folder)
    for prefix in [*(f"model.language_model.layers.{layer}" for layer in range(4)), "mtp.layers.0"]:
        for expert in range(8):
            for projection, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
                assert weights[f"{prefix}.mlp.experts.{expert}.{projection}_proj.weight"].shape == shape
    assert "lm_head.weight" in weights
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(weights)
    assert len(set(index.values())) >= 3


def test_fused_experts_are_the_same_model(checkpoints, tmp_path):
    """With experts="fused" the experts lie in one tensor a projection, and the loaded model is the same."""
    fused = tiny_checkpoint(tmp_path / "fused", "moe", dtype="bfloat16", experts="fused")
    weights = weights_of(fused)
    assert weights["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 64, 64)
    assert weights["model.language_model.layers.0.mlp.experts.down_proj"].shape == (8, 64, 32)
    assert "model.language_model.layers.0.mlp.experts.0.gate_proj.weight" not in weights
    assert "mtp.layers.0.mlp.experts.0.gate_proj.weight" in weights
    model, info = AutoModelForCausalLM.from_pretrained(fused, output_loading_info=True)
    assert not any(info.values()), info
    other = AutoModelForCausalLM.from_pretrained(checkpoints["moe"]).state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes(checkpoints, tmp_path, kind):
    """The seed decides every byte of the folder, whatever state the caller's generator is in."""
    torch.rand(7)
    again = tiny_checkpoint(tmp_path / "again", kind, dtype="bfloat16")
    assert bytes_of(again) == bytes_of(checkpoints[kind])


def test_another_seed_gives_other_weights(checkpoints, tmp_path):
    """Under another seed every tensor differs."""
    other = weights_of(tiny_checkpoint(tmp_path / "other", "moe", dtype="bfloat16", seed=1))
    same = [name for name, weight in weights_of(checkpoints["moe"]).items() if torch.equal(weight, other[name])]
    assert same == []


def test_no_two_tensors_are_alike(checkpoints):
    """No tensor is constant and none repeats another, so one that is lost or swapped shows."""
    weights = weights_of(checkpoints["dense"])
    assert all(weight.numel() == 1 or weight.float().std() > 0 for weight in weights.values())
    assert len({weight.float().numpy().tobytes() for weight in weights.values()}) == len(weights)


def test_the_callers_random_state_is_left_alone(tmp_path):
    """What torch draws next does not depend on a checkpoint having been written."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny_checkpoint(tmp_path / "dense")
    assert torch.equal(torch.rand(4), expected)


def test_time_steps_start_as_fla_starts_them(checkpoints):
    """softplus(dt_bias) lies in [0.001, 0.1], so that a state outlives its token."""
    steps = [
        torch.nn.functional.softplus(weight.float())
        for name, weight in weights_of(checkpoints["dense"]).items()
        if name.endswith("dt_bias")
    ]
    assert len(steps) == 3
    assert all((step > 0.00095).all() and (step < 0.105).all() for step in steps)


def test_a_log_can_be_set(tmp_path):
    """a_log is the value of every A_log and changes nothing else."""
    stock, set_ = (
        weights_of(tiny_checkpoint(tmp_path / "a")),
        weights_of(tiny_checkpoint(tmp_path / "b", a_log=-3)),
    )
    for name, weight in set_.items():
        if name.endswith("A_log"):
            assert (weight == -3).all()
            assert (stock[name] >= math.log(0.01)).all()
            assert (stock[name] <= math.log(16)).all()
        else:
            assert torch.equal(weight, stock[name])


def test_sizes_texts_and_vocabulary_are_the_callers(tmp_path):
    """The model has the sizes that were asked for, and the tokenizer is trained on the given texts."""
    sizes = TinySizes(
        hidden=128,
        ffn=320,
        layers=8,
        heads=6,
        head_dim=64,
        linear_head_dim=32,
        initializer_range=0.02,
    )
    folder = tiny_checkpoint(tmp_path / "base", sizes=sizes, vocabulary=300, texts=["zyzzyva " * 20])
    text = AutoConfig.from_pretrained(folder).text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (128, 320, 8)
    assert (text.num_attention_heads, text.head_dim, text.linear_value_head_dim) == (6, 64, 32)
    assert text.rope_parameters["mrope_section"] == [3, 3, 2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer.encode("zyzzyva zyzzyva")) == 2
    assert text.vocab_size == 320
    query = weights_of(folder)["model.language_model.layers.7.self_attn.q_proj.weight"]
    assert query.shape == (2 * 6 * 64, 128)
    assert query.std().item() == pytest.approx(0.02, rel=0.05)


def test_sizes_that_do_not_fit_are_refused():
    """A head dim whose quarter cannot be rotated in pairs is refused with one that can."""
    with pytest.raises(SpecError, match=r"TinySizes.head_dim = 20 is not a multiple of 8\n  Fix: head_dim=24"):
        TinySizes(head_dim=20)
    with pytest.raises(SpecError, match=r"TinySizes.layers = 3, but the 4th layer is the first of full attention"):
        TinySizes(layers=3)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("kind", "sparse"), ("dtype", "float64"), ("experts", "stacked")],
    ids=str,
)
def test_an_unknown_word_is_refused(tmp_path, argument, value):
    """A kind, dtype or layout that does not exist is refused with those that do, and nothing is written."""
    with pytest.raises(SpecError, match=f"tiny_checkpoint: {argument} = '{value}', but it is one of '"):
        tiny_checkpoint(tmp_path / "new", **{argument: value})
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_path_is_refused(tmp_path):
    """A folder that holds something is left as it is, and the error says what to do."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(
        CheckpointError,
        match="is not an empty folder\n  Fix: remove it, or name another path",
    ) as error:
        tiny_checkpoint(tmp_path)
    assert error.value.path == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(CheckpointError, match="is there already"):
        tiny_checkpoint(tmp_path / "mine")


def test_an_empty_folder_is_filled(tmp_path):
    """An empty folder and missing parents are no obstacle, and nothing is left beside the checkpoint."""
    folder = tmp_path / "deep" / "down"
    folder.mkdir(parents=True)
    assert tiny_checkpoint(folder) == folder
    assert [file.name for file in folder.parent.iterdir()] == ["down"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """Where writing fails there is no folder, whole or half."""

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("qwenft.testing.checkpoint._write_generation_config", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_checkpoint(tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["vision", "moe-vision"])
def test_the_image_processor_fits_the_tower(checkpoints, kind):
    """A picture becomes patches that the tower takes, and as many features as placeholder tokens."""
    folder = checkpoints[kind]
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    picture = processor(images=[Image.new("RGB", (96, 64), "red")], return_tensors="pt")
    assert picture["image_grid_thw"].tolist() == [[1, 4, 6]]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        features = model.model.visual(picture["pixel_values"], grid_thw=picture["image_grid_thw"]).pooler_output
    assert features.shape == (6, 64)
    video = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert (video["patch_size"], video["video_processor_type"]) == (16, "Qwen3VLVideoProcessor")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_only_the_vision_kinds_have_the_processors_files(checkpoints, kind):
    """A text checkpoint has no processor's files, but has the tower."""
    assert not list(checkpoints[kind].glob("*preprocessor*"))
    assert any(name.startswith("model.visual.") for name in weights_of(checkpoints[kind]))


@pytest.mark.long
def test_a_process_without_fla_writes_the_same_bytes(checkpoints, tmp_path):
    """Whether flash-linear-attention can be imported makes no difference to the checkpoint."""
    code = (
        "import sys; sys.modules['fla'] = None\n"
        "from qwenft.testing import tiny_checkpoint\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        f"tiny_checkpoint({str(tmp_path / 'plain')!r}, 'moe', 'bfloat16')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "plain") == bytes_of(checkpoints["moe"])
    assert "it/s" not in done.stderr

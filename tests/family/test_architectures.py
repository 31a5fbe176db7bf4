from __future__ import annotations

import json
import subprocess
import sys

import attrs
import pytest

from qwenft.errors import CheckpointError, SpecError
from qwenft.family.architectures import (
    FAMILY,
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    Architecture,
    ExpertShape,
    RopeShape,
    VisionShape,
    VisionTokens,
    architecture,
    find,
)

# The sizes as the hub names them, with the class that transformers' own registry gives each model type.
HUB_IDS = {
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "qwen3.5-27b": "Qwen/Qwen3.5-27B",
    "qwen3.5-35b-a3b": "Qwen/Qwen3.5-35B-A3B",
    "qwen3.5-122b-a10b": "Qwen/Qwen3.5-122B-A10B",
    "qwen3.5-397b-a17b": "Qwen/Qwen3.5-397B-A17B",
}


def test_the_family_is_the_eight_sizes_of_the_hub() -> None:
    """The packaged names and hub ids are exactly those of the hub."""
    assert {name: row.hub_id for name, row in FAMILY.items()} == HUB_IDS


@pytest.mark.parametrize("name", FAMILY)
def test_a_name_a_hub_id_and_any_case_find_the_same(name: str) -> None:
    """Family names and hub ids are looked up without regard to case."""
    row = FAMILY[name]
    for spelling in (name, name.upper(), HUB_IDS[name], HUB_IDS[name].lower()):
        assert find(spelling) is row
        assert architecture(spelling) is row


def test_an_unknown_name_is_not_found_and_the_nearest_is_offered() -> None:
    """The lookup that may fail returns None, the other raises with the nearest name."""
    assert find("qwen3.5-28b") is None
    with pytest.raises(SpecError, match=r"no packaged architecture is called 'qwen3\.5-28b'") as caught:
        architecture("qwen3.5-28b")
    assert caught.value.nearest in FAMILY
    assert caught.value.got == "qwen3.5-28b"
    assert f'Fix: "{caught.value.nearest}"' in str(caught.value)


def test_a_misspelt_hub_id_is_answered_with_a_hub_id() -> None:
    """The nearest of a hub id is a hub id in its own spelling."""
    with pytest.raises(SpecError, match=r'Fix: "Qwen/Qwen3\.5-35B-A3B"'):
        architecture("Qwen/Qwen35-35B-A3")


def test_a_name_of_nothing_like_it_gets_the_list_and_no_guess() -> None:
    """Where nothing is near, the message lists the family and offers no fix."""
    with pytest.raises(SpecError, match=r"the family has qwen3\.5-0\.8b, .*qwen3\.5-397b-a17b$") as caught:
        architecture("zzz")
    assert caught.value.nearest is None


def test_every_fourth_layer_attends_fully() -> None:
    """In 27B the layers 3, 7, ... 63 are full attention and the other 48 are Gated DeltaNet."""
    row = FAMILY["qwen3.5-27b"]
    assert row.full_attention_layers == tuple(range(3, 64, 4))
    assert len(row.linear_attention_layers) == 48
    assert sorted(row.full_attention_layers + row.linear_attention_layers) == list(range(64))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("text_only", [False, True])
def test_model_type_and_class_agree_with_transformers(name: str, text_only: bool) -> None:
    """The class named here is the one whose configuration carries the model type."""
    import transformers

    row = FAMILY[name].text_only() if text_only else FAMILY[name]
    assert getattr(transformers, row.class_name).config_class.model_type == row.model_type
    assert row.is_text_only is text_only
    assert row.is_moe is ("-a" in name)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("text_only", [False, True])
def test_a_config_is_read_back_equal(name: str, text_only: bool) -> None:
    """What is written as JSON and read again is the same architecture."""
    row = FAMILY[name].text_only() if text_only else FAMILY[name]
    config = json.loads(json.dumps(row.to_config()))
    assert Architecture.from_config(config, row.name, hub_id=row.hub_id) == row


def test_unusual_fields_survive_the_round_trip(tiny_architecture: Architecture) -> None:
    """Sizes, rotary embedding, layer types and token ids that differ from the family's are kept."""
    row = attrs.evolve(
        tiny_architecture,
        tied=True,
        rope=RopeShape(theta=5e5, partial_factor=0.5, sections=(2, 1, 1)),
        vision_tokens=VisionTokens(image=51, video=52, vision_start=53, vision_end=54),
    )
    assert Architecture.from_config(row.to_config(), row.name) == row


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("text_only", [False, True])
def test_transformers_reads_a_config_and_writes_an_equal_one(name: str, text_only: bool) -> None:
    """The file that transformers writes after reading ours describes the same architecture."""
    import transformers

    row = FAMILY[name].text_only() if text_only else FAMILY[name]
    config = getattr(transformers, row.class_name).config_class.from_dict(row.to_config())
    written = json.loads(config.to_json_string(use_diff=True))
    assert Architecture.from_config(written, row.name, hub_id=row.hub_id) == row


@pytest.mark.parametrize(
    "class_name",
    ["Qwen3_5Config", "Qwen3_5MoeConfig", "Qwen3_5TextConfig", "Qwen3_5MoeTextConfig"],
)
def test_fields_left_out_have_the_defaults_of_transformers(class_name: str) -> None:
    """A file with a model type and nothing else is read as transformers reads it."""
    import transformers

    whole = getattr(transformers, class_name)().to_dict()
    bare = {"model_type": whole["model_type"]}
    if "text_config" in whole:
        bare["text_config"] = {}
    assert Architecture.from_config(bare, "bare") == Architecture.from_config(whole, "bare")


def test_the_rope_that_transformers_builds_is_the_familys() -> None:
    """Base, rotated part and sections of the rotary embedding arrive in the built configuration."""
    import transformers

    config = transformers.Qwen3_5Config.from_dict(FAMILY["qwen3.5-9b"].to_config())
    rope = config.text_config.rope_parameters
    assert rope["rope_theta"] == 1e7
    assert rope["partial_rotary_factor"] == 0.25
    assert rope["mrope_section"] == [11, 11, 10]
    assert rope["mrope_interleaved"] is True


def test_the_token_ids_that_transformers_reads_are_the_familys(tiny_architecture: Architecture) -> None:
    """Vision tokens and end of text arrive in the built configuration; a vocabulary too small has no such end."""
    import transformers

    config = transformers.Qwen3_5Config.from_dict(FAMILY["qwen3.5-9b"].to_config())
    assert (config.image_token_id, config.video_token_id) == (248056, 248057)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (248053, 248054)
    assert config.text_config.eos_token_id == 248044
    assert "eos_token_id" not in tiny_architecture.to_config()["text_config"]


def test_an_older_file_gives_an_interval_and_a_rope_theta_at_the_top() -> None:
    """The older spellings of layer types and rotary base are read as transformers reads them."""
    import transformers

    text = {"num_hidden_layers": 6, "full_attention_interval": 3, "rope_theta": 3e6, "partial_rotary_factor": 0.5}
    row = Architecture.from_config({"model_type": "qwen3_5_text", **text}, "older")
    built = transformers.Qwen3_5TextConfig(**text)
    assert row.full_attention_layers == (2, 5)
    assert list(row.layer_types) == built.layer_types
    assert row.rope.theta == built.rope_parameters["rope_theta"] == 3e6
    assert row.rope.partial_factor == built.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"mtp_num_hidden_layers": 0}, False),
        ({"mtp_num_hidden_layers": 1}, True),
        ({"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}, True),
        ({"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": True}, False),
        ({"mtp_num_hidden_layers": 2}, False),
    ],
)
def test_the_familys_layer_of_multi_token_prediction(fields: dict[str, object], expected: bool) -> None:
    """It is one, with the model's embeddings; it is loaded where that is asked for, and only where it is there."""
    config = {"model_type": "qwen3_5_text", **fields}
    row = Architecture.from_config(config, "a checkpoint")
    assert row.has_mtp is expected
    assert row.loads_mtp is False
    assert row.with_mtp().loads_mtp is expected
    assert all(size.has_mtp and not size.loads_mtp for size in FAMILY.values())


@pytest.mark.parametrize("value", [-1, True, "1", 1.0])
def test_an_ill_typed_number_of_layers_of_multi_token_prediction(value: object) -> None:
    """The message names the field and what it takes."""
    config = {"model_type": "qwen3_5_text", "mtp_num_hidden_layers": value}
    with pytest.raises(
        CheckpointError, match=r"mtp_num_hidden_layers in config\.json is .*an integer of at least 0"
    ):
        Architecture.from_config(config, "a checkpoint")


def test_another_model_type_is_refused_by_name() -> None:
    """A checkpoint of another family is named, and so are the types that can be trained."""
    expected = (
        r"^my-model is a llama checkpoint; qwenft trains qwen3_5, qwen3_5_moe, qwen3_5_text, qwen3_5_moe_text$"
    )
    with pytest.raises(CheckpointError, match=expected) as caught:
        Architecture.from_config({"model_type": "llama"}, "my-model")
    assert caught.value.got == "llama"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"^m: config\.json has no model_type; expected a string\n  Fix: config\.json as"),
        (
            {"model_type": "qwen3_5"},
            r"^m: config\.json has no text_config; expected an object\n  Fix: config\.json as",
        ),
    ],
)
def test_a_missing_field_is_named(config: dict[str, object], message: str) -> None:
    """A field that has no default is named where it is missing."""
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_config(config, "m")


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    [
        (None, "model_type", 7, "a string"),
        (None, "text_config", [], "an object"),
        (None, "vision_config", "none", "an object"),
        (None, "tie_word_embeddings", "yes", "true or false"),
        (None, "image_token_id", 0.5, "a positive integer"),
        ("text_config", "hidden_size", "4096", "a positive integer"),
        ("text_config", "num_hidden_layers", True, "a positive integer"),
        ("text_config", "vocab_size", -1, "a positive integer"),
        ("text_config", "layer_types", "full_attention", "a list of strings"),
        ("text_config", "attention_bias", True, "false, as in the whole family"),
        ("text_config", "rope_parameters", 3, "an object"),
        ("vision_config", "depth", 1.5, "a positive integer"),
        ("vision_config", "patch_size", [16, 16], "a positive integer"),
    ],
)
def test_an_ill_typed_field_is_named_by_its_path(
    section: str | None,
    field: str,
    value: object,
    expected: str,
) -> None:
    """The message gives the path of the field, what stands there and what was expected."""
    config = FAMILY["qwen3.5-9b"].to_config()
    (config if section is None else config[section])[field] = value
    path = field if section is None else f"{section}.{field}"
    with pytest.raises(CheckpointError) as caught:
        Architecture.from_config(config, "m")
    assert caught.value.problem == f"m: {path} in config.json is {value!r}; expected {expected}"
    assert caught.value.field == path
    assert caught.value.got == value


@pytest.mark.parametrize(
    ("field", "value"),
    [("rope_theta", "1e7"), ("partial_rotary_factor", 0), ("mrope_section", [11, 11.5])],
)
def test_an_ill_typed_rope_field_is_named_by_its_path(field: str, value: object) -> None:
    """A field two objects deep carries both in its path."""
    config = FAMILY["qwen3.5-9b"].to_config()
    config["text_config"]["rope_parameters"][field] = value
    with pytest.raises(CheckpointError, match=rf"text_config\.rope_parameters\.{field} in config\.json is"):
        Architecture.from_config(config, "m")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_types", [LINEAR_ATTENTION, FULL_ATTENTION], "2 layer_types for 32 layers"),
        ("layer_types", [*[LINEAR_ATTENTION] * 31, "mamba"], "unknown layer_types mamba"),
        ("num_key_value_heads", 5, "16 query heads are not a multiple of 5 key/value heads"),
        ("linear_num_key_heads", 6, "32 GDN value heads are not a multiple of 6 GDN key heads"),
    ],
)
def test_fields_that_contradict_each_other_are_told(field: str, value: object, message: str) -> None:
    """A file whose fields do not fit together is refused with both numbers."""
    config = FAMILY["qwen3.5-9b"].to_config()
    config["text_config"][field] = value
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_config(config, "m")


def test_dense_and_experts_exclude_each_other() -> None:
    """An architecture has either a dense MLP or experts."""
    with pytest.raises(SpecError, match="exactly one of intermediate_size and experts"):
        attrs.evolve(FAMILY["qwen3.5-9b"], experts=ExpertShape(8, 2, 16, 16))
    with pytest.raises(SpecError, match="exactly one of intermediate_size and experts"):
        attrs.evolve(FAMILY["qwen3.5-9b"], intermediate_size=None)


def test_architectures_are_values() -> None:
    """They are frozen, hashable and equal by field."""
    row = FAMILY["qwen3.5-9b"]
    assert attrs.evolve(row) == row
    assert hash(attrs.evolve(row)) == hash(row)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        row.layers = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", FAMILY)
def test_the_merger_hands_over_the_width_of_the_text_half(name: str) -> None:
    """The tower's output is as wide as the residual stream that takes it."""
    vision = FAMILY[name].vision
    assert isinstance(vision, VisionShape)
    assert vision.out_hidden_size == FAMILY[name].hidden_size


def test_the_family_is_imported_without_torch() -> None:
    """Importing all of the folder loads neither torch nor transformers."""
    program = (
        "import sys, qwenft.family.parameters, qwenft.family.architectures\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr

"""Data sets, how their rows are read, and how documents meet the model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.axolotl.keys import DATASET, IMAGES, SPECIAL_TOKENS
from qwenft.data.formats import ROLE_NAMES
from qwenft.specs.data import ROLES, DataSpec

if TYPE_CHECKING:
    from qwenft.axolotl.config import Config

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_OVERFLOWS = {"drop": "drop", "truncate": "truncate", "raise": "error"}
_END_OF_TURN = {"turn": True, "none": False}
_END = "<|im_end|>"
_OWN_TEMPLATES = ("tokenizer_default", "qwen3_5")
#: What a data set says by default of the roles of its messages, and what axolotl calls them.
_MESSAGES = {"role": "role", "content": "content"}
_CHATS = 'type: chat_template, or recipe.with_data(DataSpec.alpaca("rows.jsonl")) and its like for other rows'


def read_data(config: Config) -> DataSpec | None:
    """All data sets as one, and what is held out of it or beside it."""
    _template(config)
    _tokens(config)
    images = config.inside("processor_kwargs", IMAGES).values
    data = _mixed(config, "datasets", images)
    held_out = _mixed(config, "test_datasets", images)
    if config.get("excess_length_strategy") == "truncate":
        config.note("excess_length_strategy", "a document is cut behind the last message that fits")
    if config.get("min_sample_len", 2) > 2:
        config.refuse("min_sample_len", "short documents are trained too", "rows without them")
    if config.get("shuffle_merged_datasets") is False:
        config.refuse("shuffle_merged_datasets", "documents are shuffled, each epoch anew", "leave it out")
    if data is None:
        config.missing("datasets", "datasets: [{path: chats.jsonl, type: chat_template}]")
        return None
    return _held_out(config, _fitted(config, data, config.get("sequence_len", 512)), held_out)


def _fitted(config: Config, data: DataSpec, length: int) -> DataSpec:
    """The data in documents of at most this length, packed where they are."""
    formats = {part.format for part, _ in data.parts}
    if formats == {"text"}:
        # axolotl cuts a completion into pieces of sequence_len before it looks for what is too long.
        data = data.with_max_length(length, overflow="split")
    else:
        data = data.with_max_length(length, overflow=_OVERFLOWS[config.get("excess_length_strategy", "drop")])
    return data.pack() if config.get("sample_packing") else data


def _held_out(config: Config, data: DataSpec, tests: DataSpec | None) -> DataSpec:
    share = config.get("val_set_size", 0)
    length = config.get("eval_sequence_len", data.max_length)
    packed = config.get("eval_sample_packing", data.packed)
    if config.has("eval_sample_packing") and tests is None:
        config.note("eval_sample_packing", "packed or not, a document is evaluated alike")
    if tests is not None:
        if share:
            config.refuse("val_set_size", "test_datasets are held out already", "one of the two")
        tests = attrs.evolve(_fitted(config, tests, length), packed=packed)
        return data.hold_out(tests)
    if length != data.max_length:
        config.refuse(
            "eval_sequence_len", "rows that are held out are as long as the others", "test_datasets: [...]"
        )
    if share >= 1:
        config.refuse("val_set_size", "a number of rows cannot be held out", "a share, val_set_size: 0.05")
        return data
    return data.hold_out(float(share)) if share else data


def _mixed(config: Config, key: str, images: dict[str, Any]) -> DataSpec | None:
    """The data sets under a key, mixed; None where there are none, or one could not be read."""
    read = [_data_set(config, entry) for entry in config.items(key, DATASET)]
    parts = [part for part in read if part is not None]
    if not parts or len(parts) != len(read):
        return None
    if len({part.format == "text" for part in parts}) > 1:
        config.refuse(
            key,
            "a completion that is too long is split, and a chat is not",
            "one kind of them, then recipe.with_data(recipe.data.mix(...))",
        )
    if images and parts[0].format != "text":
        parts = [part.with_images(**images) for part in parts]
    return functools.reduce(lambda data, other: data.mix(other), parts)


def _data_set(config: Config, entry: Config) -> DataSpec | None:
    entry.missing("path", "path: chats.jsonl")
    entry.missing("type", "type: chat_template")
    source = _source(entry)
    kind = entry.get("type")
    if source is None or kind is None:
        return None
    if kind == "completion":
        data = DataSpec.text(**source)
        return data.with_columns(text=entry.get("field")) if entry.get("field", "text") != "text" else data
    if kind != "chat_template":
        entry.refuse("type", "rows hold messages, or texts to complete", _CHATS)
        return None
    if entry.get("chat_template", "tokenizer_default") not in _OWN_TEMPLATES:
        entry.refuse("chat_template", "the checkpoint's own template is used", "chat_template: tokenizer_default")
    _known_roles(entry)
    return _trained(config, entry, _chats(config, entry, source))


def _chats(config: Config, entry: Config, source: dict[str, Any]) -> DataSpec:
    """Rows of messages, in the format with names for their keys where these are not role and content."""
    mapping = entry.get("message_property_mappings", {})
    older = {"role": entry.get("message_field_role"), "content": entry.get("message_field_content")}
    mapping = _MESSAGES | {key: value for key, value in older.items() if value} | mapping
    for key, value in mapping.items():
        if key not in _MESSAGES and key != value:
            entry.refuse("message_property_mappings", f"{key} is read by that name", "role and content alone")
    column = entry.get("field_messages", "messages")
    plain = all(mapping[key] == _MESSAGES[key] for key in _MESSAGES)
    if plain:
        data, names = DataSpec.messages(**source), {"messages": column}
    else:
        data = DataSpec.conversations(**source)
        names = {"conversations": column, "role": mapping["role"], "content": mapping["content"]}
    names["tools"] = entry.get("field_tools", "tools")
    others = {key: name for key, name in names.items() if data.names[key] != name}
    data = data.with_columns(**others) if others else data
    options = config.get("chat_template_kwargs", {})
    return data.with_template(**options) if options else data


def _known_roles(entry: Config) -> None:
    """Refuse names of roles that rows are not read by."""
    unread = [
        f"{source} for {target}"
        for target, sources in entry.get("roles", {}).items()
        for source in sources
        if target not in ROLES or ROLE_NAMES.get(source, source) != target
    ]
    if unread:
        entry.refuse("roles", f"{', '.join(unread)} is not read", f"rows with the roles {', '.join(ROLES)}")


def _trained(config: Config, entry: Config, data: DataSpec) -> DataSpec:
    """Which messages are trained, and whether what ends them is."""
    aliases = {source: target for target, sources in entry.get("roles", {}).items() for source in sources}
    names = [aliases.get(role, ROLE_NAMES.get(role, role)) for role in entry.get("roles_to_train", ["assistant"])]
    if config.get("train_on_inputs"):
        names = list(ROLES)
    if not names or any(role not in ROLES for role in names):
        entry.refuse("roles_to_train", "expected roles of a conversation", f"some of {', '.join(ROLES)}")
        return data
    ends = {entry.get(key, "turn") for key in ("train_on_eos", "train_on_eot") if entry.has(key)} or {"turn"}
    if len(ends) > 1 or not ends <= set(_END_OF_TURN):
        key = "train_on_eos" if entry.has("train_on_eos") else "train_on_eot"
        entry.refuse(key, "the end of every trained message is trained, or of none", f"{key}: turn, or none")
        return data
    data = data if names == ["assistant"] else data.train_on(*dict.fromkeys(names))
    return data if ends == {"turn"} else data.train_on(end_of_turn=False)


def _source(entry: Config) -> dict[str, Any] | None:
    """Where rows are: in files, or in a data set of the hub or of a folder."""
    path, files, split = entry.get("path", ""), entry.get("data_files", []), entry.get("split", "train")
    kind = entry.get("ds_type", "json")
    for key, refused, reason, fix in (
        ("name", entry.get("name", "default") != "default", "data sets have no configurations here", "data_files"),
        ("path", "://" in path, "files are read from disk", "path: chats.jsonl, of a copy of it"),
        (
            "ds_type",
            kind not in ("json", "csv", "parquet"),
            "files are JSON, JSONL, CSV or Parquet",
            "ds_type: json",
        ),
    ):
        if refused:
            entry.refuse(key, reason, fix)
            return None
    files = [files] if isinstance(files, str) else files
    if not files and (Path(path).is_file() or path.endswith(_SUFFIXES)):
        files = [path]
    if not files:
        return {"source": path, "split": split, "revision": entry.get("revision")}
    if path not in (*files, "json", "csv", "parquet") and not Path(path).is_dir():
        entry.refuse(
            "data_files", "single files of a data set on the hub are not read", "path: a copy of it on disk"
        )
    elif split != "train":
        entry.refuse("split", "a file is read whole", "split: train, and a file of these rows")
    elif not all(file.endswith(_SUFFIXES) for file in files):
        entry.refuse(
            "data_files" if entry.has("data_files") else "path", "its ending says how a file is read", "a.jsonl"
        )
    else:
        return {"source": files[0] if len(files) == 1 else files}
    return None


def _template(config: Config) -> None:
    """The checkpoint's template is the only one; axolotl's own copy for the family says the same."""
    asked = config.get("chat_template", "tokenizer_default")
    if asked == "qwen3_5":
        config.note("chat_template", "the checkpoint's own template is used; data.preview(model) shows it")
    elif asked != "tokenizer_default" and not asked.startswith("tokenizer_default_fallback_"):
        config.refuse("chat_template", "the checkpoint's own template is used", "chat_template: tokenizer_default")


def _tokens(config: Config) -> None:
    """The tokens that end a turn and a text are the family's."""
    config.inside("special_tokens", SPECIAL_TOKENS)
    if set(config.get("eot_tokens", [])) - {_END}:
        config.refuse("eot_tokens", f"the template ends a turn with {_END}", f'eot_tokens: ["{_END}"]')

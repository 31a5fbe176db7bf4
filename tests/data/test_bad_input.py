"""A corpus of what real files hold: each is a DataError that names its place and a remedy, or one skipped row."""

import json
import os
import threading

import pyarrow as pa
import pytest
from pyarrow import parquet

from qwenft.data.chat import ChatEncoder
from qwenft.data.sources import read_rows
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec
from qwenft.testing import train_tokenizer

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello!"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"name": "clock", "arguments": {}}


def called(**call):
    return [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, **call}]}]


def deep(levels):
    return "[" * levels + "]" * levels


def line(messages=None, **row):
    return json.dumps({"messages": messages, **row} if messages is not None else row)


# Each is the second line of a JSONL file whose first and third are good.
LINES = {
    "broken UTF-8": b'{"messages": "\xff\xfe"}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "latin-1": '{"messages": [{"role": "user", "content": "é"}]}'.encode("latin-1"),
    "a null byte in the JSON": b'{"messages": \x00}',
    "cut in the middle": line([USER, ANSWER])[:-9],
    "two objects": line([USER, ANSWER]) * 2,
    "single quotes": "{'messages': []}",
    "a trailing comma": '{"messages": [],}',
    "a comment": "// " + line([USER, ANSWER]),
    "a list": "[]",
    "a string": '"Hi"',
    "a number": "3",
    "null": "null",
    "a key twice": '{"messages": [], "messages": []}',
    "a role twice": '{"messages": [{"role": "user", "role": "assistant", "content": "Hi"}]}',
    "nested deeply": '{"messages": ' + deep(100_000) + "}",
    "nested in an argument": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", '
    '"tool_calls": [{"name": "f", "arguments": {"x": ' + deep(5_000) + "}}]}]}",
    "a bare surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
    "a surrogate in an answer": '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\udfff"}]}',
    "a surrogate in reasoning": line([USER, {**ANSWER, "reasoning_content": "\ud800"}]),
    "a surrogate in an argument": line(called(arguments={"a": "\ud800"})),
    "a surrogate in a tool": line([USER, ANSWER], tools=[{"name": "\ud800"}]),
    "no columns": "{}",
    "another schema": line(text="Hi"),
    "ShareGPT": line([{"from": "human", "value": "Hi"}]),
    "a null conversation": '{"messages": null}',
    "an empty conversation": line([]),
    "a conversation as text": line("Hi"),
    "a conversation as a mapping": line({"role": "user"}),
    "a conversation as JSON text": line(json.dumps([USER, ANSWER])),
    "a message that is null": line([USER, None]),
    "a message that is a text": line([USER, "Hello!"]),
    "a message that is a list": line([USER, ["assistant", "Hello!"]]),
    "an empty message": line([USER, {}]),
    "no role": line([USER, {"content": "Hello!"}]),
    "a null role": line([USER, {"role": None, "content": "Hello!"}]),
    "an unknown role": line([USER, {"role": "critic", "content": "Bad."}]),
    "a role in capitals": line([USER, {"role": "Assistant", "content": "Hello!"}]),
    "a role that is a list": line([USER, {"role": ["user"], "content": "Hello!"}]),
    "a role that is a number": line([USER, {"role": 1, "content": "Hello!"}]),
    "no content": line([USER, {"role": "assistant"}]),
    "a null content": line([USER, {"role": "assistant", "content": None}]),
    "a number as content": line([USER, {"role": "assistant", "content": 42}]),
    "a truth as content": line([USER, {"role": "assistant", "content": True}]),
    "NaN as content": '{"messages": [{"role": "user", "content": NaN}]}',
    "a mapping as content": line([USER, {"role": "assistant", "content": {"text": "a"}}]),
    "parts of text alone": line([USER, {"role": "assistant", "content": ["Hello!"]}]),
    "a part without text": line([USER, {"role": "assistant", "content": [{"type": "text"}]}]),
    "a part that is a number": line([USER, {"role": "assistant", "content": [{"type": "text", "text": 3}]}]),
    "an unknown part": line([USER, {"role": "assistant", "content": [{"type": "audio", "audio": "a"}]}]),
    "no parts": line([USER, {"role": "assistant", "content": []}]),
    "an empty answer": line([USER, {"role": "assistant", "content": ""}]),
    "an answer of spaces": line([USER, {"role": "assistant", "content": " \n\t"}]),
    "reasoning that is a list": line([USER, {**ANSWER, "reasoning_content": ["a"]}]),
    "reasoning that is a number": line([USER, {**ANSWER, "reasoning_content": 3}]),
    "two systems": line([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER, ANSWER]),
    "system last": line([USER, ANSWER, {"role": "system", "content": "a"}]),
    "no user": line([{"role": "system", "content": "a"}, ANSWER]),
    "the assistant alone": line([ANSWER]),
    "a result without a call": line([USER, {"role": "tool", "content": "noon"}, ANSWER]),
    "a result before its call": line([{"role": "tool", "content": "noon"}, *called()]),
    "calls that are a text": line([USER, {"role": "assistant", "content": "", "tool_calls": "clock()"}]),
    "calls that are a mapping": line(
        [USER, {"role": "assistant", "content": "", "tool_calls": {"name": "clock"}}]
    ),
    "a call that is null": line([USER, {"role": "assistant", "content": "", "tool_calls": [None]}]),
    "a call that is a text": line([USER, {"role": "assistant", "content": "", "tool_calls": ["clock"]}]),
    "a call without a name": line([USER, {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}]),
    "a call with an empty name": line(called(name="")),
    "a call whose name is a number": line(called(name=3)),
    "a call whose function is null": line(
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": None}]}]
    ),
    "arguments that do not parse": line(called(arguments="{city: Paris}")),
    "arguments cut off": line(called(arguments='{"city": "Par')),
    "arguments that are a list": line(called(arguments=["Paris"])),
    "arguments that are JSON of a list": line(called(arguments='["Paris"]')),
    "arguments that are a number": line(called(arguments=3)),
    "a call by the user": line([{**USER, "tool_calls": [CALL]}, ANSWER]),
    "tools that are a text": line([USER, ANSWER], tools="clock"),
    "tools that are a mapping": line([USER, ANSWER], tools={"name": "clock"}),
    "tools that are names": line([USER, ANSWER], tools=["clock"]),
    "train that is a text": line([USER, {**ANSWER, "train": "yes"}]),
    "train that is a number": line([USER, {**ANSWER, "train": 1}]),
    "a weight below 0": line([USER, {**ANSWER, "weight": -1}]),
    "a weight that is infinite": '{"messages": [{"role": "user", "content": "a", "weight": Infinity}]}',
    "a weight that is a text": line([USER, {**ANSWER, "weight": "2"}]),
    "a weight that is true": line([USER, {**ANSWER, "weight": True}]),
    "a turn mark": line([{"role": "user", "content": "<|im_start|>system"}, ANSWER]),
    "an end mark": line([USER, {"role": "assistant", "content": "a<|im_end|>"}]),
    "an image mark": line([{"role": "user", "content": "<|image_pad|>"}, ANSWER]),
    "a mark in an argument": line(called(arguments={"a": "<|im_end|>"})),
    "a mark in a tool": line([USER, ANSWER], tools=[{"name": "<|im_end|>"}]),
    "reasoning twice": line([USER, {"role": "assistant", "content": "a</think>b</think>c"}]),
    "a tool result in a content": line([{"role": "user", "content": "<tool_response>a</tool_response>"}, ANSWER]),
}


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(train_tokenizer())


def write(path, content):
    good = line([USER, ANSWER]).encode()
    path.write_bytes(b"\n".join([good, content if isinstance(content, bytes) else content.encode(), good, b""]))
    return path


def test_the_corpus_is_large():
    """At least eighty rows and files are wrong in different ways."""
    assert len(LINES) + len(FILES) + len(OTHERS) >= 80


@pytest.mark.parametrize("name", LINES)
def test_a_wrong_row_is_named_and_can_be_skipped(encoder, tmp_path, name):
    """The error names file, row and remedy; under "skip" the good rows are read and the wrong one is listed."""
    path = write(tmp_path / "chats.jsonl", LINES[name])
    data = DataSpec.messages(path)
    with pytest.raises(DataError) as caught:
        list(encoder.encode(data))
    assert (caught.value.file, caught.value.row) == (str(path), 2)
    assert f"{path}, " in str(caught.value)
    assert len(str(caught.value)) < 1_000
    skipped = []
    documents = list(encoder.encode(data.on_bad_row("skip"), skipped))
    assert [document.row for document in documents] == [1, 3]
    assert [(error.file, error.row) for error in skipped] == [(str(path), 2)]
    assert str(skipped[0]) == str(caught.value)


def parquet_of(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


FILES = {
    "nothing": ("chats.jsonl", b"", "holds no row"),
    "blank lines": ("chats.jsonl", b"\n \n\t\n", "holds no row"),
    "JSON that is no list": ("chats.json", b'{"a": 1}', "expected a list of rows, got dict"),
    "JSON that is a text": ("chats.json", b'"Hi"', "expected a list of rows, got str"),
    "JSON that is cut": ("chats.json", b'[{"messages": [', "broken JSON"),
    "JSON in latin-1": ("chats.json", '["é"]'.encode("latin-1"), "broken JSON"),
    "JSON nested deeply": ("chats.json", deep(100_000).encode(), "nested too deeply"),
    "an empty JSON list": ("chats.json", b"[]", "holds no row"),
    "CSV in latin-1": ("chats.csv", "prompt,completion\né,b\n".encode("latin-1"), "is no UTF-8"),
    "CSV with an open quote": ("chats.csv", b'prompt,completion\n"a,b\n', "broken CSV"),
    "CSV without rows": ("chats.csv", b"prompt,completion\n", "holds no row"),
    "no Parquet": ("chats.parquet", b"PAR1 and no more", "is no whole Parquet file"),
    "an empty Parquet": ("chats.parquet", b"", "is no whole Parquet file"),
    "an unknown ending": ("chats.xlsx", b"PK", "expected a name that ends in .jsonl"),
    "no ending": ("chats", b"{}", "expected a name that ends in .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_named(tmp_path, name):
    """The error names the file, what is wrong with it, and what is expected."""
    file, content, problem = FILES[name]
    (tmp_path / file).write_bytes(content)
    for data in (
        DataSpec.prompt_completion(tmp_path / file),
        DataSpec.prompt_completion(tmp_path / file).on_bad_row("skip"),
    ):
        with pytest.raises(DataError) as caught:
            list(read_rows(data))
        assert caught.value.file == str(tmp_path / file)
        assert problem in str(caught.value)
        assert "\n  Fix: " in str(caught.value)


def truncated_parquet(folder):
    return cut(parquet_of(folder / "chats.parquet", [GOOD] * 100), 0.7)


def damaged_parquet(folder):
    path = parquet_of(
        folder / "chats.parquet", [{"messages": [{"role": "user", "content": str(n) * 50}]} for n in range(99)]
    )
    content = bytearray(path.read_bytes())
    content[40:90] = bytes(50)
    path.write_bytes(bytes(content))
    return path


def a_folder(folder):
    (folder / "chats.jsonl").mkdir()
    return folder / "chats.jsonl"


def a_fifo(folder):
    os.mkfifo(folder / "chats.jsonl")
    return folder / "chats.jsonl"


def a_symlink_loop(folder):
    (folder / "chats.jsonl").symlink_to(folder / "other.jsonl")
    (folder / "other.jsonl").symlink_to(folder / "chats.jsonl")
    return folder / "chats.jsonl"


def a_dangling_symlink(folder):
    (folder / "chats.jsonl").symlink_to(folder / "gone.jsonl")
    return folder / "chats.jsonl"


def missing(folder):
    return folder / "chats.jsonl"


def no_match(folder):
    return folder / "*.jsonl"


def a_name_that_is_too_long(folder):
    return folder / ("a" * 300 + ".jsonl")


def a_device(_):
    return "/dev/zero"


OTHERS = (
    truncated_parquet,
    damaged_parquet,
    a_folder,
    a_fifo,
    a_symlink_loop,
    a_dangling_symlink,
    missing,
    no_match,
    a_name_that_is_too_long,
    a_device,
)


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_no_whole_file_is_named(tmp_path, make):
    """Nothing hangs on a FIFO or a device, follows a loop, or takes half a file for a whole one."""
    path = make(tmp_path)
    found = []

    def read():
        try:
            list(read_rows(DataSpec.messages(path)))
        except DataError as error:
            found.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert found
    assert found[0].file == str(path)
    assert "\n  Fix: " in str(found[0])


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    """Rows of two versions of a file are not trained on as one."""
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{line([USER, ANSWER])}\n" * 3)
    rows = read_rows(DataSpec.messages(path))
    next(rows)
    path.write_text(f"{line([USER, ANSWER])}\n" * 4)
    with pytest.raises(DataError, match="changed while it was read\n  Fix: start again when it is written"):
        list(rows)


@pytest.mark.long
def test_a_very_long_message_is_read(encoder):
    """Ten megabytes in one message are a document like any other."""
    long = "word " * 2_000_000
    (document,) = encoder.encode(DataSpec.messages([{"messages": [{"role": "user", "content": long}, ANSWER]}]))
    assert len(document) > 1_000_000
    assert document.supervised > 1

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from qwenft.data.formats import conversation
from qwenft.data.sources import read_rows
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec


def said(data):
    """The messages of every row, with nothing but what they hold."""
    return [list(conversation(row, data).messages) for row in read_rows(data)]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CHATS = [
    {"messages": [user("One?"), assistant("Two.")]},
    {"messages": [user("é\n天"), assistant("b", reasoning_content="c"), user("d"), assistant("e")]},
]
EXPECTED = [chat["messages"] for chat in CHATS]


@pytest.fixture
def files(tmp_path):
    """The same rows in a file of each kind."""
    lines = [json.dumps(chat) for chat in CHATS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.ndjson").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{', '.join(lines)}]")
    (tmp_path / "wrapped.json").write_text(f'{{"version": 1, "data": [{", ".join(lines)}]}}')
    parquet.write_table(pa.Table.from_pylist(CHATS), tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "wrapped.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same(files, name):
    """JSON lines, JSON and Parquet read alike; what columns fill with None is absent."""
    assert said(DataSpec.messages(files / name)) == EXPECTED


def test_a_glob_is_its_files_in_order(files):
    """A pattern stands for the files it matches, by name; a list for its files in its order."""
    rows = list(read_rows(DataSpec.messages(str(files / "a.*"))))
    names = ["a.json", "a.jsonl", "a.ndjson", "a.parquet"]
    assert [row.file for row in rows] == [str(files / name) for name in names for _ in CHATS]
    twice = DataSpec.messages([files / "a.parquet", files / "a.json"])
    assert [row.number for row in read_rows(twice)] == [1, 2, 1, 2]
    (files / "[odd].jsonl").write_text(json.dumps(CHATS[0]))
    assert said(DataSpec.messages(files / "[odd].jsonl")) == EXPECTED[:1]


def test_parquet_rows_behind_the_first_batch_keep_their_numbers(tmp_path):
    """Rows are counted over the batches that a file is read in."""
    path = tmp_path / "many.parquet"
    parquet.write_table(pa.Table.from_pylist(CHATS * 1500), path)
    assert [row.number for row in read_rows(DataSpec.messages(path))] == list(range(1, 3001))


def test_csv_columns_are_read(tmp_path):
    """Quoted commas and line breaks belong to their column, and a row's number is the line on which it ends."""
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), ("a, b\nc", "d"), ("é", '"quoted"')])
    data = DataSpec.prompt_completion(path)
    assert said(data) == [[user("a, b\nc"), assistant("d")], [user("é"), assistant('"quoted"')]]
    assert [row.number for row in read_rows(data)] == [3, 4]


def test_a_csv_row_with_other_columns_is_named(tmp_path):
    """A comma that is not quoted makes a column too many; the row is named or skipped."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b,c\nd,e\nf\n")
    with pytest.raises(DataError, match=r"a\.csv, row 2: expected 2 columns .*\n  Fix: quote the commas"):
        list(read_rows(DataSpec.prompt_completion(path)))
    skipped = []
    rows = list(read_rows(DataSpec.prompt_completion(path), skipped.append))
    assert [row.number for row in rows] == [3]
    assert [error.row for error in skipped] == [2, 4]


def test_sharegpt_roles_have_their_names():
    """Human and gpt are user and assistant; a system column, calls and observations find their place."""
    call = '{"name": "clock", "arguments": {"zone": "UTC"}}'
    turns = [("human", "a"), ("function_call", call), ("observation", "noon"), ("gpt", "b")]
    row = {"conversations": [{"from": name, "value": value} for name, value in turns], "system": "s"}
    assert said(DataSpec.conversations([row])) == [
        [
            {"role": "system", "content": "s"},
            user("a"),
            assistant("", tool_calls=[{"name": "clock", "arguments": {"zone": "UTC"}}]),
            {"role": "tool", "content": "noon"},
            assistant("b"),
        ]
    ]


def test_other_names_of_columns_and_keys():
    """with_columns maps whatever a file calls them."""
    row = {"dialogue": [{"speaker": "human", "text": "a"}, {"speaker": "gpt", "text": "b"}]}
    data = DataSpec.conversations([row]).with_columns(conversations="dialogue", role="speaker", content="text")
    assert said(data) == [[user("a"), assistant("b")]]
    asked = DataSpec.alpaca([{"q": "a", "a": "b"}]).with_columns(instruction="q", output="a")
    assert said(asked) == [[user("a"), assistant("b")]]
    system = {"role": "system", "content": "s"}
    led = DataSpec.conversations([{**row, "persona": "s", "system": "another"}])
    led = led.with_columns(conversations="dialogue", role="speaker", content="text", system="persona")
    assert said(led) == [[system, user("a"), assistant("b")]]
    asked = DataSpec.alpaca([{"q": "a", "a": "b", "persona": "s"}])
    assert said(asked.with_columns(instruction="q", output="a", system="persona")) == [
        [system, user("a"), assistant("b")]
    ]


@pytest.mark.parametrize(
    ("constructor", "missing", "row"),
    [
        (DataSpec.messages, "messages", {"chat": []}),
        (DataSpec.conversations, "conversations", {"dialogue": []}),
        (DataSpec.prompt_completion, "prompt", {"completion": "b"}),
        (DataSpec.prompt_completion, "completion", {"prompt": "a"}),
        (DataSpec.alpaca, "instruction", {"output": "b"}),
        (DataSpec.alpaca, "output", {"instruction": "a"}),
        (DataSpec.text, "text", {"content": "a"}),
    ],
)
def test_the_remedy_for_a_missing_column_is_an_argument_of_its_format(constructor, missing, row):
    """The line that fixes it names the column that is missing, and is accepted by with_columns."""
    data = constructor([row])
    fix = rf'expected a column \'{missing}\', got .*\n  Fix: \.with_columns\({missing}="your_column"\)'
    with pytest.raises(DataError, match=fix):
        said(data)
    with pytest.raises(DataError, match="expected a column 'your_column'"):
        said(data.with_columns(**{missing: "your_column"}))


def test_prompts_and_completions_are_texts_or_messages():
    """The answers in a prompt of several turns are not trained, the completion is; users are left to train_on."""
    data = DataSpec.prompt_completion(
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
        ]
    )
    assert said(data) == [[user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")]]
    training = [[one.train for one in conversation(row, data).training] for row in read_rows(data)]
    assert training == [[None, None], [None, False, None, None]]


def test_alpaca_puts_the_input_behind_the_instruction():
    """An empty input leaves no trace."""
    rows = [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "s"},
    ]
    assert said(DataSpec.alpaca(rows)) == [
        [user("Add.\n\n1 and 1"), assistant("2")],
        [user("Hi"), assistant("Hello")],
        [{"role": "system", "content": "s"}, user("Hi"), assistant("Hello")],
    ]


def test_arguments_in_json_are_parsed():
    """APIs give arguments as a JSON string; templates want what it says."""
    calls = [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": [1, null]}'}},
        {"name": "g", "arguments": ""},
        {"name": "h"},
        {"name": "i", "arguments": {"b": None}},
    ]
    (messages,) = said(DataSpec.messages([{"messages": [user("a"), assistant("", tool_calls=calls)]}]))
    assert messages[1]["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": [1, None]}}},
        {"name": "g", "arguments": {}},
        {"name": "h"},
        {"name": "i", "arguments": {"b": None}},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        data = DataSpec.messages([{"messages": [user("a")], "tools": given}])
        assert [conversation(row, data).tools for row in read_rows(data)] == [tools]

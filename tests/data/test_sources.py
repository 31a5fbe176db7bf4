import json

import datasets
import pytest

from qwenft.data.formats import conversation
from qwenft.data.sources import check_head, read_rows
from qwenft.errors import DataError, QwenftError
from qwenft.specs.data import DataSpec

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
LINE = json.dumps(CHAT)


def conversations(source, column="messages"):
    data = DataSpec.messages(source).with_columns(messages=column)
    return [list(conversation(row, data).messages) for row in read_rows(data)]


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="chats.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_a_file_a_list_and_a_data_set_give_the_same(write):
    """The same conversations come from JSONL, from a list of dicts and from a datasets.Dataset."""
    chats = [CHAT, {"messages": [{"role": "user", "content": "é\u2028 天"}]}]
    path = write("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats))
    expected = [chat["messages"] for chat in chats]
    assert conversations(path) == expected
    assert conversations(chats) == expected
    assert conversations(datasets.Dataset.from_list(chats)) == expected


def test_rows_know_their_place(write):
    """A row carries its file and its line; blank lines are no rows, and files follow each other."""
    first, second = write(f"{LINE}\n\n  \n{LINE}", "a.jsonl"), write(f"{LINE}\r\n{LINE}\r\n", "b.jsonl")
    rows = list(read_rows(DataSpec.messages([first, second])))
    places = [(str(first), 1), (str(first), 4), (str(second), 1), (str(second), 2)]
    assert [(row.file, row.number) for row in rows] == places
    assert [row.number for row in read_rows(DataSpec.messages([CHAT, CHAT]))] == [1, 2]


def test_a_byte_order_mark_is_no_part_of_the_first_row(write):
    """A file that an editor began with a byte-order mark reads as one without."""
    assert conversations(write(b"\xef\xbb\xbf" + f"{LINE}\n{LINE}\n".encode())) == [CHAT["messages"]] * 2


@pytest.mark.parametrize(
    ("content", "row", "message"),
    [
        ("", None, r"chats\.jsonl: holds no row\n  Fix: one conversation a line: \{\"messages\""),
        ("\n \n", None, r"chats\.jsonl: holds no row"),
        (
            f'{LINE}\n\n{{"messages": [\n',
            3,
            r"chats\.jsonl, line 3: broken JSON at column 15: Expecting value\n  Fix: one JSON object a line",
        ),
        (f"{LINE}\n{LINE[:-1]}", 2, r"chats\.jsonl, line 2: broken JSON at column"),
        (f"{LINE}\n[]\n", 2, r"chats\.jsonl, line 2: expected a JSON object, got list"),
        ('"Hi"', 1, r"chats\.jsonl, line 1: expected a JSON object, got str"),
        ("[\n" + LINE + "\n]", 1, r"chats\.jsonl, line 1: broken JSON"),
        (b'{"messages": "\xff"}\n', 1, r"chats\.jsonl, line 1: is no UTF-8: .* can't decode byte 0xff"),
        (
            f"{LINE}\n{LINE}\n".encode() + b'{"messages": "\xe9"}',
            3,
            r"chats\.jsonl, line 3: is no UTF-8: .*\n  Fix: a JSONL file in UTF-8",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(write, content, row, message):
    """The error names the file, the line where there is one, and what a line should be."""
    path = write(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(DataSpec.messages(path)))
    assert isinstance(caught.value, QwenftError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.file == str(path)
    assert caught.value.row == row


def test_a_file_that_is_missing_is_named(tmp_path):
    """A missing file and a folder in its place are errors of the data with the path."""
    gone = tmp_path / "gone.jsonl"
    with pytest.raises(
        DataError,
        match=r"gone\.jsonl: cannot be read: No such file or directory\n  Fix: a JSONL, JSON, Parquet or CSV file",
    ):
        list(read_rows(DataSpec.messages(gone)))
    with pytest.raises(DataError, match=r"is no regular file") as caught:
        list(read_rows(DataSpec.messages(tmp_path)))
    assert caught.value.file == str(tmp_path)


@pytest.mark.parametrize("source", [[], (), datasets.Dataset.from_list([])], ids=["list", "tuple", "Dataset"])
def test_no_rows_in_memory_are_an_error(source):
    """An empty list and an empty data set hold nothing to train on."""
    with pytest.raises(DataError, match=r"rows in memory: there is no row\n  Fix: DataSpec\.messages\("):
        list(read_rows(DataSpec.messages(source)))


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"message": []}, r"expected a column 'messages', got 'message'\n  Fix: \.with_columns\(messages="),
        ({}, r"expected a column 'messages', got none"),
        ({"messages": []}, r"'messages': expected a list of messages, got an empty conversation"),
        ({"messages": None}, r"'messages': expected a list of messages, got NoneType None"),
        ({"messages": "Hi"}, r"'messages': expected a list of messages, got str 'Hi'"),
        ({"messages": {"role": "user"}}, r"'messages': expected a list of messages, got dict"),
        ({"messages": ["Hi"]}, r"messages\[0\]: expected a mapping with role and content, got 'Hi'"),
        (
            {"messages": [user("Hi"), {"role": "critic", "content": "Bad."}]},
            r"messages\[1\]: expected a role of system, user, assistant, tool, got 'critic'",
        ),
        ({"messages": [{"from": "human", "value": "Hi"}]}, r"messages\[0\]: expected a role of .*, got None"),
        (
            {"messages": [{"role": ["user"], "content": "Hi"}]},
            r"messages\[0\]: expected a role of .*, got \['user'\]",
        ),
        ({"messages": [user(None)]}, r"messages\[0\]\.content: expected a string, got None"),
        ({"messages": [user(3)]}, r"messages\[0\]\.content: expected a string, got 3"),
        (
            {"messages": [user([{"type": "audio", "audio": "a"}])]},
            r"messages\[0\]\.content\[0\]: expected \{\"type\": \"text\", \"text\": \.\.\.\}, got \{",
        ),
        ({"messages": [{"role": "assistant"}]}, r"messages\[0\]\.content: expected a string, got None"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, r"messages\[0\]\.content: expected a string"),
        (
            {"messages": [{"role": "user", "tool_calls": [1]}]},
            r"messages\[0\]\.tool_calls: only an assistant calls tools, got a user",
        ),
    ],
)
def test_a_wrong_conversation_is_named_by_file_and_row(write, row, message):
    """The error names the row, the message in it, what stands there and what was expected."""
    path = write(f"{LINE}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=r"chats\.jsonl, row 2: " + message) as caught:
        conversations(path)
    assert (caught.value.file, caught.value.row) == (str(path), 2)
    assert "\n  Fix: " in str(caught.value)


def test_a_wrong_conversation_in_memory_is_named_by_its_place():
    """Rows in memory are counted from 1."""
    with pytest.raises(DataError, match=r"^rows in memory, row 2: 'messages': expected a list") as caught:
        conversations([CHAT, {"messages": []}])
    assert (caught.value.file, caught.value.row) == ("rows in memory", 2)


def test_another_column_is_read():
    """The conversation is read from the column that is named."""
    assert conversations([{"turns": CHAT["messages"]}], "turns") == [CHAT["messages"]]
    with pytest.raises(DataError, match="expected a column 'turns', got 'messages', 'id'"):
        conversations([{**CHAT, "id": 1}], "turns")


def test_keys_that_a_data_set_fills_with_none_are_absent():
    """A data set gives every message every key; those that hold None are left out, content apart."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    rows = datasets.Dataset.from_list([{"messages": [user("Hi"), call]}])
    assert conversations(rows) == [[user("Hi"), call]]


def test_the_head_of_every_file_is_checked(write):
    """check_head reads five rows of each file, and nothing behind them."""
    good = write(f"{LINE}\n" * 5 + "broken", "good.jsonl")
    check_head(DataSpec.messages(good))
    bad = write(f"{LINE}\n" * 4 + "{}\n", "bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl, row 5: expected a column 'messages', got none"):
        check_head(DataSpec.messages([good, bad]))
    with pytest.raises(DataError, match=r"bad\.jsonl, row 5"):
        check_head(DataSpec.messages([bad, good]))
    check_head(DataSpec.messages(bad), rows=4)


def test_the_head_of_data_that_skip_wrong_rows_may_be_wrong_but_not_missing(write, tmp_path):
    """Wrong rows are skipped later; a file that is not there is told at once."""
    bad = write("broken\n{}\n", "bad.jsonl")
    check_head(DataSpec.messages(bad).on_bad_row("skip"))
    with pytest.raises(DataError, match="cannot be read"):
        check_head(DataSpec.messages(tmp_path / "gone.jsonl").on_bad_row("skip"))

import datetime as dt
import json

import datasets
import pytest

from qwenft.errors import SpecError
from qwenft.specs.data import DataSpec
from qwenft.specs.rows import Rows, is_dataset

CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}]


def test_a_list_is_copied_at_once():
    """Changing the list afterwards changes neither the rows nor their digest."""
    rows = json.loads(json.dumps(CHAT))
    held = Rows(rows)
    before = held.digest
    rows[0]["messages"][0]["content"] = "Changed"
    rows.append({})
    assert list(held) == CHAT
    assert held.digest == before == Rows(CHAT).digest


def test_rows_are_compared_by_content():
    """Equal rows are equal and hash alike, and another word, order or number of rows makes a difference."""
    one, two = [{"a": 1}, {"a": 2}], [{"a": 2}, {"a": 1}]
    assert Rows(one) == Rows(tuple(one))
    assert hash(Rows(one)) == hash(Rows(list(one)))
    assert Rows(one) != Rows(two)
    assert Rows(one) != Rows(one[:1])
    assert Rows(one) != one
    assert DataSpec.messages(one) == DataSpec.messages(list(one))


def test_the_keys_of_a_row_keep_their_order():
    """A template shows the arguments of a tool call in their order, so no row is sorted."""
    row = {"messages": [], "arguments": {"to": 1, "from": 2}}
    assert list(next(iter(Rows([row])))["arguments"]) == ["to", "from"]
    assert next(Rows([row]).lines()) == json.dumps(row)


def test_a_data_set_is_kept_and_equals_its_rows():
    """A datasets.Dataset is read when needed, and equals a list of the same rows."""
    data = datasets.Dataset.from_list(CHAT)
    assert is_dataset(data)
    rows = DataSpec.messages(data).source
    assert len(rows) == 1
    assert list(rows) == CHAT
    assert rows == Rows(list(data))
    assert repr(rows) == "<1 rows in memory>"


def test_a_list_is_no_data_set():
    """Lists and strings are told from data sets."""
    assert not is_dataset(CHAT)
    assert not is_dataset("chats.jsonl")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*CHAT, "Hi"], r"expected every row to be a mapping, got str in row 2\n  Fix: DataSpec\.messages\(\[\{"),
        ([None], r"got NoneType in row 1"),
        ([*CHAT, {"when": dt.date(2024, 1, 1)}], r"row 2 holds what JSON cannot: Object of type date"),
        ([{"values": {1}}], r"row 1 holds what JSON cannot: Object of type set"),
        ([{"text": "\ud800"}], r"row 1 holds what JSON cannot: .*surrogates not allowed"),
    ],
)
def test_a_row_that_cannot_be_kept_is_named(rows, message):
    """The number of the row and what is wrong with it are told when the spec is made."""
    with pytest.raises(SpecError, match=message) as caught:
        DataSpec.messages(rows)
    assert caught.value.row == len(rows)

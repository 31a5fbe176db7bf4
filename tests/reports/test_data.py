import html
import re

import pytest

from qwenft.errors import DataError
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from tests.data.conversations import conversation

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "How many cafe\u0301s 👩‍👩‍👧?"},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "There are"}, {"type": "text", "text": " 42", "weight": 2.5}],
        "tool_calls": [{"name": "clock", "arguments": {}}],
    },
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "It is noon."},
]


@pytest.fixture(scope="module")
def preview(dense_checkpoint):
    return DataSpec.messages([{"messages": MESSAGES}, conversation(1)]).preview(ModelSpec(dense_checkpoint), n=1)


def test_every_token_has_its_role_and_weight(preview):
    """The text is whole, each message lies under its role, and what is trained is what the loss takes."""
    (document,) = preview.documents
    assert "".join(token.text for token in document) == (
        "<|im_start|>system\nBe <b>brief</b>.<|im_end|>\n"
        "<|im_start|>user\nHow many cafe\u0301s 👩‍👩‍👧?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nThere are 42\n\n"
        "<tool_call>\n<function=clock>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nIt is noon.<|im_end|>\n"
    )
    by_role = {}
    for token in document:
        by_role[token.role] = by_role.get(token.role, "") + token.text
    assert by_role["tool"] == "\n<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>"
    assert by_role["user"].endswith("👩‍👩‍👧?<|im_end|>")
    trained = {}
    for token in document:
        trained[token.weight] = trained.get(token.weight, "") + token.text
    assert trained[2.5] == " 42"
    assert trained[1.0].startswith("There are\n\n<tool_call>")
    assert trained[1.0].endswith("</tool_call><|im_end|>It is noon.<|im_end|>")


def test_html_shows_the_text_escaped_and_the_weight(preview):
    """What a notebook shows is the text, whatever is in it; another weight than 1 is written at its tokens."""
    page = preview._repr_html_()
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert "Be <b>brief</b>." in shown
    assert "<b>brief" not in page
    assert (
        '<span style="background:rgba(20,180,110,.25);border-bottom:2px solid rgb(20,160,90);font-weight:600;"'
        in page
    )
    assert 'title="weight 2.5"> 42</span>' in page


def test_a_terminal_shows_colours_and_underlines(preview):
    """Without its escapes it is the text, and what is trained is underlined in the colour of its role."""
    printed = str(preview)
    plain = re.sub(r"\033\[[\d;]*m", "", printed)
    assert plain.startswith(
        "system user assistant tool   trained\n\n<|im_start|>system\nBe <b>brief</b>.<|im_end|>"
    )
    assert "\033[32m\033[1;4mIt is noon.<|im_end|>\033[0m" in printed
    assert "\033[34m\n<|im_start|>user\n" in printed


def test_a_preview_of_wrong_data_is_an_error_or_skips(dense_checkpoint):
    """A wrong row stops the preview, unless the data skip it."""
    data = DataSpec.messages([{"messages": []}, conversation(1), conversation(2)])
    with pytest.raises(DataError, match="row 1: 'messages': expected a list"):
        data.preview(str(dense_checkpoint))
    assert len(data.on_bad_row("skip").preview(str(dense_checkpoint)).documents) == 2


def test_data_are_described_in_numbers(dense_checkpoint):
    """Lengths, trained tokens, duplicates, near-empty answers, what templates leave out and rows that are wrong."""
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    thought = {"role": "assistant", "content": "A longer answer.", "reasoning_content": "c"}
    turn = [{"role": "user", "content": "a"}, thought]
    rows = [short, short, {"messages": turn * 2}, {"messages": [*turn, {"role": "critic", "content": "d"}]}]
    found = DataSpec.messages(rows).with_max_length(24).describe(str(dense_checkpoint))
    assert len(found.lengths) == len(found.supervised) == 3
    assert (found.duplicates, found.near_empty, found.lost) == (1, 2, (("reasoning", 1),))
    assert [error.row for error in found.refused] == [4]
    lines = dict(found.rows())
    tokens, trained = found.lengths.sum(), found.supervised.sum()
    assert lines["tokens"] == f"{tokens}, {trained} of them trained ({trained / tokens:.0%})"
    share = found.lengths[2] / found.lengths.sum()
    assert lines["too long"] == f"1 above 24 tokens, with {share:.1%} of all tokens"
    assert lines["left out"] == "reasoning in 1 rows, by the chat template"
    assert "rows in memory, row 4: messages[2]: expected a role of" in str(found)
    assert "expected a role of" in found._repr_html_()
    assert found.plot()._repr_png_().startswith(b"\x89PNG")
    nothing = DataSpec.messages(rows[3:]).describe(str(dense_checkpoint))
    assert nothing.rows()[:2] == [("documents", "0"), ("rows refused", "1")]
    assert "expected a role of" in nothing.rows()[2][1]
    assert nothing.plot()._repr_png_()

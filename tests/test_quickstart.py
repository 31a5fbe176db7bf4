from __future__ import annotations

import json

import pytest

from qwenft import quickstart
from qwenft.errors import DataError


def test_conversations_become_alternating_turns_of_two_people():
    """Consecutive texts of one speaker are joined, and who speaks first is the user."""
    turns = [
        [{"text": "Hi", "sender": "a"}, {"text": "there", "sender": "a"}],
        [{"text": "Hello!", "sender": "b"}],
        [{"text": "  ", "sender": "b"}, {"text": "Bye", "sender": "a"}],
    ]
    assert quickstart._messages(turns) == [
        {"role": "user", "content": "Hi there"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]


def test_the_real_conversations_alternate():
    """Every conversation of the package becomes turns that begin with the user and alternate."""
    conversations = quickstart.chitchat_messages()
    assert len(conversations) > 4000
    for messages in conversations:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)


def test_long_conversations_are_cut_between_exchanges():
    """No turn is lost or cut but a last one without an answer."""
    messages = [
        {"role": role, "content": f"{number} {'x' * 200}"} for number in range(7) for role in ("user", "assistant")
    ]
    cut = quickstart.pieces(messages)
    assert len(cut) > 1
    assert [message for piece in cut for message in piece] == messages
    assert all(piece[0]["role"] == "user" and piece[-1]["role"] == "assistant" for piece in cut)


def test_an_earlier_run_is_kept(tmp_path):
    """A folder that exists is never reused."""
    assert quickstart.free_folder(tmp_path / "runs") == tmp_path / "runs"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs-2").mkdir()
    assert quickstart.free_folder(tmp_path / "runs") == tmp_path / "runs-3"


def test_own_data_and_model_go_through_the_same_path(dense_checkpoint, tmp_path, capsys):
    """With --data and --model a LoRA is trained on them, and the folder holds it."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(40)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--data", str(tmp_path / "own.jsonl"), "--model", str(dense_checkpoint)]
    quickstart.main([*arguments, "--run-dir", str(tmp_path / "run"), "--steps", "2"])
    assert (tmp_path / "run" / "adapter-run" / "adapter" / "adapter_model.safetensors").exists()
    printed = capsys.readouterr().out
    for part in ("role", "held-out loss", "Sample answers", str(tmp_path / "run")):
        assert part in printed


def test_own_data_without_a_model_make_a_base_from_one_half(tmp_path):
    """With --data alone the base is made from one half of the conversations, and the adapter from the other."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(80)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--data", str(tmp_path / "own.jsonl"), "--run-dir", str(tmp_path / "run")]
    quickstart.main([*arguments, "--steps", "1", "--base-steps", "2"])
    halves = [
        [json.loads(line) for line in (tmp_path / "run" / "data" / name).read_text().splitlines()]
        for name in ("base.jsonl", "adapter.jsonl")
    ]
    assert halves == [rows[:40], rows[40:]]


def test_missing_data_is_named(tmp_path):
    """A file that is not there stops the quickstart before anything is made."""
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        quickstart.main(["--data", str(tmp_path / "nowhere.jsonl"), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()

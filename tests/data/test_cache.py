import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qwenft.data.cache import folder, tokenised
from qwenft.data.chat import ChatEncoder
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec
from qwenft.testing import train_tokenizer
from tests.data.conversations import conversation


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setenv("QWENFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(conversation(seed))}\n" for seed in range(30)))
    return path


@pytest.fixture
def data(chats):
    return DataSpec.messages(chats)


def entries(cache):
    return sorted(path.name for path in cache.iterdir())


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        and (a.weights is None) == (b.weights is None)
        and (a.weights is None or np.array_equal(a.weights, b.weights))
        and np.array_equal(a.ends, b.ends)
        and (a.file, a.row, a.lost) == (b.file, b.row, b.lost)
        for a, b in zip(left, right, strict=True)
    )


def test_the_second_reading_gives_the_same_without_rendering(data, encoder, cache, monkeypatch):
    """What comes from the cache is what was encoded: tokens, labels, weights, ends, places and losses."""
    weighted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    for source in (data, DataSpec.messages([conversation(1), {"messages": weighted}, conversation(2)])):
        plain = list(encoder.encode(source))
        first = tokenised(source, encoder)
        assert first.cache == f"written to {cache / first.cache.rpartition('/')[2]}"
        with monkeypatch.context() as patch:
            patch.setattr(ChatEncoder, "encode", None)
            second = tokenised(source, encoder)
        assert second.cache == first.cache.replace("written to", "read from")
        assert same(plain, first.documents)
        assert same(plain, second.documents)


def test_the_key_is_the_content(data, chats, encoder, cache, tmp_path):
    """A copy under another name and other lengths of rows are the same entry, and errors name the file that is read."""
    tokenised(data, encoder)
    (entry,) = entries(cache)
    copy = shutil.copy(chats, tmp_path / "copy.jsonl")
    for other in (DataSpec.messages(copy), data.with_max_length(9, "truncate").pack(99).hold_out(0.5)):
        assert tokenised(other, encoder).cache == f"read from {cache / entry}"
    assert {document.file for document in tokenised(DataSpec.messages(copy), encoder).documents} == {str(copy)}


def test_what_changes_the_tokens_changes_the_key(data, chats, encoder, cache):
    """Content, options, template, tokenizer: each alone makes another entry."""
    tokenised(data, encoder)
    changed = [
        (data.train_on("user"), encoder),
        (data.train_on(turns="last"), encoder),
        (data.train_on(end_of_turn=False), encoder),
        (data.train_on(tool_calls=False), encoder),
        (data.with_thinking("mask"), encoder),
        (data.with_template(enable_thinking=True), encoder),
        (data.with_control_tokens("encode"), encoder),
        (data.on_bad_row("skip"), encoder),
        (DataSpec.messages([chats, chats]), encoder),
    ]
    template = train_tokenizer()
    template.chat_template += " "
    vocabulary = train_tokenizer(vocabulary=512)
    changed += [(data, ChatEncoder(template)), (data, ChatEncoder(vocabulary))]
    for number, (other, by) in enumerate(changed, start=2):
        tokenised(other, by)
        assert len(entries(cache)) == number, number
    content = chats.read_text()
    chats.write_text(content.replace("the", "teh"))
    tokenised(data, encoder)
    assert len(entries(cache)) == len(changed) + 2


def test_skipped_rows_are_remembered_with_the_name_of_the_file(chats, encoder, tmp_path):
    """Errors come back from the cache word for word, but for the file's name where that is another."""
    chats.write_text(f"{chats.read_text()}{{}}\nbroken\n")
    data = DataSpec.messages(chats).on_bad_row("skip")
    first, second = tokenised(data, encoder), tokenised(data, encoder)
    assert second.cache.startswith("read")
    assert [(str(e), e.file, e.row) for e in second.skipped] == [(str(e), e.file, e.row) for e in first.skipped]
    assert [e.row for e in second.skipped] == [31, 32]
    moved = chats.rename(tmp_path / "moved.jsonl")
    third = tokenised(DataSpec.messages(moved).on_bad_row("skip"), encoder)
    assert third.cache.startswith("read")
    assert [str(e) for e in third.skipped] == [str(e).replace("chats.jsonl", "moved.jsonl") for e in first.skipped]


@pytest.mark.parametrize("name", ["index.json", "input_ids", "labels", "rows"])
def test_a_damaged_entry_is_made_again(data, encoder, cache, name):
    """An entry that is not whole is never taken for one."""
    plain = list(encoder.encode(data))
    tokenised(data, encoder)
    (entry,) = entries(cache)
    content = (cache / entry / name).read_bytes()
    (cache / entry / name).write_bytes(content[:-4])
    assert same(tokenised(data, encoder).documents, plain)
    assert tokenised(data, encoder).cache.startswith("read")
    (cache / entry / name).unlink()
    assert same(tokenised(data, encoder).documents, plain)
    assert tokenised(data, encoder).cache.startswith("read")


def test_without_a_place_to_write_the_data_are_read_all_the_same(data, encoder, tmp_path, monkeypatch):
    """The report says why there is no entry."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWENFT_CACHE", str(tmp_path / "file" / "below"))
    found = tokenised(data, encoder)
    assert len(found.documents) == 30
    assert found.cache == f"in memory alone: {tmp_path}/file/below cannot be written: Not a directory"


def test_the_place_is_the_users_cache(monkeypatch, tmp_path):
    """QWENFT_CACHE, else XDG_CACHE_HOME, else ~/.cache."""
    monkeypatch.delenv("QWENFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "qwenft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "qwenft"


def test_a_file_that_changes_meanwhile_is_an_error(data, chats, encoder, cache, monkeypatch):
    """Nothing is kept under the key of a content that was not the one that was read."""
    encode = ChatEncoder.encode

    def changed_before(self, *args):
        chats.write_text(chats.read_text() + "\n")
        return encode(self, *args)

    monkeypatch.setattr(ChatEncoder, "encode", changed_before)
    with pytest.raises(DataError, match="changed while it was read"):
        tokenised(data, encoder)
    assert not cache.exists()


BUILD = """
import sys
from qwenft.data.cache import tokenised
from qwenft.data.chat import ChatEncoder
from qwenft.specs.data import DataSpec
from qwenft.testing import train_tokenizer
encoder = ChatEncoder(train_tokenizer())
print("ready", flush=True)
sys.stdin.readline()
print(len(tokenised(DataSpec.messages(sys.argv[1]), encoder).documents))
"""


def builder(path):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_build_at_once(chats, cache, data, encoder):
    """Both get all documents, and one whole entry is left."""
    builders = [builder(chats) for _ in range(2)]
    for process in builders:
        assert process.stdout.readline() == "ready\n"
    for process in builders:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in builders]
    assert outputs == ["30\n", "30\n"]
    assert len(entries(cache)) == 1
    assert tokenised(data, encoder).cache.startswith("read")


@pytest.mark.long
def test_a_build_that_is_killed_leaves_nothing_that_is_taken(chats, cache, data, encoder):
    """Whenever the process dies, the next reading gives all documents; what it left is cleared away in time."""
    plain = list(encoder.encode(data))
    for wait in (0.0, 0.01, 0.02, 0.03, 0.04, 0.06):
        with builder(chats) as process:
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        assert same(tokenised(data, encoder).documents, plain)
        shutil.rmtree(cache)
    abandoned = cache / ".building-old"
    abandoned.mkdir(parents=True)
    os.utime(abandoned, (0, 0))
    (cache / ".building-new").mkdir()
    tokenised(data, encoder)
    assert ".building-new" in entries(cache)
    assert not abandoned.exists()

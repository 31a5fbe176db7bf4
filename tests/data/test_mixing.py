"""Data that are mixed into others."""

import math
from collections import Counter

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenft.data.corpus import read_corpus
from qwenft.data.document import Document
from qwenft.data.stream import MapStream, Place
from qwenft.errors import DataError, SpecError
from qwenft.reports.data import describe, preview
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.training import TrainingSpec


def chat(answer):
    return {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": answer}]}


CHATS = DataSpec.messages([chat(f"number {n}") for n in range(20)])
NOTES = DataSpec.text([{"text": f"note {n}"} for n in range(8)])


@pytest.fixture
def read(encoder):
    return lambda data, **training: read_corpus(data, TrainingSpec(**training), encoder)


def texts(encoder, stream, epoch=0):
    """What an epoch trains on."""
    return [encoder.tokenizer.decode(d.input_ids) for _, row in stream.rows_from(Place(epoch)) for d in row]


def test_each_part_is_read_in_its_own_format(read, encoder):
    """Mixed data keep their format and masks, and take the lengths and rows of the whole."""
    corpus = read(CHATS.mix(NOTES).with_max_length(64).pack())
    seen = texts(encoder, corpus.train)
    assert sum(text.startswith("note") for text in seen) == 8
    assert sum(text.startswith("<|im_start|>user") for text in seen) == 20
    assert corpus.report.documents == corpus.report.rows == 28
    note = next(d for d in corpus.train.documents if d.supervised == len(d) - 1)
    assert encoder.tokenizer.decode(note.input_ids).startswith("note")


@pytest.mark.parametrize("times", [0.25, 0.5, 1, 1.5, 3])
def test_an_epoch_takes_a_document_so_many_times(read, encoder, times):
    """Every epoch takes as much of a part, over the epochs every document of it as often, and the others once."""
    train = read(CHATS.mix(NOTES, times)).train
    total = Counter()
    for epoch in range(4):
        seen = Counter(texts(encoder, train, epoch))
        notes = {text: count for text, count in seen.items() if text.startswith("note")}
        assert sum(notes.values()) == 8 * times
        assert sum(seen.values()) - sum(notes.values()) == len(seen) - len(notes) == 20
        total.update(notes)
    assert set(total.values()) == {4 * times}


def test_the_seed_decides_which_are_taken(read, encoder):
    """Another seed takes another quarter of the documents in the first epoch."""
    first = {frozenset(texts(encoder, read(CHATS.mix(NOTES, 0.25), seed=seed).train)) for seed in range(4)}
    assert len(first) > 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 4), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 3))
def test_any_numbers_of_times(shares, count, seed):
    """After any number of epochs a document was taken as often as its share says, rounded up or down."""
    ids = np.arange(3, dtype=np.int32)
    documents = [
        Document(input_ids=ids, labels=ids, file="a", row=len(shares) * n + part, times=times)
        for n in range(count)
        for part, times in enumerate(shares)
    ]
    stream = MapStream(documents, capacity=8, packed=True, seed=seed)
    taken = Counter()
    for epoch in range(5):
        taken.update(document for row in stream.rows(epoch) for document in row)
    for number, document in enumerate(documents):
        assert math.floor(5 * document.times) <= taken[number] <= math.ceil(5 * document.times)


def test_what_is_held_out_is_of_the_whole(read, encoder):
    """A fraction is held out of all parts together, and trained in no epoch."""
    corpus = read(CHATS.mix(NOTES, 2).hold_out(0.5))
    held = set(texts(encoder, corpus.held_out))
    assert corpus.report.held_out == 14
    assert {text.startswith("note") for text in held} == {True, False}
    for epoch in range(3):
        assert not held & set(texts(encoder, corpus.train, epoch))


def test_the_whole_says_how_long_documents_may_be(read):
    """The length policy of the whole is that of every part."""
    long = DataSpec.text([{"text": "word " * 90}])
    assert read(CHATS.mix(long).with_max_length(64)).report.dropped == 1
    assert read(CHATS.mix(long).with_max_length(64, "split")).report.split == 1


def test_how_full_rows_are_counts_what_is_taken(read):
    """Rows that hold a document twice are as full as they are."""
    corpus = read(CHATS.mix(NOTES, 4).with_max_length(32).pack())
    rows = [sum(map(len, row)) for _, row in corpus.train.rows_from(Place())]
    assert corpus.report.fill == sum(rows) / (32 * len(rows))
    assert corpus.report.tokens < sum(rows)


def test_the_parts_of_one_another_are_told_apart(read, tmp_path):
    """A wrong row of mixed data is named with its source."""
    path = tmp_path / "notes.jsonl"
    path.write_text('{"words": "x"}\n')
    with pytest.raises(DataError, match=r"notes\.jsonl, row 1: "):
        read(CHATS.mix(DataSpec.text(path)))


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        (NOTES.pack(), "packed"),
        (NOTES.with_max_length(64), "max_length"),
        (NOTES.with_max_length(2048, "split", 8), "overflow, overlap"),
        (NOTES.hold_out(0.5), "held_out"),
        (NOTES.mix(CHATS), "mixed"),
        (NOTES.stream(), "window"),
    ],
)
def test_what_the_whole_decides_is_not_said_of_a_part(other, fields):
    """Lengths, packing, hold-out and windows of mixed data would be ignored, and are refused."""
    with pytest.raises(SpecError, match=rf"^DataSpec\.mix: {fields} of the other data would not be used\n  Fix: "):
        CHATS.mix(other)


@pytest.mark.parametrize("times", [0, -1, math.inf, True, "half"])
def test_a_share_is_a_number_above_zero(times):
    """How often is a positive number."""
    with pytest.raises(SpecError, match=r"DataSpec\.mixed: expected pairs of a DataSpec and a number above 0"):
        CHATS.mix(NOTES, times)
    with pytest.raises(SpecError, match=r"DataSpec\.mixed: "):
        attrs.evolve(CHATS, mixed=(("notes.jsonl", 1.0),))


def test_preview_and_description_show_every_part(dense_checkpoint):
    """The first documents of each part are shown, and all are described."""
    data = CHATS.mix(NOTES, 0.5)
    model = ModelSpec(dense_checkpoint)
    shown = preview(data, model, 2).documents
    assert [document[0].role for document in shown] == ["user", "user", "text", "text"]
    assert len(describe(data, model).lengths) == 28

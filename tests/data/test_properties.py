"""What holds for all data: masks, splitting, packing, and going on in the middle of an epoch."""

import itertools
import unicodedata

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenft.data.chat import ChatEncoder
from qwenft.data.document import Document
from qwenft.data.masking import IGNORED
from qwenft.data.packing import pack
from qwenft.data.stream import MapStream, Place
from qwenft.specs.data import DataSpec
from qwenft.testing import train_tokenizer

ENCODER = ChatEncoder(train_tokenizer())
FAST = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Any text but what means something to templates: control tokens, and the tags of reasoning and of tools' results.
SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not any(mark in text for mark in ("<|", "think>", "tool_response>"))
)


@st.composite
def conversations(draw):
    system = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    turns = []
    for _ in range(draw(st.integers(1, 4))):
        answer = {"role": "assistant", "content": draw(SAID), "train": draw(st.sampled_from([None, True, False]))}
        turns += [{"role": "user", "content": draw(SAID)}, answer]
    return [*system, *turns]


@FAST
@given(conversations())
def test_every_answer_is_trained_to_the_character_and_nothing_else(messages):
    """Whatever people write, the trained runs are the answers that are to be trained, each with its end."""
    (document,) = ENCODER.encode(DataSpec.messages([{"messages": messages}]))
    text = ENCODER.tokenizer.apply_chat_template(messages, tokenize=False)
    assert ENCODER.tokenizer.decode(document.input_ids) == unicodedata.normalize("NFC", text)
    groups = itertools.groupby(document.labels.tolist(), key=lambda label: label != IGNORED)
    runs = [ENCODER.tokenizer.decode(list(labels)) for trained, labels in groups if trained]
    answers = [m for m in messages if m["role"] == "assistant" and m["train"] is not False]
    assert runs == [unicodedata.normalize("NFC", f"{m['content'].strip()}<|im_end|>") for m in answers]


@FAST
@given(st.data())
def test_pieces_train_each_token_once(data):
    """However long the messages, the rows and the overlap: pieces fit, and train what the whole does in its order."""
    ends = np.cumsum(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12)))
    total = int(ends[-1]) + data.draw(st.integers(0, 5))
    ids = np.arange(total, dtype=np.int32)
    labels = np.full(total, IGNORED, dtype=np.int32)
    trained = np.asarray(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    labels[:-1][trained[:-1]] = ids[1:][trained[:-1]]
    document = Document(input_ids=ids, labels=labels, file="a", row=1, ends=ends.astype(np.int32))
    length, overlap = data.draw(st.integers(2, 50)), data.draw(st.integers(0, 60))
    pieces = list(document.split(length, overlap))
    assert max(map(len, pieces)) <= length
    found = [label for piece in pieces for label in piece.labels.tolist() if label != IGNORED]
    # Where a piece begins at a message without context, nothing stands before its first token to predict it.
    first = {int(piece.input_ids[0]) for piece in pieces}
    expected = [label for label in labels.tolist() if label != IGNORED]
    assert [label for label in expected if label not in first] == [label for label in found if label not in first]
    assert len(found) == len(set(found))
    for piece in pieces:
        assert (np.diff(piece.input_ids) == 1).all()
    covered = np.concatenate([piece.input_ids for piece in pieces])
    assert set(covered.tolist()) == set(ids.tolist())


@FAST
@given(st.lists(st.integers(1, 64), max_size=300), st.integers(64, 200), st.integers(0, 5))
def test_bins_hold_every_document_once_and_are_full(lengths, capacity, seed):
    """No bin overflows, none could take another's documents, and the same seed gives the same bins."""
    bins = pack(lengths, capacity, seed=seed)
    assert sorted(document for documents in bins for document in documents) == list(range(len(lengths)))
    loads = sorted(sum(lengths[document] for document in documents) for documents in bins)
    assert not loads or loads[-1] <= capacity
    assert len(loads) < 2 or loads[0] + loads[1] > capacity
    assert pack(lengths, capacity, seed=seed) == bins


@FAST
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.booleans(), st.integers(0, 3), st.data())
def test_an_epoch_goes_on_where_it_stopped(lengths, packed, epoch, data):
    """The steps before and behind any place are those of the whole epoch, each document once."""
    ids = [np.arange(length, dtype=np.int32) for length in lengths]
    documents = [Document(input_ids=one, labels=one, file="a", row=row) for row, one in enumerate(ids)]
    stream = MapStream(
        documents, capacity=40, packed=packed, tokens_per_step=data.draw(st.sampled_from([None, 80]))
    )
    steps = list(stream.batches(Place(epoch)))
    whole = [[batch.documents for batch in step] for step in steps]
    done = data.draw(st.integers(0, len(steps)))
    place = steps[done - 1][-1].following if done else Place(epoch)
    assert [[batch.documents for batch in step] for step in stream.batches(place)] == whole[done:]
    rows = sorted(row for step in whole for documents in step for _, row in documents)
    assert rows == list(range(len(lengths)))

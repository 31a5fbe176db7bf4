from itertools import pairwise

import attrs
import numpy as np
import pytest
import torch

from qwenft.data.masking import IGNORED
from qwenft.data.stream import Batch, MapStream, Place


@pytest.fixture
def documents(document):
    lengths = [3, 40, 2, 17, 64, 5, 33, 8, 21, 12, 50, 7]
    return [document(length, first=1000 * row, row=row) for row, length in enumerate(lengths, start=1)]


def stream(documents, **options):
    return MapStream(documents, **{"capacity": 64, "packed": True, "seed": 5, **options})


def rows_of(step):
    """The numbers of the documents of every row of a step."""
    return [[document.row for document in row] for row in step]


START = Place()


def steps_of(source, place=START):
    return [rows_of(step) for _, step in source.steps(place)]


def test_a_batch_is_its_documents_one_after_the_other(document):
    """Tokens and labels of a row are those of its documents, and the layout says where each begins."""
    one, two = document(5, first=10, row=7), document(3, first=90, row=9)
    batch = Batch.from_documents([one, two])
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 90, 91, 92]
    assert batch.labels.tolist() == [-100, -100, 13, 14, -100, -100, 92, -100]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert list(batch.layout.lengths) == [5, 3]
    assert batch.documents == (("chats.jsonl", 7), ("chats.jsonl", 9))
    assert batch.tokens == 3.0


def test_a_label_is_the_token_behind_its_position(documents):
    """In every row, each trained position predicts the next token of its own document, and no last one is trained."""
    for step in stream(documents).batches():
        for batch in step:
            trained = (batch.labels != IGNORED).nonzero().flatten()
            assert len(trained)
            assert torch.equal(batch.labels[trained], batch.input_ids[trained + 1])
            assert torch.equal(batch.layout.document_ids[trained], batch.layout.document_ids[trained + 1])


def test_weights_count_at_supervised_positions_only(document):
    """The tokens of a batch are the sum of the weights where something is trained."""
    batch = Batch.from_documents([document(4)])
    weighted = Batch(batch.input_ids, batch.labels, batch.layout, weights=torch.tensor([9.0, 9.0, 0.5, 9.0]))
    assert batch.labels.tolist() == [-100, -100, 3, -100]
    assert weighted.tokens == 0.5
    moved = weighted.to("cpu")
    assert torch.equal(moved.weights, weighted.weights)
    assert torch.equal(moved.labels, batch.labels)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens_per_step", [None, 64, 130, 10_000])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_document_is_seen_once_an_epoch(documents, packed, tokens_per_step, epoch):
    """Whatever rows and steps are made of them, each document comes once, in a row that holds it."""
    steps = [
        step for _, step in stream(documents, packed=packed, tokens_per_step=tokens_per_step).steps(Place(epoch))
    ]
    seen = [number for step in steps for row in rows_of(step) for number in row]
    assert sorted(seen) == [document.row for document in documents]
    for step in steps:
        rows = [sum(map(len, row)) for row in step]
        assert max(rows) <= 64
        assert step
        if tokens_per_step is None:
            assert len(step) == 1
        else:
            assert sum(rows) <= tokens_per_step


def test_steps_are_as_full_as_they_can_be(documents):
    """The first row of a step would not have fitted the step before it."""
    steps = stream(documents, packed=False, tokens_per_step=100).steps()
    sizes = [[sum(map(len, row)) for row in step] for _, step in steps]
    assert len(sizes) > 2
    assert all(sum(before) + after[0] > 100 for before, after in pairwise(sizes))


@pytest.mark.parametrize("tokens_per_step", [None, 130])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_every_step(documents, ranks, tokens_per_step):
    """All ranks have as many micro-batches in a step, together its rows and its tokens, each once."""
    sources = [stream(documents, tokens_per_step=tokens_per_step, rank=rank, ranks=ranks) for rank in range(ranks)]
    steps = [step for _, step in sources[0].steps()]
    by_rank = [list(source.batches()) for source in sources]
    assert [len(of_rank) for of_rank in by_rank] == [len(steps)] * ranks
    for number, step in enumerate(steps):
        shares = [of_rank[number] for of_rank in by_rank]
        assert len({len(share) for share in shares}) == 1
        assert len({batch.following for share in shares for batch in share}) == 1
        trained = [batch for share in shares for batch in share if batch.tokens]
        seen = sorted(tuple(row for _, row in batch.documents) for batch in trained)
        assert seen == sorted(map(tuple, rows_of(step)))


@pytest.mark.parametrize("tokens_per_step", [64, 130])
def test_steps_of_a_token_budget_do_not_depend_on_the_ranks(documents, tokens_per_step):
    """With tokens_per_step the same rows are a step on any number of ranks."""
    one, three = (stream(documents, tokens_per_step=tokens_per_step, ranks=ranks) for ranks in (1, 3))
    assert steps_of(one) == steps_of(three)


def test_another_number_of_ranks_goes_on_where_the_others_stopped(documents):
    """Behind any step of two ranks, three take the rows that are left, each once and in their order."""
    two, three = (stream(documents, ranks=ranks) for ranks in (2, 3))
    order = [row for step in steps_of(two, Place(1)) for row in step]
    done = 0
    for place, step in two.steps(Place(1)):
        done += len(step)
        assert [row for step in steps_of(three, place) for row in step] == order[done:]


def test_unpacked_rows_hold_one_document(documents):
    """Without packing a row is a document, in a shuffled order."""
    rows = stream(documents, packed=False).rows()
    assert all(len(row) == 1 for row in rows)
    assert [row[0] for row in rows] != list(range(len(documents)))


@pytest.mark.parametrize("packed", [True, False])
def test_seed_and_epoch_decide_the_order(documents, packed):
    """The same seed and epoch give the same rows, and any other seed or epoch gives others."""
    one = stream(documents, packed=packed)
    assert one.rows(3) == stream(documents, packed=packed).rows(3)
    assert one.rows(3) != one.rows(4)
    assert one.rows(3) != stream(documents, packed=packed, seed=6).rows(3)


def test_batches_are_the_steps(documents):
    """batches() makes a micro-batch of every row of every step, in order."""
    source = stream(documents, tokens_per_step=130)
    for (place, rows), batches in zip(source.steps(Place(2)), source.batches(Place(2)), strict=True):
        for row, batch in zip(rows, batches, strict=True):
            expected = np.concatenate([document.input_ids for document in row])
            assert batch.input_ids.tolist() == expected.tolist()
            assert batch.following == place


def test_weights_of_a_document_are_those_of_its_tokens(document):
    """Documents without weights weigh 1 beside those that have some; without any there is no tensor of them."""
    plain, weighted = document(3), attrs.evolve(document(4), weights=np.float32([1, 0.5, 2, 1]))
    batch = Batch.from_documents([plain, weighted])
    assert batch.weights.tolist() == [1, 1, 1, 1, 0.5, 2, 1]
    assert [None if one.weights is None else one.weights.tolist() for one in batch.split()] == [
        [1, 1, 1],
        [1, 0.5, 2, 1],
    ]
    assert Batch.from_documents([plain, plain]).weights is None

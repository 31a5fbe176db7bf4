import random
import time

import pytest

from qwenft.data.packing import pack


def first_fit_in_order(lengths, capacity):
    """The number of bins when each document goes, in order, into the first bin that has room."""
    space = []
    for length in lengths:
        for place, left in enumerate(space):
            if left >= length:
                space[place] -= length
                break
        else:
            space.append(capacity - length)
    return len(space)


def drawn(count, capacity, seed=0):
    draw = random.Random(seed)
    return [min(capacity, max(1, int(draw.lognormvariate(5, 1)))) for _ in range(count)]


@pytest.mark.parametrize(
    ("lengths", "capacity"),
    [
        ([], 8),
        ([1], 1),
        ([8] * 5, 8),
        ([1] * 100, 7),
        ([5, 5, 5, 5], 8),
        ([3, 5, 8, 1, 7, 2, 6, 4], 8),
        (drawn(2000, 2048), 2048),
    ],
)
def test_every_document_is_in_one_bin_that_holds_it(lengths, capacity):
    """No document is lost or doubled, no bin is empty, and none holds more than its capacity."""
    bins = pack(lengths, capacity, seed=3)
    assert sorted(document for documents in bins for document in documents) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in documents) <= capacity for documents in bins)


def test_the_seed_decides():
    """The same seed gives the same bins, another seed other neighbours."""
    lengths = drawn(500, 2048)
    assert pack(lengths, 2048, seed=1) == pack(lengths, 2048, seed=1)
    one, two = pack(lengths, 2048, seed=1), pack(lengths, 2048, seed=2)
    assert one != two
    alike = [7] * 40
    neighbours = [{frozenset(documents) for documents in pack(alike, 28, seed=seed)} for seed in (1, 2)]
    assert neighbours[0] != neighbours[1]


def test_bins_do_not_come_by_length():
    """The longest documents are packed first and not trained on first."""
    lengths = list(range(1, 101))
    order = [max(lengths[document] for document in documents) for documents in pack(lengths, 100)]
    assert order != sorted(order, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_it_wastes_less_than_first_fit_in_order(seed):
    """Fewer rows are needed than by filling them in the order of the file, and few more than the tokens need."""
    lengths = drawn(1000, 1024, seed)
    bins = len(pack(lengths, 1024, seed=seed))
    assert bins < first_fit_in_order(lengths, 1024)
    assert bins <= 1.02 * sum(lengths) / 1024 + 1


def test_ten_thousand_documents_take_no_time():
    """Packing is far from quadratic: 10,000 documents take well under a second."""
    lengths = drawn(10_000, 2048)
    started = time.process_time()
    pack(lengths, 2048)
    assert time.process_time() - started < 1.0


def test_a_document_that_fits_no_bin_is_refused():
    """The length policy comes first; what is too long here is refused with both numbers."""
    with pytest.raises(ValueError, match="expected at most the capacity of 8 tokens, got 9"):
        pack([3, 9], 8)

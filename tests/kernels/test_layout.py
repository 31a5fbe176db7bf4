import pytest
import torch

from qwenft.kernels.layout import SequenceLayout


def test_lengths_give_boundaries_documents_and_positions():
    """Boundaries, document ids and positions follow from the lengths."""
    layout = SequenceLayout.from_lengths([3, 1, 2])
    assert layout.starts == (0, 3, 4, 6)
    assert layout.total == 6
    assert layout.max_length == 3
    assert len(layout) == 3
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert layout.document_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert layout.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert repr(layout) == "SequenceLayout(lengths=[3, 1, 2], device='cpu')"


def test_boundaries_give_lengths_back():
    """from_cu_seqlens is the inverse of cu_seqlens, for lists and tensors."""
    layout = SequenceLayout([5, 1, 64])
    assert SequenceLayout.from_cu_seqlens(layout.cu_seqlens, total=70).lengths == (5, 1, 64)
    assert SequenceLayout.from_cu_seqlens([0, 15]).lengths == (15,)


@pytest.mark.parametrize("boundaries", [[0], [1, 4], [0, 4, 4], [0, 5, 3], []])
def test_boundaries_that_do_not_increase_from_zero_are_refused(boundaries):
    """Boundaries must start at 0 and increase."""
    with pytest.raises(ValueError, match="cu_seqlens: expected 0 first and then increasing"):
        SequenceLayout.from_cu_seqlens(boundaries)


def test_boundaries_that_miss_tokens_are_refused():
    """Boundaries must end at the stream's length where it is given."""
    with pytest.raises(ValueError, match="expected to end at the 9 tokens of the stream, got 8"):
        SequenceLayout.from_cu_seqlens([0, 8], total=9)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_empty_documents_are_refused(lengths):
    """A layout has at least one document, and a document at least one token."""
    with pytest.raises(ValueError, match="lengths: every document needs at least one token"):
        SequenceLayout(lengths)


@pytest.mark.parametrize("asked", [[1], [0, 1], [4, 1]])
def test_query_lengths_lie_within_the_documents(asked):
    """Each document asks with one to all of its tokens."""
    with pytest.raises(ValueError, match="query_lengths: expected 1 to the document's length for each"):
        SequenceLayout([3, 2], query_lengths=asked)


def test_all_tokens_ask_unless_told():
    """query_lengths are the lengths where they are not given."""
    assert SequenceLayout([3, 2]).query_lengths == (3, 2)
    assert SequenceLayout([3, 2], query_lengths=[1, 2]).query_lengths == (1, 2)


def test_derived_values_are_made_once():
    """What a kernel derives from a layout is computed at first use and kept."""
    layout, calls = SequenceLayout([3]), []
    assert layout.derived("plan", lambda: calls.append(1) or "made") == "made"
    assert layout.derived("plan", lambda: calls.append(1) or "again") == "made"
    assert calls == [1]
    assert layout.cu_seqlens is layout.cu_seqlens


def test_moving_keeps_lengths_and_queries():
    """to() gives the same layout elsewhere, and itself where it is there already."""
    layout = SequenceLayout([3, 2], query_lengths=[1, 2])
    moved = layout.to("meta")
    assert moved.device == torch.device("meta")
    assert (moved.lengths, moved.query_lengths) == (layout.lengths, layout.query_lengths)
    assert layout.to("cpu") is layout

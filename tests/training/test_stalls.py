"""Which of several processes is taken for the one that the others wait for."""

import pytest
from torch.distributed import DistBackendError, HashStore

from qwenft.training import stalls
from qwenft.training.ranks import ALONE, Ranks
from qwenft.training.stalls import Pulse, is_of_collective


@pytest.mark.parametrize(
    ("places", "suspects"),
    [
        ([(4, True), (4, False), (4, True)], {1}),
        ([(4, True), (4, False), (4, False)], {1, 2}),
        ([(4, False), (4, False), (4, False)], set()),  # all compute
        ([(4, True), (4, True), (4, True)], set()),  # a collective is slow
        ([(4, True), (3, False), (4, True)], {1}),
        ([(5, False), (4, True), (5, True)], set()),  # nobody is behind who is at something else
    ],
)
def test_those_who_are_behind_at_something_else(monkeypatch, places, suspects):
    """Of those in the earliest step, the ones that stay in code of their own, unless all do."""
    monkeypatch.setattr(stalls, "PATIENCE", 0.0)
    monkeypatch.setattr(Ranks, "store", HashStore())
    pulse = Pulse(Ranks(0, len(places)), print)
    for rank, (step, waits) in enumerate(places):
        pulse._seen[rank] = {"step": step, "at": "data", "waits": waits}
    assert set(pulse.suspects()) == suspects
    monkeypatch.setattr(stalls, "PATIENCE", 1000.0)  # all have only just come to where they are
    assert pulse.suspects() == {}


def test_those_who_give_no_sign(monkeypatch):
    """Silence is stronger than what was said before it."""
    monkeypatch.setattr(stalls, "BEAT", 0.0)
    monkeypatch.setattr(Ranks, "store", HashStore())
    pulse = Pulse(Ranks(0, 2), print)
    pulse._seen = {rank: {"step": 1, "at": "data", "waits": rank == 0} for rank in range(2)}
    pulse._heard[0] += 1000
    assert "has given no sign of life" in pulse.suspects()[1]
    assert set(pulse.suspects()) == {1}


def test_one_alone_is_never_suspected(monkeypatch):
    """Of a run in one process nothing is watched."""
    monkeypatch.setattr(stalls, "BEAT", 0.0)
    with Pulse(ALONE, pytest.fail) as pulse:
        assert pulse.suspects() == {}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_is_an_error_of_others(error, expected):
    """An error of one's own is never blamed on another process."""
    assert is_of_collective(error) is expected

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwenft.training.live_bytes import FORWARD, LiveBytes


def peak(live):
    """The most of all components together."""
    return sum(live.peak({}, {}).by_component.values())


def test_what_is_gone_is_gone():
    """A tensor counts from its operation until nobody holds its storage, whatever views there were."""
    live = LiveBytes()
    with FakeTensorMode(), live:
        x = torch.ones(100)
        view = x[50:]
        del x
        for _ in range(3):
            y = view + 1
            del y
    assert peak(live) == 400 + 200


def test_views_of_a_storage_do_not_keep_it():
    """What is made of a storage, as results that are made again are, goes with it."""
    live = LiveBytes()
    with FakeTensorMode(), live:
        for _ in range(5):
            storage = (torch.ones(100) * 2).untyped_storage()
            x = torch.empty(0).set_(storage, 0, (10, 10), (10, 1))
            del storage, x
    assert peak(live) == 800


def test_storages_that_are_resized_come_and_go():
    """As those of weights do that are gathered for a while."""
    live = LiveBytes()
    with FakeTensorMode(), live:
        weight = torch.ones(1000)
        live.begin(FORWARD, "without it")
        weight.untyped_storage().resize_(0)
        other = torch.ones(500)
        live.begin(FORWARD, "with it")
        weight.untyped_storage().resize_(4000)
        del other
    assert [live.sizes[event] for segment in live.segments[:2] for event in segment.events if event >= 0] == [
        4000,
        2000,
    ]
    assert peak(live) == 6000
    assert torch.ones(3).untyped_storage().resize_(0).nbytes() == 0  # and torch is left as it was

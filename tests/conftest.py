from __future__ import annotations

import signal

import pytest
import torch

from qwenft.testing import tiny_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Run every test on one thread, so that two workers do not wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Let Ctrl-C reach the tests, which a shell that starts them in the background would have them ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep tokenised data of tests to the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory):
    """A tiny dense checkpoint whose scan remembers, so that leaks show."""
    return tiny_checkpoint(tmp_path_factory.mktemp("dense") / "checkpoint", "dense", a_log=-3.0)


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory):
    """A tiny mixture of experts whose scan remembers, so that leaks show."""
    return tiny_checkpoint(tmp_path_factory.mktemp("moe") / "checkpoint", "moe", a_log=-3.0)


@pytest.fixture(params=["dense", "moe"])
def checkpoint(request, dense_checkpoint, moe_checkpoint):
    """Both tiny checkpoints, one after the other."""
    return {"dense": dense_checkpoint, "moe": moe_checkpoint}[request.param]

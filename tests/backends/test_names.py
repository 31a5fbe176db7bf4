import subprocess
import sys

import pytest

from qwenft import backends
from qwenft.capabilities import AttentionBackend, LinearAttentionBackend
from qwenft.errors import SpecError


@pytest.mark.parametrize("name", backends.FULL_NAMES)
def test_full_gives_the_backend_of_that_name(name):
    """Every full-attention name gives a backend that bears it and declares itself."""
    backend = backends.full(name)
    assert isinstance(backend, AttentionBackend)
    assert backend.name == name
    assert isinstance(backend.supports_packing, bool)
    assert isinstance(backend.uses_flash_lib, bool)


@pytest.mark.parametrize("name", backends.LINEAR_NAMES)
def test_linear_gives_the_backend_of_that_name(name):
    """Every linear-attention name gives a backend that bears it and declares itself."""
    backend = backends.linear(name)
    assert isinstance(backend, LinearAttentionBackend)
    assert backend.name == name
    assert isinstance(backend.supports_packing, bool)
    assert backend.uses_flash_lib is False


def test_backends_compare_by_class_and_fields():
    """Two backends of one class and the same fields are equal, of different classes not."""
    assert backends.full("sdpa") == backends.SdpaAttention()
    assert hash(backends.full("sdpa")) == hash(backends.SdpaAttention())
    assert backends.full("sdpa") != backends.full("eager")
    assert repr(backends.linear("torch")) == "TorchDeltaRule()"


def test_an_unknown_name_gets_the_known_ones_and_the_nearest():
    """A misspelt name is answered with the names there are and the one that was meant."""
    with pytest.raises(
        SpecError, match=r"attention\.full: no backend is called 'sdp'; known names: eager, sdpa"
    ) as full:
        backends.full("sdp")
    assert full.value.fix == 'full="sdpa"'
    assert full.value.got == "sdp"
    assert "sdpa" in full.value.expected
    with pytest.raises(SpecError, match=r"attention\.linear: no backend is called 'torsch'.*torch, ") as linear:
        backends.linear("torsch")
    assert linear.value.fix == 'linear="torch"'


def test_a_name_like_no_other_gets_auto():
    """A name that resembles none is answered with "auto"."""
    with pytest.raises(SpecError, match='Fix: full="auto"'):
        backends.full("zzz")


def test_constructing_backends_loads_no_torch():
    """Recipes construct backends by name, and must stay light."""
    code = (
        "import sys; from qwenft import backends\n"
        "for name in backends.FULL_NAMES: backends.full(name)\n"
        "for name in backends.LINEAR_NAMES: backends.linear(name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

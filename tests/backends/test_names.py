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
    assert backend.uses_flash_lib is name.startswith("flash_attention_")


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


@pytest.mark.parametrize(("slot", "name", "meant"), [("full", "sdpaa", "sdpa"), ("linear", "torsch", "torch")])
def test_an_unknown_name_gets_the_known_ones_and_the_nearest(slot, name, meant):
    """A misspelt name is answered with the slot, the name that was meant and the names there are."""
    with pytest.raises(
        SpecError,
        match=rf"attention\.{slot}: no backend is called '{name}'.*'{meant}'.*Known: ",
    ) as found:
        getattr(backends, slot)(name)
    assert found.value.got == name
    assert meant in found.value.expected


@pytest.mark.parametrize(
    ("slot", "name", "meant"),
    [
        ("full", "sdp", "sdpa"),
        ("full", "flash", "flash_attention_2"),
        ("full", "fa2", "flash_attention_2"),
        ("full", "fa3", "flash_attention_3"),
        ("full", "flex", "flex_attention"),
        ("full", "xformers", "sdpa"),
        ("vision", "sdp", "sdpa"),
        ("linear", "stock", "transformers"),
    ],
)
def test_a_short_name_of_others_is_refused_with_the_right_one(slot, name, meant):
    """An alias is never taken: the message and the fix say what to write."""
    with pytest.raises(
        SpecError, match=rf"attention\.{slot}: no backend is called '{name}'; its name here is '{meant}'\. Known: "
    ) as found:
        backends.find(slot, name)
    assert found.value.fix == f'AttentionSpec({slot}="{meant}")'


def test_a_name_like_no_other_gets_auto():
    """A name that resembles none is answered with the known names and "auto"."""
    with pytest.raises(SpecError, match=r"called 'zzz'\. Known: eager, sdpa") as found:
        backends.full("zzz")
    assert 'full="auto"' in found.value.fix


def test_constructing_backends_loads_no_torch():
    """Recipes construct backends by name, and must stay light."""
    code = (
        "import sys; from qwenft import backends\n"
        "for name in backends.FULL_NAMES: backends.full(name)\n"
        "for name in backends.LINEAR_NAMES: backends.linear(name)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

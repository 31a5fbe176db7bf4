"""What the tests of the rules share."""

from qwenft.capabilities import AttentionBackend, Availability, LinearAttentionBackend
from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.specs.data import DataSpec
from qwenft.specs.model import ModelSpec

CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}]
DATA = DataSpec.messages(CHATS)
GPU = Machine.named("H100-80GB")


class Windowed(AttentionBackend):
    """A full-attention backend that declares what a test needs."""

    name = "windowed"
    uses_flash_lib = False

    def __init__(self, supports_packing=False, needs_half_precision=False, usable=True, refusal=None):
        self.supports_packing = supports_packing
        self.needs_half_precision = needs_half_precision
        self.usable = usable
        self.refusal = refusal

    supports_packing = False

    def availability(self, machine):
        """As it was told."""
        return Availability(self.usable, f"no kernel for {machine.device}", "pip install windowed")

    def refuses(self, problem):
        """As it was told."""
        return self.refusal

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """Never called by a plan."""
        raise NotImplementedError


class Forgetful(LinearAttentionBackend):
    """A linear-attention backend that cannot pack."""

    name = "forgetful"
    supports_packing = False
    uses_flash_lib = False

    def short_conv(self, *arguments, **options):
        """Never called by a plan."""
        raise NotImplementedError

    def delta_rule(self, *arguments, **options):
        """Never called by a plan."""
        raise NotImplementedError


def recipe(model="qwen3.5-4b", **specs):
    return Recipe(model if isinstance(model, ModelSpec) else ModelSpec(model), **specs)


def found(asked, place, level="error", machine=None):
    """The findings of this level and place, as text."""
    findings = asked.compile(machine, strict=False).findings
    return [str(finding) for finding in findings if (finding.level, finding.place) == (level, place)]


def one(asked, place, level="error", machine=None):
    (finding,) = found(asked, place, level, machine)
    return finding

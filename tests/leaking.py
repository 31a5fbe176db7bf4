"""Backends that reach into other documents, each in one half: what suites and proofs must catch."""

from __future__ import annotations

from qwenft.backends import SdpaAttention, TorchDeltaRule
from qwenft.kernels.layout import SequenceLayout


def joined(layout, *, after=0):
    """The layout without the boundaries that follow a document of more than ``after`` tokens."""
    if layout.query_lengths != layout.lengths:
        return layout
    lengths = [layout.lengths[0]]
    for before, length in zip(layout.lengths, layout.lengths[1:], strict=False):
        if before > after:
            lengths[-1] += length
        else:
            lengths.append(length)
    return SequenceLayout(lengths)


class LeakingAttention(SdpaAttention):
    """Takes the stream for one document."""

    name = "leaking"
    after = 0

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """See the class."""
        one = joined(layout, after=self.after)
        return super().attend(query, key, value, layout=one, scale=scale, causal=causal)


class LeakingAttentionAfterLong(LeakingAttention):
    """Gives up boundaries after documents longer than 64 tokens only, as a kernel of blocks might."""

    after = 64


class LeakingConv(TorchDeltaRule):
    """Its taps reach over the start of a document."""

    name = "leaking-conv"

    def short_conv(self, x, weight, bias, *, layout, **options):
        """See the class."""
        return super().short_conv(x, weight, bias, layout=SequenceLayout([layout.total]), **options)


class LeakingScan(TorchDeltaRule):
    """Carries the state over into the next document."""

    name = "leaking-scan"
    after = 0

    def delta_rule(self, *inputs, layout, **options):
        """See the class."""
        return super().delta_rule(*inputs, layout=joined(layout, after=self.after), **options)


class LeakingScanAfterLong(LeakingScan):
    """Carries the state over after documents longer than 64 tokens only."""

    after = 64

"""The suite that every attention backend passes, shipped or written in a notebook: on the user's own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from qwenft.backends.eager import EagerAttention
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.comparison import ConformanceReport, Probe, Suite
from qwenft.errors import SpecError
from qwenft.kernels.layout import SequenceLayout

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.capabilities import AttentionBackend, Backend, LinearAttentionBackend
    from qwenft.comparison import Call

# Long documents stand first and last, so that a leak in either direction finds a neighbour to show in.
PACKED: dict[str, tuple[int, ...]] = {
    "awkward lengths": (130, 3, 1, 63, 64, 65, 96),
    "many tiny documents": (2, 1, 3) * 8,
}
SINGLE: dict[str, tuple[int, ...]] = {
    f"one document of {length}": (length,) for length in (1, 3, 63, 64, 65, 130, 300)
}


def check_attention(
    backend: AttentionBackend,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tolerance: float | None = None,
) -> ConformanceReport:
    """Check a full-attention backend: isolation, determinism, and output and gradients against the reference.

    A backend that declares ``exact = False`` is compared with itself alone.

    Args:
        backend: the backend, which needs no registration.
        device: where to run it.
        dtype: of query, key and value.
        tolerance: the largest relative error; 1e-4 for float32, 2e-2 for 16 bits where None.

    Returns:
        One row a check, printed as a table.

    Raises:
        LeakError: a document reached another one (`.half` is "attention").
        ConformanceError: another check failed; the message names the case.
    """
    suite = _suite(backend, device, dtype, tolerance)
    for heads in ((2, 2), (4, 2)):
        for name, lengths in _cases(backend).items():
            layout = SequenceLayout(lengths, device=device)
            _check_attention_case(suite, f"{name}, {heads[0]}/{heads[1]} heads", layout, heads)
    lengths, asked = ((130, 3, 1, 65), (1, 3, 1, 2)) if backend.supports_packing else ((130,), (2,))
    layout = SequenceLayout(lengths, query_lengths=asked, device=device)
    probe = _attention_probe(suite, "last tokens ask", layout)
    suite.parity(probe, _attention_inputs(suite, layout, (4, 2)))
    return suite.report()


def check_linear_attention(
    backend: LinearAttentionBackend,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tolerance: float | None = None,
) -> ConformanceReport:
    """Check a Gated DeltaNet backend, its convolution and its scan apart: each of them can leak.

    A backend that declares ``exact = False`` is compared with itself alone.

    Args:
        backend: the backend, which needs no registration.
        device: where to run it.
        dtype: of all inputs but log_decay, which is float32.
        tolerance: the largest relative error; 1e-4 for float32, 2e-2 for 16 bits where None.

    Returns:
        One row a check, printed as a table.

    Raises:
        LeakError: a document reached another one (`.half` is "conv" or "scan").
        ConformanceError: another check failed; the message names the case.
    """
    suite = _suite(backend, device, dtype, tolerance)
    for name, lengths in _cases(backend).items():
        layout = SequenceLayout(lengths, device=device)
        _check_conv_case(suite, name, layout)
        for heads in ((2, 2), (2, 4)):
            _check_scan_case(suite, f"{name}, {heads[0]}/{heads[1]} heads", layout, heads)
    return suite.report()


def _suite(backend: Backend, device: str, dtype: str, tolerance: float | None) -> Suite:
    if backend.needs_half_precision and dtype == "float32":
        msg = f"dtype: {backend!r} computes in 16 bits only, got {dtype!r}"
        raise SpecError(msg, fix='dtype="bfloat16"', got=dtype, expected=("bfloat16", "float16"))
    return Suite(backend, device, dtype, tolerance)


def _cases(backend: Backend) -> dict[str, tuple[int, ...]]:
    return {**PACKED, **SINGLE} if backend.supports_packing else SINGLE


def _check_attention_case(suite: Suite, case: str, layout: SequenceLayout, heads: tuple[int, int]) -> None:
    probe = _attention_probe(suite, case, layout)
    inputs = _attention_inputs(suite, layout, heads)
    suite.isolation(probe, inputs, _attention_inputs(suite, layout, heads), {})
    suite.determinism(probe, inputs)
    suite.buffers(probe, inputs)
    suite.parity(probe, inputs)


def _attention_probe(suite: Suite, case: str, layout: SequenceLayout) -> Probe:
    def attend_by(backend: AttentionBackend) -> Call:
        return lambda query, key, value: backend.attend(query, key, value, layout=layout, scale=0.125)

    reference = attend_by(EagerAttention()) if suite.backend.exact else None
    return Probe(case, "attention", layout, attend_by(suite.backend), reference)


def _attention_inputs(suite: Suite, layout: SequenceLayout, heads: tuple[int, int]) -> dict[str, Tensor]:
    dim = 64
    return {
        "query": suite.random(sum(layout.query_lengths), heads[0], dim),
        "key": suite.random(layout.total, heads[1], dim),
        "value": suite.random(layout.total, heads[1], dim),
    }


def _check_conv_case(suite: Suite, case: str, layout: SequenceLayout) -> None:
    channels, width = 32, 4

    def convolve_by(backend: LinearAttentionBackend) -> Call:
        def convolve(*inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            state = inputs[3] if len(inputs) > 3 else None
            return backend.short_conv(
                *inputs[:3], layout=layout, initial_state=state, return_state=state is not None
            )

        return convolve

    reference = convolve_by(ReferenceDeltaRule()) if suite.backend.exact else None
    probe = Probe(case, "conv", layout, convolve_by(suite.backend), reference)
    stream = {"x": suite.random(layout.total, channels)}
    shared = {"weight": suite.random(channels, width), "bias": suite.random(channels)}
    suite.isolation(probe, stream, {"x": suite.random(layout.total, channels)}, shared)
    suite.determinism(probe, stream | shared)
    suite.buffers(probe, stream | shared)
    suite.parity(probe, stream | shared)
    state = {"initial_state": suite.random(len(layout), width - 1, channels)}
    suite.parity(attrs.evolve(probe, case=f"{case}, with states"), stream | shared | state)


def _check_scan_case(suite: Suite, case: str, layout: SequenceLayout, heads: tuple[int, int]) -> None:
    def scan_by(backend: LinearAttentionBackend) -> Call:
        def scan(*inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            state = inputs[5] if len(inputs) > 5 else None
            return backend.delta_rule(
                *inputs[:5], layout=layout, initial_state=state, return_state=state is not None
            )

        return scan

    reference = scan_by(ReferenceDeltaRule()) if suite.backend.exact else None
    probe = Probe(case, "scan", layout, scan_by(suite.backend), reference)
    # A slow decay, so that what a scan carries over from the document before does not fade before it is seen.
    slow = _scan_inputs(suite, layout, heads, decay=0.02)
    suite.isolation(probe, slow, _scan_inputs(suite, layout, heads, decay=0.02), {})
    suite.determinism(probe, slow)
    suite.buffers(probe, slow)
    suite.parity(probe, slow)
    fast = _scan_inputs(suite, layout, heads, decay=4.0)
    D, E = fast["key"].shape[2], fast["value"].shape[2]
    state = {"initial_state": suite.random(len(layout), heads[1], D, E, dtype="float32")}
    suite.parity(attrs.evolve(probe, case=f"{case}, with states"), fast | state)


def _scan_inputs(
    suite: Suite, layout: SequenceLayout, heads: tuple[int, int], *, decay: float
) -> dict[str, Tensor]:
    (K, V), D, E = heads, 32, 64
    return {
        "query": suite.random(layout.total, K, D),
        "key": suite.random(layout.total, K, D),
        "value": suite.random(layout.total, V, E),
        "log_decay": -decay * torch.sigmoid(suite.random(layout.total, V, dtype="float32")),
        "beta": torch.sigmoid(suite.random(layout.total, V)),
    }

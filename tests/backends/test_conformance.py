"""Every shipped backend passes the suite, and the suite catches backends that are wrong on purpose."""

import pytest
import torch

from qwenft.backends import EagerAttention, FlexAttention, ReferenceDeltaRule, SdpaAttention, TorchDeltaRule
from qwenft.errors import ConformanceError, LeakError, QwenftError, SpecError
from qwenft.testing.conformance import check_attention, check_linear_attention
from tests.leaking import (
    LeakingAttention,
    LeakingAttentionAfterLong,
    LeakingConv,
    LeakingScan,
    LeakingScanAfterLong,
)

RUNS_HERE_FULL = [EagerAttention(), SdpaAttention(), FlexAttention()]
RUNS_HERE_LINEAR = [TorchDeltaRule(), pytest.param(ReferenceDeltaRule(), marks=pytest.mark.long)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", RUNS_HERE_FULL, ids=repr)
def test_full_attention_backends_conform(backend, dtype):
    """Each full-attention backend equals the reference, keeps documents apart and repeats itself."""
    report = check_attention(backend, dtype=dtype)
    changes = [row.error for row in report.rows if row.check == "other documents unchanged"]
    assert max(changes) == 0.0
    assert {"output", "gradient of query", "gradient of key", "gradient of value"} <= {
        row.check for row in report.rows
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", RUNS_HERE_LINEAR, ids=repr)
def test_linear_attention_backends_conform(backend, dtype):
    """Each linear-attention backend does so in its convolution and in its scan."""
    report = check_linear_attention(backend, dtype=dtype)
    changes = {row.half: row.error for row in report.rows if row.check == "other documents unchanged"}
    assert changes == {"conv": 0.0, "scan": 0.0}
    assert {"final state", "gradient of log_decay", "gradient of beta"} <= {row.check for row in report.rows}


def test_a_report_prints_a_small_table():
    """A report names the backend and gives one line to each kind of check."""
    lines = str(check_attention(SdpaAttention())).splitlines()
    assert lines[0].startswith("SdpaAttention() on cpu in float32: ")
    assert len(lines) == 9
    assert any("other documents unchanged" in line and "0.0e+00" in line for line in lines)


class _LeakingGradients(SdpaAttention):
    """Right forward; backward, every key takes some of the gradient of the one before it."""

    name = "leaking-gradients"

    def attend(self, query, key, value, *, layout, scale, causal=True):
        return super().attend(query, _ShiftedGradient.apply(key), value, layout=layout, scale=scale, causal=causal)


class _ShiftedGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        return grad + 0.1 * grad.roll(1, dims=0)


@pytest.mark.parametrize(
    "backend",
    [LeakingAttention(), LeakingAttentionAfterLong(), _LeakingGradients()],
    ids=repr,
)
def test_leaking_attention_is_caught(backend):
    """An attention that reaches another document, forward or backward, is a LeakError of that half."""
    with pytest.raises(
        LeakError,
        match=r"leaks in its attention: awkward lengths.*of other documents changed by",
    ) as found:
        check_attention(backend)
    assert found.value.half == "attention"
    assert found.value.backend is backend
    assert found.value.error > 1e-3


@pytest.mark.parametrize(
    ("backend", "half"),
    [(LeakingConv(), "conv"), (LeakingScan(), "scan"), (LeakingScanAfterLong(), "scan")],
    ids=repr,
)
def test_leaking_linear_attention_is_caught_in_the_half_that_leaks(backend, half):
    """A leak of the convolution and one of the scan are told apart."""
    with pytest.raises(LeakError, match=f"leaks in its {half}: awkward lengths") as found:
        check_linear_attention(backend)
    assert found.value.half == half
    assert found.value.backend is backend
    assert found.value.error > 1e-3


def test_a_backend_that_does_not_pack_is_given_single_documents():
    """Where supports_packing is False the suite asks for one document a row, and nothing can leak."""

    class OneByOne(LeakingAttention):
        supports_packing = False

    report = check_attention(OneByOne())
    assert "other documents unchanged" not in {row.check for row in report.rows}


class _WrongScale(SdpaAttention):
    """Ignores the scale it is given."""

    name = "wrong-scale"

    def attend(self, query, key, value, *, layout, scale, causal=True):
        return super().attend(query, key, value, layout=layout, scale=scale * 1.01, causal=causal)


def test_a_wrong_result_names_its_case():
    """An attention that differs from the reference fails with the case, the error and the limit."""
    with pytest.raises(
        ConformanceError,
        match=r"_WrongScale\(\) fails: attention, awkward lengths.*output",
    ) as found:
        check_attention(_WrongScale())
    assert isinstance(found.value, QwenftError)
    assert isinstance(found.value, RuntimeError)
    assert found.value.error > found.value.limit


def test_an_attention_that_means_to_differ_is_checked_without_the_reference():
    """Exact = False leaves isolation and determinism."""

    class Different(_WrongScale):
        exact = False

    report = check_attention(Different())
    assert {row.check for row in report.rows} == {
        "other documents unchanged",
        "same output twice",
        "NaN in fresh buffers not read",
    }


class _NotFinite(TorchDeltaRule):
    """Divides zero by zero in the backward pass of the scan."""

    name = "not-finite"

    def delta_rule(self, query, key, *rest, layout, **options):
        return super().delta_rule(query, key + 0 * (key - key).abs().sqrt(), *rest, layout=layout, **options)


def test_gradients_that_are_not_finite_fail():
    """NaN in a gradient never counts as a small error."""
    with pytest.raises(ConformanceError, match=r"scan, .*gradient of key: relative error inf"):
        check_linear_attention(_NotFinite())


class _ReadsFreshMemory(SdpaAttention):
    """Adds nothing, where the memory that it was given happens to be zero."""

    name = "reads-fresh-memory"

    def attend(self, query, key, value, *, layout, scale, causal=True):
        output = super().attend(query, key, value, layout=layout, scale=scale, causal=causal)
        # What fresh memory holds is chance, and here zeros, until the suite asks torch to fill it.
        filled = torch.are_deterministic_algorithms_enabled()
        fresh = torch.empty_like(output) if filled else torch.zeros_like(output)
        return output + fresh


def test_reading_unwritten_memory_fails():
    """A buffer that is read before it is written shows, also where it held zeros by chance."""
    with pytest.raises(ConformanceError, match="NaN in fresh buffers not read"):
        check_attention(_ReadsFreshMemory())


class _Noisy(SdpaAttention):
    """Adds a little of its own."""

    name = "noisy"

    def attend(self, query, key, value, *, layout, scale, causal=True):
        output = super().attend(query, key, value, layout=layout, scale=scale, causal=causal)
        return output + 1e-7 * torch.rand(())


def test_a_backend_that_does_not_repeat_itself_fails():
    """Two runs on the same inputs must agree to the bit."""
    with pytest.raises(ConformanceError, match="same output twice"):
        check_attention(_Noisy())


def test_half_precision_backends_are_checked_in_half_precision():
    """A backend of 16 bits only is refused in float32, with the dtype to use."""

    class Half(SdpaAttention):
        needs_half_precision = True

    with pytest.raises(SpecError, match='Fix: dtype="bfloat16"'):
        check_attention(Half())
    assert check_attention(Half(), dtype="bfloat16").dtype == "bfloat16"

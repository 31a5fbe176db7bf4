"""A backend that claims too much is caught before a run, on layers of the run's own shape."""

import json

import pytest
import torch

import qwenft as qf
from qwenft import backends
from qwenft.errors import ConformanceError, LeakError, PlanError
from qwenft.family.architectures import FAMILY
from qwenft.models.checkpoint import architecture_of
from qwenft.models.verify import verify
from qwenft.specs.model import ModelSpec
from tests.leaking import LeakingAttention, LeakingConv, LeakingScan, LeakingScanAfterLong

TINY = {"device": "cpu", "dtype": "float32"}
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Hello {n}!"}]}
    for n in range(4)
]


@pytest.fixture
def tiny(dense_checkpoint):
    """The text half of the tiny checkpoint."""
    return architecture_of(ModelSpec(dense_checkpoint)).text_only()


class WrongGradient(torch.autograd.Function):
    """Right forward; a tenth too much backward."""

    @staticmethod
    def forward(_ctx, x):
        """See the class."""
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        """See the class."""
        return 1.1 * grad


class WrongAttentionGradient(backends.SdpaAttention):
    """Its keys get a tenth too much."""

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """See the class."""
        return super().attend(query, WrongGradient.apply(key), value, layout=layout, scale=scale, causal=causal)


class WrongConvGradient(backends.TorchDeltaRule):
    """Its inputs get a tenth too much."""

    def short_conv(self, x, *rest, **options):
        """See the class."""
        return super().short_conv(WrongGradient.apply(x), *rest, **options)


class WrongScanGradient(backends.TorchDeltaRule):
    """Its decay gets a tenth too much."""

    def delta_rule(self, query, key, value, log_decay, beta, **options):
        """See the class."""
        return super().delta_rule(query, key, value, WrongGradient.apply(log_decay), beta, **options)


def chosen(backend):
    """Both slots, one of them filled with ``backend``."""
    slot = "full" if isinstance(backend, qf.AttentionBackend) else "linear"
    return {"full": backends.full("sdpa"), "linear": backends.linear("torch"), slot: backend}


LEAKS = [
    (LeakingAttention(), "attention"),
    (LeakingConv(), "conv"),
    (LeakingScan(), "scan"),
    (LeakingScanAfterLong(), "scan"),
]
WRONGS = [(WrongAttentionGradient(), "attention"), (WrongConvGradient(), "conv"), (WrongScanGradient(), "scan")]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ("qwen3.5-0.8b", "float32"),
        ("qwen3.5-27b", "float32"),
        ("qwen3.5-35b-a3b", "float32"),
        *(
            pytest.param(size, "bfloat16", marks=pytest.mark.long)
            for size in ("qwen3.5-0.8b", "qwen3.5-27b", "qwen3.5-35b-a3b")
        ),
    ],
)
def test_shipped_backends_are_proven_at_the_head_sizes_of_the_family(size, dtype):
    """Every slot is measured, the tower's too; nothing leaks to the bit where all goes through dense products."""
    proof = verify(
        FAMILY[size],
        full=backends.full("sdpa"),
        linear=backends.linear("torch"),
        vision=backends.full("sdpa"),
        device="cpu",
        dtype=dtype,
    )
    assert list(proof.reports) == ["full", "linear", "vision"]
    for report in proof.reports.values():
        assert report.worst("other documents") <= (1e-6 if "a3b" in size else 0.0)
        assert 0 < report.worst("gradient") < (1e-5 if dtype == "float32" else 2e-2)
    assert repr(proof).count("\n") == 2
    assert repr(proof).startswith(
        f"attention.full: SdpaAttention() on cpu in {dtype}; other documents changed by "
    )


@pytest.mark.parametrize(("backend", "half"), LEAKS, ids=repr)
def test_a_leak_names_its_half_and_the_backend(tiny, backend, half):
    """An attention, a convolution or a scan that reaches another document is told from the others."""
    with pytest.raises(
        LeakError,
        match=rf"{backend!r} leaks in its {half}: documents of 130, 3, 1, 66 tokens".replace("()", r"\(\)"),
    ) as found:
        verify(tiny, **chosen(backend), **TINY)
    assert found.value.half == half
    assert found.value.backend is backend
    assert found.value.error > 1e-3
    slot = "full" if half == "attention" else "linear"
    assert found.value.fix == f'recipe.with_attention({slot}="auto"), or another backend'


@pytest.mark.parametrize(("backend", "half"), WRONGS, ids=repr)
def test_wrong_gradients_are_told_from_a_leak(tiny, backend, half):
    """Gradients that are wrong without a leak are another error, which names the half and how far off it is."""
    with pytest.raises(ConformanceError, match=r"gradient of .*: relative error .*, allowed 1e-04") as found:
        verify(tiny, **chosen(backend), **TINY)
    assert not isinstance(found.value, LeakError)
    assert found.value.half == half
    assert found.value.backend is backend
    assert found.value.error > found.value.limit


@pytest.mark.parametrize(("backend", "half"), LEAKS[:3], ids=repr)
def test_a_backend_that_does_not_claim_to_pack_is_given_one_document_a_row(tiny, backend, half):
    """What would leak between documents is right on each alone."""
    alone = type(type(backend).__name__, (type(backend),), {"supports_packing": False})()
    proof = verify(tiny, **chosen(alone), **TINY)
    slot = "full" if half == "attention" else "linear"
    assert "other documents unchanged" not in {row.check for row in proof.reports[slot].rows}


def test_a_backend_that_means_to_differ_is_compared_with_itself_alone(tiny):
    """With exact = False wrong numbers pass, and a leak does not."""

    class Different(WrongAttentionGradient):
        exact = False

    class DifferentAndLeaking(LeakingAttention):
        exact = False

    summary = verify(tiny, **chosen(Different()), **TINY).reports["full"].summary
    assert summary.endswith(
        "other documents changed by 0e+00; outputs off by: not compared; gradients off by: not compared"
    )
    with pytest.raises(LeakError):
        verify(tiny, **chosen(DifferentAndLeaking()), **TINY)


def test_a_leak_between_images_is_caught():
    """The tower is tried on images and frames."""
    with pytest.raises(LeakError, match="leaks in its attention: images of 1x8x10, 2x2x4, 1x6x4 patches"):
        verify(FAMILY["qwen3.5-0.8b"], **chosen(backends.full("sdpa")), vision=LeakingAttention(), **TINY)


def test_verifying_leaves_the_random_state_alone(tiny):
    """A run draws the same numbers whether it was verified or not."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    verify(tiny, **chosen(backends.full("sdpa")), **TINY)
    assert torch.equal(before, torch.get_rng_state())


def recipe(checkpoint, **attention):
    return qf.Recipe(
        qf.ModelSpec(checkpoint, dtype="float32"),
        data=qf.DataSpec.messages(CHATS).with_max_length(64).pack(),
        attention=qf.AttentionSpec(**attention),
        training=qf.TrainingSpec(max_steps=1),
    )


@pytest.mark.parametrize("backend", [LeakingAttention(), LeakingConv(), LeakingScan()], ids=repr)
def test_no_run_starts_with_a_backend_that_leaks(dense_checkpoint, tmp_path, backend):
    """train() and prepare() verify by themselves, before a weight is read or a folder made."""
    slot = "full" if isinstance(backend, qf.AttentionBackend) else "linear"
    plan = recipe(dense_checkpoint, **{slot: backend}).compile()
    with pytest.raises(LeakError):
        plan.train(tmp_path / "run", verbose=0)
    assert not (tmp_path / "run").exists()
    with pytest.raises(LeakError):
        plan.prepare()


def test_a_run_keeps_its_proof(dense_checkpoint, tmp_path):
    """What was measured stands in plan.json, and is measured once a plan."""
    plan = recipe(dense_checkpoint).compile()
    assert not plan.is_verified
    proof = plan.verify()
    assert plan.verify() is proof
    plan.train(tmp_path / "run", verbose=0)
    saved = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert saved["verified"] == repr(proof).splitlines()
    assert [line.split(":")[0] for line in saved["verified"]] == ["attention.full", "attention.linear"]


def test_a_plan_for_another_machine_cannot_be_verified_here(dense_checkpoint):
    """The proof belongs to the machine that runs."""
    plan = recipe(dense_checkpoint).compile(qf.Machine.named("H100-80GB"))
    with pytest.raises(PlanError, match=r"before this can be verified\n.*H100"):
        plan.verify()


def test_a_plan_without_data_or_weights_can_be_verified():
    """What else is missing for a run does not matter to the proof."""
    plan = qf.Recipe(qf.ModelSpec("qwen3.5-0.8b", dtype="float32")).compile()
    assert plan.verify().reports["linear"].worst("output") < 1e-5

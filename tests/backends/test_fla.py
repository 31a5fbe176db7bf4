"""The "fla" backend without a GPU: its kernels run in Triton's interpreter, and compile for three kinds of GPU."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch

from qwenft.backends.fla import FlaDeltaRule
from qwenft.capabilities import LinearAttentionProblem
from qwenft.kernels.fla import fla_delta_rule, fla_short_conv
from qwenft.kernels.layout import SequenceLayout
from qwenft.machine import Machine

needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None,
    reason="flash-linear-attention and triton are not installed",
)

SCAN = {"half": "scan", "heads": (2, 4), "dims": (32, 48), "decay": 0.5, "norm": 1.0, "states": True}
CONV = {"half": "conv", "channels": 20, "width": 4, "bias": True, "activation": "silu", "states": True}
AWKWARD = (3, 65, 1, 64, 63)
#: A long document stands at either end: a leak in either direction finds a neighbour to show in.
NEIGHBOURS = (65, 3, 1, 64)

SCANS = (
    {"name": "awkward lengths", "lengths": AWKWARD},
    {
        "name": "head dims of Qwen3.5, no states",
        "lengths": (130, 2),
        "heads": (1, 1),
        "dims": (128, 128),
        "states": False,
    },
    # The squares of q and k are near the epsilon of the norm.
    {"name": "short queries and keys", "lengths": (5, 66), "heads": (1, 1), "norm": 2e-4},
    {
        "name": "changed documents",
        "lengths": NEIGHBOURS,
        "heads": (1, 1),
        "dims": (32, 32),
        "decay": 0.02,
        "isolated": True,
    },
)
CONVS = (
    {"name": "awkward lengths", "lengths": (*AWKWARD, 2)},
    {"name": "plain", "lengths": (66, 2), "bias": False, "activation": None, "states": False},
    {"name": "changed documents", "lengths": NEIGHBOURS, "isolated": True},
)
LONG_SCANS = (
    {"name": "many tiny documents", "lengths": (2, 1, 3) * 4},
    {"name": "fast decay", "lengths": (130, 1, 63), "decay": 6.0},
    {"name": "no states", "lengths": AWKWARD, "states": False, "dims": (64, 32)},
    {"name": "largest head dims", "lengths": (65, 2), "heads": (1, 1), "dims": (256, 256)},
    {"name": "awkward head dims", "lengths": (65, 2), "heads": (1, 3), "dims": (24, 100)},
    {
        "name": "changed documents",
        "lengths": (130, 2, 64, 1, 65),
        "dims": (64, 64),
        "decay": 0.02,
        "isolated": True,
    },
)
LONG_CONVS = (
    {"name": "many tiny documents", "lengths": (2, 1, 3) * 4},
    {"name": "two taps", "lengths": AWKWARD, "width": 2},
    {"name": "three taps, no bias", "lengths": AWKWARD, "width": 3, "bias": False},
    {"name": "changed documents", "lengths": (130, 2, 64, 1, 65), "states": False, "isolated": True},
)


LEFT_OUT_BY = {"bias": "bias", "initial_state": "states"}
SCAN_INPUTS = ("query", "key", "value", "log_decay", "beta", "initial_state")
CONV_INPUTS = ("x", "weight", "bias", "initial_state")

#: What one layer launches, forward and backward.
SCAN_KERNELS = {
    "l2norm_fwd_kernel",
    "chunk_local_cumsum_scalar_kernel",
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
    "recompute_w_u_fwd_kernel",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    "chunk_fwd_kernel_o",
    "chunk_bwd_kernel_dv_local",
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
    "chunk_bwd_kernel_dqkwg",
    "prepare_wy_repr_bwd_kernel",
    "l2norm_bwd_kernel",
}
CONV_KERNELS = {
    "causal_conv1d_fwd_kernel",
    "causal_conv1d_bwd_kernel",
    "causal_conv1d_states_fwd_kernel",
    "compute_dh0_kernel",
}


def run_helper(name, *arguments, stdin="", **environment):
    """What a helper script says in JSON; a process of its own, since FLA and Triton are changed in it."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(name), *arguments],
        input=stdin,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def interpret(base, cases):
    """The largest error of each check that passed in the interpreter, by half and case."""
    whole = [{"isolated": False} | base | case for case in cases]
    errors = {}
    for row in run_helper("fla_interpreter.py", stdin=json.dumps(whole), TRITON_INTERPRET="1"):
        case, half, check, error = row
        checks = errors.setdefault((half, case), {})
        checks[check] = max(error, checks.get(check, 0.0))
    return errors


def assert_complete(found, cases, inputs):
    """Each case was compared in its output, its states and the gradient of each input, or no document leaked."""
    assert len(found) == len(cases)
    for case, checks in zip(cases, found.values(), strict=True):
        if case.get("isolated"):
            assert checks == {"other documents unchanged": 0.0, "NaN in fresh buffers not read": 0.0}
            continue
        given = {name for name in inputs if case.get(LEFT_OUT_BY.get(name), True)}
        states = {"final state"} if "initial_state" in given else set()
        assert set(checks) == {"output", *states} | {f"gradient of {name}" for name in given}
        assert max(checks.values()) < 1e-5


@needs_fla
@pytest.mark.long
def test_the_scan_holds_what_is_declared():
    """What its functions allocate, forward and backward, is what a simulation takes them to hold: within 1 %."""
    cases = [
        {"half": "memory", "lengths": [70, 10], "heads": [1, 2], "dims": [32, 32]},
        {"half": "memory", "lengths": [130], "heads": [2, 2], "dims": [16, 32]},
    ]
    for found in run_helper("fla_interpreter.py", stdin=json.dumps(cases), TRITON_INTERPRET="1"):
        forward, backward, declared_forward, declared_backward = found
        assert forward == pytest.approx(declared_forward, rel=0.01)
        assert backward == pytest.approx(declared_backward, rel=0.01)


@needs_fla
@pytest.mark.long
def test_the_scan_equals_the_reference_and_keeps_documents_apart():
    """Interpreted, it has the reference's output, states and gradients, and no document changes another one's."""
    assert_complete(interpret(SCAN, SCANS), SCANS, SCAN_INPUTS)


@needs_fla
@pytest.mark.long
def test_the_convolution_equals_the_reference_and_keeps_documents_apart():
    """So has the convolution."""
    assert_complete(interpret(CONV, CONVS), CONVS, CONV_INPUTS)


@needs_fla
@pytest.mark.long
@pytest.mark.parametrize(
    ("base", "cases", "inputs"),
    [(SCAN, LONG_SCANS, SCAN_INPUTS), (CONV, LONG_CONVS, CONV_INPUTS)],
    ids=["scan", "conv"],
)
def test_a_wider_sweep_equals_the_reference(base, cases, inputs):
    """So have fast decays, other head dims, fewer taps and many tiny documents."""
    assert_complete(interpret(base, cases), cases, inputs)


@needs_fla
@pytest.mark.long
def test_the_backend_conforms():
    """It passes the suite of all linear backends, interpreted, on the layouts that a few minutes allow."""
    unchanged = "other documents unchanged"
    changes = [checks[unchanged] for checks in interpret({}, []).values() if unchanged in checks]
    # Two packed layouts, for the convolution and for the scan with two numbers of heads.
    assert changes == [0.0] * 6


@needs_fla
@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_kernels_compile(capability, tmp_path):
    """For Ampere, Hopper and Blackwell, in bfloat16 and for the head dims of Qwen3.5, each configuration that fits."""
    found = run_helper("fla_compiler.py", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert set(found["loaded"]) == SCAN_KERNELS | CONV_KERNELS
    assert {kind for kind, _ in found["refused"]} <= {"does not fit"}


def machine(capability=(9, 0), device="cuda"):
    return Machine(name="test", device=device, cores=8, host_bytes=2**36, compute_capability=capability)


@pytest.fixture
def installed(monkeypatch):
    """The versions that importlib.metadata finds; to be changed by the test."""
    versions = {"flash-linear-attention": "0.6.0", "triton": "3.9.0"}

    def version(distribution):
        if distribution not in versions:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_it_is_available_from_ampere_on(capability):
    """Where both packages are installed, every GPU from Ampere on will do."""
    assert FlaDeltaRule().availability(machine(capability)).usable


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (machine(None, device="cpu"), "it needs an NVIDIA GPU"),
        (machine((7, 5)), "it needs compute capability 8.0 or more, the GPU has 7.5"),
        (machine(None), "it needs compute capability 8.0 or more, the GPU has 0.0"),
    ],
)
def test_other_machines_are_named(here, reason):
    """A machine without a GPU, or with an older one, is told so; nothing would help."""
    availability = FlaDeltaRule().availability(here)
    assert (availability.usable, availability.reason, availability.remedy) == (False, reason, "")


@pytest.mark.parametrize("missing", ["flash-linear-attention", "triton"])
def test_a_missing_package_gets_the_line_that_installs_it(installed, missing):
    """Both packages come with qwenft[cuda]."""
    del installed[missing]
    availability = FlaDeltaRule().availability(machine())
    assert not availability.usable
    assert availability.reason == f"{missing} is not installed"
    assert availability.remedy == 'pip install "qwenft[cuda]"'


@pytest.mark.parametrize(
    ("versions", "capability", "reason", "remedy"),
    [
        ({"flash-linear-attention": "0.5.1"}, (8, 0), "0.6 or newer, found 0.5.1", "flash-linear-attention>=0.6"),
        ({"triton": "3.4.0"}, (10, 0), "3.5 or newer, found 3.4.0", "triton>=3.5"),
        ({"triton": "3.7.0"}, (9, 0), "3.7.1 or newer, found 3.7.0: .* for Hopper", "triton>=3.7.1"),
        ({"triton": "3.5.1+git1"}, (9, 0), "3.7.1 or newer, found 3.5.1", "triton>=3.7.1"),
    ],
)
def test_versions_that_are_wrong_on_a_gpu_are_named(installed, versions, capability, reason, remedy):
    """What is found, what is needed, and the line that installs it."""
    installed.update(versions)
    availability = FlaDeltaRule().availability(machine(capability))
    assert not availability.usable
    assert re.search(reason, availability.reason)
    assert availability.remedy == f'pip install "{remedy}"'


@pytest.mark.parametrize(("triton", "capability"), [("3.7.1", (9, 0)), ("3.7.0", (8, 0)), ("3.7.0", (10, 0))])
def test_versions_that_are_wrong_elsewhere_do_no_harm(installed, triton, capability):
    """Hopper alone needs Triton 3.7.1."""
    installed["triton"] = triton
    assert FlaDeltaRule().availability(machine(capability)).usable


PROBLEM = LinearAttentionProblem(
    device="cuda",
    dtype="bfloat16",
    key_heads=16,
    value_heads=32,
    key_dim=128,
    value_dim=128,
    max_length=4096,
    compute_capability=(9, 0),
)


def test_it_computes_the_layers_of_qwen():
    """The layers of Qwen3.5 in bfloat16 on a GPU are not refused."""
    assert FlaDeltaRule().refuses(PROBLEM) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "NVIDIA GPUs only, not on 'cpu'"),
        ({"dtype": "float16"}, "NaN in float16"),
        ({"dtype": "float32"}, "TF32"),
        ({"key_dim": 512}, "256 dims at most, these have 512"),
        ({"value_dim": 65}, "odd head dims .*: 128 and 65"),
    ],
)
def test_what_it_computes_wrongly_is_refused(change, reason):
    """Each refusal says why."""
    assert re.search(reason, FlaDeltaRule().refuses(attrs.evolve(PROBLEM, **change)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_never_reach_fla(dtype):
    """float16 gives NaN gradients and float64 would be rounded: both are refused before FLA is imported."""
    layout = SequenceLayout([3, 2])
    heads, gates, stream = torch.ones(5, 2, 4, dtype=dtype), torch.ones(5, 2), torch.ones(5, 4, dtype=dtype)
    with pytest.raises(ValueError, match=rf"value: expected bfloat16 or float32, got {dtype}"):
        fla_delta_rule(heads, heads, heads, -gates, gates, layout=layout)
    with pytest.raises(ValueError, match=rf"x: expected bfloat16 or float32, got {dtype}"):
        fla_short_conv(stream, torch.ones(4, 4), None, layout=layout)


def test_arguments_are_checked():
    """Shapes are refused by the names of this project, as by every kernel."""
    layout, heads, gates = SequenceLayout([3, 2]), torch.ones(5, 2, 4), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"beta: expected \[T, V\] = \[5, 2\], got \[4, 2\]"):
        fla_delta_rule(heads, heads, heads, -gates, gates[:4], layout=layout)
    with pytest.raises(ValueError, match='activation: expected "silu" or None'):
        fla_short_conv(torch.ones(5, 4), torch.ones(4, 4), None, layout=layout, activation="relu")


def test_asking_loads_neither_torch_nor_fla():
    """Plans ask for availability, and must stay light."""
    code = (
        "import sys; from qwenft.backends.fla import FlaDeltaRule; from qwenft.machine import Machine\n"
        "FlaDeltaRule().availability(Machine.named('H100-80GB'))\n"
        "assert not {'torch', 'triton', 'fla'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

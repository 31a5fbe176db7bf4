"""Checks the "fla" backend in Triton's interpreter, on CPU tensors, for test_fla.py; a process of its own.

TRITON_INTERPRET must be in the environment before Triton is imported, and both it and FLA are left changed. Reads
from standard input a list of cases, writes what passed to standard output; a check that fails ends the process.
"""

import builtins
import json
import sys
import warnings

import numpy as np
import torch
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

from qwenft.backends.fla import FlaDeltaRule
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.capabilities import LinearAttentionProblem
from qwenft.comparison import Probe, Suite
from qwenft.kernels.layout import SequenceLayout
from qwenft.testing import conformance
from qwenft.training.live_bytes import BACKWARD, LiveBytes


def prepare():
    """Make FLA run in the interpreter: with one configuration a kernel, and where the interpreter is at fault."""
    assert knobs.runtime.interpret, "TRITON_INTERPRET=1 must be in the environment"
    torch.set_num_threads(1)
    Autotuner.__init__ = keep_first_configuration(Autotuner.__init__)
    interpreter.InterpreterBuilder.create_splat = splat
    with warnings.catch_warnings():
        # FLA asks Triton for its GPU, warns that there is none and takes "cuda" for granted: that goes well with
        # CPU tensors. It also imports parts of torch that are deprecated.
        warnings.simplefilter("ignore")
        import fla.modules.causal_conv1d
        import fla.ops.gated_delta_rule  # noqa: F401
        from fla.ops.common import chunk_delta_h
    # Its loops call methods of the index, which is a number of Python's in the interpreter.
    chunk_delta_h.range = tensor_range
    warnings.simplefilter("error")
    # Entries above the diagonal overflow and are masked away, in numpy with a warning.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")


def keep_first_configuration(initialise):
    """Choosing among configurations would run each of them, in an interpreter that has no use for them."""

    def first_only(self, fn, arg_names, configs, *arguments, **options):
        initialise(self, fn, arg_names, configs[:1], *arguments, **options)

    return first_only


def splat(_builder, block_type, scalar):
    """Triton 3.9 takes the dtype from the operands of a comparison, so that a mask of int64 comes out of it."""
    return interpreter.TensorHandle(np.full(block_type.shape, scalar.data.reshape(-1)[0]), scalar.dtype.scalar)


def tensor_range(*bounds):
    numbers = [int(bound.handle.data.item()) if isinstance(bound, tl.core.tensor) else bound for bound in bounds]
    for number in builtins.range(*numbers):
        handle = interpreter.TensorHandle(np.array([number], dtype=np.int32), tl.int32)
        yield tl.core.tensor(handle, tl.int32)


def scan_inputs(suite, layout, *, heads, dims, decay, norm, states, **_others):
    (K, V), (D, E) = heads, dims
    inputs = {
        "query": norm * suite.random(layout.total, K, D),
        "key": norm * suite.random(layout.total, K, D),
        "value": suite.random(layout.total, V, E),
        "log_decay": -decay * torch.sigmoid(suite.random(layout.total, V)),
        "beta": torch.sigmoid(suite.random(layout.total, V)),
    }
    return inputs | ({"initial_state": suite.random(len(layout), V, D, E)} if states else {})


def scan_of(backend, layout, *, states, **_others):
    def scan(*inputs):
        state = inputs[5] if states else None
        return backend.delta_rule(*inputs[:5], layout=layout, initial_state=state, return_state=states)

    return scan


def conv_inputs(suite, layout, *, channels, width, bias, states, **_others):
    inputs = {"x": suite.random(layout.total, channels), "weight": suite.random(channels, width)}
    inputs |= {"bias": suite.random(channels)} if bias else {}
    return inputs | ({"initial_state": suite.random(len(layout), width - 1, channels)} if states else {})


def conv_of(backend, layout, *, bias, activation, states, **_others):
    def convolve(x, weight, *optional):
        return backend.short_conv(
            x,
            weight,
            optional[0] if bias else None,
            layout=layout,
            activation=activation,
            initial_state=optional[-1] if states else None,
            return_state=states,
        )

    return convolve


INPUTS = {"scan": scan_inputs, "conv": conv_inputs}
CALLS = {"scan": scan_of, "conv": conv_of}
#: The inputs that documents do not share.
STREAMS = {"scan": ("query", "key", "value", "log_decay", "beta"), "conv": ("x",)}


def check(case):
    """The rows of one case: with NaN in fresh memory, against the reference, and with changed documents."""
    suite, layout, half = (
        Suite(FlaDeltaRule(), "cpu", "float32", 1e-5),
        SequenceLayout(case["lengths"]),
        case["half"],
    )
    inputs = INPUTS[half](suite, layout, **case)
    calls = [CALLS[half](backend, layout, **case) for backend in (suite.backend, ReferenceDeltaRule())]
    probe = Probe(case["name"], half, layout, *calls)
    if case["isolated"]:
        others = INPUTS[half](suite, layout, **case)
        stream = {name: inputs[name] for name in STREAMS[half]}
        shared = {name: tensor for name, tensor in inputs.items() if name not in stream}
        suite.isolation(probe, stream, others, shared)
        suite.buffers(probe, inputs)
    else:
        suite.parity(probe, inputs)
    return suite.report().rows


def most_held(case):
    """The most bytes that a scan and its backward pass hold, arguments apart, and what the backend declares."""
    (K, V), (D, E), tokens = case["heads"], case["dims"], sum(case["lengths"])
    # As the layer hands them on: parts of one tensor.
    query, key, value = torch.randn(tokens, 2 * K * D + V * E).split([K * D, K * D, V * E], dim=-1)
    inputs = [query.view(tokens, K, D), key.view(tokens, K, D), value.view(tokens, V, E)]
    inputs += [-torch.rand(tokens, V), torch.rand(tokens, V)]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    grad, backend, live = torch.randn(tokens, V, E), FlaDeltaRule(), LiveBytes()
    live.ignore([*inputs, grad])
    with live:
        output = backend.delta_rule(*inputs, layout=SequenceLayout(case["lengths"]))
        live.begin(BACKWARD, "backward")
        output.backward(grad)
    now, found = 0, []
    for segment in live.segments:
        found.append(0)
        for event in segment.events:
            now += live.sizes[event] if event >= 0 else -live.sizes[~event]
            found[-1] = max(found[-1], now)
    problem = LinearAttentionProblem(
        "cuda", "float32", K, V, D, E, max(case["lengths"]), lengths=tuple(case["lengths"])
    )
    # Beta is kept as it is given.
    kept = sum(backend.saved_tensors(problem).values()) - inputs[4].nbytes + output.nbytes
    space, gradients = backend.workspace(problem), sum(tensor.nbytes for tensor in inputs)
    return [*found, kept + space.forward, kept + space.backward + gradients]


def contract():
    """The suite that all backends pass, on fewer layouts: a chunk of a head takes a third of a second here."""
    conformance.PACKED = {"awkward lengths": (65, 3, 1, 64, 63), "tiny documents": (2, 1, 3)}
    conformance.SINGLE = {f"one document of {length}": (length,) for length in (1, 130)}
    return conformance.check_linear_attention(FlaDeltaRule(), tolerance=1e-5).rows


if __name__ == "__main__":
    prepare()
    cases = json.load(sys.stdin)
    if cases and cases[0]["half"] == "memory":
        json.dump([most_held(case) for case in cases], sys.stdout)
        sys.exit()
    rows = [row for case in cases for row in check(case)] if cases else contract()
    json.dump([[row.case, row.half, row.check, row.error] for row in rows], sys.stdout)

"""Gated DeltaNet in plain PyTorch against the torch code of transformers: one thread, paired runs.

    python benchmarks/linear_attention.py [--runs 9]

Every comparison first checks that both sides agree, output and gradients, and is not timed where they do not.
A ratio is the median over runs of (theirs / ours) within a run; its spread is the lowest and highest run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import attrs
import torch
import transformers
from torch.nn import functional
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from qwenft.kernels.gated_delta_rule import gated_delta_rule
from qwenft.kernels.layout import SequenceLayout
from qwenft.kernels.short_conv import short_conv

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

KEY_HEADS, VALUE_HEADS, DIM, WIDTH = 4, 8, 128, 4
MIXED = [1, 3, 17, 33, 48, 64, 65, 80, 96, 100, 127, 128, 130, 150, 200, 256] * 2
MOST_ERROR = 1e-5

# With FLA importable the decorated rule may be FLA's own; the torch function is what the decorator wraps.
stock_rule = torch_chunk_gated_delta_rule.__wrapped__


@attrs.frozen
class Side:
    """One of the two implementations of a comparison.

    Args:
        forward: computes the output.
        inputs: what it is differentiated by.
        output_grad: the gradient of the output.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    output_grad: Tensor

    def results(self) -> list[Tensor]:
        """Output and gradients."""
        output = self.forward()
        return [output, *torch.autograd.grad(output, self.inputs, self.output_grad)]

    def seconds(self) -> float:
        """Of one forward and backward pass."""
        start = time.perf_counter()
        self.results()
        return time.perf_counter() - start

    def saved_bytes(self) -> int:
        """What autograd keeps between the passes, each storage once."""
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.forward()
        del output
        return sum(storages.values())


def compare(title: str, ours: Side, theirs: Side, runs: int) -> None:
    error = max(
        ((got - expected).norm() / expected.norm()).item()
        for got, expected in zip(ours.results(), theirs.results(), strict=True)
    )
    if not error < MOST_ERROR:
        msg = f"{title}: the two sides differ by {error:.1e}; not timed"
        raise SystemExit(msg)
    pairs = [(ours.seconds(), theirs.seconds()) for _ in range(runs)]
    ratios = [other / own for own, other in pairs]
    own, other = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    print(
        f"{title:<46} {own:8.1f} ms against {other:8.1f} ms: {statistics.median(ratios):5.2f}x "
        f"({min(ratios):.2f} to {max(ratios):.2f}), agree to {error:.0e}"
    )


def rule_inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(tokens, KEY_HEADS, DIM, generator=generator) for _ in range(2))
    value = torch.randn(tokens, VALUE_HEADS, DIM, generator=generator)
    log_decay = -torch.rand(tokens, VALUE_HEADS, generator=generator)
    beta = torch.rand(tokens, VALUE_HEADS, generator=generator)
    return [tensor.requires_grad_() for tensor in (query, key, value, log_decay, beta)]


def rule_sides(lengths: list[int]) -> tuple[Side, Side]:
    layout = SequenceLayout(lengths)
    inputs = rule_inputs(layout.total)
    output_grad = torch.randn(layout.total, VALUE_HEADS, DIM, generator=torch.Generator().manual_seed(1))

    def theirs() -> Tensor:
        outputs = [
            stock_rule(*(tensor[None, start:stop] for tensor in inputs), use_qk_l2norm_in_kernel=True)[0][0]
            for start, stop in pairwise(layout.starts)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    ours = Side(lambda: gated_delta_rule(*inputs, layout=layout), inputs, output_grad)
    return ours, Side(theirs, inputs, output_grad)


def conv_sides(lengths: list[int]) -> tuple[Side, Side]:
    layout = SequenceLayout(lengths)
    channels = (2 * KEY_HEADS + VALUE_HEADS) * DIM
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(layout.total, channels, generator=generator, requires_grad=True)
    weight = torch.randn(channels, WIDTH, generator=generator, requires_grad=True)
    output_grad = torch.randn(layout.total, channels, generator=generator)

    def theirs() -> Tensor:
        outputs = []
        for document in x.split(lengths):
            padded = functional.conv1d(document.T[None], weight[:, None], padding=WIDTH - 1, groups=channels)
            outputs.append(functional.silu(padded[0, :, : len(document)]).T)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    ours = Side(lambda: short_conv(x, weight, None, layout=layout), [x, weight], output_grad)
    return ours, Side(theirs, [x, weight], output_grad)


def linearity(short: int, long: int, runs: int) -> None:
    """The tokens per second of a long document over those of a short one, which is its beginning."""
    inputs, output_grad = rule_inputs(long), torch.randn(long, VALUE_HEADS, DIM)
    begin = [tensor[:short].detach().requires_grad_() for tensor in inputs]
    sides = [
        Side(lambda own=own, size=size: gated_delta_rule(*own, layout=SequenceLayout([size])), own, grad)
        for size, own, grad in ((short, begin, output_grad[:short]), (long, inputs, output_grad))
    ]
    first, whole = (side.results()[0] for side in sides)
    if not torch.allclose(first, whole[:short], rtol=MOST_ERROR, atol=MOST_ERROR):
        msg = f"the first {short} tokens of {long} have another output alone; not timed"
        raise SystemExit(msg)
    pairs = [[size / side.seconds() for size, side in zip((short, long), sides, strict=True)] for _ in range(runs)]
    ratios = [slow / fast for fast, slow in pairs]
    own, other = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    print(
        f"rule, one document of {short} and one of {long} tokens: {own:,.0f} and {other:,.0f} tokens/s: "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread, float32")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{KEY_HEADS} key and {VALUE_HEADS} value heads of {DIM}, {WIDTH} taps; forward and backward")
    one = rule_sides([2048])
    compare("rule, one document of 2048 tokens", *one, runs)
    compare(f"rule, {len(MIXED)} documents, {sum(MIXED)} tokens, and a loop", *rule_sides(MIXED), runs)
    compare("conv, one document of 2048 tokens", *conv_sides([2048]), runs)
    compare(f"conv, {len(MIXED)} documents, {sum(MIXED)} tokens, and a loop", *conv_sides(MIXED), runs)
    for title, (ours, theirs) in (("rule", one), ("conv", conv_sides([2048]))):
        own, other = ours.saved_bytes() / 2**20, theirs.saved_bytes() / 2**20
        print(
            f"{title}, saved for backward at 2048 tokens: {own:.1f} MiB against {other:.1f} MiB, {own / other:.2f}"
        )
    linearity(4096, 32768, runs)


if __name__ == "__main__":
    main()

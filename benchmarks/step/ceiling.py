"""What a step would take if matrix products ran at this machine's own rate and nothing else took time."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from job import JOBS
from measuring import RANK

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 64
HEAD_DIM, LINEAR_DIM = 256, 128


def products(name: str, lengths: Sequence[int], supervised: int) -> list[tuple[int, int, int, float]]:
    """(rows, inner, columns, times) of every matrix product of a pass over documents of these lengths.

    Forward and the gradient of the input of all Linears, their adapters (which have weight gradients too), the
    head on supervised tokens, the causal half of attention (two products forward, four backward), and the chunked
    rule at 64: five products of a chunk with its own tokens and three with the state, and twice that backward.
    Nothing that is computed again is counted.
    """
    job = JOBS[name]
    size, tokens = job.sizes, sum(lengths)
    hidden, ffn, layers = (size[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    full = layers // 4
    query, key = size["num_attention_heads"] * HEAD_DIM, size["num_key_value_heads"] * HEAD_DIM
    heads = size["linear_num_value_heads"]
    linear = heads * LINEAR_DIM
    mlp = [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    of_full = [(hidden, 2 * query), (hidden, key), (hidden, key), (query, hidden), *mlp]
    of_linear = [(hidden, 3 * linear), (hidden, linear), (hidden, heads), (hidden, heads), (linear, hidden), *mlp]
    found: list[tuple[int, int, int, float]] = []
    for count, linears in ((full, of_full), (layers - full, of_linear)):
        for inner, columns in linears:
            found.append((tokens, inner, columns, 2 * count))
            found.append((tokens, inner, RANK, 3 * count))
            found.append((tokens, RANK, columns, 3 * count))
    found.append((supervised, hidden, job.vocabulary, 2))
    causal = 0.5 * 6 * full * size["num_attention_heads"]
    found += [(length, HEAD_DIM, length, causal) for length in lengths]
    chunks = sum(-(-length // CHUNK) for length in lengths)
    of_chunks = 3 * chunks * heads * (layers - full)
    found.append((CHUNK, LINEAR_DIM, CHUNK, 2 * of_chunks))  # k k^T, q k^T
    found.append((CHUNK, CHUNK, LINEAR_DIM, 3 * of_chunks))  # solved values and keys, and the output within
    found.append((CHUNK, LINEAR_DIM, LINEAR_DIM, 3 * of_chunks))  # what the state is asked twice and told once
    return found


def flops(work: Sequence[tuple[int, int, int, float]]) -> float:
    """Multiplications and additions."""
    return sum(2.0 * rows * inner * columns * times for rows, inner, columns, times in work)


def rate(name: str, runs: int = 7) -> float:
    """Floating point operations a second of float32 products at the job's largest shapes, the best of them."""
    size = JOBS[name].sizes
    hidden, ffn = size["hidden_size"], size["intermediate_size"]
    found = []
    for inner, columns in ((hidden, ffn), (ffn, hidden), (hidden, 3 * hidden)):
        left, right = torch.randn(2048, inner), torch.randn(columns, inner)
        out = torch.empty(2048, columns)
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            torch.mm(left, right.T, out=out)
            seconds.append(time.perf_counter() - start)
        found.append(2 * 2048 * inner * columns / statistics.median(seconds))
    return max(found)

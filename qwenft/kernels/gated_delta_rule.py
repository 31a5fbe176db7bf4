r"""The gated delta rule over packed documents, in chunks, with a backward pass that recomputes.

The recurrence is that of arXiv:2412.06464; its chunked form follows
transformers.models.qwen3_5.modeling_qwen3_5.torch_chunk_gated_delta_rule. Per chunk and value head, with rows for
the C tokens, c the running sum of log_decay within the chunk, b = beta, S the state before the chunk, and q, k
L2-normalised (q also scaled by D^-0.5):

    decay_ij = exp(c_i - c_j) for j <= i, else 0
    M_ij     = decay_ij (k_i . k_j) for j < i, else 0         what token j left of itself in token i's view
    P_ij     = decay_ij (q_i . k_j)
    u_i      = b_i (v_i - exp(c_i) S^T k_i - sum_j M_ij u_j)  what token i writes: the delta rule, unrolled
    output   = exp(c) q S + P u
    S'       = exp(c_C) S + (exp(c_C - c) k)^T u

The writes solve (I + b M) u = b (v - exp(c) k S). With the inverse A, u = A b v - W S and W = A (b exp(c) k): all
but W S is formed for a group of chunks at once, and two products a chunk are left for the sequential scan, for
documents side by side.

Backward, with do and dS' given:

    du = P^T do + (exp(c_C - c) k) dS'
    dS = exp(c_C) dS' + (exp(c) q)^T do - W^T du

and all other gradients follow from du, u, S and dS' for the group at once: with r = A^T du, the gradient of
b (v - exp(c) k S), dv = b r, dM = -b (r u^T), and db = r . (v - exp(c) k S - M u), which is exact for beta = 0 too
since nothing is divided by beta.

Where a document begins without a state S = 0, and where it ends with none asked for dS' = 0: the products with
them are left out, which is half of the work for a document of one chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.autograd.function import once_differentiable

from qwenft.kernels.checks import check_delta_rule, compute_dtype, exact
from qwenft.kernels.chunk_tensors import ChunkTensors
from qwenft.kernels.chunks import CHUNK, ChunkPlan
from qwenft.kernels.device import device_type
from qwenft.kernels.reference import l2norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenft.kernels.chunks import Group
    from qwenft.kernels.layout import SequenceLayout

# Rows of chunks and value heads that are computed together on a CPU: few enough that the temporaries of a group
# are small beside what a layer keeps, many enough that few kernels are launched.
GROUP_ROWS = 512


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    layout: SequenceLayout,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the gated delta rule over each document, as :func:`gated_delta_rule_reference` does, in chunks.

    Computes in float32 (float64 for float64 values) whatever the dtypes of the arguments.

    Args:
        query: [T, K, D], raw.
        key: [T, K, D], raw; value head v reads key head v // (V / K).
        value: [T, V, E].
        log_decay: [T, V], at most 0.
        beta: [T, V].
        layout: where the documents begin.
        initial_state: [N, V, D, E]; zeros where None.
        return_state: also return the state after each document.

    Returns:
        [T, V, E] in the dtype of ``value``, and [N, V, D, E] in float32 where asked.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    inputs = (query, key, value, log_decay, beta)
    check_delta_rule(inputs, initial_state, layout)
    if layout.max_length == 1:
        with exact(value):
            output, state = _single_step(inputs, initial_state)
    else:
        output, state = _ChunkedRule.apply(_plan(layout, key, value), return_state, initial_state, *inputs)
    return (output, state) if return_state else output


def _single_step(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token for each of N documents, as when decoding."""
    query, key, value, log_decay, beta = inputs
    dtype = compute_dtype(value)
    N, K, D = key.shape
    V, E = value.shape[1:]
    query_NKD = l2norm(query.to(dtype)) * D**-0.5
    key_NKD = l2norm(key.to(dtype))
    if initial_state is None:
        initial_state = value.new_zeros(N, V, D, E, dtype=dtype)
    decayed = initial_state.to(dtype) * log_decay.to(dtype).exp()[..., None, None]
    recalled = torch.einsum("nkrde,nkd->nkre", decayed.view(N, K, -1, D, E), key_NKD).reshape(N, V, E)
    writes = beta.to(dtype)[..., None] * (value.to(dtype) - recalled)
    written = key_NKD[:, :, None, :, None] * writes.view(N, K, -1, 1, E)
    state = decayed + written.view(N, V, D, E)
    output = torch.einsum("nkrde,nkd->nkre", state.view(N, K, -1, D, E), query_NKD)
    return output.reshape(N, V, E).to(value.dtype), state


def _plan(layout: SequenceLayout, key: Tensor, value: Tensor) -> ChunkPlan:
    heads = key.shape[1], value.shape[1]
    size = max(1, GROUP_ROWS // heads[1]) if device_type(value) == "cpu" else layout.total
    return ChunkPlan.of(layout, size, heads)


class _ChunkedRule(torch.autograd.Function):
    """Both passes, group by group; saves the inputs and each group's states, writes u and inverse A."""

    @staticmethod
    def forward(
        ctx: Any, plan: ChunkPlan, return_state: bool, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        value = inputs[2]
        saved: list[Tensor | None] = []
        output = torch.empty_like(value, memory_format=torch.contiguous_format)
        with exact(value):
            carry = _carry(initial_state, plan, inputs)
            for group in plan.groups:
                chunks = ChunkTensors.cut(inputs, group)
                inverse = _inverse(chunks)
                fresh = group.fresh if initial_state is None else 0
                states, writes = _scan(chunks, inverse, carry, group, fresh=fresh, keeps_last=return_state)
                result = torch.bmm(chunks.products(chunks.q).view(inverse.shape), writes)
                if len(states):
                    result[-len(states) :].baddbmm_(chunks.scaled(chunks.q, chunks.from_start, fresh), states)
                group.scatter(result.view(chunks.v.shape), output)
                if any(ctx.needs_input_grad):
                    saved += [states, writes, inverse]
        ctx.save_for_backward(*inputs, *saved)
        ctx.plan = plan
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return output, _by_document(carry, plan, value.shape[1]) if return_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        kept_tensors, plan = ctx.saved_tensors, ctx.plan  # read once: checkpointing unpacks once
        inputs, saved = kept_tensors[:5], kept_tensors[5:]
        wants_initial = ctx.needs_input_grad[2]
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
        if grad_output is None:
            grad_output = torch.zeros_like(inputs[2])
        with exact(grad_output):
            carry = _carry(grad_final, plan, inputs)
            for number, group in reversed(list(enumerate(plan.groups))):
                kept = _Kept(ChunkTensors.cut(inputs, group), *saved[3 * number : 3 * number + 3])
                output_grad = group.gather(grad_output, carry.dtype, zeroed=True).view(kept.writes.shape)
                fresh = 0 if wants_initial else group.fresh
                scanned = _scan_backwards(
                    kept, output_grad, carry, group, fresh=fresh, has_last=grad_final is not None
                )
                for grad, stream in zip(_input_gradients(kept, output_grad, scanned), grads, strict=True):
                    group.scatter(grad, stream)
        initial = _by_document(carry, plan, inputs[2].shape[1]).to(ctx.state_dtype) if wants_initial else None
        return None, None, initial, *grads


def _carry(states: Tensor | None, plan: ChunkPlan, inputs: Sequence[Tensor]) -> Tensor:
    """States [N, V, D, E] of documents, or zeros, as [N V, D, E] in the order of the scan: a copy to work in."""
    _, key, value, *_ = inputs
    shape = (len(plan.order) * value.shape[1], key.shape[2], value.shape[2])
    if states is None:
        return value.new_zeros(shape, dtype=compute_dtype(value))
    return states.to(compute_dtype(value)).index_select(0, plan.order).view(shape)


def _by_document(carry: Tensor, plan: ChunkPlan, heads: int) -> Tensor:
    """The inverse of :func:`_carry`."""
    states = carry.view(-1, heads, *carry.shape[1:])
    return torch.empty_like(states).index_copy_(0, plan.order, states)


def _inverse(chunks: ChunkTensors) -> Tensor:
    """The inverse of I + b M: [B V, C, C]."""
    # The solver reads below the diagonal only, so that the decay's ones on it do no harm.
    strictly_lower = chunks.products(chunks.k).mul_(chunks.beta[..., None]).view(chunks.rows, CHUNK, CHUNK)
    identity = torch.eye(CHUNK, dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(
        strictly_lower, identity.expand_as(strictly_lower), upper=False, unitriangular=True
    )


def _recalled(chunks: ChunkTensors, inverse: Tensor, out: Tensor) -> Tensor:
    """-W [(B - fresh) V, C, D], into ``out``: what the states before the last chunks add to the writes there."""
    fresh = (len(inverse) - len(out)) // chunks.v.shape[1]
    readers = chunks.scaled(chunks.k, chunks.beta * chunks.from_start, fresh)
    return out.baddbmm_(inverse[len(inverse) - len(out) :], readers, beta=0, alpha=-1)


def _scan(
    chunks: ChunkTensors, inverse: Tensor, carry: Tensor, group: Group, *, fresh: int, keeps_last: bool
) -> tuple[Tensor, Tensor]:
    """Carry the states of the documents through a group; ``carry`` holds those that enter, then those that leave.

    Returns:
        The state before each chunk but the ``fresh`` first ones, where it is zero, [(B - fresh) V, D, E], and the
        writes u [B V, C, E].
    """
    heads = chunks.v.shape[1]
    writes = torch.bmm(inverse, (chunks.v * chunks.beta[..., None]).view(chunks.rows, CHUNK, -1))
    writers = chunks.scaled(chunks.k, chunks.to_end)
    states = carry.new_empty(chunks.rows - fresh * heads, *carry.shape[1:])
    recalled = _recalled(chunks, inverse, carry.new_empty(len(states), CHUNK, carry.shape[1]))
    whole = chunks.whole.view(-1, 1, 1)
    for span in group.spans:
        rows, later = span.rows(heads, span.documents), span.rows(heads, span.documents, fresh)
        known = span.chunk >= fresh
        if known:
            if span.enters or keeps_last:
                states[later] = carry[span.carried(heads, span.documents)]
            writes[rows].baddbmm_(recalled[later], states[later])
        going = span.documents if keeps_last else span.going_on
        if going:
            rows = span.rows(heads, going)
            following = None if keeps_last else span.rows_after(heads, fresh)
            after = carry[span.carried(heads, going)] if following is None else states[following]
            if known:
                before = states[span.rows(heads, going, fresh)]
                torch.mul(before, whole[rows], out=after).baddbmm_(writers[rows].mT, writes[rows])
            else:
                torch.bmm(writers[rows].mT, writes[rows], out=after)
    return states, writes


@attrs.frozen(eq=False)
class _Kept:
    """What the backward pass has of a group: its tensors, made again, and what forward saved."""

    chunks: ChunkTensors
    states: Tensor
    writes: Tensor
    inverse: Tensor

    @property
    def fresh(self) -> int:
        """How many chunks, the first ones, have no state before them."""
        return (len(self.writes) - len(self.states)) // self.chunks.v.shape[1]


@attrs.frozen(eq=False)
class _Scanned:
    """What the scan backwards leaves of a group.

    Args:
        attention: [B, V, C, C], P.
        solved: [B V, C, E], r.
        write_k: [B V, C, D], u dS'^T, zero where no state is handed on.
        grad_whole: [B V, 1, 1], S . dS', the gradient of the chunk's whole decay.
    """

    attention: Tensor
    solved: Tensor
    write_k: Tensor
    grad_whole: Tensor


def _scan_backwards(
    kept: _Kept, output_grad: Tensor, carry: Tensor, group: Group, *, fresh: int, has_last: bool
) -> _Scanned:
    """Carry the gradients of the states through a group, from its last span to its first, in place.

    The ``fresh`` first chunks hand none on.
    """
    chunks, heads = kept.chunks, kept.chunks.v.shape[1]
    writers = chunks.scaled(chunks.k, chunks.to_end)
    # A state is asked by the outputs and by the writes: one product with the gradients of both, side by side.
    askers = carry.new_empty(chunks.rows - fresh * heads, 2 * CHUNK, carry.shape[1])
    askers[:, :CHUNK] = chunks.scaled(chunks.q, chunks.from_start, fresh)
    _recalled(chunks, kept.inverse, askers[:, CHUNK:])
    attention = chunks.products(chunks.q)
    grads = torch.cat([output_grad, torch.bmm(attention.view(kept.inverse.shape).mT, output_grad)], 1)
    write_grads = grads[:, CHUNK:]
    whole = chunks.whole.view(-1, 1, 1)
    write_k, grad_whole = torch.zeros_like(writers), torch.zeros_like(whole)
    for span in reversed(group.spans):
        going = span.documents if has_last else span.going_on
        if going:
            rows, after = span.rows(heads, going), carry[span.carried(heads, going)]
            write_grads[rows].baddbmm_(writers[rows], after)
            torch.bmm(kept.writes[rows], after.mT, out=write_k[rows])
            if span.chunk >= kept.fresh:
                before = kept.states[span.rows(heads, going, kept.fresh)]
                torch.bmm(before.flatten(1)[:, None], after.flatten(1)[..., None], out=grad_whole[rows])
        if span.chunk >= fresh:
            rows, later = span.rows(heads, span.documents), span.rows(heads, span.documents, fresh)
            state_grads = carry[span.carried(heads, span.documents)].mul_(whole[rows])
            state_grads.baddbmm_(askers[later].mT, grads[rows])
    return _Scanned(attention, torch.bmm(kept.inverse.mT, write_grads), write_k, grad_whole)


def _input_gradients(kept: _Kept, output_grad: Tensor, scanned: _Scanned) -> tuple[Tensor, ...]:
    """The gradients of query, key, value, log_decay and beta, in chunks."""
    chunks = kept.chunks
    q_parts, k_parts, grad_c, grad_beta = _through_pairs(kept, output_grad, scanned)
    solved = scanned.solved.view(chunks.v.shape)
    grad_beta += (solved * chunks.v).sum(-1)

    # Through the state after the chunk, which k writes into.
    written = chunks.dot(scanned.write_k, chunks.k) * chunks.to_end
    grad_c -= written
    grad_c[..., -1] += written.sum(-1) + scanned.grad_whole.view(chunks.whole.shape[:2]) * chunks.whole[..., 0]
    by_state_k = scanned.write_k.mul_(chunks.to_end.view(-1, CHUNK, 1))

    # Through the state before it, which q reads for the output and k for the correction.
    if rows := len(kept.states):
        first = kept.fresh
        from_start, beta = chunks.from_start[first:], chunks.beta[first:]
        state_q = torch.bmm(output_grad[-rows:], kept.states.mT)
        state_k = torch.bmm(scanned.solved[-rows:], kept.states.mT)
        read = chunks.dot(state_k, chunks.k[first:]) * from_start
        grad_c[first:] += chunks.dot(state_q, chunks.q[first:]) * from_start - read * beta
        grad_beta[first:] -= read
        by_state_k[-rows:].addcmul_(state_k, (beta * from_start).view(-1, CHUNK, 1), value=-1)
        q_parts[first:] += chunks.over_values(state_q.mul_(from_start.reshape(-1, CHUNK, 1)))
    k_parts += chunks.over_values(by_state_k)

    return (
        _through_l2norm(q_parts, chunks.q, chunks.q_factor, square=1 / chunks.q.shape[-1]),
        _through_l2norm(k_parts, chunks.k, chunks.k_factor, square=1.0),
        solved * chunks.beta[..., None],
        grad_c.flip(-1).cumsum(-1).flip(-1),
        grad_beta,
    )


def _through_pairs(kept: _Kept, output_grad: Tensor, scanned: _Scanned) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What P and M give to the gradients of q and k [B, K, C, D], and of c and beta [B, V, C]."""
    chunks = kept.chunks
    grad_P = torch.bmm(output_grad, kept.writes.mT).view(chunks.decay.shape)
    solved_u = torch.bmm(scanned.solved, kept.writes.mT).view(chunks.decay.shape)
    by_decay = grad_P * scanned.attention
    by_beta = solved_u * chunks.products(chunks.k)
    # M has no diagonal, and the decay on P's does not depend on c.
    for pairs in (by_decay, by_beta):
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
    by_decay.addcmul_(by_beta, chunks.beta[..., None], value=-1)
    grad_qk = chunks.over_values(grad_P.mul_(chunks.decay).view(-1, CHUNK, CHUNK))
    grad_M = solved_u.mul_(chunks.decay).mul_(chunks.beta[..., None]).neg_()
    grad_kk = chunks.over_values(grad_M.view(-1, CHUNK, CHUNK))
    grad_kk.diagonal(dim1=-2, dim2=-1).zero_()
    return (
        torch.matmul(grad_qk, chunks.k),
        torch.matmul(grad_kk + grad_kk.mT, chunks.k) + torch.matmul(grad_qk.mT, chunks.q),
        by_decay.sum(-1) - by_decay.sum(-2),
        -by_beta.sum(-1),
    )


def _through_l2norm(grad: Tensor, normalised: Tensor, factor: Tensor, *, square: float) -> Tensor:
    """The gradient of x from that of ``normalised`` = x ``factor``, whose squared length is ``square``."""
    along = (grad * normalised).sum(-1, keepdim=True) / square
    return (grad - along * normalised) * factor

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

The writes solve (I + b M) u = b (v - exp(c) k S). Its inverse A is formed for all chunks at once; what is left for
the sequential scan is three products a chunk, for all documents side by side.

Backward, with do and dS' given:

    du = P^T do + (exp(c_C - c) k) dS'        r = A^T du        r is the gradient of b (v - exp(c) k S)
    dS = exp(c_C) dS' + (exp(c) q)^T do - (b exp(c) k)^T r

and all other gradients follow from r, u, S and dS' of every chunk at once: dv = b r, dM = -b (r u^T), and
db = r . (v - exp(c) k S - M u), which is exact for beta = 0 too since nothing is divided by beta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.autograd.function import once_differentiable

from qwenft.kernels.checks import check_delta_rule, compute_dtype, exact
from qwenft.kernels.chunks import CHUNK, ChunkPlan
from qwenft.kernels.reference import EPSILON, l2norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout

# Sums of log_decay are kept as a multiple of this and a rest, so that differences of large sums stay exact.
COARSE = 1 / 16


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
        output, state = _ChunkedRule.apply(ChunkPlan.of(layout), return_state, initial_state, *inputs)
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


@attrs.frozen(eq=False)
class _Chunks:
    """What both passes need of every chunk, before any state is known.

    Args:
        q: [B, K, C, D], normalised and scaled.
        k: [B, K, C, D], normalised.
        v: [B, V, C, E].
        beta: [B, V, C].
        from_start: [B, V, C], exp(c): the decay from the chunk's start to each token.
        to_end: [B, V, C], exp(c_C - c): the decay from each token to the chunk's end.
        whole: [B, V, 1], exp(c_C).
        decay: [B, V, C, C], 1 on the diagonal and 0 above it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    from_start: Tensor
    to_end: Tensor
    whole: Tensor
    decay: Tensor

    @classmethod
    def cut(cls, inputs: Sequence[Tensor], plan: ChunkPlan) -> _Chunks:
        q, k, v, log_decay, beta = inputs
        dtype = compute_dtype(v)
        log_decay = plan.gather(log_decay, dtype)
        # Multiples of COARSE add up exactly and the rests stay small, so c_i - c_j is exact to float32's relative
        # precision even where the sums are in the thousands; one running sum would lose 1e-4 there.
        coarse = (log_decay / COARSE).round() * COARSE
        fine = (log_decay - coarse).cumsum(-1)
        coarse = coarse.cumsum(-1)
        decay = (coarse[..., :, None] - coarse[..., None, :]).add_(plan.later)
        decay = decay.add_(fine[..., :, None]).sub_(fine[..., None, :]).exp_()
        return cls(
            q=plan.gather(l2norm(q.to(dtype)).mul_(q.shape[-1] ** -0.5), dtype),
            k=plan.gather(l2norm(k.to(dtype)), dtype),
            v=plan.gather(v, dtype),
            beta=plan.gather(beta, dtype),
            from_start=(coarse + fine).exp_(),
            to_end=decay[..., -1, :].contiguous(),
            whole=(coarse[..., -1:] + fine[..., -1:]).exp_(),
            decay=decay,
        )

    @property
    def rows(self) -> int:
        """B * V, the batch of the products over value heads."""
        return self.v.shape[0] * self.v.shape[1]

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """The rows of q or k, one copy a value head, times [B, V, C]: [B V, C, D]."""
        B, K, C, D = x.shape
        return (x[:, :, None] * factor.view(B, K, -1, C, 1)).view(self.rows, C, D)

    def products(self, x: Tensor) -> Tensor:
        """decay_ij (x_i . k_j) of q or k: [B, V, C, C]."""
        B, K, C, _ = x.shape
        dots = torch.matmul(x, self.k.mT)
        return (self.decay.view(B, K, -1, C, C) * dots[:, :, None]).view(B, -1, C, C)

    def over_values(self, x: Tensor) -> Tensor:
        """[B V, C, X] summed over the value heads that share a key head: [B, K, C, X]."""
        B, K, C, _ = self.k.shape
        return x.view(B, K, -1, C, x.shape[-1]).sum(2)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Row by row dots of [B V, C, D] with q or k: [B, V, C]."""
        B, K, C, D = y.shape
        return (x.view(B, K, -1, C, D) * y[:, :, None]).sum(-1).view(B, -1, C)


def _unit_lower_inverse(strictly_lower: Tensor) -> Tensor:
    """The inverse of I + [..., C, C], of which only what lies below the diagonal is read."""
    identity = torch.eye(CHUNK, dtype=strictly_lower.dtype, device=strictly_lower.device)
    return torch.linalg.solve_triangular(
        strictly_lower, identity.expand_as(strictly_lower), upper=False, unitriangular=True
    )


class _ChunkedRule(torch.autograd.Function):
    """Forward and backward of the chunked rule; saves its inputs, the states, the writes u and the inverse A."""

    @staticmethod
    def forward(
        ctx: Any, plan: ChunkPlan, return_state: bool, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with exact(inputs[0]):
            chunks = _Chunks.cut(inputs, plan)
            inverse = _unit_lower_inverse(chunks.products(chunks.k).mul_(chunks.beta[..., None]))
            inverse = inverse.view(chunks.rows, CHUNK, CHUNK)
            states, writes, final = _scan(chunks, inverse, initial_state, plan, return_state=return_state)
            output = torch.bmm(chunks.scaled(chunks.q, chunks.from_start), states)
            output.baddbmm_(chunks.products(chunks.q).view(inverse.shape), writes)
        ctx.save_for_backward(*inputs, states, writes, inverse)
        ctx.plan = plan
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        return plan.scatter(output.view(chunks.v.shape), inputs[2].dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, states, writes, inverse = ctx.saved_tensors
        query, key, value, log_decay, beta = inputs
        plan = ctx.plan
        with exact(value):
            chunks = _Chunks.cut(inputs, plan)
            output_grad = plan.gather(grad_output, chunks.v.dtype).view(writes.shape)
            solved, state_grads, initial_grad = _scan_backwards(
                chunks, inverse, output_grad, grad_final, plan, wants_initial=ctx.needs_input_grad[2]
            )
            dq, dk, dv, dg, db = _input_gradients(
                chunks,
                states=states,
                writes=writes,
                output_grad=output_grad,
                solved=solved,
                state_grads=state_grads,
            )
            dq = _through_l2norm(plan.scatter(dq, dq.dtype), query, query.shape[-1] ** -0.5)
            dk = _through_l2norm(plan.scatter(dk, dk.dtype), key, 1.0)
        return (
            None,
            None,
            None if initial_grad is None else initial_grad.to(ctx.state_dtype),
            dq.to(query.dtype),
            dk.to(key.dtype),
            plan.scatter(dv, value.dtype),
            plan.scatter(dg, log_decay.dtype),
            plan.scatter(db, beta.dtype),
        )


def _scan(
    chunks: _Chunks, inverse: Tensor, initial_state: Tensor | None, plan: ChunkPlan, *, return_state: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Carry the states from chunk to chunk.

    Returns:
        The state before each chunk [B V, D, E], the writes u [B V, C, E], and the final states [N, V, D, E].
    """
    B, V, C, E = chunks.v.shape
    D = chunks.k.shape[-1]
    readers = chunks.scaled(chunks.k, chunks.beta * chunks.from_start)
    writers = chunks.scaled(chunks.k, chunks.to_end)
    whole = chunks.whole.view(-1, 1, 1)
    wanted = (chunks.v * chunks.beta[..., None]).view(-1, C, E)
    writes = torch.empty_like(wanted)
    states = chunks.v.new_empty(B * V, D, E)
    documents = len(plan.order)
    first = states[: documents * V].view(documents, V, D, E)
    if initial_state is None:
        first.zero_()
    else:
        first.copy_(initial_state.index_select(0, plan.order))
    final = states.new_empty(documents * V, D, E) if return_state else None
    for step, going_on, following, ending in plan.forwards(V):
        wanted[step].baddbmm_(readers[step], states[step], alpha=-1)
        torch.bmm(inverse[step], wanted[step], out=writes[step])
        torch.mul(states[going_on], whole[going_on], out=states[following])
        states[following].baddbmm_(writers[going_on].mT, writes[going_on])
        if final is not None:
            last = final[ending.start - step.start : ending.stop - step.start]
            torch.mul(states[ending], whole[ending], out=last)
            last.baddbmm_(writers[ending].mT, writes[ending])
    if final is not None:
        final = torch.empty_like(final).view(first.shape).index_copy_(0, plan.order, final.view(first.shape))
    return states, writes, final


def _scan_backwards(
    chunks: _Chunks,
    inverse: Tensor,
    output_grad: Tensor,
    grad_final: Tensor | None,
    plan: ChunkPlan,
    *,
    wants_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Carry the gradients of the states from chunk to chunk, last to first.

    Returns:
        r [B V, C, E], the gradient of the state after each chunk [B V, D, E], and that of the initial states.
    """
    V, D, E = chunks.v.shape[1], chunks.k.shape[-1], chunks.v.shape[-1]
    readers = chunks.scaled(chunks.k, chunks.beta * chunks.from_start)
    writers = chunks.scaled(chunks.k, chunks.to_end)
    whole = chunks.whole.view(-1, 1, 1)
    write_grads = torch.bmm(chunks.products(chunks.q).view(inverse.shape).mT, output_grad)
    before = torch.bmm(chunks.scaled(chunks.q, chunks.from_start).mT, output_grad)
    solved = torch.empty_like(output_grad)
    after = torch.empty_like(before)
    ends = None if grad_final is None else grad_final.index_select(0, plan.order).view(-1, D, E)
    for step, going_on, following, ending in reversed(list(plan.forwards(V))):
        after[going_on] = before[following]
        after[ending] = 0 if ends is None else ends[ending.start - step.start : ending.stop - step.start]
        write_grads[step].baddbmm_(writers[step], after[step])
        torch.bmm(inverse[step].mT, write_grads[step], out=solved[step])
        if step.start > 0 or wants_initial:
            before[step].addcmul_(after[step], whole[step]).baddbmm_(readers[step].mT, solved[step], alpha=-1)
    if not wants_initial:
        return solved, after, None
    initial = before[: len(plan.order) * V].view(-1, V, D, E)
    return solved, after, torch.empty_like(initial).index_copy_(0, plan.order, initial)


def _input_gradients(
    chunks: _Chunks, *, states: Tensor, writes: Tensor, output_grad: Tensor, solved: Tensor, state_grads: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of normalised q and k, of v, log_decay and beta, in chunks, from what the scans left."""
    B, V, C, E = chunks.v.shape
    beta, solved_BVCE = chunks.beta, solved.view(B, V, C, E)
    pairs = (B, V, C, C)

    # Through the chunk's own pairs: P and M. M's diagonal is no part of the rule, P's decay is constant there.
    grad_P = torch.bmm(output_grad, writes.mT).view(pairs)
    by_decay = grad_P * chunks.products(chunks.q)
    grad_M = torch.bmm(solved, writes.mT).view(pairs)
    solved_M = grad_M * chunks.products(chunks.k)
    by_decay.addcmul_(solved_M, beta[..., None], value=-1)
    by_decay.diagonal(dim1=-2, dim2=-1).zero_()
    solved_M.diagonal(dim1=-2, dim2=-1).zero_()
    grad_c = by_decay.sum(-1) - by_decay.sum(-2)
    grad_beta = (solved_BVCE * chunks.v).sum(-1) - solved_M.sum(-1)
    grad_qk = chunks.over_values(grad_P.mul_(chunks.decay).view(-1, C, C))
    grad_kk = chunks.over_values(grad_M.mul_(chunks.decay).mul_(beta[..., None]).neg_().view(-1, C, C))
    grad_kk.diagonal(dim1=-2, dim2=-1).zero_()
    dq = torch.matmul(grad_qk, chunks.k)
    dk = torch.matmul(grad_kk + grad_kk.mT, chunks.k) + torch.matmul(grad_qk.mT, chunks.q)

    # Through the state before the chunk, which q reads for the output and k for the correction.
    state_q = torch.bmm(output_grad, states.mT)
    state_k = torch.bmm(solved, states.mT)
    read_k = chunks.dot(state_k, chunks.k) * chunks.from_start
    grad_c += chunks.dot(state_q, chunks.q) * chunks.from_start - read_k * beta
    grad_beta -= read_k
    dq += chunks.over_values(state_q.mul_(chunks.from_start.view(-1, C, 1)))

    # Through the state after the chunk, which k writes into.
    write_k = torch.bmm(writes, state_grads.mT)
    written = chunks.dot(write_k, chunks.k) * chunks.to_end
    grad_c -= written
    kept = (states * state_grads).sum((1, 2)).view(B, V) * chunks.whole[..., 0]
    grad_c[..., -1] += written.sum(-1) + kept
    write_k.mul_(chunks.to_end.view(-1, C, 1)).addcmul_(
        state_k, (beta * chunks.from_start).view(-1, C, 1), value=-1
    )
    dk += chunks.over_values(write_k)

    grad_log_decay = grad_c.flip(-1).cumsum(-1).flip(-1)
    return dq, dk, solved_BVCE * beta[..., None], grad_log_decay, grad_beta


def _through_l2norm(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    """The gradient of x from that of x / |x| * scale."""
    x = x.to(grad.dtype)
    inverse_length = torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)
    along = (grad * x).sum(-1, keepdim=True) * inverse_length**2
    return (grad - along * x) * (inverse_length * scale)

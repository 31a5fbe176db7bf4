"""Weights as bitsandbytes holds them in 4 and 8 bits, made dense where they are multiplied.

A quantized weight is a parameter of bitsandbytes: ``Params4bit`` with its ``quant_state`` (nf4, arXiv:2305.14314),
or ``Int8Params`` with its ``SCB``, the largest absolute value of each row (arXiv:2208.07339). Here both are alone
storage: products are made in the dtype of their input, from the dense weight, and no activation is rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenft.plan.storage import NESTED_BLOCK, NF4_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable

_INT8_STEPS = 127.0


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is held in 4 or 8 bits."""
    return getattr(weight, "quant_state", None) is not None or getattr(weight, "SCB", None) is not None


def dense_shape(weight: torch.Tensor) -> torch.Size:
    """The shape of a weight, packed or not."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else torch.Size(state.shape)


def dense(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in ``dtype``, whatever it is held in; without its gradient."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return _from_nf4(weight.data, state, _scales(state, 0, state.absmax.numel()), state.shape, dtype)
    if getattr(weight, "SCB", None) is not None:
        return _from_int8(weight.data, weight.SCB, dtype)  # type: ignore[attr-defined]
    return weight.detach().to(dtype)


def dense_experts(stack: torch.Tensor, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
    """Some experts [last - first, O, I] of a stack [E, O, I] in ``dtype``; of no other is anything made.

    An expert of a stack in 4 bits holds a whole number of blocks.
    """
    state = getattr(stack, "quant_state", None)
    if state is None:
        scales = getattr(stack, "SCB", None)
        part = stack.data[first:last]
        return part.to(dtype) if scales is None else _from_int8(part, scales[first:last], dtype)
    size = state.shape[1] * state.shape[2]
    packed = stack.data[first * size // 2 : last * size // 2]
    scales = _scales(state, first * size // state.blocksize, last * size // state.blocksize)
    return _from_nf4(packed, state, scales, torch.Size((last - first, *state.shape[1:])), dtype)


def quantize(weight: torch.Tensor, kind: str, *, double_quant: bool) -> torch.Tensor:
    """A weight [O, I] as a parameter of bitsandbytes.

    Args:
        weight: on the device where it is to be held.
        kind: "nf4" or "int8".
        double_quant: quantize the scales of nf4 too.
    """
    return quantize_experts([weight], (1, *weight.shape), kind, double_quant=double_quant, stacked=False)


def quantize_experts(
    experts: Iterable[torch.Tensor],
    shape: tuple[int, ...],
    kind: str,
    *,
    double_quant: bool,
    stacked: bool = True,
) -> torch.Tensor:
    """A stack of experts, quantized one after the other, as one parameter of bitsandbytes.

    It equals the quantized stack, as an expert holds a whole number of blocks.

    Args:
        experts: [O, I] each; none is kept.
        shape: [E, O, I] of the stack.
        kind: "nf4" or "int8".
        double_quant: quantize the scales of nf4 too.
        stacked: the parameter has the shape of the stack; of its one expert otherwise.
    """
    from bitsandbytes import functional as bnb

    if kind == "int8":
        return _quantize_int8(experts, shape if stacked else shape[1:])
    packed = scales = code = dtype = None
    for number, expert in enumerate(experts):
        part, state = bnb.quantize_4bit(
            expert.contiguous(), blocksize=NF4_BLOCK, compress_statistics=False, quant_type="nf4"
        )
        if packed is None or scales is None:
            packed = part.new_empty(shape[0] * len(part), 1)
            scales = state.absmax.new_empty(shape[0] * len(state.absmax))
            code, dtype = state.code, state.dtype
        packed[number * len(part) : (number + 1) * len(part)] = part
        scales[number * len(state.absmax) : (number + 1) * len(state.absmax)] = state.absmax
    assert packed is not None
    assert scales is not None
    nested: dict[str, Any] = {}
    if double_quant:
        # As in bitsandbytes' quantize_4bit.
        offset = scales.mean()
        scales, second = bnb.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        nested = {"offset": offset, "state2": second}
    whole = bnb.QuantState(
        absmax=scales,
        shape=torch.Size(shape if stacked else shape[1:]),
        code=code,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        **nested,
    )
    return held_in_nf4(packed, whole)


def held_in_nf4(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """A packed weight and its ``QuantState`` as one parameter."""
    from bitsandbytes.nn import Params4bit

    options = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
    return Params4bit(packed, quant_state=state, bnb_quantized=True, **options)


def held_in_int8(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows in int8 and the largest absolute value of each as one parameter."""
    from bitsandbytes.nn import Int8Params

    return Int8Params(rows, requires_grad=False, CB=rows, SCB=scales)


def _quantize_int8(experts: Iterable[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    held = scales = None
    for number, expert in enumerate(experts):
        part, scale, _ = bnb.int8_vectorwise_quant(expert.half().contiguous())
        if held is None or scales is None:
            held, scales = part.new_empty(shape), scale.new_empty(shape[:-1])
        if len(shape) == 3:
            held[number], scales[number] = part, scale
        else:
            held.copy_(part)
            scales.copy_(scale)
    assert held is not None
    assert scales is not None
    return held_in_int8(held, scales)


def _scales(state: Any, first: int, last: int) -> torch.Tensor:
    """The scales of some blocks, in float32."""
    scales = state.absmax[first:last]
    if state.state2 is None:
        return scales
    blocks = torch.arange(first, last, device=scales.device) // state.state2.blocksize
    return state.state2.code[scales.int()].mul_(state.state2.absmax[blocks]).add_(state.offset)


def _from_nf4(
    packed: torch.Tensor, state: Any, scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    from bitsandbytes import functional as bnb

    part = bnb.QuantState(
        absmax=scales, shape=shape, code=state.code, blocksize=state.blocksize, quant_type="nf4", dtype=dtype
    )
    # bitsandbytes takes a weight of one packed row for a transposed one.
    return bnb.dequantize_4bit(packed.view(-1, 1), part).view(shape)


def _from_int8(held: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return held.float().mul_((scales / _INT8_STEPS)[..., None]).to(dtype)

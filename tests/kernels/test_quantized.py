"""Weights in 4 and 8 bits, against bitsandbytes' own functions."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qwenft.kernels.quantized import dense, dense_experts, dense_shape, is_quantized, quantize, quantize_experts

EXPERTS, ROWS, COLUMNS = 5, 24, 40  # 15 blocks an expert: scales of scales reach over experts


def stack(dtype=torch.float32, experts=EXPERTS):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(experts, ROWS, COLUMNS, generator=generator).to(dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [EXPERTS, 40])
def test_a_stack_in_nf4_is_bitsandbytes_own(experts, dtype, double_quant):
    """Quantized expert by expert, it has the bits and the scales of the stack quantized at once, in any slice."""
    whole = stack(dtype, experts)
    packed, state = bnb.quantize_4bit(whole, quant_type="nf4", compress_statistics=double_quant)
    held = quantize_experts(iter(whole), whole.shape, "nf4", double_quant=double_quant)
    assert torch.equal(held.data, packed)
    assert torch.equal(held.quant_state.absmax, state.absmax)
    assert held.quant_state == state
    assert is_quantized(held)
    assert dense_shape(held) == whole.shape
    wanted = bnb.dequantize_4bit(packed, state)
    assert torch.equal(dense(held, dtype), wanted)
    for first, last in ((0, 1), (2, 5), (experts - 1, experts)):
        assert torch.equal(dense_experts(held, first, last, dtype), wanted[first:last])


def test_nf4_is_made_dense_in_the_dtype_that_is_asked():
    """In float32 of a bfloat16 weight nothing is rounded to bfloat16."""
    held = quantize(stack(torch.bfloat16)[0], "nf4", double_quant=True)
    in_float32 = dense(held, torch.float32)
    assert in_float32.dtype == torch.float32
    assert not torch.equal(in_float32, in_float32.bfloat16().float())
    assert torch.equal(in_float32.bfloat16(), dense(held, torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 2, ROWS])
def test_a_matrix_keeps_its_shape(rows):
    """A matrix of few rows too, which bitsandbytes packs into as few."""
    weight = stack()[0, :rows, :2]
    held = quantize(weight, "nf4", double_quant=False)
    assert dense(held, torch.float32).shape == weight.shape
    assert (dense(held, torch.float32) - weight).abs().max() < 0.2 * weight.abs().max()


def test_int8_rounds_each_row_to_its_largest():
    """As bitsandbytes does; a stack is its experts one by one."""
    whole = stack()
    held = quantize_experts(iter(whole), whole.shape, "int8", double_quant=False)
    rows, scales, _ = bnb.int8_vectorwise_quant(whole.half().view(-1, COLUMNS))
    assert torch.equal(held.data.view(-1, COLUMNS), rows)
    assert torch.equal(held.SCB.flatten(), scales)
    wanted = bnb.int8_vectorwise_dequant(rows, scales).view(whole.shape)
    assert torch.allclose(dense(held, torch.float32), wanted, rtol=1e-6)
    assert torch.equal(dense_experts(held, 1, 3, torch.float32), dense(held, torch.float32)[1:3])
    assert torch.equal(
        dense(quantize(whole[2], "int8", double_quant=False), torch.float32), dense(held, torch.float32)[2]
    )


def test_a_plain_weight_is_cast():
    """What is not quantized is itself in another dtype."""
    whole = stack()
    assert torch.equal(dense(whole, torch.bfloat16), whole.bfloat16())
    assert torch.equal(dense_experts(whole, 1, 3, torch.bfloat16), whole[1:3].bfloat16())
    assert not is_quantized(whole)

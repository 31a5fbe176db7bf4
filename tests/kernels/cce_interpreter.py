"""Runs cut cross entropy in Triton's interpreter, on CPU tensors, for test_cce.py; a process of its own.

float16, since its backward refuses float32 and the interpreter is wrong in bfloat16.
"""

import sys

import torch
import triton
import triton.language as tl
from cut_cross_entropy import tl_utils
from torch.nn import functional as F

from qwenft.models.loss import supervised_loss


@triton.jit
def _log1p(x):
    return tl.log(1.0 + x)


def main():
    tl_utils.tl_log1p = _log1p  # the interpreter has no functions of libdevice
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 64, generator=generator).half().requires_grad_()
    head = torch.nn.Linear(64, 512, bias=False).half().requires_grad_(False)
    head.weight.copy_(0.3 * torch.randn(512, 64, generator=generator))
    labels = torch.randint(0, 512, (60,), generator=generator)
    labels[::3] = -100
    weights = torch.rand(60, generator=generator)
    found = supervised_loss(hidden, head, labels, weights, method="cce")
    (gradient,) = torch.autograd.grad(found, hidden)
    each = F.cross_entropy(hidden.float() @ head.weight.float().T, labels, ignore_index=-100, reduction="none")
    wanted = (each * weights).sum()
    (reference,) = torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient, reference, rtol=1e-2, atol=4e-3)
    nothing = supervised_loss(hidden, head, torch.full_like(labels, -100), method="cce")
    (gradient,) = torch.autograd.grad(nothing, hidden)
    assert float(nothing) == float(gradient.abs().max()) == 0.0
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main()

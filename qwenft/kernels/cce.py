"""Cut cross entropy (arXiv:2411.09009) on a GPU: the loss without logits in memory, as the package of its authors.

In release 25.1.1 the gradient of the hidden states is added up in their own dtype (`cce_backward.py`), and small
parts of it are left out unless that is turned off, as here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of every token.

    Args:
        hidden: [S, H] bfloat16 or float16, on a GPU of compute capability 8.0 or more.
        weight: [V, H], the output head.
        labels: [S].

    Returns:
        [S] float32.
    """
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(hidden, weight, labels, filter_eps=None, reduction="none")
    return losses.float()

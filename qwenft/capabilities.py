"""What an attention backend is, and what it says of itself.

Rules, plans and the binding read these declarations and never a class name, so that a backend written in a
notebook cell stands beside the shipped ones. Letters in shapes: T tokens of the flat stream, S of them that
ask, N documents, H query heads, G key/value heads, K and V key and value heads of the Gated DeltaNet, D and E
head dims, C channels, W taps of the convolution.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine


@attrs.frozen
class Availability:
    """Whether a backend can run on a machine.

    Args:
        usable: it can.
        reason: why, or why not, in a few words.
        remedy: the line that would make it usable, where there is one.
    """

    usable: bool
    reason: str = ""
    remedy: str = ""


@attrs.frozen
class AttentionProblem:
    """What a full-attention layer asks of its backend.

    Args:
        device: "cpu" or "cuda".
        dtype: the dtype of the computation, such as "bfloat16".
        query_heads: H.
        key_value_heads: G, a divisor of H.
        head_dim: D.
        max_length: the longest document, in tokens.
        compute_capability: of the GPU, such as (9, 0), or None.
        lengths: tokens of the documents of a stream, where one is meant.
    """

    device: str
    dtype: str
    query_heads: int
    key_value_heads: int
    head_dim: int
    max_length: int
    compute_capability: tuple[int, int] | None = None
    lengths: tuple[int, ...] = ()


@attrs.frozen
class Workspace:
    """What kernels hold while they run, beside arguments, results, gradients of either and what is saved.

    Args:
        forward: bytes at most.
        backward: bytes at most.
    """

    forward: int = 0
    backward: int = 0


@attrs.frozen
class LinearAttentionProblem:
    """What a Gated DeltaNet layer asks of its backend.

    Args:
        device: "cpu" or "cuda".
        dtype: the dtype of the computation, such as "bfloat16".
        key_heads: K.
        value_heads: V, a multiple of K.
        key_dim: D.
        value_dim: E.
        max_length: the longest document, in tokens.
        compute_capability: of the GPU, such as (9, 0), or None.
        lengths: tokens of the documents of a stream, where one is meant.
    """

    device: str
    dtype: str
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    max_length: int
    compute_capability: tuple[int, int] | None = None
    lengths: tuple[int, ...] = ()


class Backend(ABC):
    """What both kinds of backend declare; compared by class and constructor fields.

    A plain class attribute satisfies each abstract property; one that is forgotten is named by the TypeError
    that the constructor raises.
    """

    #: It computes in 16 bits only, so that a float32 model is refused.
    needs_half_precision: bool = False

    #: It computes softmax attention, or the gated delta rule, itself. An experiment that means to differ says
    #: False: then it is compared with no reference, and isolation alone is proven.
    exact: bool = True

    #: It gives the same bits again: on a CPU, and on CUDA where torch is asked for deterministic algorithms.
    deterministic: bool = True

    #: Its operations are torch's own, so that a simulation can count what they hold; a launched kernel's are not.
    traceable: bool = True

    #: Where it fetches code from the network, "org/name@commit", or None.
    remote_code: str | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that plans and messages use."""

    @property
    @abstractmethod
    def supports_packing(self) -> bool:
        """Whether documents in one row stay apart."""

    @property
    @abstractmethod
    def uses_flash_lib(self) -> bool:
        """Whether it calls the flash-attn package or a hub build of it."""

    def availability(self, machine: Machine) -> Availability:
        """Whether it is installed and can run on ``machine``."""
        return Availability(usable=True)

    def refuses(self, problem: Any) -> str | None:
        """Why it cannot compute ``problem``, whatever is installed, or None where it can."""
        return None

    def saved_tensors(self, problem: Any) -> dict[str, int]:
        """Bytes of what attention, or the gated delta rule, keeps for backward, by name.

        Of a backend that is not ``traceable``; the arguments of full attention, kept too, are not among them.

        Raises:
            NotImplementedError: the backend does not say.
        """
        raise NotImplementedError

    def workspace(self, problem: Any) -> Workspace:
        """What it holds while it runs; as for :meth:`saved_tensors`."""
        raise NotImplementedError

    def fields(self) -> dict[str, Any]:
        """Its constructor's arguments, read back from attributes of the same names."""
        parameters = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in parameters}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.fields() == other.fields()

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.fields().items())))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.fields().items())
        return f"{type(self).__name__}({arguments})"


class AttentionBackend(Backend):
    """Softmax attention over the flat stream, causal within each document."""

    @abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        scale: float,
        causal: bool = True,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, H, D], the last ``layout.query_lengths[n]`` tokens of each document n.
            key: [T, G, D]; query head h reads key head h // (H / G).
            value: [T, G, D].
            layout: where the documents begin.
            scale: the factor on query times key, usually D ** -0.5.
            causal: no token sees a later one.

        Returns:
            [S, H, D], in the dtype of ``query``.
        """


class LinearAttentionBackend(Backend):
    """The two halves of Gated DeltaNet that mix tokens (arXiv:2412.06464): each can leak, so it owns both."""

    @abstractmethod
    def short_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        layout: SequenceLayout,
        activation: str | None = "silu",
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolve each channel causally over W taps, from each document's start.

        Args:
            x: [T, C].
            weight: [C, W]; the last tap meets the token itself.
            bias: [C] or None.
            layout: where the documents begin.
            activation: "silu" or None.
            initial_state: [N, W - 1, C], the inputs before each document's first token; zeros where None.
            return_state: also return the last W - 1 inputs of each document.

        Returns:
            [T, C], and [N, W - 1, C] where asked.
        """

    @abstractmethod
    def delta_rule(
        self,
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
        """Run the gated delta rule over each document.

        With q and k L2-normalised (eps 1e-6) and q scaled by D ** -0.5, for each token and value head:
        S = exp(log_decay) S;  S = S + k (beta (v - S^T k))^T;  output = S^T q.

        Args:
            query: [T, K, D], raw.
            key: [T, K, D], raw; value head v reads key head v // (V / K).
            value: [T, V, E].
            log_decay: [T, V], float32, at most 0.
            beta: [T, V], in 0 to 1.
            layout: where the documents begin.
            initial_state: [N, V, D, E], float32; zeros where None.
            return_state: also return the state after each document.

        Returns:
            [T, V, E] in the dtype of ``value``, and [N, V, D, E] in float32 where asked.
        """

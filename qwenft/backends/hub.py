"""Softmax attention by a kernel from the Hugging Face hub: code from the network, pinned to a commit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from qwenft.backends.requirements import Support, installed, unsupported_gpu, unsupported_problem
from qwenft.capabilities import AttentionBackend, Availability
from qwenft.errors import BackendUnavailable, SpecError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from torch import Tensor

    from qwenft.capabilities import AttentionProblem
    from qwenft.kernels.layout import SequenceLayout
    from qwenft.machine import Machine

#: The first release that asks the hub whether a publisher is trusted before it loads code.
OLDEST_KERNELS = "0.14.0"

_PIN = "<40 hex digits>"

#: Builds of flash-attention whose sources were read (huggingface/kernels-community at 40d4194, August 2026), with
#: the GPUs of their build.toml. Of 3 the builds hold code for 8.0 too: see qwenft.backends.flash. That of 4 is
#: 4.0.0.beta8, which had no kernels for head dim 256 on 10.x and no tested backward for it on 9.0.
KNOWN: dict[str, Mapping[int, Support]] = {
    "kernels-community/flash-attn2": {8: Support(256), 9: Support(256), 10: Support(256), 12: Support(256)},
    "kernels-community/flash-attn3": {9: Support(256)},
    "kernels-community/vllm-flash-attn3": {9: Support(256)},
    "kernels-community/flash-attn4": {9: Support(128, step=32), 10: Support(128, step=32)},
}


class HubAttention(AttentionBackend):
    """A kernel from the hub that has a `flash_attn_varlen_func` or a `flash_attn_func`.

    Of a kernel that is not in ``KNOWN``, nothing is believed: it is not given packed documents. A subclass may say
    more, and may override :meth:`attend` for a kernel that is called otherwise.

    Args:
        name: the repository, "org/name".
        revision: its commit, 40 hex digits. Branches, tags and versions move, and are refused.

    Raises:
        SpecError: the name is no repository's, or the revision is no commit.

    Examples:
        >>> HubAttention.parse("org/name@0123456789012345678901234567890123456789").revision[:4]
        '0123'
        >>> class Mine(HubAttention):
        ...     supports_packing = True
        ...
        ...     def attend(self, query, key, value, *, layout, scale, causal=True):
        ...         return self.load().attention(query, key, value, layout.cu_seqlens, scale)
    """

    #: Load it also where the hub does not count its publisher among the trusted ones. Set in a subclass, so that a
    #: recipe alone can never say it.
    trusted: bool = False

    #: Known of flash-attention alone; a subclass may know better.
    deterministic: bool = False
    traceable: bool = False

    def __init__(self, name: str, *, revision: str | None = None) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise SpecError(
                f'HubAttention: a kernel is named "org/name", got {name!r}',
                fix=f'HubAttention("org/name", revision="{_PIN}")',
                got=name,
                expected="org/name",
            )
        if not isinstance(revision, str) or not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise SpecError(
                f"HubAttention: {name} is code from the network, and revision = {revision!r} does not pin it to a "
                "commit",
                fix=f'HubAttention("{name}", revision="{_PIN}")',
                got=revision,
                expected=_PIN,
            )
        self._name = name
        self.revision = revision
        self.needs_half_precision = type(self).needs_half_precision or name in KNOWN
        self.deterministic = type(self).deterministic or name in KNOWN
        self.remote_code = f"{name}@{revision}"

    @classmethod
    def parse(cls, text: str) -> HubAttention:
        """The kernel of the string that recipes use.

        Args:
            text: "org/name@commit".

        Raises:
            SpecError: as for the constructor.
        """
        name, _, revision = text.partition("@")
        return cls(name, revision=revision or None)

    @property
    def name(self) -> str:
        """The repository, which is also the name that plans and messages use."""
        return self._name

    @property
    def supports_packing(self) -> bool:
        """Whether documents in one row stay apart: known of flash-attention alone."""
        return self.name in KNOWN

    @property
    def uses_flash_lib(self) -> bool:
        """Whether it is a build of flash-attention."""
        return self.name in KNOWN

    def availability(self, machine: Machine) -> Availability:
        """On the GPUs that it is built for, as far as they are known, with the package `kernels`."""
        if machine.device != "cuda":
            return Availability(usable=False, reason="it needs an NVIDIA GPU")
        if self.name in KNOWN and (reason := unsupported_gpu(machine, KNOWN[self.name])) is not None:
            return Availability(usable=False, reason=reason)
        found = installed("kernels", machine)
        if found is None:
            return Availability(usable=False, reason="kernels is not installed", remedy="pip install kernels")
        if found < Version(OLDEST_KERNELS):
            return Availability(
                usable=False,
                reason=f"it needs kernels {OLDEST_KERNELS} or newer, found {found}",
                remedy=f'pip install "kernels>={OLDEST_KERNELS}"',
            )
        return Availability(usable=True)

    def refuses(self, problem: AttentionProblem) -> str | None:
        """Other devices than a GPU, and head dims that a known build has no kernel for."""
        if problem.device != "cuda":
            return f"it computes on NVIDIA GPUs only, not on {problem.device!r}"
        return unsupported_problem(problem, KNOWN[self.name]) if self.name in KNOWN else None

    def load(self) -> ModuleType:
        """The kernel's module, fetched on the first call.

        Raises:
            BackendUnavailable: it cannot be fetched or loaded; the message says why.
        """
        from qwenft.kernels.flash import hub_kernel

        try:
            return hub_kernel(self.name, self.revision, trusted=self.trusted)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise BackendUnavailable(
                f"{self.remote_code} cannot be loaded: {error}", fix=_fix_of_loading(error)
            ) from error

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
        """Attend by one call where the kernel takes boundaries, and by one for each document where it does not.

        Args:
            query: [S, H, D], the last tokens of each document.
            key: [T, G, D]; query head h reads key head h // (H / G).
            value: [T, G, D].
            layout: where the documents begin.
            scale: the factor on query times key.
            causal: no token sees a later one.

        Returns:
            [S, H, D], in the dtype of ``query``.

        Raises:
            BackendUnavailable: the kernel cannot be loaded, or has none of the functions.
        """
        from qwenft.kernels.flash import document_attention, varlen_attention

        kernel = self.load()
        for name, attend in (
            ("flash_attn_varlen_func", varlen_attention),
            ("flash_attn_func", document_attention),
        ):
            if hasattr(kernel, name):
                options: dict[str, Any] = {"scale": scale, "causal": causal, "repeats": self.deterministic}
                return attend(getattr(kernel, name), query, key, value, layout=layout, **options)
        offered = [name for name in dir(kernel) if not name.startswith("_") and callable(getattr(kernel, name))]
        raise BackendUnavailable(
            f"{self.remote_code} has no flash_attn_varlen_func and no flash_attn_func; "
            f"it has {', '.join(offered) or 'no functions'}",
            fix="a subclass of HubAttention that overrides attend() and calls self.load()",
        )


def _fix_of_loading(error: Exception) -> str | None:
    """The line that mends a failed load, where we know one: kernels names arguments of its own."""
    if isinstance(error, ModuleNotFoundError) and error.name == "kernels":
        return "pip install kernels"
    if "not from a trusted publisher" in str(error):
        return "trusted = True in a subclass of HubAttention, if you trust its publisher"
    if "could not verify publisher" in str(error):
        return "HF_HUB_OFFLINE=1 in the environment, where the hub is out of reach and the kernel in its cache"
    return None

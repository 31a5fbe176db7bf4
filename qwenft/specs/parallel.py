"""How many processes a run uses."""

from __future__ import annotations

import attrs

from qwenft.specs.base import spec


@spec
@attrs.frozen
class ParallelSpec:
    """One process on one device.

    Examples:
        >>> ParallelSpec.single()
        ParallelSpec()
    """

    @classmethod
    def single(cls) -> ParallelSpec:
        """Train in this process alone."""
        return cls()

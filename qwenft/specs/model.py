"""Which checkpoint is trained."""

from __future__ import annotations

from typing import ClassVar

import attrs

from qwenft.errors import SpecError
from qwenft.specs.base import Check, flag, one_of, path_text, spec, text

#: The formats of quantized weights.
KINDS = ("nf4", "int8")
DTYPES = ("bfloat16", "float32")


_DTYPE = Check(
    lambda value: isinstance(value, str) and value in DTYPES,
    "one of 'bfloat16', 'float32' (float16 overflows in Gated DeltaNet: its gradients are NaN)",
    'ModelSpec(..., dtype="bfloat16")',
)


@spec
@attrs.frozen
class Quantization:
    """Which frozen weights are held in 4 or 8 bits; write it with :meth:`ModelSpec.quantize`.

    Args:
        kind: "nf4" (arXiv:2305.14314), or "int8", a scale a row (arXiv:2208.07339).
        double_quant: quantize the scales of nf4 too.
        experts: those of routed experts.
        vision: those of the vision tower.
    """

    kind: str = attrs.field(validator=one_of(KINDS, 'ModelSpec(...).quantize("nf4")'))
    double_quant: bool = attrs.field(
        kw_only=True, validator=flag('ModelSpec(...).quantize("nf4", double_quant=False)')
    )
    experts: bool = attrs.field(
        default=True, kw_only=True, validator=flag('ModelSpec(...).quantize("nf4", experts=False)')
    )
    vision: bool = attrs.field(
        default=False, kw_only=True, validator=flag('ModelSpec(...).quantize("nf4", vision=True)')
    )


@spec
@attrs.frozen
class ModelSpec:
    """A checkpoint and how its frozen weights are held.

    Args:
        source: a checkpoint folder, a hub id, or a family name such as "qwen3.5-27b".
        revision: the hub's branch, tag or commit.
        dtype: the dtype in which weights that are not trained are held. Trained weights are float32.
        vision: load the vision tower too; without it only the text half is read.
        quantization: which of them are held in 4 or 8 bits; see :meth:`quantize`.

    Examples:
        >>> ModelSpec("Qwen/Qwen3.5-4B").text_only().with_dtype("float32").dtype
        'float32'
    """

    #: Arguments of other libraries, each refused with what stands for it.
    RENAMED: ClassVar[dict[str, str]] = {
        "load_in_4bit": '.quantize("nf4")',
        "load_in_8bit": '.quantize("int8")',
        "quantization_config": '.quantize("nf4")',
        "torch_dtype": 'dtype="bfloat16"',
    }

    source: str = attrs.field(converter=path_text, validator=text('ModelSpec("Qwen/Qwen3.5-4B")'))
    revision: str | None = attrs.field(
        default=None, kw_only=True, validator=text('ModelSpec(..., revision="main")', optional=True)
    )
    dtype: str = attrs.field(default="bfloat16", kw_only=True, validator=_DTYPE)
    vision: bool = attrs.field(default=False, kw_only=True, validator=flag("ModelSpec(...).with_vision()"))
    quantization: Quantization | None = attrs.field(
        default=None,
        kw_only=True,
        validator=Check(
            lambda value: value is None or isinstance(value, Quantization),
            "a Quantization or None",
            'ModelSpec(...).quantize("nf4")',
        ),
    )

    def text_only(self) -> ModelSpec:
        """Leave the vision tower on disk."""
        return attrs.evolve(self, vision=False)

    def with_vision(self) -> ModelSpec:
        """Load the vision tower too."""
        return attrs.evolve(self, vision=True)

    def with_dtype(self, dtype: str) -> ModelSpec:
        """Hold frozen weights in "bfloat16" or "float32"."""
        return attrs.evolve(self, dtype=dtype)

    def quantize(
        self, kind: str = "nf4", *, double_quant: bool | None = None, experts: bool = True, vision: bool = False
    ) -> ModelSpec:
        """Hold the large frozen matrices in 4 or 8 bits, through bitsandbytes; adapters are trained beside them.

        Embeddings, the output head, gates, the router, norms and convolutions stay as they are.

        Args:
            kind: "nf4" or "int8".
            double_quant: quantize the scales of nf4 too: 4.1 instead of 4.5 bits a weight. True unless given.
            experts: quantize routed experts, most of the weights of a mixture of experts.
            vision: quantize the vision tower.

        Raises:
            SpecError: no such kind, or int8 with ``double_quant``.
        """
        if kind == "int8" and double_quant:
            raise SpecError(
                'ModelSpec.quantize("int8", double_quant=True): the scales of int8 are not quantized',
                fix='.quantize("int8")',
                got=double_quant,
            )
        double = kind == "nf4" if double_quant is None else double_quant
        return attrs.evolve(
            self, quantization=Quantization(kind, double_quant=double, experts=experts, vision=vision)
        )

"""The layers that peft puts beside weights, with the step's own products in place of peft's."""

from __future__ import annotations

from typing import Any

import attrs
import peft
import peft.tuners.lora.bnb
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer

from qwenft.errors import SpecError
from qwenft.kernels.experts import LowRank
from qwenft.kernels.lora import lora_product
from qwenft.kernels.quantized import dense_shape, is_quantized
from qwenft.models.precision import CastLinear
from qwenft.models.quantize import Linear4bit, Linear8bit


class _Fused:
    """The plain case of peft's layer, one adapter beside a frozen Linear, as one node of the graph.

    DoRA, dropout, several active adapters, merged or disabled ones, and modules with hooks go through peft's own
    forward.

    Attributes:
        taken_out: the initial pair (A, B) that was taken out of the weight, if one was.
    """

    taken_out: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., I] to [..., O]."""
        adapter = None if args or kwargs else self._plain_adapter()
        without = self.taken_out is not None and (self.disable_adapters or "default" not in self.active_adapters)
        if adapter is None or without:
            y: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            if not without:
                return y
            a, b = (part.to(x.dtype) for part in self.taken_out)
            return y + self.scaling["default"] * (x @ a.T @ b.T)  # beside the base as it was
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return lora_product(x, self.base_layer.weight, a, b, self.scaling[adapter])

    def _plain_adapter(self: Any) -> str | None:
        """The active adapter, where it is all that this layer is asked for."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        name: str = active[0]
        drops = self.training and not isinstance(self.lora_dropout[name], torch.nn.Identity)
        linears = (self.base_layer, self.lora_A[name], self.lora_B[name])
        is_plain = not drops and not self.base_layer.weight.requires_grad and all(map(_is_plain, linears))
        return name if is_plain else None


class LoraLinear(_Fused, peft.tuners.lora.Linear):
    """Beside a Linear."""


class LoraLinear4bit(_Fused, peft.tuners.lora.bnb.Linear4bit):
    """Beside a Linear in nf4."""


class LoraLinear8bit(_Fused, peft.tuners.lora.bnb.Linear8bitLt):
    """Beside a Linear in int8."""


class ParamWrapper(peft.tuners.lora.ParamWrapper):
    """Beside a stack of experts: peft's own layer, which would make the whole stack anew at every call.

    The pairs of its adapters go to the experts; stacks may be quantized. peft knows the class by its name.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What :class:`RoutedExperts` takes, to [T, H]."""
        self._check_forward_args(x, *args, **kwargs)
        pairs: dict[str, LowRank] = {}
        module: Any = self
        while isinstance(module, ParamWrapper):
            if (pair := module.pair()) is not None:
                # Laid out once, and not at the product of every expert.
                pairs[module.parameter_name] = attrs.evolve(pair, b=pair.b.contiguous())
            module = module.base_layer
        answers: torch.Tensor = module(x, *args, **kwargs, **pairs)
        return answers

    def pair(self) -> LowRank | None:
        """The pairs of all active adapters as one, or None where there is none beside the stack."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        pairs = [self.pair_of(name) for name in active]
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        a = torch.cat([pair.a for pair in pairs], dim=1)
        return LowRank(a, torch.cat([pair.b * pair.scaling for pair in pairs], dim=2), 1.0)

    def pair_of(self, adapter: str) -> LowRank:
        """One adapter's."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        # As peft lays them out: the experts are the slow index of A's rows and the fast one of B's columns.
        of_experts = b.view(len(b), -1, self.num_experts).permute(2, 0, 1)
        return LowRank(a.view(self.num_experts, -1, a.shape[1]), of_experts, self.scaling[adapter])

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Add the adapter to the stack.

        Raises:
            SpecError: the stack is quantized.
        """
        if is_quantized(self.get_param()):
            raise SpecError("experts that are quantized cannot be merged in memory", fix="run.export(path)")
        super().merge(*args, **kwargs)


class TokenRows(TrainableTokensLayer):
    """Rows of some tokens in place of those of a frozen embedding or head.

    peft's own layer copies the whole weight at every call, and gives its whole a gradient.
    """

    def forward_adapters(self, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Ids [...] to [..., H], or of a head [..., H] to [..., V]."""
        active = [name for name in active_adapters if name in self.trainable_tokens_delta]
        if self.disable_adapters or self.merged or len(active) > 1:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        y: torch.Tensor = self.base_layer(x)
        if not active:
            return y
        rows = self.trainable_tokens_delta[active[0]]
        ids = torch.tensor(self.token_indices[active[0]], device=rows.device)
        if not isinstance(self.base_layer, torch.nn.Embedding):
            return y.index_copy(-1, ids, x @ rows.to(x.dtype).T)
        is_one = x.to(ids.device)[..., None] == ids
        own = torch.nn.functional.embedding(is_one.int().argmax(-1), rows).to(y)
        return torch.where(is_one.any(-1, keepdim=True).to(y.device), own, y)


_LINEARS = (torch.nn.Linear, CastLinear, Linear4bit, Linear8bit)
#: Of peft's layers those that stand for them.
OWN_LAYERS: dict[type, Any] = {
    peft.tuners.lora.Linear: LoraLinear,
    peft.tuners.lora.bnb.Linear4bit: LoraLinear4bit,
    peft.tuners.lora.bnb.Linear8bitLt: LoraLinear8bit,
    TrainableTokensLayer: TokenRows,
}


def _is_plain(linear: Any) -> bool:
    """Whether a Linear is its weight alone, so that nobody would notice that it is not called."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        type(linear) in _LINEARS
        and linear.bias is None
        and dense_shape(linear.weight) == (linear.out_features, linear.in_features)
        and not any(getattr(linear, kind) for kind in kinds)
    )

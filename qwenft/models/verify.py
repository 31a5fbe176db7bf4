"""The proof before a run: what was chosen, in one bound layer of each kind, on the run's own device and dtype.

A layer is transformers' own, at the head sizes of the model, and is called as training calls it. Changing one
document must change no other, forward and backward; outputs and gradients must be those of the same layer with
the reference backends. Where a Gated DeltaNet layer fails, its convolution and its scan are tried apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.func import functional_call
from transformers.models import qwen3_5, qwen3_5_moe

from qwenft.backends.eager import EagerAttention
from qwenft.backends.reference import ReferenceDeltaRule
from qwenft.capabilities import LinearAttentionBackend
from qwenft.comparison import ConformanceReport, Probe, Suite, Verification
from qwenft.errors import ConformanceError, LeakError
from qwenft.family.architectures import FULL_ATTENTION, LINEAR_ATTENTION
from qwenft.family.inventory import FLOAT32
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.bind import bind, stream_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qwenft.capabilities import AttentionBackend, Backend
    from qwenft.comparison import Call
    from qwenft.family.architectures import Architecture

# Longer than two chunks of 64 first and longer than one last, so that a leak in either direction shows.
LENGTHS = (130, 3, 1, 66)
# Frames, height and width in patches; a frame of a video stands alone.
GRIDS = ((1, 8, 10), (2, 2, 4), (1, 6, 4))
HIDDEN = 128
# Relative, in 16 bits: fused kernels round the attention weights, which moves gradients by 1e-2 here. A wrong
# kernel is off by its gradient's own size.
TOLERANCE_16_BITS = 5e-2
# exp(-3.5) softplus(0) is 0.02 a token: after a document of 130 tokens a tenth of the state would be left to leak.
A_LOG = -3.5


def verify(
    architecture: Architecture,
    *,
    full: AttentionBackend,
    linear: LinearAttentionBackend,
    vision: AttentionBackend | None = None,
    device: str,
    dtype: str,
) -> Verification:
    """Prove the backends of a run.

    Args:
        architecture: the part of the checkpoint that is loaded.
        full: of the full-attention layers.
        linear: of the Gated DeltaNet layers.
        vision: of the tower, where it is loaded.
        device: "cpu" or "cuda".
        dtype: in which the layers compute.

    Returns:
        What was measured, by slot.

    Raises:
        LeakError: a document reached another one (`.half` is "attention", "conv" or "scan").
        ConformanceError: nothing leaked, and outputs or gradients are wrong.
    """
    reports = {
        "full": _verify_layer(architecture, FULL_ATTENTION, "attention", full, device=device, dtype=dtype),
        "linear": _verify_gated_delta_net(architecture, linear, device, dtype),
    }
    if vision is not None:
        reports["vision"] = _verify_tower(architecture, vision, device, dtype)
    return Verification(reports)


def _verify_gated_delta_net(
    architecture: Architecture, linear: LinearAttentionBackend, device: str, dtype: str
) -> ConformanceReport:
    """Conv and scan together, as they run; apart only to say which of them fails."""
    try:
        return _verify_layer(architecture, LINEAR_ATTENTION, "conv and scan", linear, device=device, dtype=dtype)
    except (LeakError, ConformanceError):
        reference = ReferenceDeltaRule()
        for half, alone in (("conv", Halves(linear, reference)), ("scan", Halves(reference, linear))):
            _verify_layer(architecture, LINEAR_ATTENTION, half, linear, device=device, dtype=dtype, run=alone)
        raise


def _verify_layer(
    architecture: Architecture,
    layer_type: str,
    half: str,
    backend: Backend,
    *,
    device: str,
    dtype: str,
    run: Backend | None = None,
) -> ConformanceReport:
    """One decoder layer of a type; ``run`` is bound instead of ``backend``, which the report and errors name."""
    slot = "full" if layer_type == FULL_ATTENTION else "linear"
    suite = _suite(backend, slot, device, dtype)
    model = _decoder(architecture, layer_type, device)
    reference = EagerAttention() if slot == "full" else ReferenceDeltaRule()
    for lengths in [LENGTHS] if backend.supports_packing else [(length,) for length in LENGTHS]:
        layout = SequenceLayout.from_lengths(lengths, device=device)
        probe = Probe(
            case=f"documents of {', '.join(map(str, lengths))} tokens",
            half=half,
            layout=layout,
            call=_stream_call(model, slot, run or backend, layout),
            reference=_stream_call(model, slot, reference, layout) if backend.exact else None,
        )
        embeddings, other = ({"embed_tokens.weight": suite.random(layout.total, HIDDEN)} for _ in range(2))
        suite.isolation(probe, embeddings, other, weights := dict(_weights(model, suite)))
        suite.parity(_of_one_dtype(probe, embeddings | weights), embeddings | weights)
    return suite.report()


def _verify_tower(
    architecture: Architecture, backend: AttentionBackend, device: str, dtype: str
) -> ConformanceReport:
    suite = _suite(backend, "vision", device, dtype)
    model = _tower(architecture, device, dtype)
    probe = Probe(
        case=f"images of {', '.join('x'.join(map(str, grid)) for grid in GRIDS)} patches",
        half="attention",
        layout=SequenceLayout.from_lengths(
            [h * w for frames, h, w in GRIDS for _ in range(frames)], device=device
        ),
        call=_tower_call(model, backend),
        reference=_tower_call(model, EagerAttention()) if backend.exact else None,
    )
    width = model.patch_embed.proj.weight[0].numel()
    pixels, other = ({"pixels": suite.random(probe.layout.total, width)} for _ in range(2))
    suite.isolation(probe, pixels, other, weights := dict(_weights(model, suite)))
    suite.parity(_of_one_dtype(probe, pixels | weights), pixels | weights)
    return suite.report()


def _suite(backend: Backend, slot: str, device: str, dtype: str) -> Suite:
    tolerance = None if dtype == "float32" else TOLERANCE_16_BITS
    return Suite(
        backend, device, dtype, tolerance, fix=f'recipe.with_attention({slot}="auto"), or another backend'
    )


def _of_one_dtype(probe: Probe, inputs: dict[str, torch.Tensor]) -> Probe:
    """The probe whose reference computes in the dtypes of ``inputs`` too: what differs then is the backend."""
    reference, dtypes = probe.reference, [tensor.dtype for tensor in inputs.values()]
    if reference is None:
        return probe

    def cast(*tensors: torch.Tensor) -> Any:
        return reference(*(tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)))

    return attrs.evolve(probe, reference=cast)


def _stream_call(model: Any, slot: str, backend: Any, layout: SequenceLayout) -> Call:
    """The decoder as a function of its embeddings, one row a token of the stream, and its weights."""
    slots: dict[str, Any] = {"full": EagerAttention(), "linear": ReferenceDeltaRule(), slot: backend}
    ids = torch.arange(layout.total, device=layout.device)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        output = _called(bind(model, **slots), "embed_tokens.weight", tensors, stream_arguments(ids, layout))
        return output.last_hidden_state[0]

    return call


def _tower_call(model: Any, backend: AttentionBackend) -> Call:
    """The tower as a function of its pixels, one row a patch, and its weights."""
    grids = torch.tensor(GRIDS, device=model.pos_embed.weight.device)

    def call(pixels: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        bound = bind(model, full=backend, linear=ReferenceDeltaRule(), vision=backend)
        return _called(bound, None, weights, {"hidden_states": pixels, "grid_thw": grids}).last_hidden_state

    return call


def _called(model: Any, first: str | None, tensors: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> Any:
    """The model called with ``tensors`` in place of ``first`` and then of all its weights in their order."""
    names = [*filter(None, [first]), *_weight_names(model)]
    return functional_call(model, dict(zip(names, tensors, strict=True)), args=(), kwargs=arguments)


def _weight_names(model: Any) -> list[str]:
    """The parameters that its output depends on, embeddings apart: the tower's merger comes after it."""
    return [name for name, _ in model.named_parameters() if not name.startswith(("embed_tokens", "merger"))]


def _weights(model: Any, suite: Suite) -> Iterator[tuple[str, torch.Tensor]]:
    """Numbers for all weights with which every part of a layer shows in its output."""
    parameters = dict(model.named_parameters())
    for name in _weight_names(model):
        shape = parameters[name].shape
        islands = any(island in name for island in FLOAT32)
        numbers = suite.random(*shape, dtype="float32" if islands else None)
        if name.endswith("A_log"):
            yield name, A_LOG + 0.1 * numbers
        elif len(shape) == 1:
            yield name, parameters[name].detach().to(numbers) + 0.1 * numbers
        else:
            yield name, numbers * shape[1:].numel() ** -0.5


def _decoder(architecture: Architecture, layer_type: str, device: str) -> Any:
    """Transformers' decoder with one layer, with at most two groups of heads in the model's own sizes."""
    one_layer: Any = (layer_type,)
    groups = min(architecture.key_value_heads, 2)
    key_heads = min(architecture.gdn_key_heads, 2)
    small = attrs.evolve(
        architecture.text_only(),
        layers=1,
        layer_types=one_layer,
        hidden_size=HIDDEN,
        intermediate_size=None if architecture.is_moe else HIDDEN,
        # A single expert: with a choice between them, rounding could choose another one.
        experts=_single_expert(architecture),
        query_heads=groups * architecture.query_heads // architecture.key_value_heads,
        key_value_heads=groups,
        gdn_key_heads=key_heads,
        gdn_value_heads=key_heads * architecture.gdn_value_heads // architecture.gdn_key_heads,
        vocabulary=1,
    )
    if architecture.is_moe:
        config: Any = qwen3_5_moe.Qwen3_5MoeTextConfig(**small.to_config())
        return _built(lambda: qwen3_5_moe.Qwen3_5MoeTextModel(config), device)
    config = qwen3_5.Qwen3_5TextConfig(**small.to_config())
    return _built(lambda: qwen3_5.Qwen3_5TextModel(config), device)


def _single_expert(architecture: Architecture) -> Any:
    if architecture.experts is None:
        return None
    sizes = {"intermediate_size": HIDDEN, "shared_intermediate_size": HIDDEN}
    return attrs.evolve(architecture.experts, count=1, top_k=1, **sizes)


def _tower(architecture: Architecture, device: str, dtype: str) -> Any:
    """Transformers' tower with one block, with at most two heads in the tower's own size."""
    shape = architecture.vision
    assert shape is not None
    heads = min(shape.heads, 2)
    small = attrs.evolve(
        shape,
        depth=1,
        heads=heads,
        hidden_size=heads * shape.hidden_size // shape.heads,
        intermediate_size=HIDDEN,
        out_hidden_size=HIDDEN,
    )
    if architecture.is_moe:
        config: Any = qwen3_5_moe.Qwen3_5MoeVisionConfig(**small.to_config())
        tower = _built(lambda: qwen3_5_moe.Qwen3_5MoeVisionModel(config), device)
    else:
        config = qwen3_5.Qwen3_5VisionConfig(**small.to_config())
        tower = _built(lambda: qwen3_5.Qwen3_5VisionModel(config), device)
    tower.merger.to(getattr(torch, dtype))  # the one part whose weights are not given with a call
    return tower


def _built(build: Callable[[], Any], device: str) -> Any:
    """A model whose making leaves the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        return build().to(device)


class Halves(LinearAttentionBackend):
    """The convolution of one backend and the scan of another.

    Args:
        conv: whose convolution.
        scan: whose scan.
    """

    name = "halves"
    supports_packing = True
    uses_flash_lib = False

    def __init__(self, conv: LinearAttentionBackend, scan: LinearAttentionBackend) -> None:
        self.conv = conv
        self.scan = scan

    def short_conv(self, *inputs: Any, **options: Any) -> Any:
        """That of ``conv``."""
        return self.conv.short_conv(*inputs, **options)

    def delta_rule(self, *inputs: Any, **options: Any) -> Any:
        """That of ``scan``."""
        return self.scan.delta_rule(*inputs, **options)

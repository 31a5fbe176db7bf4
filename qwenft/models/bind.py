"""Attention backends put into a model of transformers: the only file that touches its internals.

Each layer of one model is given a subclass of its own class (``module.__class__``), its backend as an attribute,
and the layout as a keyword of the call; classes, registries and other models of the process stay as they are,
and so does ``forward`` of the instance, which activation checkpointing relies on. Without a layout a bound model
behaves as stock: rows are documents, padding is masked, caches are honoured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers import Cache
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from qwenft.kernels.layout import SequenceLayout
from qwenft.kernels.made_again import made_again
from qwenft.models.mtp import MultiTokenPrediction
from qwenft.models.stock import dense, moe

if TYPE_CHECKING:
    from qwenft.capabilities import AttentionBackend, LinearAttentionBackend
    from qwenft.data.stream import VisionInputs


class _BoundAttention:
    """Full attention on the flat stream where there is a layout, and stock where there is none."""

    qwenft_backend: AttentionBackend

    def forward(self, hidden_states: torch.Tensor, *args: Any, layout: Any = None, **kwargs: Any) -> Any:
        if layout is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self.on_stream(hidden_states[0], kwargs["position_embeddings"], layout)[None], None

    def on_stream(
        self: Any,
        x_TC: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        layout: Any,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output for all T tokens, or for S ``wanted`` ones, which ask all the others."""
        tokens = x_TC.shape[0]
        asking_SC = x_TC if wanted is None else x_TC[wanted]
        query_SHD, gate_SHD = self.q_proj(asking_SC).view(len(asking_SC), -1, 2 * self.head_dim).chunk(2, dim=-1)
        query_SHD = self.q_norm(query_SHD)
        key_TGD = self.k_norm(self.k_proj(x_TC).view(tokens, -1, self.head_dim))
        value_TGD = self.v_proj(x_TC).view(tokens, -1, self.head_dim)
        # Backends attend from every token: those that nobody wants ask with zeros.
        query_THD = query_SHD if wanted is None else _scattered(query_SHD, wanted, tokens)
        cos_TR, sin_TR = (table[0] for table in rotary)
        query_THD, key_TGD = dense.apply_rotary_pos_emb(query_THD, key_TGD, cos_TR, sin_TR)
        mixed_THD = self.qwenft_backend.attend(query_THD, key_TGD, value_TGD, layout=layout, scale=self.scaling)
        mixed_SHD = mixed_THD if wanted is None else mixed_THD[wanted]
        opened_SHD = gate_SHD.sigmoid()
        gated_SHD = mixed_SHD * opened_SHD
        with made_again(gated_SHD, lambda: mixed_SHD.detach() * opened_SHD.detach()):
            return self.o_proj(gated_SHD.flatten(1))


def _scattered(x: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    """[S, ...] at their places of [length, ...] zeros."""
    return x.new_zeros(length, *x.shape[1:]).index_copy(0, places, x)


class _BoundLastLayer:
    """The last decoder layer, of which only the ``wanted`` tokens go on, where some are named.

    Their attention sees all tokens; the query, the output gate, the output projection and the MLP or the experts
    are computed for them alone.
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, wanted: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if wanted is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x_TC, layout = self.input_layernorm(hidden_states)[0], kwargs["layout"]
        if self.block_type == "full_attention":
            mixed_SC = self.self_attn.on_stream(x_TC, kwargs["position_embeddings"], layout, wanted)
        else:
            mixed_SC = self.linear_attn(x_TC[None], layout=layout)[0][wanted]
        mixed = hidden_states[:, wanted] + mixed_SC[None]
        return mixed + self.mlp(self.post_attention_layernorm(mixed))


class _BoundGatedDeltaNet:
    """Gated DeltaNet through its backend, on the flat stream or on stock's rows with their cache."""

    qwenft_backend: LinearAttentionBackend

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Any = None,
        **options: Any,
    ) -> torch.Tensor:
        # By its type: transformers 5.24 renamed the argument, and one that is not found would silently be ignored.
        cache = next((option for option in options.values() if isinstance(option, Cache)), None)
        rows, tokens, width = hidden_states.shape
        if layout is not None:
            return self._mix(hidden_states[0], layout)[0][None]
        if attention_mask is not None:
            hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
        conv_state, scan_state = self._states(cache)
        # Rows are documents: all in one stream, or one by one where the backend cannot keep them apart.
        size = rows if self.qwenft_backend.supports_packing else 1
        parts = [
            self._mix(
                hidden_states[first : first + size].reshape(size * tokens, width),
                SequenceLayout.from_lengths([tokens] * size, device=hidden_states.device),
                conv_state=None if conv_state is None else conv_state[first : first + size],
                scan_state=None if scan_state is None else scan_state[first : first + size],
                return_state=cache is not None,
            )
            for first in range(0, rows, size)
        ]
        mixed, conv_inputs = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        if cache is not None:
            inputs_BCT = conv_inputs.view(rows, tokens, -1).transpose(1, 2)
            scan_state = torch.cat([part[2] for part in parts])
            cache.update_conv_state(inputs_BCT, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            cache.update_recurrent_state(scan_state, self.layer_idx)
        return mixed.view(rows, tokens, width)

    def _states(self: Any, cache: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The cached states [N, W - 1, C] and [N, V, D, E]; to be read before update_conv_state marks them old."""
        if cache is None:
            return None, None
        conv_BCW = cache.get_conv_state(self.layer_idx, state_idx=0)
        if conv_BCW is not None:
            conv_BCW = conv_BCW[..., 1 - self.conv_kernel_size :].transpose(1, 2).clone()
        return conv_BCW, cache.get_recurrent_state(self.layer_idx, state_idx=0)

    def _mix(
        self: Any,
        x_TC: torch.Tensor,
        layout: SequenceLayout,
        *,
        conv_state: torch.Tensor | None = None,
        scan_state: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The layer's output [T, H], the inputs of its convolution [T, C], and the state after each document."""
        tokens = x_TC.shape[0]
        inputs_TC = self.in_proj_qkv(x_TC)
        # Read here: in backward the modules may hold others.
        taps, norm_weight = self.conv1d.weight[:, 0], self.norm.weight

        def convolve(x_TC: torch.Tensor) -> Any:
            return self.qwenft_backend.short_conv(
                x_TC,
                taps,
                self.conv1d.bias,
                layout=layout,
                activation=self.activation,
                initial_state=conv_state,
            )

        convolved_TC = convolve(inputs_TC)
        query, key, value = convolved_TC.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        log_decay_TV = -self.A_log.float().exp() * F.softplus(self.in_proj_a(x_TC).float() + self.dt_bias)
        beta_TV = self.in_proj_b(x_TC).sigmoid()
        with made_again(convolved_TC, lambda: convolve(inputs_TC.detach())):
            answer: Any = self.qwenft_backend.delta_rule(
                query.view(tokens, -1, self.head_k_dim),
                key.view(tokens, -1, self.head_k_dim),
                value.view(tokens, -1, self.head_v_dim),
                log_decay_TV,
                beta_TV,
                layout=layout,
                initial_state=scan_state,
                return_state=return_state,
            )
        mixed_TVE, state = answer if return_state else (answer, None)
        mixed_RE = mixed_TVE.reshape(-1, self.head_v_dim)
        gate_RE = self.in_proj_z(x_TC).view(-1, self.head_v_dim)
        normed_RE = self.norm(mixed_RE, gate_RE)

        def norm() -> torch.Tensor:
            return functional_call(self.norm, {"weight": norm_weight}, (mixed_RE.detach(), gate_RE.detach()))

        with made_again(normed_RE, norm):
            return self.out_proj(normed_RE.view(tokens, -1)), inputs_TC, state


class _BoundVisionAttention:
    """Attention of the tower, which sees the images of a call as documents."""

    qwenft_backend: AttentionBackend

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        *_: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        image_layout: SequenceLayout,
        **__: Any,
    ) -> torch.Tensor:
        tokens = hidden_states.shape[0]
        query_THD, key_THD, value_THD = self.qkv(hidden_states).view(tokens, 3, self.num_heads, -1).unbind(1)
        query_THD, key_THD = dense.apply_rotary_pos_emb_vision(query_THD, key_THD, *position_embeddings)
        mixed_THD = _attend_images(
            self.qwenft_backend, query_THD, key_THD, value_THD, layout=image_layout, scale=self.scaling
        )
        return self.proj(mixed_THD.reshape(tokens, -1))


def _attend_images(
    backend: AttentionBackend,
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    *,
    layout: SequenceLayout,
    scale: float,
) -> torch.Tensor:
    """Attend within each image in both directions; image by image where the backend cannot keep them apart."""
    if backend.supports_packing:
        return backend.attend(query_THD, key_THD, value_THD, layout=layout, scale=scale, causal=False)
    images = zip(*(x_THD.split(layout.lengths) for x_THD in (query_THD, key_THD, value_THD)), strict=True)
    return torch.cat(
        [
            backend.attend(
                *image, layout=SequenceLayout([len(image[0])], device=layout.device), scale=scale, causal=False
            )
            for image in images
        ]
    )


def unpackable(model: Any) -> AttentionBackend | LinearAttentionBackend | None:
    """A backend of a bound model's decoder that cannot keep documents of one row apart; None where all can."""
    bound = (module for module in model.modules() if isinstance(module, _BoundAttention | _BoundGatedDeltaNet))
    return next((one.qwenft_backend for one in bound if not one.qwenft_backend.supports_packing), None)


class _BoundVisionModel:
    """The tower, which tells its layers once where the images of a call begin.

    What depends on the grids alone is computed where they are, on the host in training.
    """

    def forward(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(  # type: ignore[misc]
            hidden_states, grid_thw, **kwargs, **self.of_grids(grid_thw, hidden_states.device)
        )

    def of_grids(self: Any, grid_thw: torch.Tensor, device: torch.device) -> dict[str, Any]:
        """What the tower is told of images beside their pixels: places, positions and where each begins."""
        merge = self.spatial_merge_size
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=self.num_grid_per_side,
            mode=self.interpolation_mode,
            align_corners=self.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        # Each frame of a video stands alone, as in stock's get_vision_attention_seqlens.
        lengths = [height * width for frames, height, width in grid_thw.tolist() for _ in range(frames)]
        layout = SequenceLayout.from_lengths(lengths, device=device)
        return {
            "interp_indices": indices.to(device),
            "interp_weights": weights.to(device),
            "position_ids": get_vision_position_ids(grid_thw, merge).to(device),
            "cu_seqlens": layout.cu_seqlens,
            "max_seqlen": layout.max_length,
            "image_layout": layout,
        }


class BoundAttention(_BoundAttention, dense.Qwen3_5Attention):
    """Full attention of a dense model, bound."""


class BoundMoeAttention(_BoundAttention, moe.Qwen3_5MoeAttention):
    """Full attention of a mixture of experts, bound."""


class BoundLastLayer(_BoundLastLayer, dense.Qwen3_5DecoderLayer):
    """The last layer of a dense model, bound."""


class BoundMoeLastLayer(_BoundLastLayer, moe.Qwen3_5MoeDecoderLayer):
    """The last layer of a mixture of experts, bound."""


class BoundGatedDeltaNet(_BoundGatedDeltaNet, dense.Qwen3_5GatedDeltaNet):
    """Gated DeltaNet of a dense model, bound."""


class BoundMoeGatedDeltaNet(_BoundGatedDeltaNet, moe.Qwen3_5MoeGatedDeltaNet):
    """Gated DeltaNet of a mixture of experts, bound."""


class BoundVisionAttention(_BoundVisionAttention, dense.Qwen3_5VisionAttention):
    """Attention of a dense model's tower, bound."""


class BoundMoeVisionAttention(_BoundVisionAttention, moe.Qwen3_5MoeVisionAttention):
    """Attention of the tower of a mixture of experts, bound."""


class BoundVisionModel(_BoundVisionModel, dense.Qwen3_5VisionModel):
    """The tower of a dense model, bound."""


class BoundMoeVisionModel(_BoundVisionModel, moe.Qwen3_5MoeVisionModel):
    """The tower of a mixture of experts, bound."""


_FULL: dict[type, Any] = {dense.Qwen3_5Attention: BoundAttention, moe.Qwen3_5MoeAttention: BoundMoeAttention}
_LINEAR: dict[type, Any] = {
    dense.Qwen3_5GatedDeltaNet: BoundGatedDeltaNet,
    moe.Qwen3_5MoeGatedDeltaNet: BoundMoeGatedDeltaNet,
}
_LAST: dict[type, Any] = {
    dense.Qwen3_5DecoderLayer: BoundLastLayer,
    moe.Qwen3_5MoeDecoderLayer: BoundMoeLastLayer,
}
_VISION: dict[type, Any] = {
    dense.Qwen3_5VisionAttention: BoundVisionAttention,
    moe.Qwen3_5MoeVisionAttention: BoundMoeVisionAttention,
    dense.Qwen3_5VisionModel: BoundVisionModel,
    moe.Qwen3_5MoeVisionModel: BoundMoeVisionModel,
}


def bind(
    model: Any, *, full: AttentionBackend, linear: LinearAttentionBackend, vision: AttentionBackend | None = None
) -> Any:
    """Give this model's layers their backends, in place; no other model is touched.

    Args:
        model: a Qwen3.5 model of transformers, dense or mixture of experts, with or without its tower.
        full: for full-attention layers.
        linear: for Gated DeltaNet layers.
        vision: for the layers of the tower, which stays stock where None.

    Returns:
        The model.
    """
    slots: tuple[tuple[dict[type, Any], Any], ...] = ((_FULL, full), (_LINEAR, linear), (_VISION, vision))
    for module in model.modules():
        for bound_classes, backend in slots:
            # A model that is bound already is bound anew.
            if backend is not None and type(module) in (*bound_classes, *bound_classes.values()):
                module.__class__ = bound_classes.get(type(module), type(module))
                module.qwenft_backend = backend
        if isinstance(module, dense.Qwen3_5TextModel | moe.Qwen3_5MoeTextModel | MultiTokenPrediction):
            last = module.layers[-1]
            last.__class__ = _LAST.get(type(last), type(last))
    return model


def decoder_of(model: Any) -> Any:
    """The text decoder (embeddings, layers, final norm) inside any model, be it of peft or vision-language."""
    causal = causal_of(model)
    return getattr(causal.model, "language_model", causal.model)


def causal_of(model: Any) -> Any:
    """The ``...ForCausalLM`` or ``...ForConditionalGeneration`` inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    layout: SequenceLayout,
    *,
    vision: VisionInputs | None = None,
    wanted: torch.Tensor | None = None,
    neftune_alpha: float = 0.0,
) -> torch.Tensor:
    """What the output head would be given, for every token of a flat stream or for some of them.

    Args:
        model: bound.
        input_ids: [T].
        layout: where its documents begin.
        vision: the images and videos in it; the tower sees all of them first, each apart.
        wanted: [S] int64, the positions that are asked for, in the order of the stream; all T where None. The last
            layer leaves out what the others would need after its attention.
        neftune_alpha: of the noise on the embeddings (arXiv:2310.05914).

    Returns:
        [T, H], or [S, H].
    """
    decoder = decoder_of(model)
    arguments = stream_arguments(input_ids, layout)
    if wanted is not None:
        arguments["wanted"] = wanted
    if neftune_alpha or vision is not None:
        embeddings = decoder.embed_tokens(arguments.pop("input_ids"))
        if neftune_alpha:
            embeddings = embeddings + neftune_noise(embeddings, layout, neftune_alpha)
        if vision is not None:
            features = vision_features(model, vision).to(embeddings.dtype)
            embeddings = embeddings.index_copy(1, vision.places, features[None, : len(vision.places)])
            # Four rows, the first of places in the text: three of them make transformers build a T x T mask.
            arguments["position_ids"] = torch.cat([layout.position_ids[None], vision.position_ids])[:, None]
        arguments["inputs_embeds"] = embeddings
    return decoder(**arguments).last_hidden_state[0]


def vision_features(model: Any, vision: VisionInputs) -> torch.Tensor:
    """What the tower hands to the text half: [V, H]; without a graph where nothing of the tower is trained."""
    tower = causal_of(model).model.visual
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trained):
        pixels = vision.pixel_values.to(tower.dtype)
        features: torch.Tensor = tower(pixels, grid_thw=vision.grid_thw).pooler_output
    return features


def neftune_noise(embeddings: torch.Tensor, layout: SequenceLayout, alpha: float) -> torch.Tensor:
    """Uniform noise of up to alpha / sqrt(L H) for every document of L tokens (arXiv:2310.05914).

    Args:
        embeddings: [1, T, H].
        layout: where the documents begin: what shares their row does not change their noise.
        alpha: its size.
    """
    lengths = torch.tensor(layout.lengths, device=embeddings.device)
    size_T = alpha / (lengths * embeddings.shape[-1]).sqrt()
    noise = torch.zeros_like(embeddings).uniform_(-1, 1)
    return noise * size_T.repeat_interleave(lengths)[:, None].to(noise.dtype)


def stream_arguments(input_ids: torch.Tensor, layout: SequenceLayout) -> dict[str, Any]:
    """What a bound decoder is called with for a flat stream of ids [T]."""
    return {
        "input_ids": input_ids[None],
        "position_ids": layout.position_ids[None],  # they restart in every document
        # A dict of Nones, or transformers builds a T x T mask.
        "attention_mask": {"full_attention": None, "linear_attention": None},
        "use_cache": False,
        "layout": layout,
    }

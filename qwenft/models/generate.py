"""Answers of a trained model, through transformers' own ``generate``."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenft.errors import SpecError, nearest
from qwenft.models.lora import output_head
from qwenft.specs.images import ImageSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.data.chat import ChatEncoder
    from qwenft.data.document import Document


@torch.no_grad()
def answer(
    model: Any,
    encoder: ChatEncoder,
    messages: str | list[dict[str, Any]],
    max_new_tokens: int,
    *,
    base: bool = False,
    adapter: str | None = None,
    **options: Any,
) -> str:
    """The text that the model writes after the generation prompt, without control tokens.

    Args:
        model: bound; called without a layout, it behaves as stock.
        encoder: of the checkpoint.
        messages: a conversation, or the text of one user turn.
        max_new_tokens: at the most.
        base: with the adapter off.
        adapter: the name of another one, which was loaded.
        **options: of ``generate``.
    """
    template, tokenizer = encoder.template(), encoder.tokenizer
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    # Who calls this may name any file.
    asked = encoder.prompt(conversation, ImageSpec(root=Path.cwd().anchor))
    ids = torch.from_numpy(asked.input_ids)[None].long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_media(asked, encoder, ids)}
    device = output_head(model).weight.device  # the embeddings may be on the host
    was_training = model.training
    model.eval()
    with _active(model, adapter, base=base):
        output = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.convert_tokens_to_ids(template.end_token or tokenizer.eos_token),
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False, **options},
        )
    model.train(was_training)
    written = output[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True).strip()


def _media(asked: Document, encoder: ChatEncoder, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What stock takes of images and of videos."""
    if encoder.media is None or not asked.media:
        return {}
    tokens = encoder.media.tokens
    found = {"mm_token_type_ids": (ids == tokens.image).int() + 2 * (ids == tokens.video).int()}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [medium for medium in asked.media if medium.kind == kind]
        if media:
            found[pixels] = torch.cat([torch.from_numpy(encoder.media.pixels(medium)) for medium in media])
            found[grid] = torch.tensor([medium.grid for medium in media])
    return found


@contextmanager
def _active(model: Any, adapter: str | None, *, base: bool) -> Iterator[None]:
    """One adapter of a peft model for all others, or none of them."""
    if base and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    before = getattr(model, "active_adapter", None)
    if adapter is None or adapter == before:
        yield
        return
    known = list(getattr(model, "peft_config", ()))
    if adapter not in known:
        raise SpecError(
            f"there is no adapter {adapter!r}; there are {', '.join(known) or 'none'}{nearest(adapter, known)}",
            fix=f'run.load_adapter("path/to/{adapter}", "{adapter}")',
            got=adapter,
            expected=known,
        )
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(before)

"""Answers of a trained model, through transformers' own ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from qwenft.models.lora import output_head
from qwenft.specs.images import ImageSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qwenft.data.chat import ChatEncoder
    from qwenft.data.document import Document
    from qwenft.data.media import Medium


@torch.no_grad()
def answers(
    model: Any,
    encoder: ChatEncoder,
    conversations: Sequence[str | list[dict[str, Any]]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    on_text: Callable[[str], Any] | None = None,
    **options: Any,
) -> list[str]:
    """The texts that the model writes after the generation prompts, without control tokens.

    Args:
        model: bound; called without a layout, it behaves as stock.
        encoder: of the checkpoint.
        conversations: each as messages, or the text of one user turn.
        max_new_tokens: of each, at the most.
        batch_size: how many are written at a time, those of like length together.
        on_text: called with the pieces of a single answer as they come.
        **options: of ``generate``.

    Raises:
        DataError: a message is none, or holds an image that cannot be seen.
    """
    end = encoder.tokenizer.convert_tokens_to_ids(encoder.template().end_token or encoder.tokenizer.eos_token)
    padding = end if encoder.tokenizer.pad_token_id is None else encoder.tokenizer.pad_token_id
    # Who calls this may name any file.
    places = ImageSpec(root=Path.cwd().anchor)
    asked = [encoder.prompt(_messages(conversation), places) for conversation in conversations]
    by_length = sorted(range(len(asked)), key=lambda one: len(asked[one]))
    texts = [""] * len(asked)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(asked), batch_size):
            chosen = by_length[start : start + batch_size]
            inputs = _padded([asked[one] for one in chosen], encoder, padding)
            output = model.generate(
                # The embeddings may be on the host.
                **{name: tensor.to(output_head(model).weight.device) for name, tensor in inputs.items()},
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=padding,
                streamer=None if on_text is None else _Pieces(encoder.tokenizer, on_text),
                **{"do_sample": False, **options},
            )
            written = output[:, inputs["input_ids"].shape[1] :]
            found = encoder.tokenizer.batch_decode(written, skip_special_tokens=True)
            for one, text in zip(chosen, found, strict=True):
                texts[one] = text.strip()
    finally:  # who stops an answer may go on with training
        model.train(was_training)
    return texts


class _Pieces(TextStreamer):  # type: ignore[misc] # transformers has no types here
    """Hands on what is written as soon as its words are whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """As transformers calls it."""
        if text:
            self.on_text(text)


def _messages(conversation: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation


def _padded(asked: Sequence[Document], encoder: ChatEncoder, padding: int) -> dict[str, torch.Tensor]:
    """Prompts side by side, filled up in front as stock expects it, with their images and videos."""
    longest = max(map(len, asked))
    ids = torch.full((len(asked), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(asked):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.input_ids)
        mask[row, longest - len(prompt) :] = 1
    media = [medium for prompt in asked for medium in prompt.media]
    return {"input_ids": ids, "attention_mask": mask, **_media(media, encoder, ids)}


def _media(media: Sequence[Medium], encoder: ChatEncoder, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What stock takes of images and of videos."""
    if encoder.media is None or not media:
        return {}
    tokens = encoder.media.tokens
    found = {"mm_token_type_ids": (ids == tokens.image).int() + 2 * (ids == tokens.video).int()}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if of_kind := [medium for medium in media if medium.kind == kind]:
            found[pixels] = torch.cat([torch.from_numpy(encoder.media.pixels(medium)) for medium in of_kind])
            found[grid] = torch.tensor([medium.grid for medium in of_kind])
    return found

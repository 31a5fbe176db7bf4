"""Answers of a trained model, through transformers' own ``generate``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qwenft.data.chat import ChatEncoder
from qwenft.errors import SpecError, nearest
from qwenft.models.lora import output_head

if TYPE_CHECKING:
    from collections.abc import Iterator


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
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
        tokenizer: the checkpoint's.
        messages: a conversation, or the text of one user turn.
        max_new_tokens: at the most.
        base: with the adapter off.
        adapter: the name of another one, which was loaded.
        **options: of ``generate``.
    """
    template = ChatEncoder(tokenizer).template()
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    inputs = tokenizer(template.ask(conversation), return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(output_head(model).weight.device)  # the embeddings may be on the host
    was_training = model.training
    model.eval()
    with _active(model, adapter, base=base):
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.convert_tokens_to_ids(template.end_token or tokenizer.eos_token),
            pad_token_id=tokenizer.pad_token_id,
            **{"do_sample": False, **options},
        )
    model.train(was_training)
    written = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True).strip()


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

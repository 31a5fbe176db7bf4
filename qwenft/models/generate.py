"""Answers of a trained model, through transformers' own ``generate``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from qwenft.data.chat import ChatEncoder
from qwenft.models.lora import output_head


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    messages: str | list[dict[str, Any]],
    max_new_tokens: int,
    *,
    base: bool = False,
    **options: Any,
) -> str:
    """The text that the model writes after the generation prompt, without control tokens.

    Args:
        model: bound; called without a layout, it behaves as stock.
        tokenizer: the checkpoint's.
        messages: a conversation, or the text of one user turn.
        max_new_tokens: at the most.
        base: with the adapter off.
        **options: of ``generate``.
    """
    template = ChatEncoder(tokenizer).template()
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    inputs = tokenizer(template.ask(conversation), return_tensors="pt", add_special_tokens=False)
    inputs = inputs.to(output_head(model).weight.device)  # the embeddings may be on the host
    was_training = model.training
    model.eval()
    with model.disable_adapter() if base and hasattr(model, "disable_adapter") else nullcontext():
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

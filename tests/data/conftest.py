"""A tiny tokenizer with the family's control tokens and template."""

from __future__ import annotations

import numpy as np
import pytest

from qwenft.data.chat import ChatEncoder
from qwenft.data.document import Document
from qwenft.data.masking import IGNORED
from qwenft.testing import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def encoder(tokenizer):
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="session")
def document():
    """Makes a document of a length: its tokens count on from ``first``, and the later half is trained."""

    def make(length, first=0, supervised=None, row=1):
        ids = np.arange(first, first + length, dtype=np.int32)
        labels = np.full(length, IGNORED, dtype=np.int32)
        begin = length // 2 if supervised is None else length - 1 - supervised
        labels[begin : length - 1] = ids[begin + 1 :]
        return Document(input_ids=ids, labels=labels, file="chats.jsonl", row=row)

    return make

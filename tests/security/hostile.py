"""What the tests of hostile files share: files that are made wrong, and code that shows when it runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest

import qwenft as qf
from qwenft.models.checkpoint import architecture_of
from qwenft.models.load import load_model, load_tokenizer
from qwenft.models.weights import storage_of

DEEP = "[" * 100_000


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def pickled(trace):
    """A pickle that leaves a trace where it is loaded."""
    return pickle.dumps(Runs(trace))


def header_of(file):
    """The header and the bytes behind it of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file, header, data=b""):
    """Write a safetensors file with a header of one's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_json(file, **changes):
    """Change fields of a JSON object."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def link_out(file):
    """Put a link to a copy elsewhere in the place of a file."""
    elsewhere = file.parent.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    shutil.move(file, elsewhere / file.name)
    file.symlink_to(elsewhere / file.name)


def load(folder):
    """All that a run reads of a base checkpoint."""
    model = qf.ModelSpec(folder, dtype="float32")
    loaded = architecture_of(model)
    load_tokenizer(folder)
    return load_model(folder, loaded, storage=storage_of(model, loaded))


def refused(error, use, place, problem):
    """That a use is refused with the place and the reason in it, and what to do."""
    with pytest.raises(error, match=f"(?s){problem}") as caught:
        use()
    assert type(caught.value) in (error, *error.__subclasses__())
    assert str(place) in str(caught.value)
    assert caught.value.fix

"""Data of somebody else: what would fill the memory, run or fall over is a DataError with its place."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
import zlib

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import qwenft as qf
from qwenft.data.pictures import PictureError, Pictures
from qwenft.data.sources import read_rows

from .hostile import pickled, refused

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def read(path):
    return list(read_rows(qf.DataSpec.messages(path)))


@pytest.mark.parametrize(
    "name", ["chats.jsonl.gz", "chats.zip", "chats.pkl", "chats.pt", "chats.arrow", "chats.txt"]
)
def test_archives_and_pickles_are_not_opened(tmp_path, name):
    """What is compressed is not unpacked, and nothing but the named kinds is read."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(10**6)) if name.endswith("gz") else pickled(tmp_path / "ran"))
    refused(qf.DataError, lambda: read(path), path, r"expected a name that ends in \.jsonl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["gzip", "zip", "pickle"])
def test_archives_and_pickles_by_another_name_are_not_opened(tmp_path, suffix, kind):
    """A suffix says how a file is read, and what is something else is an error of the data."""
    path = tmp_path / f"chats{suffix}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("chats.jsonl", bytes(10**7))
    else:
        path.write_bytes(gzip.compress(bytes(10**7)) if kind == "gzip" else pickled(tmp_path / "ran"))
    refused(qf.DataError, lambda: read(path), path, "is no |broken|expected|holds no row")
    assert not (tmp_path / "ran").exists()


def test_a_line_of_many_brackets_is_named_with_its_row(tmp_path):
    """Megabytes of brackets end at the first thousands."""
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n{'[' * 20_000_000}\n")
    with pytest.raises(qf.DataError, match="line 2: is nested too deeply") as caught:
        read(path)
    assert (caught.value.file, caught.value.row) == (str(path), 2)


@pytest.mark.parametrize("value", ["9" * 100_000, '{"a": ' * 100_000, '"\\ud800"', "1e999999999", "nan"])
def test_values_that_json_parsers_fall_over_are_named_with_their_row(tmp_path, value):
    """Huge numbers, deep objects and bare surrogates."""
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n{value}\n")
    with pytest.raises(qf.DataError, match="line 2: ") as caught:
        read(path)
    assert caught.value.row == 2


def damaged(content, where):
    changed = bytearray(content)
    changed[where] ^= 0xFF
    return bytes(changed)


def test_a_parquet_file_that_is_damaged_anywhere_is_an_error_or_its_rows(tmp_path):
    """Sizes and places of pages that are wrong reach no memory and raise no other error."""
    path = tmp_path / "chats.parquet"
    parquet.write_table(pa.Table.from_pylist([CHAT] * 3), path)
    content = path.read_bytes()
    files = []
    for where in range(0, len(content), 7):
        path.write_bytes(damaged(content, where))
        try:
            read(path)
        except qf.DataError as error:
            files.append(error.file)
    assert len(files) > 20
    assert set(files) == {str(path)}


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*chunks, size=(64, 64)):
    """A PNG with chunks of one's own behind its header."""
    image = io.BytesIO()
    Image.new("RGB", size).save(image, "PNG")
    content = image.getvalue()
    return content[:33] + b"".join(chunks) + content[33:]


def test_texts_of_an_image_are_not_unpacked_without_end():
    """A PNG whose comment is a bomb is broken, or read without it; its gigabytes are never there."""
    bomb = b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    with pytest.raises(PictureError, match="is broken"):
        Pictures().find(png(chunk(b"zTXt", bomb))).open()


def test_an_image_of_many_pixels_is_not_decoded():
    """A header that claims a terabyte of pixels is refused by it."""
    header = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
    content = png()
    huge = content[:8] + chunk(b"IHDR", header) + content[33:]
    with pytest.raises(PictureError, match="has 1000000 x 1000000 pixels, more than 100,000,000"):
        Pictures().find(huge)


def test_a_chunk_that_claims_gigabytes_is_truncated():
    """Its length is not believed."""
    content = png()
    claimed = content[:33] + struct.pack(">I", 2**31 - 1) + b"eXIf" + content[33:]
    with pytest.raises(PictureError, match=r"is broken: (Truncated|truncated)"):
        Pictures().find(claimed)

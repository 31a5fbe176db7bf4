"""Images that rows name: found and measured without being decoded, opened later."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import struct
import tempfile
import urllib.request
import warnings
import zlib
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import attrs
import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag

# What Pillow reads by itself, without an external program; AVIF where it was built in.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_RATIO = 200  # transformers' smart_resize refuses what is longer
_TIMEOUT = 20  # seconds without an answer
_REMOTE_BYTES = 100_000_000  # of one image that is fetched
_TAIL = 65536  # bytes in which a JPEG's end is looked for
_SCHEME = re.compile(r"(data(?=:)|[a-z][a-z0-9+.-]*(?=://))", re.IGNORECASE)
_FOLDER = '.with_images(root="folder")'
_AGAIN = "save or download it again"
_EXPECTED = "a path, a URL, a data URL, bytes or a PIL.Image"


class PictureError(ValueError):
    """What is wrong with an image, in words; `.fix` is the remedy, or None."""

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__(problem)
        self.fix = fix


def _name(source: Any) -> str:
    """What errors call an image."""
    if isinstance(source, str | Path):
        return f"{source!s:.200}"
    return f"an image of {len(source):,} bytes" if isinstance(source, bytes) else f"a {type(source).__name__}"


@attrs.frozen
class Picture:
    """An image that is not decoded; equal to another of the same source.

    Args:
        source: its file, or the bytes of one.
        height: pixels, as it is shown: with its EXIF orientation applied.
        width: pixels, likewise.
        signature: size in bytes and time of change in nanoseconds of a user's file; None of bytes and of files in
            the store, which do not change.
    """

    source: Path | bytes = attrs.field(repr=_name)
    height: int = attrs.field(eq=False)
    width: int = attrs.field(eq=False)
    signature: tuple[int, int] | None = attrs.field(default=None, eq=False)

    @property
    def fingerprint(self) -> bytes:
        """What tells it from another wherever it lies: name and size, of bytes and of the store a sha256."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).digest()
        return f"{self.source.name} {self.signature[0] if self.signature else ''}".encode()

    def open(self) -> Image.Image:
        """The decoded image, as it is shown, in RGB of 8 bits.

        CMYK and grey become RGB; 16-bit grey is divided by 257; what is transparent, in a palette or a channel,
        lies on white. EXIF orientations 1 to 8 are applied; ICC profiles are ignored.

        Raises:
            PictureError: it is broken or truncated, or has changed since it was measured.
        """
        name = _name(self.source)
        with _reading(name), _file(self.source) as file:
            if self.signature is not None and self.signature != _signature(file):
                raise PictureError(f"{name}: has changed since it was measured", "start again when it is written")
            shown = _shown(_header(file, name))
        if shown.size != (self.width, self.height):
            measured = f"was measured as {self.width} x {self.height}"
            raise PictureError(f"{name}: {measured} and decoded as {shown.width} x {shown.height}", _AGAIN)
        return shown


@attrs.frozen
class Pictures:
    """Where images may come from.

    Args:
        root: the folder in which every path must lie, links followed; without it no path is allowed.
        hosts: of which https URLs are fetched, as they stand in a URL: "example.org" or "example.org:8443".
        store: a folder where bytes are kept in files named by their sha256; where it is None or cannot be written
            they stay in the Picture.
        max_pixels: of one image; a larger one is refused before it is decoded. Pillow 13 itself reads no TIFF or
            WebP of more than twice its `PIL.Image.MAX_IMAGE_PIXELS`.
    """

    root: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    hosts: tuple[str, ...] = ()
    store: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    max_pixels: int = 100_000_000

    def find(self, value: Any) -> Picture:
        """The image that a row names or holds, measured.

        Args:
            value: a path in ``root``, relative or absolute; a `file://`, `data:` or `https://` URL; the bytes of a
                file; a `PIL.Image.Image` or a uint8 array [H, W, 3], kept as a PNG of what `Picture.open` gives of
                them; ``{"url": ...}`` as OpenAI's API has it; or ``{"bytes": ..., "path": ...}`` as `datasets` has
                it, whose bytes win.

        Raises:
            PictureError: it is missing, not allowed, broken, animated, too large or too long, or no image.
        """
        named = _unwrapped(value)
        name = _name(named)
        with _reading(name):
            if isinstance(named, str) and (scheme := _SCHEME.match(named)):
                named = self._from_url(named, scheme[1].lower(), name)
            if isinstance(named, str | Path) and str(named):
                return self._in_root(Path(named), name)
            if isinstance(named, np.ndarray) and named.dtype == np.uint8 and named.shape[2:] == (3,):
                named = Image.fromarray(named)
            if isinstance(named, Image.Image):
                named = self._png(named, name)
            if isinstance(named, bytes):
                height, width = _measured(io.BytesIO(named), name, self.max_pixels)
                return Picture(named if self.store is None else _stored(named, self.store), height, width)
        raise PictureError(f"expected an image, got {value!r:.60}", _EXPECTED)

    def _from_url(self, url: str, scheme: str, name: str) -> Path | bytes:
        if scheme == "data":
            return _from_data(url, name)
        parts = urlsplit(url)
        host = parts.netloc.lower()
        if scheme == "file" and host in {"", "localhost"}:
            return Path(urllib.request.url2pathname(parts.path))
        if scheme != "https":
            raise PictureError(f"{name}: only https URLs are fetched", f"https://..., or a file: {_FOLDER}")
        if host not in self.hosts:
            fix = f'.with_images(hosts=("{host}",)), or a file: {_FOLDER}'
            raise PictureError(f"{name}: images are not fetched from {host!r}", fix)
        return _fetched(url, name)

    def _in_root(self, path: Path, name: str) -> Picture:
        if self.root is None:
            raise PictureError(f"{name}: no folder of images is named, so no path is allowed", _FOLDER)
        root = self.root.resolve()
        # In the root of the file system lie all paths, and a relative one is that of the working folder.
        start = Path.cwd() if root == Path(root.anchor) else root
        real = (start / path).resolve()  # an absolute path replaces the start
        if not real.is_relative_to(root):
            fix = f'a path inside of it, or .with_images(root="{real.parent}")'
            raise PictureError(f"{name}: lies outside of the folder of images, {self.root}", fix)
        if not real.exists():
            raise PictureError(f"{name}: is missing in {self.root}", "put it there, or leave the row out")
        if not real.is_file():  # a FIFO would wait for its writer
            what = "a folder" if real.is_dir() else "no regular file"
            raise PictureError(f"{name}: is {what}", "the path of an image")
        with real.open("rb") as file:
            signature = _signature(file)
            height, width = _measured(file, name, self.max_pixels)
        return Picture(real, height, width, signature)

    def _png(self, image: Image.Image, name: str) -> bytes:
        _check(image, name, self.max_pixels)
        png = io.BytesIO()
        _shown(image).save(png, "PNG", compress_level=1)  # higher levels take several times as long
        return png.getvalue()


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follow redirects within the host that was allowed."""

    def redirect_request(  # noqa: PLR0917 - urllib's signature
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            fp.close()
            raise PictureError(f"{req.full_url:.200}: leads to another host, {newurl:.200}", "the URL it leads to")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _unwrapped(value: Any) -> Any:
    """What a mapping holds, in bytes or as a string or path; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    if isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value.get("path"), str | Path):
        return Path(value["path"])
    if isinstance(value.get("url"), str):
        return value["url"]
    expected = '{"url": ...} or {"bytes": ..., "path": ...}'
    raise PictureError(f"expected {expected}, got {value!r:.60}", _EXPECTED)


def _from_data(url: str, name: str) -> bytes:
    kind, _, body = url.partition(",")
    if not re.fullmatch(r"data:image/.*;base64", kind, re.IGNORECASE):
        raise PictureError(f"{name}: is no image in base64", "data:image/png;base64,...")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise PictureError(f"{name}: is no base64: {error}", "base64.b64encode(image_bytes).decode()") from None


def _fetched(url: str, name: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "qwenft"})  # noqa: S310 - https alone comes here
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=_TIMEOUT) as answer:
            data: bytes = answer.read(_REMOTE_BYTES + 1)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()
        problem = f"{name}: cannot be fetched: {error}"
        raise PictureError(problem, "a URL that can be reached, or leave the row out") from None
    if len(data) > _REMOTE_BYTES:
        fix = f"download it, and name the file: {_FOLDER}"
        raise PictureError(f"{name}: has more than {_REMOTE_BYTES:,} bytes", fix)
    return data


def _stored(data: bytes, store: Path) -> Path | bytes:
    """The file that holds these bytes, written whole beside its place and then moved there, or else the bytes."""
    place = store / hashlib.sha256(data).hexdigest()
    try:
        store.mkdir(parents=True, exist_ok=True)
        if place.is_file() and place.stat().st_size == len(data):
            return place
        with tempfile.NamedTemporaryFile(dir=store, prefix=".writing-", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                Path(file.name).replace(place)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError:
        return data
    return place


def _file(source: Path | bytes) -> IO[bytes]:
    return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)


def _signature(file: IO[bytes]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say of every error which image it is about."""
    try:
        yield
    except PictureError:
        raise
    except OSError as error:
        if error.errno is None:  # Pillow's word for a broken image
            raise PictureError(f"{name}: is broken: {error}", _AGAIN) from error
        raise PictureError(f"{name}: cannot be read: {error.strerror}", "a file that can be read") from error
    except Exception as error:  # Pillow raises errors of every kind
        raise PictureError(f"{name}: is broken: {type(error).__name__}: {error}", _AGAIN) from error


def _header(file: IO[bytes], name: str) -> Image.Image:
    """The image of a file, of which nothing but the header is read."""
    head = file.read(16)
    if not head:
        raise PictureError(f"{name}: is empty", _AGAIN)
    Image.init()
    for kind in FORMATS:
        # Not Image.open, which warns of and refuses what has more pixels than a limit of the whole process.
        read, accepts = Image.OPEN.get(kind, (None, None))
        if read is not None and accepts is not None and accepts(head) is True:
            file.seek(0)
            return read(file, "")
    raise PictureError(f"{name}: is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", "save it as PNG or JPEG")


def _check(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuse what is known of an image before it is decoded."""
    short, long = sorted(image.size)
    size = f"{image.width} x {image.height} pixels"
    if not short:
        raise PictureError(f"{name}: is empty: {size}", "leave the row out")
    if short * long > max_pixels:
        raise PictureError(f"{name}: has {size}, more than {max_pixels:,} in all", "make it smaller")
    if long / short > _RATIO:
        raise PictureError(
            f"{name}: has {size}, its sides differ by more than {_RATIO} times", "cut it into pieces"
        )
    # An MPO is a JPEG of which the first image is the picture, and others its preview or depth.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        fix = "one frame of it, or a video: a list of its frames"
        raise PictureError(f"{name}: is a {image.format} of more than one image", fix)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise PictureError(f"{name}: has values of 32 bits, whose range is not known", "save it with 8 or 16 bits")


def _measured(file: IO[bytes], name: str, max_pixels: int) -> tuple[int, int]:
    """Height and width of a file's image as it is shown, in pixels; what can be told cheaply is checked."""
    image = _header(file, name)
    _check(image, name, max_pixels)
    if image.format == "JPEG":
        _check_end(image, file)
    if image.format == "PNG" and (exif := _png_exif(file)):
        image.info["exif"] = exif
    # Not image.getexif(), which decodes a PNG to look for metadata behind its pixels.
    orientation = Image.Image.getexif(image).get(ExifTag.Orientation)
    turned = orientation in _SIDEWAYS and image.format != "TIFF"  # whose size Pillow gives as it is shown
    return (image.width, image.height) if turned else (image.height, image.width)


def _check_end(image: Image.Image, file: IO[bytes]) -> None:
    """Refuse a JPEG that is cut short: one that has no end mark and cannot be decoded."""
    pixels = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(pixels, size - _TAIL))
    if b"\xff\xd9" not in file.read():
        image.load()


def _png_exif(file: IO[bytes]) -> bytes | None:
    """Read a PNG to its end, check the sums of its chunks and give its EXIF, which may lie behind the pixels.

    The chunks are those of https://www.w3.org/TR/png-3/#5Chunk-layout.
    """
    exif, name = None, b""
    file.seek(8)
    while name != b"IEND":
        length, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        content, checksum = file.read(length), file.read(4)
        if zlib.crc32(content, zlib.crc32(name)) != int.from_bytes(checksum):
            msg = "truncated, or a wrong checksum"
            raise OSError(msg)
        if name == b"eXIf":
            exif = b"Exif\0\0" + content
    return exif


def _shown(image: Image.Image) -> Image.Image:
    """An image decoded, turned as it is shown and in RGB."""
    if image.format == "TIFF":  # its decoder warns by a limit of the whole process
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        values = np.asarray(image).astype(np.int32)
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")

import base64
import http.client
import http.server
import io
import os
import struct
import threading
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, WebPImagePlugin, features

from qwenft.data.pictures import Picture, PictureError, Pictures

NOISE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)


def file_of(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(name, content=b""):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def header_of(width, height):
    """A PNG of which there is little more than the size."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"x") + chunk(b"IEND")


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def pixels(image):
    return np.asarray(image).tolist()


PNG = file_of(Image.fromarray(NOISE))
JPEG = file_of(Image.fromarray(NOISE), "JPEG")
FRAMES = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a b.png").write_bytes(PNG)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(PNG)
    return folder


@pytest.fixture
def pictures(root):
    return Pictures(root=root)


def refused(pictures, value, words):
    """The error of an image, of which the words are a part and which has a remedy."""
    with pytest.raises(PictureError) as caught:
        pictures.find(value)
    assert words in str(caught.value)
    assert caught.value.fix
    assert len(str(caught.value)) < 500
    return caught.value


# Where an image comes from


def test_every_way_to_name_an_image_gives_its_pixels(root, pictures):
    """Paths, URLs of files, data URLs, bytes, images, arrays and the mappings of APIs and data sets are alike."""
    path, data = root / "inner" / "a b.png", base64.b64encode(PNG).decode()
    values = [
        "inner/a b.png",
        "inner/../inner/a b.png",
        str(path),
        Path("inner/a b.png"),
        path,
        path.as_uri(),
        f"data:image/png;base64,{data}",
        f"DATA:image/png;charset=x;base64,{data[:40]}\n{data[40:]}",
        PNG,
        Image.open(io.BytesIO(PNG)),
        NOISE,
        {"url": f"data:image/png;base64,{data}", "detail": "high"},
        {"url": "inner/a b.png"},
        {"bytes": PNG, "path": "/nowhere.png"},
        {"bytes": None, "path": "inner/a b.png"},
        {"path": str(path)},
    ]
    for value in values:
        found = pictures.find(value)
        assert (found.height, found.width) == (30, 50), value
        assert pixels(found.open()) == NOISE.tolist(), value


def test_an_undecoded_column_of_a_data_set_is_read(pictures):
    """What datasets gives for Image(decode=False) and for Image() is found."""
    rows = datasets.Dataset.from_list([{"image": {"bytes": PNG, "path": None}}])
    for decode in (False, True):
        row = rows.cast_column("image", datasets.Image(decode=decode))[0]
        assert pixels(pictures.find(row["image"]).open()) == NOISE.tolist()


def test_a_picture_is_equal_by_its_source_and_says_little(root, pictures):
    """Two names of one file are one picture; bytes do not fill the repr."""
    first, second = pictures.find("inner/a b.png"), pictures.find(root / "inner" / "a b.png")
    assert first == second
    assert len({first, second, pictures.find(PNG)}) == 2
    assert Picture(PNG, height=1, width=1) == Picture(PNG, height=2, width=2)
    assert first.source == (root / "inner" / "a b.png").resolve()
    assert first.signature == (len(PNG), first.source.stat().st_mtime_ns)
    assert pictures.find(PNG).signature is None
    assert len(repr(pictures.find(PNG))) < 120


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "",
        ["a.png"],
        {},
        {"url": 3},
        {"url": None},
        {"image": "a.png"},
        np.zeros((4, 4), np.uint8),
        NOISE / 255,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_names_no_image_is_refused(pictures, value):
    """The error says what it got and what is expected."""
    error = refused(pictures, value, "got")
    assert "path" in f"{error} {error.fix}"


def test_no_path_is_read_without_a_folder(root):
    """Neither a path nor a URL of a file is read where no root is named; bytes are."""
    for value in ("a.png", root / "inner" / "a b.png", (root / "inner" / "a b.png").as_uri(), {"path": "a.png"}):
        assert refused(Pictures(), value, "no path is allowed").fix == '.with_images(root="folder")'
    assert Pictures().find(PNG).width == 50


def test_paths_that_lead_out_of_the_folder_are_refused(root, pictures):
    """Dots, absolute paths, URLs of files, and links of files and of folders cannot leave the root."""
    secret = root.parent / "outside" / "secret.png"
    (root / "link.png").symlink_to(secret)
    (root / "linked").symlink_to(secret.parent)
    (root / "inner" / "far").symlink_to("../../outside")
    values = [
        "../outside/secret.png",
        "inner/../../outside/secret.png",
        "../outside/is_missing.png",
        str(secret),
        secret.as_uri(),
        f"file://{root}/%2e%2e/outside/secret.png",
        "link.png",
        "linked/secret.png",
        "inner/far/secret.png",
        {"path": "linked/secret.png"},
        "../images_beside/a.png",
    ]
    for value in values:
        assert "root=" in refused(pictures, value, "lies outside").fix


def test_links_within_the_folder_are_followed(root, pictures):
    """A link that stays inside, and a root that is a link itself, are read."""
    (root / "link.png").symlink_to("inner/a b.png")
    (root.parent / "root").symlink_to(root)
    assert pictures.find("link.png") == pictures.find("inner/a b.png")
    assert Pictures(root.parent / "root").find("link.png") == pictures.find("inner/a b.png")


def test_paths_of_no_image_are_refused(root, pictures):
    """Missing files, folders, pipes, loops and impossible names are told apart."""
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "nothing.png").write_bytes(b"")
    refused(pictures, "missing.png", "missing.png: is missing in")
    refused(pictures, "inner", "is a folder")
    refused(pictures, "pipe.png", "no regular file")
    refused(pictures, "nothing.png", "is empty")
    for value in ("loop.png", "a\0b.png", "a" * 100_000, "inner/a b.png/c.png", "https://["):
        refused(pictures, value, "")
    refused(pictures, f"file://other{root}/inner/a%20b.png", "only https URLs")


def test_data_urls_of_no_image_are_refused(pictures):
    """Text, other encodings, broken base64 and base64 of what is no image are told apart."""
    refused(pictures, "data:text/plain;base64,aGk=", "is no image in base64")
    refused(pictures, "data:image/svg+xml,%3Csvg/%3E", "is no image in base64")
    refused(pictures, "data:image/png;base64", "is empty")
    refused(pictures, "data:image/png;base64,YW*Jj", "is no base64")
    refused(pictures, "data:image/png;base64,abc", "is no base64")
    refused(pictures, "data:image/png;base64,aGk=", "is no PNG, JPEG")
    refused(pictures, "data:image/png;base64,", "is empty")


# URLs


@pytest.fixture
def server(monkeypatch):
    """A host whose https is plain http, that answers by path."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/a.png":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(PNG)
            elif self.path == "/slow.png":
                done.wait(10)
            elif self.path in leads:
                self.send_response(302)
                self.send_header("Location", leads[self.path])
                self.end_headers()
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    asked, leads, done = [], {"/here": "/a.png", "/there": "https://elsewhere.org/a.png"}, threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as served:
        host = f"127.0.0.1:{served.server_port}"
        leads["/down"] = f"http://{host}/a.png"
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            urllib.request.HTTPSHandler,
            "https_open",
            lambda self, request: self.do_open(http.client.HTTPConnection, request),
        )
        monkeypatch.setenv("no_proxy", "*")
        served.host, served.asked = host, asked
        yield served
        done.set()
        served.shutdown()


def test_urls_of_allowed_hosts_are_fetched(server):
    """An image of such a host is read, through redirects within it."""
    pictures = Pictures(hosts=(server.host,))
    assert pixels(pictures.find(f"https://{server.host}/a.png").open()) == NOISE.tolist()
    assert pixels(pictures.find({"url": f"https://{server.host}/here"}).open()) == NOISE.tolist()


def test_other_hosts_are_not_asked(server):
    """Nothing is sent to a host that is not allowed, however the URL is written."""
    url = f"https://{server.host}/a.png"
    assert f'hosts=("{server.host}",)' in refused(Pictures(), url, "are not fetched from").fix
    pictures = Pictures(hosts=("example.org",))
    for value in (url, f"https://example.org@{server.host}/a.png", f"https://{server.host}\\@example.org/a.png"):
        refused(pictures, value, "are not fetched from")
    for value in (f"http://{server.host}/a.png", "ftp://example.org/a.png", "s3://bucket/a.png"):
        refused(Pictures(hosts=(server.host, "example.org")), value, "only https URLs")
    assert server.asked == []


def test_fetching_fails_in_words(server, monkeypatch):
    """Redirects to other hosts and to http, missing pages, silence and too many bytes are refused."""
    pictures, url = Pictures(hosts=(server.host, "127.0.0.1:1")), f"https://{server.host}"
    refused(pictures, f"{url}/there", "leads to another host, https://elsewhere.org")
    refused(pictures, f"{url}/down", "leads to another host, http://")
    refused(pictures, f"{url}/missing.png", "404")
    refused(pictures, f"{url}/a b.png", "cannot be fetched")
    refused(pictures, "https://127.0.0.1:1/a.png", "cannot be fetched")
    monkeypatch.setattr("qwenft.data.pictures._TIMEOUT", 0.1)
    refused(pictures, f"{url}/slow.png", "timed out")
    monkeypatch.setattr("qwenft.data.pictures._REMOTE_BYTES", len(PNG) - 1)
    refused(pictures, f"{url}/a.png", "more than")


# The store


def test_bytes_are_kept_in_the_store(tmp_path):
    """Equal bytes are one file, which is written once and named by its sha256; no other file stays there."""
    store = tmp_path / "deep" / "store"
    pictures = Pictures(store=store)
    found = [pictures.find(value) for value in (PNG, {"bytes": PNG}, NOISE, JPEG)]
    assert found[0] == found[1]
    assert found[0].signature is None
    assert len(list(store.iterdir())) == 3
    assert pixels(found[2].open()) == NOISE.tolist()
    written = found[0].source.stat().st_mtime_ns
    assert pictures.find(PNG).source.stat().st_mtime_ns == written


def test_an_entry_that_is_not_whole_is_written_again(tmp_path):
    """A file of the store that was cut short is replaced."""
    place = Pictures(store=tmp_path).find(PNG).source
    place.write_bytes(PNG[:9])
    Pictures(store=tmp_path).find(PNG)
    assert place.read_bytes() == PNG


def test_a_store_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    """The bytes stay in the picture, and nothing half written stays in the store."""
    (tmp_path / "file").write_bytes(b"")
    assert Pictures(store=tmp_path / "file" / "store").find(PNG).source == PNG
    store = tmp_path / "store"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert Pictures(store=store).find(PNG).source == PNG
    assert list(store.iterdir()) == []


def test_many_write_into_the_store_at_once(tmp_path):
    """Every one of them finds a whole image."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Pictures(store=tmp_path).find(PNG).open().size, range(64)))
    assert found == [(50, 30)] * 64
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_refused_is_not_kept(tmp_path):
    """Bytes that are no image do not enter the store."""
    refused(Pictures(store=tmp_path), b"no image", "is no PNG, JPEG")
    assert list(tmp_path.iterdir()) == []


# What is refused


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_a_truncated_image_is_refused(kind):
    """At once where that is told cheaply, else when it is decoded; one that is whole is not."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = file_of(Image.fromarray(NOISE), kind)
    assert Pictures().find(data).open().size == (50, 30)
    for length in (8, 20, len(data) // 2, len(data) - 60):
        with pytest.raises(PictureError, match=r"is broken|is no PNG|has changed|measured"):
            Pictures().find(data[:length]).open()
    if kind in {"PNG", "JPEG", "WEBP"}:
        refused(Pictures(), data[: len(data) - 60], "is broken")


def test_a_jpeg_with_a_preview_is_checked_to_its_end():
    """The end mark of a preview in its metadata is not taken for its own; what follows the image, or no mark, is fine."""
    tags = Image.Exif()
    tags[0x010E] = "\xff\xd9".encode("latin-1") * 10
    data = file_of(Image.fromarray(NOISE), "JPEG", exif=tags)
    assert b"\xff\xd9\xff\xd9" in data[: len(data) // 4]
    refused(Pictures(), data[: len(data) // 2], "truncated")
    assert Pictures().find(data + bytes(100_000)).open().size == (50, 30)
    endless = file_of(Image.new("L", (64, 64)), "JPEG").removesuffix(b"\xff\xd9")
    assert Pictures().find(endless).open().size == (64, 64)


def test_a_damaged_png_is_refused():
    """A wrong checksum is told at once; pixels that no longer inflate, when they are decoded."""
    place = PNG.index(b"IDAT") + 40
    damaged = PNG[:place] + bytes([PNG[place] ^ 255]) + PNG[place + 1 :]
    refused(Pictures(), damaged, "checksum")
    for length in (len(PNG) - 1, len(PNG) - 4, len(PNG) - 9, len(PNG) - 12):
        refused(Pictures(), PNG[:length], "truncated")
    with pytest.raises(PictureError, match="is broken"):
        Pictures().find(header_of(30, 50)).open()


@pytest.mark.parametrize("size", [(50_000, 10_000), (10_001, 10_000)])
def test_too_many_pixels_are_refused_before_they_are_decoded(size):
    """The limit is ours, and neither a warning nor an error of Pillow comes before it."""
    refused(Pictures(), header_of(*size), "more than 100,000,000 in all")
    assert Pictures(max_pixels=500_000_000).find(header_of(*size)).width == size[0]


def test_the_limit_holds_for_every_kind(monkeypatch):
    """What Pillow refuses by itself is an error of ours, and what it warns of is not."""
    wide = Image.new("1", (1000, 100))
    refused(Pictures(max_pixels=99_999), wide, "more than 99,999")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90_000)
    for kind in ("PNG", "TIFF", "WEBP", "GIF", "BMP", "JPEG"):
        data = file_of(wide.convert("L"), kind)
        assert Pictures().find(data).open().size == (1000, 100)

    def bomb(_file, _name):  # as Pillow 13 does by itself of TIFF and WebP, and Pillow 12 does not
        raise Image.DecompressionBombError

    monkeypatch.setitem(Image.OPEN, "WEBP", (bomb, Image.OPEN["WEBP"][1]))
    refused(Pictures(), file_of(wide.convert("L"), "WEBP"), "DecompressionBombError")


def test_an_image_that_is_too_long_is_refused():
    """Sides may differ by 200 times, which is the processor's limit, and no more."""
    assert Pictures().find(Image.new("L", (1, 200))).height == 200
    refused(Pictures(), Image.new("L", (1, 201)), "more than 200 times")
    refused(Pictures(), file_of(Image.new("L", (402, 2))), "more than 200 times")


def test_an_image_without_pixels_is_refused():
    """In memory and as a file."""
    refused(Pictures(), Image.new("RGB", (0, 5)), "is empty")
    refused(Pictures(), np.zeros((4, 0, 3), np.uint8), "is empty")
    refused(Pictures(), header_of(0, 5), "is broken")
    refused(Pictures(), b"", "is empty")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_more_than_one_frame_is_refused(kind):
    """As bytes and opened already; the remedy is a video."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = file_of(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])
    assert "list of its frames" in refused(Pictures(), data, f"is a {kind} of more than one image").fix
    refused(Pictures(), Image.open(io.BytesIO(data)), f"is a {kind} of more than one image")


def test_a_photograph_with_its_preview_is_one_image():
    """Of an MPO, which phones write as JPEG, the first image counts."""
    data = file_of(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:], quality=100)
    shown = Pictures().find(data).open()
    assert shown.size == (50, 30)
    assert np.abs(np.asarray(shown, int) - NOISE).mean() < 60


def test_documents_and_other_formats_are_refused(root, pictures):
    """What Pillow would open by another program, or is no picture, is not opened, whatever its name."""
    eps = file_of(Image.fromarray(NOISE), "EPS")
    for data in (
        eps,
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        file_of(FRAMES[0], "ICO"),
        b"hello",
    ):
        (root / "a.png").write_bytes(data)
        refused(pictures, "a.png", "is no PNG, JPEG")
        refused(pictures, data, "is no PNG, JPEG")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_of_an_unknown_range_are_refused(mode):
    """Floats and 32-bit integers say nothing of which value is white."""
    refused(Pictures(), Image.new(mode, (4, 4)), "32 bits")
    refused(Pictures(), file_of(Image.new(mode, (4, 4)), "TIFF"), "32 bits")


def test_a_file_that_changes_is_not_opened(root, pictures):
    """A size or a time other than those at its measuring are told, and a file that is gone too."""
    path = root / "inner" / "a b.png"
    found = pictures.find(path)
    assert found.open().size == (50, 30)
    os.utime(path, ns=(0, found.signature[1] + 1))
    with pytest.raises(PictureError, match="has changed"):
        found.open()
    path.write_bytes(PNG + b"x")
    os.utime(path, ns=(0, found.signature[1]))
    with pytest.raises(PictureError, match="has changed"):
        found.open()
    path.unlink()
    with pytest.raises(PictureError, match="cannot be read: No such file"):
        found.open()


def test_a_size_that_was_not_measured_is_not_opened():
    """Whoever counts tokens by the measured size gets no other image."""
    with pytest.raises(PictureError, match="was measured as 30 x 50 and decoded as 50 x 30"):
        Picture(PNG, height=50, width=30).open()


def test_no_image_is_decoded_to_be_measured(monkeypatch):
    """Finding an image of any kind reads no pixels of it."""
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"] + ["AVIF"] * features.check("avif")
    files = [file_of(Image.fromarray(NOISE), kind) for kind in kinds]

    def decoded(_):
        pytest.fail("an image was decoded")

    for kind in (ImageFile.ImageFile, TiffImagePlugin.TiffImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(kind, "load", decoded)
    assert [Pictures().find(data).width for data in files] == [50] * len(kinds)


# What is shown


def test_16_bits_of_grey_are_scaled():
    """65535 is white and 257 is 1, from PNG, TIFF of either order, PGM and memory; a transparent value is white."""
    values = np.array([[0, 257, 400, 128 * 257, 65535]], dtype=np.uint16)
    expected = [[[value] * 3 for value in (0, 1, 2, 128, 255)]]
    image = Image.fromarray(values)
    pgm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    big = file_of(Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()), "TIFF")
    for value in (image, file_of(image), file_of(image, "TIFF"), big, pgm):
        assert pixels(Pictures().find(value).open()) == expected
    clear = file_of(image, transparency=257)
    assert pixels(Pictures().find(clear).open()) == [[[0] * 3, [255] * 3, [2] * 3, [128] * 3, [255] * 3]]


def test_transparency_lies_on_white():
    """In a channel, of grey, in a palette and of one colour."""
    rgba = Image.new("RGBA", (2, 1), (200, 100, 0, 0))
    rgba.putpixel((1, 0), (200, 100, 0, 128))
    half = [round((value * 128 + 255 * 127) / 255) for value in (200, 100, 0)]
    assert pixels(Pictures().find(file_of(rgba)).open()) == [[[255] * 3, half]]
    assert pixels(Pictures().find(rgba).open()) == [[[255] * 3, half]]
    assert pixels(Pictures().find(file_of(Image.new("LA", (1, 1), (10, 0)))).open()) == [[[255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for options in ({"transparency": 1}, {"transparency": b"\xff\x00"}):
        assert pixels(Pictures().find(file_of(palette, **options)).open()) == [[[10, 20, 30], [255] * 3]]
    assert pixels(Pictures().find(file_of(palette)).open()) == [[[10, 20, 30], [40, 50, 60]]]
    black = file_of(Image.new("RGB", (1, 1)), transparency=(0, 0, 0))
    assert pixels(Pictures().find(black).open()) == [[[255] * 3]]


def test_other_colours_become_rgb():
    """CMYK, grey and single bits, as files and in memory; colour profiles change nothing."""
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert pixels(Pictures().find(cmyk).open()) == [[[255, 0, 0]] * 2] * 2
    assert pixels(Pictures().find(file_of(cmyk, "TIFF")).open()) == [[[255, 0, 0]] * 2] * 2
    shown = np.asarray(Pictures().find(file_of(cmyk, "JPEG", quality=100)).open(), int)
    assert np.abs(shown - [255, 0, 0]).max() < 5
    assert pixels(Pictures().find(file_of(Image.new("L", (1, 1), 77))).open()) == [[[77] * 3]]
    assert pixels(Pictures().find(file_of(Image.new("1", (1, 1), 1))).open()) == [[[255] * 3]]
    assert (
        pixels(Pictures().find(file_of(Image.fromarray(NOISE), icc_profile=b"profile")).open()) == NOISE.tolist()
    )
    assert type(Pictures().find(PNG).open()) is Image.Image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_orientations_are_applied(kind, orientation):
    """The measured size and the pixels are those of exif_transpose, from a file and from memory."""
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = file_of(Image.fromarray(NOISE), kind, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == ((50, 30) if orientation < 5 else (30, 50))
    for value in (data, Image.open(io.BytesIO(data))):
        found = Pictures().find(value)
        assert (found.width, found.height) == expected.size
        assert pixels(found.open()) == pixels(expected)


def test_an_orientation_behind_the_pixels_is_applied():
    """A PNG may hold its EXIF at the end, as some programs write it."""
    tags = exif(6).tobytes().removeprefix(b"Exif\0\0")
    end = PNG.index(b"IEND") - 4
    found = Pictures().find(PNG[:end] + chunk(b"eXIf", tags) + PNG[end:])
    assert (found.width, found.height) == (30, 50)
    assert pixels(found.open()) == np.rot90(NOISE, -1).tolist()

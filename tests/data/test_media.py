"""Images and videos of conversations as tokens: how many, where, and what becomes of those that are wrong."""

from __future__ import annotations

import base64
import copy
import io
import json

import attrs
import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import qwenft as qf
from qwenft.data.cache import tokenised
from qwenft.data.chat import ChatEncoder
from qwenft.data.corpus import read_corpus
from qwenft.data.masking import IGNORED
from qwenft.data.media import load_media_encoder
from qwenft.data.pictures import Pictures
from qwenft.data.stream import MapStream, Place
from qwenft.models.checkpoint import architecture_of
from qwenft.models.load import load_tokenizer
from qwenft.testing import tiny_checkpoint


def picture(number=0, size=(64, 64)):
    """Noise of a size (width, height), another for every number."""
    values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def png(image):
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()


def user(*parts):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def says(text):
    return {"role": "assistant", "content": text}


def named(name):
    return {"type": "image", "image": name}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("vision") / "checkpoint", "vision")


@pytest.fixture(scope="module")
def encoder(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    return ChatEncoder(
        tokenizer, load_media_encoder(checkpoint, architecture_of(qf.ModelSpec(checkpoint)), tokenizer)
    )


@pytest.fixture
def folder(tmp_path):
    for number, size in enumerate([(64, 64), (128, 96), (50, 200)]):
        picture(number, size).save(tmp_path / f"{number}.png")
    return tmp_path


def data_of(rows, folder, **options):
    return qf.DataSpec.messages([{"messages": row} for row in rows]).with_images(folder, **options)


def encoded(encoder, data):
    return list(encoder.encode(data))


CHAT = [
    user("Look: ", named("0.png"), " and ", named("1.png")),
    says("Two."),
    user(named("2.png")),
    says("Three."),
]


def test_tokens_are_those_of_the_processor(encoder, checkpoint, folder, monkeypatch):
    """The checkpoint's own processor, called as transformers has it, gives the same ids, pixels and grids."""
    # Its half for videos needs torchvision, and it would not be made without one.
    monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    processor = Qwen3VLProcessor(
        image_processor=transformers.AutoImageProcessor.from_pretrained(checkpoint),
        tokenizer=encoder.tokenizer,
        video_processor=None,
        chat_template=encoder.tokenizer.chat_template,
    )
    found = processor.apply_chat_template(
        [
            {
                **turn,
                "content": [
                    {**part, "image": str(folder / part["image"])} if "image" in part else part
                    for part in turn["content"]
                ],
            }
            if isinstance(turn["content"], list)
            else turn
            for turn in CHAT
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    (document,) = encoded(encoder, data_of([CHAT], folder))
    assert document.input_ids.tolist() == found["input_ids"][0].tolist()
    assert [list(medium.grid) for medium in document.media] == found["image_grid_thw"].tolist()
    pixels = np.concatenate([encoder.media.pixels(medium) for medium in document.media])
    np.testing.assert_array_equal(pixels, found["pixel_values"].numpy())
    image = encoder.media.tokens.image
    assert (document.input_ids == image).tolist() == (found["mm_token_type_ids"][0] == 1).tolist()
    for medium in document.media:
        (start,) = medium.starts
        assert (document.input_ids[start : start + medium.frame_tokens] == image).all()
        assert medium.bounds == (start - 1, start + medium.frame_tokens + 1)


@pytest.mark.parametrize("roles", [("assistant",), ("user", "assistant"), ("user",)])
def test_vision_tokens_are_never_trained(encoder, folder, roles):
    """Whoever is trained: no image, nor what encloses it; the text around it is."""
    (document,) = encoded(encoder, data_of([CHAT], folder).train_on(*roles))
    tokens = attrs.astuple(encoder.media.tokens)
    assert not np.isin(document.labels, tokens).any()
    trained = document.labels != IGNORED
    assert trained.any()
    assert (document.labels[:-1][trained[:-1]] == document.input_ids[1:][trained[:-1]]).all()
    text = encoder.tokenizer.decode(document.labels[trained])
    for role, words in (("assistant", ("Two.", "Three.")), ("user", ("Look:", "and"))):
        assert all((word in text) == (role in roles) for word in words)


def test_a_video_is_frames_with_their_times(encoder, folder):
    """Pairs of frames, each enclosed behind its time; an odd last frame is doubled."""
    frames = [f"{frame}.png" for frame in ("0", "a", "b")]
    for frame in frames[1:]:
        picture(7, (64, 64)).save(folder / frame)
    part = {"type": "video", "video": frames, "fps": 2}
    (document,) = encoded(encoder, data_of([[user("A film: ", part), says("Yes.")]], folder))
    (medium,) = document.media
    assert medium.grid[0] == 2
    assert encoder.media.times(medium) == [0.25, 1.0]
    text = encoder.tokenizer.decode(document.input_ids)
    assert "<|vision_start|><0.2 seconds><|vision_start|><|video_pad|>" in text
    assert "<|video_pad|><|vision_end|><1.0 seconds><|vision_start|>" in text
    pixels = encoder.media.pixels(medium).reshape(2, -1, 3, 2, 256)
    _, rows, columns = medium.grid
    still = encoder.media._patches([picture(0, (64, 64))], (rows * 16, columns * 16)).reshape(-1, 3, 2, 256)
    np.testing.assert_array_equal(pixels[0, :, :, 0], still[:, :, 0])
    np.testing.assert_array_equal(pixels[1, :, :, 0], pixels[1, :, :, 1])
    assert not np.array_equal(pixels[0, :, :, 0], pixels[0, :, :, 1])


def test_pixels_have_the_bounds_that_are_asked(encoder, folder):
    """Larger images are scaled down and smaller ones up; the token count is known before anything is decoded."""
    counts = []
    for options in ({}, {"max_pixels": 32 * 64}, {"min_pixels": 200 * 200}):
        (document,) = encoded(encoder, data_of([[user(named("1.png")), says("Yes.")]], folder, **options))
        counts.append(document.media[0].frame_tokens)
    assert counts[1] <= 2 < counts[0] < counts[2]


def test_a_bound_that_is_asked_goes_before_the_checkpoints(encoder, folder):
    """A least above the checkpoint's most, and a most below its least, both hold; two that leave nothing are refused."""
    size = encoder.media.processor.size
    for options in ({"min_pixels": 2 * size["longest_edge"]}, {"max_pixels": size["shortest_edge"] * 3 // 4}):
        (limit,) = options.values()
        data = data_of([[user(named("1.png")), says("Yes.")]], folder, **options)
        if "min_pixels" in options:
            (document,) = encoded(encoder, data)
            _, rows, columns = document.media[0].grid
            assert rows * columns * 16**2 >= limit
        assert (
            encoder.media.limits("image", least=data.images.min_pixels, most=data.images.max_pixels)[
                "max_pixels" in options
            ]
            == limit
        )
    both = data_of([[user(named("1.png")), says("Yes.")]], folder, min_pixels=5000, max_pixels=2000)
    with pytest.raises(qf.DataError, match="min_pixels = 5,000 are more than max_pixels = 2,000"):
        encoded(encoder, both)


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split", "resize", "error"])
def test_no_policy_of_length_cuts_an_image(encoder, folder, overflow):
    """Whatever is left of a document that is too long holds whole images, each with its pixels."""
    chat = [*CHAT, user("More: ", named("1.png"), named("1.png")), says("So many.")]
    (whole,) = encoded(encoder, data_of([chat], folder))
    length = len(whole) - 20
    data = data_of([chat], folder).with_max_length(length, overflow)
    if overflow == "error":
        with pytest.raises(qf.DataError, match="are more than"):
            tokenised_fitted(encoder, data)
        return
    pieces = tokenised_fitted(encoder, data)
    assert len(pieces) == {"drop": 0, "truncate": 1, "split": 2, "resize": 1}[overflow]
    tokens = encoder.media.tokens
    for piece in pieces:
        assert len(piece) <= length
        count = sum(medium.frame_tokens * len(medium.starts) for medium in piece.media)
        assert (piece.input_ids == tokens.image).sum() == count
        assert (piece.input_ids == tokens.vision_start).sum() == len(piece.media)
        assert (piece.input_ids == tokens.vision_end).sum() == len(piece.media)
        for medium in piece.media:
            assert (piece.input_ids[medium.starts[0] : medium.bounds[1] - 1] == tokens.image).all()
            assert encoder.media.pixels(medium).shape[0] == medium.grid[1] * medium.grid[2]
    if overflow == "resize":
        assert len(pieces[0].media) == 5
        assert len(pieces[0]) > length // 2


def tokenised_fitted(encoder, data):
    from qwenft.data.fitting import Counts, fitted

    return [piece for document in encoder.encode(data) for piece in fitted(document, data, Counts())]


def test_every_length_of_split_pieces_keeps_images_whole(encoder, folder):
    """A long message with images is cut between them, or left out where an image alone is too long."""
    chat = [user(*[part for _ in range(4) for part in ("some words here ", named("0.png"))]), says("Yes, " * 20)]
    (whole,) = encoded(encoder, data_of([chat], folder).train_on("user", "assistant"))
    for length in range(4, len(whole) + 2):
        for piece in whole.split(length, 0) if len(whole) > length else [whole]:
            assert len(piece) <= length
            for medium in piece.media:
                assert 0 <= medium.bounds[0] < medium.bounds[1] <= len(piece)
            pads = (piece.input_ids == encoder.media.tokens.image).sum()
            assert pads == sum(medium.frame_tokens for medium in piece.media)


def test_images_in_every_form(encoder, folder):
    """A path, a data URL in OpenAI's form, bytes, a PIL image and a data set's column give the same document."""
    url = f"data:image/png;base64,{base64.b64encode(png(picture(0))).decode()}"
    forms = [
        named("0.png"),
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": png(picture(0))},
        {"type": "image", "image": picture(0)},
    ]
    documents = [encoded(encoder, data_of([[user("See ", form), says("Yes.")]], folder))[0] for form in forms]
    column = {"messages": [user("See ", {"type": "image"}), says("Yes.")], "images": [picture(0)]}
    documents += encoded(encoder, qf.DataSpec.messages([column]).with_images(folder))
    pixels = [encoder.media.pixels(one.media[0]) for one in documents]
    for document, values in zip(documents, pixels, strict=True):
        assert document.input_ids.tolist() == documents[0].input_ids.tolist()
        np.testing.assert_array_equal(values, pixels[0])


def test_the_image_column_of_a_data_set(encoder, folder):
    """Images of a ``datasets`` column go to the parts that name none, in their order."""
    rows = {
        "messages": [[{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, says("Yes.")]],
        "images": [[picture(0), picture(1, (128, 96))]],
    }
    messages = [json.dumps(row) for row in rows["messages"]]
    source = datasets.Dataset.from_dict({"images": rows["images"], "text": messages}).cast_column(
        "images", datasets.List(datasets.Image())
    )
    found = [{"messages": json.loads(row["text"]), "images": row["images"]} for row in source]
    (document,) = encoded(encoder, qf.DataSpec.messages(found).with_images(folder))
    (wanted,) = encoded(encoder, data_of([[user(named("0.png"), named("1.png")), says("Yes.")]], folder))
    assert document.input_ids.tolist() == wanted.input_ids.tolist()
    for mine, theirs in zip(document.media, wanted.media, strict=True):
        np.testing.assert_array_equal(encoder.media.pixels(mine), encoder.media.pixels(theirs))


BAD = {
    "missing": (user(named("0.png"), named("9.png")), "image 2: .*9.png.* is missing"),
    "outside": (user(named("../secret.png")), "image 1: .*lies outside"),
    "remote": (user(named("https://example.org/cat.png")), "image 1: .*not fetched from 'example.org'"),
    "no image": (user(named("data:image/png;base64,AAAA")), "image 1: .*is no PNG"),
    "nothing": (user({"type": "image"}), "image 1: the part names no image"),
    "video": (user({"type": "video", "video": "film.mp4"}), "image 1: a video is a list of frames"),
    "frames": (
        user({"type": "video", "video": ["0.png", "1.png"]}),
        "the frames of a video are of different sizes",
    ),
    "fps": (user({"type": "video", "video": ["0.png"], "fps": 0}), "fps: expected a number above 0"),
    "placeholder": ({"role": "user", "content": "<|image_pad|>"}, r"holds the control token <\|image_pad\|>"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_names_row_and_image(encoder, folder, case):
    """Each is a DataError with the row and the image's place, or skipped and listed."""
    turn, message = BAD[case]
    data = data_of([[user("Fine: ", named("0.png")), says("Yes.")], [turn, says("No.")]], folder)
    with pytest.raises(qf.DataError, match=rf"rows in memory, row 2: .*{message}") as refused:
        encoded(encoder, data)
    assert refused.value.row == 2
    skipped = []
    assert len(list(encoder.encode(data.on_bad_row("skip"), skipped))) == 1
    assert [error.row for error in skipped] == [2]


def test_more_images_than_parts(encoder):
    """Images that no part asks for are an error too."""
    row = {"messages": [user("Hi ", {"type": "image"}), says("Yes.")], "images": [picture(0), picture(1)]}
    with pytest.raises(qf.DataError, match="row 1: 1 more images in its column than parts that ask for one"):
        encoded(encoder, qf.DataSpec.messages([row]))


def test_images_need_the_tower(checkpoint, folder):
    """For a model without its tower a row with an image is refused, with the line that loads it."""
    with pytest.raises(qf.DataError, match=r"(?s)loaded without its tower.*recipe\.with_model\(vision=True\)"):
        encoded(ChatEncoder(load_tokenizer(checkpoint)), data_of([CHAT], folder))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(16, 1536), "gives Tensor; expected a mapping"),
        ({"pixel_values": np.zeros((16, 1536))}, r"gives \['pixel_values'\]; expected"),
        ({"pixel_values": np.zeros((1, 16, 1536)), "image_grid_thw": np.array([[1, 4, 4]])}, "expected .patches"),
        ({"pixel_values": np.zeros((16, 1536)), "image_grid_thw": np.array([[1, 2, 8]])}, r"1 x \[1, 4, 4\]"),
    ],
)
def test_a_processor_that_gives_something_else_is_refused(encoder, folder, answer, message):
    """A bare tensor, a result without grids, or grids that were not planned."""
    (document,) = encoded(encoder, data_of([[user(named("0.png")), says("Yes.")]], folder))
    processor = type("Processor", (), {"resample": 3, "__call__": lambda *_, **__: answer})()
    other = copy.copy(encoder.media)
    other.processor = processor
    with pytest.raises(qf.DataError, match=message):
        other.pixels(document.media[0])


def test_the_cache_needs_no_image_and_sees_one_that_changed(encoder, folder, monkeypatch):
    """Read again, grids come from the entry; an image that is another by then is measured anew."""
    rows = [[user(named("0.png"), named("1.png")), says("Yes.")]]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = qf.DataSpec.messages(folder / "chats.jsonl").with_images(folder)
    (first,) = tokenised(data, encoder).documents
    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "find", None)
        (again,) = tokenised(data, encoder).documents
    assert again.media == first.media
    assert again.input_ids.tolist() == first.input_ids.tolist()
    for mine, theirs in zip(again.media, first.media, strict=True):
        np.testing.assert_array_equal(encoder.media.pixels(mine), encoder.media.pixels(theirs))
    picture(5, (200, 64)).save(folder / "0.png")
    (changed,) = tokenised(data, encoder).documents
    assert changed.media[0].grid != first.media[0].grid
    larger = tokenised(data.with_images(folder, min_pixels=300 * 300), encoder).documents[0]
    assert larger.media[0].frame_tokens > changed.media[0].frame_tokens


def test_other_images_are_other_data(encoder, folder):
    """The digest that a run goes on by knows images by name and size, wherever and whenever they were written."""

    def digest():
        data = data_of([[user(named("0.png")), says("Yes.")]], folder).pack()
        return read_corpus(data, qf.TrainingSpec(), encoder).digests

    first = digest()
    (folder / "0.png").touch()
    assert digest() == first
    PIL.Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    assert digest() != first


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_batches(encoder, folder, workers):
    """Read ahead in other processes or here: the same micro-batches in the same order, all of them or some."""
    for number in range(12):
        picture(number, (64 + 32 * (number % 3), 64)).save(folder / f"n{number}.png")
    rows = [[user(named(f"n{number}.png"), f"Number {number}"), says("Yes.")] for number in range(12)]
    documents = encoded(encoder, data_of(rows, folder))

    def stream(workers):
        options = {"capacity": 80, "packed": True, "pixels": encoder.media.pixels, "workers": workers}
        return MapStream(documents, **options)

    wanted = [batch for step in stream(0).batches() for batch in step]
    got = [batch for step in stream(workers).batches() for batch in step]
    assert len(got) == len(wanted) > 3
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.documents == theirs.documents
        assert torch.equal(mine.vision.pixel_values, theirs.vision.pixel_values)
        assert torch.equal(mine.vision.places, theirs.vision.places)
    place = Place(0, 2)
    left = [batch for step in stream(workers).batches(place) for batch in step]
    assert [batch.documents for batch in left] == [batch.documents for batch in wanted[2:]]
    (folder / "n3.png").write_bytes((folder / "n3.png").read_bytes()[:-500])
    with pytest.raises(qf.DataError, match=r"row 4: image 1: .*n3\.png"):
        list(stream(workers).batches())


def test_preview_shows_the_image(checkpoint, folder):
    """In a notebook the picture stands beside its tokens; in a terminal they are counted."""
    preview = data_of([CHAT], folder).preview(qf.ModelSpec(checkpoint))
    assert preview._repr_html_().count('src="data:image/png;base64,') == 3
    assert preview._repr_html_().count('alt="image, ') == 3
    assert str(preview).count("[image, ") == 3
    assert "<|image_pad|>" not in str(preview)

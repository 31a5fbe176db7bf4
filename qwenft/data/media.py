"""Images and videos of a document: what they are, which of its tokens are theirs, and their pixels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np

from qwenft.data.masking import IGNORED
from qwenft.data.pictures import PictureError
from qwenft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qwenft.data.document import Document
    from qwenft.data.pictures import Picture
    from qwenft.family.architectures import Architecture

#: Frames a second of a video whose row does not say it (transformers, models/qwen3_vl/processing_qwen3_vl.py).
FPS = 24.0


@attrs.frozen
class Medium:
    """An image, or a video.

    Args:
        kind: "image" or "video".
        pictures: one, or the frames.
        grid: frames, rows and columns of patches; a frame of a video's grid is a pair of its pictures.
        frame_tokens: of a frame.
        fps: pictures a second.
        starts: the token of the document with which each frame of the grid begins.
        bounds: the first of the document's tokens that are its own, and the one behind the last; what encloses it
            is its own.
    """

    kind: Literal["image", "video"]
    pictures: tuple[Picture, ...]
    grid: tuple[int, int, int]
    frame_tokens: int
    fps: float = FPS
    starts: tuple[int, ...] = ()
    bounds: tuple[int, int] = (0, 0)

    def moved(self, by: int) -> Medium:
        """The same, so many tokens further on."""
        first, stop = self.bounds
        return attrs.evolve(
            self, starts=tuple(start + by for start in self.starts), bounds=(first + by, stop + by)
        )


class MediaEncoder:
    """Images and videos through a checkpoint's own image processor.

    Args:
        processor: of transformers, such as ``AutoImageProcessor`` gives it.
        loaded: the architecture, with its tower.
        video: ``video_preprocessor_config.json``, or its defaults where empty.
        tokenizer: of the checkpoint.
    """

    def __init__(self, processor: Any, loaded: Architecture, video: Mapping[str, Any], tokenizer: Any) -> None:
        assert loaded.vision is not None
        self.processor = processor
        self.shape, self.tokens = loaded.vision, loaded.vision_tokens
        self.tokenizer = tokenizer
        self._video_size = {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768} | dict(
            video.get("size", {})
        )

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values of all that decides of grids and pixels."""
        return {"processor": self.processor.to_dict(), "video": self._video_size}

    def limits(self, kind: str, *, least: int | None, most: int | None) -> tuple[int, int]:
        """The fewest and the most pixels of an image, or of all frames of a video.

        A bound that is asked for goes before the checkpoint's other one.

        Raises:
            PictureError: those that are asked for leave nothing.
        """
        size = dict(self.processor.size) if kind == "image" else self._video_size
        if least is not None and most is not None and least > most:
            msg = f"min_pixels = {least:,} are more than max_pixels = {most:,}"
            raise PictureError(msg, f".with_images(min_pixels={most}, max_pixels={least})")
        if least is not None:
            return least, most or max(least, size["longest_edge"])
        high = most or size["longest_edge"]
        return min(size["shortest_edge"], high), high

    def measured(
        self, kind: Any, pictures: Sequence[Picture], limits: tuple[int, int], fps: float = FPS
    ) -> Medium:
        """A medium with the grid that its pictures are scaled to; nothing is decoded.

        Raises:
            PictureError: the frames of a video differ in size.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as of_image
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as of_video

        low, high = limits
        factor, first = self.shape.patch * self.shape.merge, pictures[0]
        if any((each.height, each.width) != (first.height, first.width) for each in pictures):
            msg = "the frames of a video are of different sizes"
            raise PictureError(msg, "frames of one size")
        try:
            if kind == "image":
                frames = 1
                height, width = of_image(first.height, first.width, factor, low, high)
            else:
                frames = -(-len(pictures) // self.shape.temporal)
                count = frames * self.shape.temporal
                height, width = of_video(count, first.height, first.width, self.shape.temporal, factor, low, high)
        except ValueError as error:
            raise PictureError(str(error)) from None
        grid = (frames, height // self.shape.patch, width // self.shape.patch)
        return Medium(kind, tuple(pictures), grid, grid[1] * grid[2] // self.shape.merge**2, fps)

    def scaled(self, medium: Medium, scale: float) -> Medium:
        """The same with about so much of its pixels, and one token a frame at the least."""
        _, rows, columns = medium.grid
        frames = medium.grid[0] * (self.shape.temporal if medium.kind == "video" else 1)
        pixels = max(int(scale * rows * columns * self.shape.patch**2), (self.shape.patch * self.shape.merge) ** 2)
        return self.measured(medium.kind, medium.pictures, (1, pixels * frames), medium.fps)

    def placed(self, document: Document, media: Sequence[Medium]) -> Document:
        """A document in whose tokens each placeholder has become those of its medium; none of them is trained.

        A video's frames are each enclosed, behind the time that they show
        (transformers, models/qwen3_vl/processing_qwen3_vl.py: replace_video_token).

        Raises:
            PictureError: there are more or fewer placeholders than media.
        """
        ids = document.input_ids
        places = np.flatnonzero(np.isin(ids, (self.tokens.image, self.tokens.video)))
        kinds = ["image" if token == self.tokens.image else "video" for token in ids[places]]
        if kinds != [medium.kind for medium in media]:
            msg = (
                f"the chat template makes {_counted(kinds)} of {_counted([medium.kind for medium in media])}: "
                "where each stands cannot be told"
            )
            raise PictureError(msg, "a template that writes a placeholder for each")
        labels, weights = document.labels.copy(), document.weights
        labels[np.isin(labels, (self.tokens.image, self.tokens.video, *self._bounds))] = IGNORED
        parts: dict[str, list[Any]] = {"ids": [], "labels": [], "weights": []}
        placed, done, shift = [], 0, 0
        ends = document.ends.copy()
        for place, medium in zip(places.tolist(), media, strict=True):
            inside, starts = self._tokens_of(medium)
            at = attrs.evolve(medium, starts=tuple(starts), bounds=(-1, len(inside) + 1))
            placed.append(at.moved(place + shift))
            parts["ids"] += [ids[done:place], inside]
            parts["labels"] += [labels[done:place], np.full(len(inside), IGNORED, dtype=np.int32)]
            if weights is not None:
                parts["weights"] += [weights[done:place], np.ones(len(inside), dtype=np.float32)]
            ends[document.ends > place] += len(inside) - 1
            done, shift = place + 1, shift + len(inside) - 1
        return attrs.evolve(
            document,
            input_ids=np.concatenate([*parts["ids"], ids[done:]]),
            labels=np.concatenate([*parts["labels"], labels[done:]]),
            weights=None if weights is None else np.concatenate([*parts["weights"], weights[done:]]),
            ends=ends,
            media=tuple(placed),
        )

    @property
    def _bounds(self) -> tuple[int, int]:
        return self.tokens.vision_start, self.tokens.vision_end

    def _tokens_of(self, medium: Medium) -> tuple[np.ndarray, list[int]]:
        """What stands for a medium in place of its placeholder, and where in that each frame begins."""
        count = medium.frame_tokens
        if medium.kind == "image":
            return np.full(count, self.tokens.image, dtype=np.int32), [0]
        ids: list[int] = []
        starts = []
        for seconds in self.times(medium):
            ids += self.tokenizer.encode(f"<{seconds:.1f} seconds>", add_special_tokens=False)
            starts.append(len(ids) + 1)
            ids += [self.tokens.vision_start, *[self.tokens.video] * count, self.tokens.vision_end]
        return np.asarray(ids, dtype=np.int32), starts

    def times(self, medium: Medium) -> list[float]:
        """The seconds that each frame of a video's grid shows: the middle of its pictures."""
        size = self.shape.temporal
        shown = [min(frame, len(medium.pictures) - 1) / medium.fps for frame in range(medium.grid[0] * size)]
        return [(shown[first] + shown[first + size - 1]) / 2 for first in range(0, len(shown), size)]

    def pixels(self, medium: Medium) -> np.ndarray:
        """The patches of a medium, in the order of its grid: [P, C * T * p * p] float32.

        Raises:
            PictureError: a picture is broken, or has changed.
        """
        frames, rows, columns = medium.grid
        size = (rows * self.shape.patch, columns * self.shape.patch)
        pictures = [*medium.pictures]
        if medium.kind == "video":
            pictures += pictures[-1:] * (frames * self.shape.temporal - len(pictures))
        patches = self._patches([picture.open() for picture in pictures], size)
        if medium.kind == "image":
            return patches
        # The processor repeats a still over the frames of a patch; of a video each is another picture.
        still = patches.reshape(
            frames, self.shape.temporal, rows * columns, self.shape.in_channels, self.shape.temporal, -1
        )
        moving = np.stack([still[:, frame, :, :, frame] for frame in range(self.shape.temporal)], axis=3)
        return np.ascontiguousarray(moving.reshape(frames * rows * columns, -1))

    def _patches(self, images: list[Any], size: tuple[int, int]) -> np.ndarray:
        """What the processor makes of images that are scaled to ``size`` = (height, width), in pixels."""
        exact = size[0] * size[1]
        # Scaled here, so that the grid is that which was planned; the processor finds nothing left to do.
        width_height = size[::-1]
        scaled = [
            image if image.size == width_height else image.resize(width_height, self.processor.resample)
            for image in images
        ]
        found = self.processor(
            images=scaled, size={"shortest_edge": exact, "longest_edge": exact}, return_tensors="np"
        )
        if not isinstance(found, Mapping) or "pixel_values" not in found or "image_grid_thw" not in found:
            got = list(found) if isinstance(found, Mapping) else type(found).__name__
            raise DataError(
                f"the checkpoint's image processor gives {got}; expected a mapping with pixel_values and "
                "image_grid_thw",
                fix="preprocessor_config.json as the checkpoint was published with it",
                row=None,
            )
        values = np.asarray(found["pixel_values"], dtype=np.float32)
        grid = np.asarray(found["image_grid_thw"])
        wanted = [1, size[0] // self.shape.patch, size[1] // self.shape.patch]
        if values.ndim != 2 or grid.shape != (len(images), 3) or (grid != wanted).any():
            raise DataError(
                f"the checkpoint's image processor gives pixels of {values.shape} and grids {grid.tolist()}; "
                f"expected [patches, values] and {len(images)} x {wanted}",
                fix="preprocessor_config.json as the checkpoint was published with it",
                row=None,
            )
        return values


def positions_of(document: Document) -> np.ndarray:
    """Where each token stands in time, height and width: [3, T] int64.

    Text advances all three; the tokens of a frame share a time and have their own rows and columns, and what comes
    behind it goes on behind the larger of these (transformers, Qwen3_5Model.get_rope_index).

    Args:
        document: with its media placed.
    """
    positions = np.empty((3, len(document)), dtype=np.int64)
    done = position = 0
    for medium in document.media:
        merge = math.isqrt(medium.grid[1] * medium.grid[2] // medium.frame_tokens)
        rows, columns = medium.grid[1] // merge, medium.grid[2] // merge
        for start in medium.starts:
            text = start - done
            positions[:, done:start] = position + np.arange(text)
            position += text
            row, column = np.divmod(np.arange(rows * columns), columns)
            positions[:, start : start + rows * columns] = position + np.stack([np.zeros_like(row), row, column])
            position += max(rows, columns)
            done = start + rows * columns
    positions[:, done:] = position + np.arange(len(document) - done)
    return positions


def _counted(kinds: list[str]) -> str:
    counts = [f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) != 1)}" for kind in ("image", "video")]
    return " and ".join(count for count in counts if not count.startswith("0 ")) or "none"


def load_media_encoder(folder: Path, loaded: Architecture, tokenizer: Any) -> MediaEncoder | None:
    """The image processor of a checkpoint folder; None where it has none, or the tower is not loaded.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    if loaded.is_text_only or not (folder / "preprocessor_config.json").exists():
        return None

    file = folder / "video_preprocessor_config.json"
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        video = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return MediaEncoder(processor, loaded, video, tokenizer)
    except Exception as error:  # transformers raises what it falls over
        raise DataError(
            f"{folder}: its image processor cannot be loaded: {error}",
            fix="preprocessor_config.json of the checkpoint beside it",
            row=None,
        ) from error

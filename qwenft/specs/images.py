"""Where images of conversations come from, and how large the model sees them."""

from __future__ import annotations

import attrs

from qwenft.specs.base import Check, path_text, spec, text, whole


@spec
@attrs.frozen
class ImageSpec:
    """Images and videos in messages; write it with :meth:`DataSpec.with_images`.

    Args:
        root: the folder in which paths of images lie; a path that leads out of it is refused, and all are where
            None.
        min_pixels: of an image as the model sees it; a smaller one is scaled up. None is as the checkpoint says.
        max_pixels: likewise; a larger one is scaled down.
        hosts: from which https URLs are fetched.
        workers: processes that read images ahead of training; 0 reads them in its own.
    """

    root: str | None = attrs.field(
        default=None,
        kw_only=True,
        converter=path_text,
        validator=text('.with_images(root="pictures")', optional=True),
    )
    min_pixels: int | None = attrs.field(
        default=None, kw_only=True, validator=whole(".with_images(min_pixels=65_536)", optional=True)
    )
    max_pixels: int | None = attrs.field(
        default=None, kw_only=True, validator=whole(".with_images(max_pixels=1_048_576)", optional=True)
    )
    hosts: tuple[str, ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(
            lambda value: isinstance(value, tuple) and all(isinstance(host, str) and host for host in value),
            "names of hosts",
            '.with_images(hosts=("images.example.org",))',
        ),
    )
    workers: int = attrs.field(default=2, kw_only=True, validator=whole(".with_images(workers=4)", low=0))

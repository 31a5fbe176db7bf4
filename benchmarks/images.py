"""Reading images for training against the image processor alone, and memory over many of them.

    python benchmarks/images.py [--images 200] [--passes 10000]

Both sides decode the same JPEG files and make patches of them, in one process with one thread, in turns; ours also
places them into packed micro-batches with their positions. Reported are images a second of ours over theirs, each
turn, with median and range, and the growth of resident memory over ``--passes`` images.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import torch
import transformers

import qwenft as qf
from qwenft.data.chat import ChatEncoder
from qwenft.data.media import load_media_encoder
from qwenft.data.stream import MapStream, Place
from qwenft.models.checkpoint import architecture_of
from qwenft.models.load import load_tokenizer
from qwenft.testing import tiny_checkpoint

SIZES = ((640, 480), (480, 640), (800, 600), (512, 512))
TURNS = 5


def write_images(folder: Path, count: int) -> list[str]:
    """Photographs would compress like this: smooth, with some noise."""
    names = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        noise = np.random.default_rng(number).normal(128, 40, (height // 16, width // 16, 3)).clip(0, 255)
        image = PIL.Image.fromarray(noise.astype(np.uint8)).resize((width, height), PIL.Image.Resampling.BICUBIC)
        names.append(f"{number}.jpg")
        image.save(folder / names[-1], quality=90)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--passes", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = tiny_checkpoint(folder / "checkpoint", "vision")
        names = write_images(folder, arguments.images)
        tokenizer = load_tokenizer(checkpoint)
        media = load_media_encoder(checkpoint, architecture_of(qf.ModelSpec(checkpoint)), tokenizer)
        processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
        # The pixels that the family's own processors allow; the tiny checkpoint's are few.
        media.processor.size = processor.size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
        rows = [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": one}, {"type": "text", "text": "What is it?"}],
                    },
                    {"role": "assistant", "content": "Noise."},
                ]
            }
            for one in names
        ]
        data = qf.DataSpec.messages(rows).with_images(folder)
        documents = list(ChatEncoder(tokenizer, media).encode(data))
        stream = MapStream(documents, capacity=2048, packed=True, pixels=media.pixels, workers=0)

        def ours() -> int:
            return sum(len(batch.vision.grid_thw) for step in stream.batches(Place()) for batch in step)

        def theirs() -> int:
            for one in names:
                processor(images=[PIL.Image.open(folder / one).convert("RGB")], return_tensors="pt")
            return len(names)

        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, Pillow {PIL.__version__}"
        )
        check(stream, processor, folder, names)
        ratios = []
        for _ in range(TURNS):
            rates = []
            for side in (ours, theirs):
                started = time.process_time()
                count = side()
                rates.append(count / (time.process_time() - started))
            ratios.append(rates[0] / rates[1])
            print(f"images a second: ours {rates[0]:.1f}, the processor alone {rates[1]:.1f}")
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        memory = []
        seen = 0
        while seen < arguments.passes:
            seen += ours()
            memory.append(psutil.Process().memory_info().rss / 2**20)
        print(
            f"resident memory over {seen:,} images: {memory[0]:.0f} MiB behind the first {len(names)}, "
            f"{max(memory):.0f} at the most, {memory[-1]:.0f} at the end"
        )


def check(stream: MapStream, processor: object, folder: Path, names: list[str]) -> None:
    """Refuse to time what gives other pixels."""
    found = {
        document: patches
        for step in stream.batches(Place())
        for batch in step
        for document, patches in zip(
            batch.documents, batch.vision.pixel_values.split(batch.vision.grid_thw.prod(1).tolist()), strict=True
        )
    }
    for number, one in enumerate(names[:20], start=1):
        wanted = processor(images=[PIL.Image.open(folder / one).convert("RGB")], return_tensors="pt")
        assert torch.equal(found["rows in memory", number], wanted["pixel_values"]), one


if __name__ == "__main__":
    main()

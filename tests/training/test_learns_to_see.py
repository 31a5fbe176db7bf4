"""From pictures on disk to answers: a model of random weights learns to name what it has not seen before."""

from __future__ import annotations

import random

import PIL.Image
import pytest
from PIL import ImageDraw

import qwenft as qf
from qwenft.testing import TinySizes, tiny_checkpoint

COLOURS = {
    "red": (200, 20, 20),
    "green": (20, 130, 50),
    "blue": (30, 50, 200),
    "black": (20, 20, 20),
    "purple": (130, 30, 160),
    "brown": (120, 70, 30),
    "gray": (115, 115, 115),
    "orange": (235, 120, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = TinySizes(
    hidden=64,
    ffn=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    linear_key_heads=1,
    linear_value_heads=1,
    linear_head_dim=16,
    vision_hidden=64,
    vision_ffn=128,
    vision_depth=1,
    vision_heads=2,
    initializer_range=0.06,
)


def draw(rng, colour, shape):
    """A shape of 64 x 64 pixels: its place, size, ink and ground vary."""
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    ink = tuple(max(0, min(255, value + rng.randint(-20, 20))) for value in COLOURS[colour])
    picture = PIL.Image.new("RGB", (64, 64), ground)
    pen = ImageDraw.Draw(picture)
    r = rng.randint(17, 24)
    x, y = (rng.randint(max(r + 1, 28), min(62 - r, 36)) for _ in range(2))
    corners = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(corners, fill=ink)
    elif shape == "square":
        pen.rectangle(corners, fill=ink)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=ink)
    else:
        pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=ink)
        pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=ink)
    return picture


def pictures(folder, kinds, count, seed):
    """Rows of so many pictures, which are written into the folder, and what they show."""
    rng = random.Random(seed)
    folder.mkdir()
    rows, truths = [], []
    for number in range(count):
        colour, shape = rng.choice(kinds)
        draw(rng, colour, shape).save(folder / f"{number}.png")
        question = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "What is it?"}]
        truths.append(f"{colour} {shape}")
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": truths[-1]}]}
        )
    return rows, truths


@pytest.mark.parametrize(
    ("colours", "shapes", "steps", "wanted"),
    [
        pytest.param(4, 3, 120, 0.9, id="small"),
        pytest.param(8, 4, 200, 0.95, id="large"),
    ],
)
@pytest.mark.long
def test_colours_and_shapes_are_named(colours, shapes, steps, wanted, tmp_path):
    """Greedy answers on pictures that were not trained on are right, word for word."""
    kinds = [(colour, shape) for colour in list(COLOURS)[:colours] for shape in SHAPES[:shapes]]
    texts = [f"What is it? {colour} {shape}" for colour, shape in kinds]
    texts += [f"user\nassistant\n{colour}\n" for colour in COLOURS]
    checkpoint = tiny_checkpoint(
        tmp_path / "checkpoint", "vision", texts=texts, vocabulary=448, sizes=SIZES, seed=1
    )
    rows, _ = pictures(tmp_path / "seen", kinds, 250 * colours, seed=1001)
    recipe = qf.Recipe(
        qf.ModelSpec(checkpoint, dtype="float32").with_vision(),
        qf.DataSpec.messages(rows).with_images(tmp_path / "seen").with_max_length(32).pack(row_tokens=900),
        qf.AdapterSpec.full(),
        training=qf.TrainingSpec(
            learning_rate=2e-3,
            schedule="linear",
            warmup_ratio=0.05,
            betas=(0.9, 0.95),
            max_steps=steps,
            activation_checkpointing=False,
        ).with_learning_rate(vision=4e-4),
    )
    run = recipe.compile().train(tmp_path / "run", verbose=0)
    asked, truths = pictures(tmp_path / "unseen", kinds, 100, seed=99)
    answers = []
    for row in asked:
        image, text = row["messages"][0]["content"]
        path = str(tmp_path / "unseen" / image["image"])
        messages = [{"role": "user", "content": [{**image, "image": path}, text]}]
        answers.append(run.generate(messages, max_new_tokens=4))
    right = sum(answer == truth for answer, truth in zip(answers, truths, strict=True))
    assert right / len(truths) >= wanted

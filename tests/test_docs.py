"""Pages that are made from the code say what the code says, and links between pages lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import textwrap
from pathlib import Path

import PIL.Image
import pyarrow.parquet
import pytest

import qwenft as qf
from qwenft.testing.skills import SKILLS, examination, ticket

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_options_is_that_of_the_code():
    """`python scripts/options.py` would change nothing; every option of every spec is described."""
    script = runpy.run_path(str(ROOT / "scripts" / "options.py"))
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == script["page"]()


def test_the_page_of_capabilities_is_that_of_the_code():
    """`python scripts/capabilities.py` would change nothing."""
    script = runpy.run_path(str(ROOT / "scripts" / "capabilities.py"))
    assert (ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8") == script["page"]()


def examples(page):
    """The blocks of Python of a page, as they stand in it; those that need a cluster or an account are marked otherwise."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


CHATS = examination(ticket, 12) + examination(SKILLS["extract"], 12)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the files that pages speak of."""
    monkeypatch.chdir(tmp_path)
    for folder in ("chats", "notes", "huge", "pictures", "organisation/chats"):
        (tmp_path / folder).mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in CHATS)
    for name in ("chats.jsonl", "huge/1.jsonl", "organisation/chats/train.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), tmp_path / "chats" / "1.parquet")
    (tmp_path / "notes" / "1.jsonl").write_text(
        '{"text": "A note."}\n{"text": "Another one."}\n', encoding="utf-8"
    )
    for name in ("cat.png", "dog.png"):
        PIL.Image.new("RGB", (64, 64), "white").save(tmp_path / name)
    return tmp_path


def given():
    """What pages take as known that do not begin from nothing: a recipe, its plan, data and a run that has ended."""
    data = qf.DataSpec.messages("chats.jsonl").with_max_length(512).pack()
    training = qf.TrainingSpec(max_steps=2)
    model = qf.ModelSpec(qf.testing.tiny_base(), dtype="float32")
    recipe = qf.Recipe(model, data.hold_out(0.2), qf.AdapterSpec.lora(rank=4), training=training)
    plan = recipe.compile()
    runs = [plan.train(f"runs/{name}", verbose=0) for name in ("support-bot", "first", "second")]
    return {"qf": qf, "data": data, "recipe": recipe, "plan": plan, "run": runs[0]}


@pytest.mark.parametrize(
    "page",
    [
        # Simulating a large model on several cards takes its time.
        pytest.param(page, id=page.name, marks=pytest.mark.long if page.name == "planning.md" else [])
        for page in PAGES
        if examples(page)
    ],
)
@pytest.mark.usefixtures("place")
def test_examples_run(page, moe_checkpoint, tmp_path_factory):
    """Every block of a page runs after those before it, with tiny checkpoints in the place of those of the hub."""
    seeing = qf.testing.tiny_checkpoint(tmp_path_factory.mktemp("hub") / "vision", "vision")
    stands_for = {"Qwen/Qwen3.5-0.8B": seeing, "Qwen/Qwen3.5-35B-A3B": moe_checkpoint}
    blocks = examples(page)
    known = {} if blocks[0].startswith("import qwenft") else given()
    for number, block in enumerate(blocks, start=1):
        source = block
        for name, path in stands_for.items():
            source = source.replace(f'"{name}"', f'"{path}"')
        exec(compile(source, f"{page.name}, block {number}", "exec"), known)  # noqa: S102 - of our own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """A page or a picture that is named is there, and so is a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        other = page.parent / path if path else page
        assert other.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, (
                target
            )

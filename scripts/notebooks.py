"""Execute the notebooks and keep their outputs in them: ``python scripts/notebooks.py [name ...]``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

import qwenft

FOLDER = Path(__file__).parents[1] / "notebooks"
_NUMBER = re.compile(r"[+-]?\d[\d,.:]*(e[+-]?\d+)?")


def executed(path: Path, folder: Path) -> Any:
    """A notebook with the outputs of all its cells, from the first to the last, executed in a folder."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    # Plans say where tokens are kept: beside the notebook.
    with patch.dict(os.environ, QWENFT_CACHE="cache"):
        client.execute()
    notebook.metadata.language_info = {"name": "python"}
    # Wherever the package is installed, it is said to lie beside the notebook.
    text = nbformat.writes(notebook).replace(str(Path(qwenft.__file__).parent), "qwenft")
    return nbformat.reads(text, as_version=4)


def summary(cell: Any) -> list[tuple[str, list[str], str]]:
    """What is the same whenever and wherever a cell is executed: of each output its kind, formats and words.

    Numbers, and how far they are apart, may differ; of a cell with the tag "varies" the words may too.
    """
    found = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        text = "" if "varies" in cell.metadata.get("tags", ()) else output.get("text", data.get("text/plain", ""))
        words = re.sub(r"[-\s─━▁▂▃▄▅▆▇█]+", " ", _NUMBER.sub("#", text)).strip()
        found.append((output["output_type"], sorted(data), words))
    return found


def main() -> None:
    """Execute those that are named by their beginnings, or all."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if len(sys.argv) > 1 and not path.name.startswith(tuple(sys.argv[1:])):
            continue
        with TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

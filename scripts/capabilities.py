"""Writes docs/capabilities.md: what works with what, asked of the code itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwenft as qf
from qwenft.backends import FULL_NAMES, LINEAR_NAMES
from qwenft.family.architectures import FAMILY
from qwenft.family.roles import ROLES, default_adapter_roles, roles_of
from qwenft.machine import CARDS
from qwenft.specs.data import FORMATS, OVERFLOWS
from qwenft.specs.model import DTYPES
from qwenft.specs.model import KINDS as QUANTIZATIONS
from qwenft.specs.parallel import KINDS as PARALLEL
from qwenft.specs.training import LOSSES, OPTIMIZERS, SCHEDULES
from qwenft.trackers import TRACKERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAGE = Path(__file__).parents[1] / "docs" / "capabilities.md"
HEAD = """# Capabilities

What there is and what goes with what, asked of the code: `python scripts/capabilities.py` writes this page, and a
test compares the two. What was measured or tried of it is in the [README](../README.md); every option is in
[options.md](options.md)."""
MACHINES = ("cpu:64GB", "RTX4090", "A100-80GB", "H100-80GB", "B200")
ADAPTERS = {
    "LoRA": lambda role: qf.AdapterSpec.lora().on(role),
    "LoRA of nf4": lambda role: qf.AdapterSpec.lora().on(role),
    "DoRA": lambda role: qf.AdapterSpec.lora(dora=True).on(role),
    "whole, beside LoRA": lambda role: qf.AdapterSpec.lora().train_fully(role),
    "full fine-tuning": lambda role: qf.AdapterSpec.full().on(role),
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mark(*, holds: bool) -> str:
    """Yes or no in a cell."""
    return "yes" if holds else "no"


def models() -> str:
    """The sizes, and the roles of their modules."""
    rows = [
        (
            f"`{name}`",
            f"{size.layers}, {len(size.full_attention_layers)} with full attention",
            f"{size.hidden_size:,}",
            f"{size.experts.count}, {size.experts.top_k} a token" if size.experts else "",
            mark(holds=size.tied),
        )
        for name, size in FAMILY.items()
    ]
    return table(("size", "layers", "hidden size", "experts", "head is the embedding"), rows)


def adapters() -> str:
    """Which role can be trained how, of a dense model and of a mixture of experts with their towers."""
    rows = []
    for role in ROLES:
        of = [size for size in (FAMILY["qwen3.5-27b"], FAMILY["qwen3.5-35b-a3b"]) if role in roles_of(size)]
        if not of:
            continue
        default = any(role in default_adapter_roles(size) for size in of)
        said = [trained(of[-1].name, name, make, role) for name, make in ADAPTERS.items()]
        rows.append((f"`{role}`", mark(holds=default), *said))
    return table(("role", "by default", *ADAPTERS), rows)


def trained(size: str, name: str, make: Any, role: str) -> str:
    """Whether a plan trains a role so."""
    model = qf.ModelSpec(size).with_vision()
    model = model.quantize("nf4", vision=True) if "nf4" in name else model
    try:
        plan = qf.Recipe(model, adapter=make(role)).compile(qf.Machine.named("8xH100-80GB"), strict=False)
    except qf.SpecError:
        return "no"
    return mark(holds=not any(finding.level == "error" for finding in plan.findings))


def backends() -> str:
    """What each backend says of itself, and where it runs."""
    rows = []
    for slot, names in (("full", FULL_NAMES), ("linear", LINEAR_NAMES)):
        for name in names:
            backend = getattr(qf.backends, slot)(name)
            found = {name: backend.availability(qf.Machine.named(name)) for name in MACHINES}
            runs = [name for name, one in found.items() if one.usable]
            said = (backend.supports_packing, backend.uses_flash_lib, not backend.needs_half_precision)
            rows.append(
                (
                    slot,
                    f"`{name}`",
                    *(mark(holds=one) for one in said),
                    ", ".join(runs) or found["H100-80GB"].reason,
                )
            )
    header = ("slot", "name", "packs", "flash library", "float32", "runs, with what `qwenft[cuda]` installs, on")
    return table(header, rows)


def values() -> str:
    """The values that options take."""
    rows = [
        (what, ", ".join(f"`{one}`" for one in names))
        for what, names in {
            "formats of data": FORMATS,
            "rows that are too long": OVERFLOWS,
            "weights in few bits": QUANTIZATIONS,
            "dtype of weights": DTYPES,
            "optimizers": OPTIMIZERS,
            "schedules": SCHEDULES,
            "how the loss is computed": LOSSES,
            "several processes": PARALLEL,
            "trackers, beside TensorBoard": TRACKERS,
            "machines by name": CARDS,
            "presets": qf.presets(),
        }.items()
    ]
    return table(("", "one of"), rows)


def page() -> str:
    """The whole page."""
    parts = {
        "Models": models(),
        "What can be trained": adapters(),
        "Attention": backends(),
        "Values": values(),
    }
    return "\n\n".join([HEAD, *(f"## {title}\n\n{text}" for title, text in parts.items())]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

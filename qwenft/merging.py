"""What was learned, merged into the checkpoint that it was learned beside, and proven before it has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenft.errors import CheckpointError
from qwenft.specs.model import ModelSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from qwenft.family.architectures import Architecture
    from qwenft.models.adapter import Adapter

#: The largest difference of logits that float32 leaves, relative to the largest of them.
TOLERANCE = 1e-4
REPORT = "export.json"


def merge_adapter(
    adapter: str | os.PathLike[str], path: str | os.PathLike[str], *, model: ModelSpec | None = None
) -> Path:
    """Merge an adapter into its base, file by file: neither is loaded as a model.

    One tensor, or of large ones a block of rows, is in memory at a time, and a layer where the result is proven.
    What is checked and reported is that of :meth:`qwenft.Run.export`.

    Args:
        adapter: the folder of a LoRA adapter of peft, such as ``run.adapter_path``.
        path: a new or empty folder; the whole checkpoint is there in the end, or nothing.
        model: the base; the one that the adapter names where None.

    Raises:
        CheckpointError: the adapter is none of this base, a file is missing or damaged, or the place is taken or
            cannot be written; adapter and base stay as they are.
    """
    from qwenft.models.adapter import Adapter
    from qwenft.models.checkpoint import architecture_of, checkpoint_folder, quantization_of
    from qwenft.models.export import updates

    begun = Adapter.of_folder(Path(adapter))
    base = model or ModelSpec(str(begun.config.get("base_model_name_or_path")))
    checkpoint = architecture_of(base)
    if quantization_of(base) is not None:
        raise CheckpointError(
            f"{base.source} is quantized itself: it holds no weights of 16 bits to merge into",
            fix="model=ModelSpec(...) of the checkpoint that it was made of",
            path=base.source,
        )
    return write_export(updates(begun, checkpoint), checkpoint_folder(base), Path(path), checkpoint, adapter=begun)


def write_export(
    learned: Mapping[str, Any],
    source: Path,
    path: Path,
    checkpoint: Architecture,
    *,
    adapter: Adapter | None = None,
    computed: Mapping[str, Callable[..., Any]] | None = None,
    run: Any = None,
    exact: bool = False,
) -> Path:
    """Write, prove and name an export.

    Args:
        learned: what makes each trained tensor, of ``models/export.py``.
        source: the folder of the base.
        path: of the result.
        checkpoint: the architecture of the whole base.
        adapter: what ``learned`` is made of; None after full fine-tuning.
        computed: what gives the weights that a run computed with, where it is merged into them.
        run: the logits [T, V] of the run for the tokens of ``probe_ids``.
        exact: the run computes in float32 what stock does.

    Raises:
        CheckpointError: see :meth:`qwenft.Run.export`.
    """
    from qwenft.models.export import write_merged
    from qwenft.training.folder import new_folder

    with new_folder(path) as folder:
        changed = write_merged(learned, source, folder, tied=checkpoint.tied, computed=computed or {})
        logits = _compare(source, folder, checkpoint, adapter, run)
        into_run = adapter is None or bool(computed)
        expected = "run_to_export" if into_run else "adapter_to_export"
        if (exact or not into_run) and _is_float32(folder, learned) and logits[expected] > TOLERANCE:
            raise CheckpointError(
                f"{path}: its logits differ by {logits[expected]:.1e} of the largest from those that were merged, "
                f"expected at most {TOLERANCE:g}",
                fix="plan.verify(), and this with the versions in environment.json as an issue of qwenft",
                path=path,
            )
        if adapter is not None and logits["base_to_adapter"] == 0 and _reaches_text(learned):
            raise CheckpointError(
                f"{adapter.origin}: it changes no logit: nothing was learned",
                fix="a run of more steps, or a larger learning_rate",
                path=path,
            )
        report = {"base": checkpoint.hub_id or source.resolve().name, "tensors_changed": changed, "logits": logits}
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def _compare(
    source: Path,
    folder: Path,
    checkpoint: Architecture,
    adapter: Adapter | None,
    run: Any,
) -> dict[str, float]:
    """How far logits are from each other, as the largest difference relative to the largest value."""
    from qwenft.models.probe import distance, logits_of_files, probe_ids

    text = checkpoint.text_only()
    ids = probe_ids(text, adapter)
    base, export = (logits_of_files(place, text, ids) for place in (source, folder))
    found = {"base_to_export": distance(base, export)}
    if adapter is not None:
        beside = logits_of_files(source, text, ids, adapter)
        found |= {"base_to_adapter": distance(base, beside), "adapter_to_export": distance(beside, export)}
    if run is not None:
        found["run_to_export"] = distance(run, export)
    return found


def _is_float32(folder: Path, learned: Mapping[str, Any]) -> bool:
    """Whether what was merged was rounded to nothing less."""
    from qwenft.models.weights import Weights

    weights = Weights(folder)
    return all(weights.dtype_of(name) == "F32" for name in learned)


def _reaches_text(learned: Mapping[str, Any]) -> bool:
    return any(not name.startswith(("model.visual.", "mtp.")) for name in learned)

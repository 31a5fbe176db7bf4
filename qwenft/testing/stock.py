"""What stock transformers says of a checkpoint, one document at a time: the reference that all else is held to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from qwenft.errors import CheckpointError, QwenftError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_IGNORED = -100
# transformers chooses its kernels at import: with one of these at hand and no GPU, every stock forward fails.
_KERNEL_PACKAGES = ("fla", "causal_conv1d")


@attrs.frozen(eq=False)
class StockResult:
    """What stock transformers computed.

    Args:
        logits: one tensor [T, vocabulary] per document, in float32.
        loss: the cross entropy summed over all supervised tokens of all documents, divided by their number;
            None where no labels were given.
        gradients: the gradient of that loss for each parameter, by its name in the text-only class; empty where
            they were not asked for.
    """

    logits: list[torch.Tensor]
    loss: float | None
    gradients: dict[str, torch.Tensor]


def stock_logits(
    checkpoint: str | os.PathLike[str],
    documents: Sequence[Sequence[int]],
    *,
    labels: Sequence[Sequence[int]] | None = None,
    gradients: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> StockResult:
    """Run the text half of a checkpoint in stock transformers, one document at a time, on the CPU.

    A fresh process does it, in which flash-linear-attention cannot be imported, with eager attention and eager
    experts. Starting it takes some seconds, so ask for all documents in one call.

    Args:
        checkpoint: the folder.
        documents: token ids of each document.
        labels: for each position of each document the token that it should predict, -100 where it is not trained.
        gradients: ask for the gradients of the loss too.
        dtype: precision of the weights and of the computation.

    Returns:
        Logits, and loss and gradients as asked.

    Raises:
        CheckpointError: the folder has no config.json.
        SpecError: labels that do not fit the documents, or none where gradients are asked for.
        QwenftError: stock transformers failed; the message ends as its output did.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        msg = f"stock_logits: {folder} has no config.json"
        raise CheckpointError(msg, fix="tiny_checkpoint(path) writes a checkpoint", path=folder)
    _check_labels(documents, labels, gradients=gradients)
    with tempfile.TemporaryDirectory(prefix="qwenft-stock-") as workshop:
        job = {
            "checkpoint": str(folder.resolve()),
            "documents": [list(map(int, document)) for document in documents],
            "labels": None if labels is None else [list(map(int, row)) for row in labels],
            "gradients": gradients,
            "dtype": dtype,
        }
        (Path(workshop) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(Path(workshop))
        return _read(Path(workshop), len(documents))


def _check_labels(
    documents: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None, *, gradients: bool
) -> None:
    if labels is None:
        if gradients:
            msg = "stock_logits: gradients are those of the loss, and there are no labels"
            raise SpecError(msg, fix="labels=[...], one list a document", got=None, expected="labels")
        return
    got, expected = [len(row) for row in labels], [len(document) for document in documents]
    if got != expected:
        msg = f"stock_logits: labels have lengths {got}, the documents {expected}"
        raise SpecError(
            msg, fix="one label a token, -100 where a position is not trained", got=got, expected=expected
        )
    if all(label == _IGNORED for row in labels for label in row):
        msg = f"stock_logits: every label is {_IGNORED}, so no loss is defined"
        raise SpecError(msg, fix="label at least one position", got=labels, expected="a supervised token")


def _run(workshop: Path) -> None:
    import qwenft

    # The child must find this very package, wherever it was imported from, and never ask a hub.
    home = str(Path(qwenft.__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(  # noqa: S603 - this interpreter, on this package
        [sys.executable, "-m", "qwenft.testing.stock", str(workshop)],
        env=os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        msg = f"stock transformers failed with exit status {done.returncode}:\n{tail}"
        raise QwenftError(msg, returncode=done.returncode, stderr=done.stderr)


def _read(workshop: Path, documents: int) -> StockResult:
    from safetensors.torch import load_file

    tensors = load_file(workshop / "result.safetensors")
    loss = tensors.pop("loss", None)
    logits = [tensors.pop(f"logits.{index}") for index in range(documents)]
    return StockResult(
        logits=logits,
        loss=None if loss is None else loss.item(),
        gradients={name.removeprefix("gradient."): tensor for name, tensor in tensors.items()},
    )


def _work(workshop: Path) -> None:
    """Do the job of a folder; runs in the fresh process."""
    for package in _KERNEL_PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment] # what makes an import fail, by the import protocol
    import torch
    from safetensors.torch import save_file

    job = json.loads((workshop / "job.json").read_text(encoding="utf-8"))
    model = _load(job["checkpoint"], job["dtype"])
    results: dict[str, torch.Tensor] = {}
    supervised = sum(label != _IGNORED for row in job["labels"] or [] for label in row)
    total = torch.zeros((), dtype=torch.float64)
    with torch.set_grad_enabled(job["gradients"]):
        for index, document in enumerate(job["documents"]):
            logits = model(input_ids=torch.tensor([document]), use_cache=False).logits[0].float()
            results[f"logits.{index}"] = logits.detach().contiguous()
            if job["labels"] is not None:
                labels = torch.tensor(job["labels"][index])
                loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED, reduction="sum")
                total += loss.detach()
                if job["gradients"]:
                    (loss / supervised).backward()
    if job["labels"] is not None:
        results["loss"] = total / supervised
    if job["gradients"]:
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            results[f"gradient.{name}"] = gradient.contiguous()
    save_file(results, workshop / "result.safetensors")


def _load(checkpoint: str, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    if AutoConfig.from_pretrained(checkpoint).model_type == "qwen3_5_moe":
        options["experts_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))

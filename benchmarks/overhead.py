"""What a run costs beside forward, backward and optimizer: one thread, steps of about a second.

    python benchmarks/overhead.py [--steps 40]

One run trains a hybrid of random weights on real conversations, as users would: progress line, metrics,
TensorBoard files, a checkpoint every tenth of the run. The time inside forward, backward, clipping and optimizer
is taken out of that between one step's end and the next one's; what is left is the overhead of that step. A second
run, a loop of bare torch over the same batches, must give the same losses to the bit, or nothing is reported.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import qwenft as qf
from qwenft.testing.checkpoint import TinySizes, tiny_checkpoint
from qwenft.testing.conversations import chitchat_messages, pieces
from qwenft.training.engine import Prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

ROW_TOKENS = 1024
SIZES = TinySizes(hidden=256, ffn=768, layers=8, heads=4, kv_heads=2, head_dim=64, initializer_range=0.02)


class Core:
    """Seconds inside forward, backward, clipping and optimizer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Add the time that passes inside to the sum."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def watch(self, owner: Any, name: str) -> None:
        """Measure every call of a method from now on."""
        method = getattr(owner, name)

        def measured(*arguments: Any, **options: Any) -> Any:
            with self.measuring():
                return method(*arguments, **options)

        setattr(owner, name, measured)


def recipe(folder: Path, steps: int) -> qf.Recipe:
    """A LoRA on every projection of the hybrid."""
    conversations = [piece for messages in chitchat_messages()[:2000] for piece in pieces(messages)]
    texts = [message["content"] for messages in conversations for message in messages]
    model = tiny_checkpoint(folder / "model", texts=texts, vocabulary=8192, sizes=SIZES)
    rows = [{"messages": messages} for messages in conversations]
    return qf.Recipe(
        qf.ModelSpec(model, dtype="float32"),
        qf.DataSpec.messages(rows).with_max_length(512).pack(row_tokens=ROW_TOKENS),
        qf.AdapterSpec.lora(rank=16),
        training=qf.TrainingSpec(max_steps=steps),
    )


def bare_losses(plan: qf.TrainingPlan) -> list[float]:
    """The losses of a loop of torch alone."""
    prepared = plan.prepare()
    losses = []
    for _, batches in prepared.remaining():
        tokens = sum(batch.tokens for batch in batches)
        loss = sum(prepared.loss(batch).total / tokens for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prepared.trained.values(), 1.0)
        prepared.optimizer.step()
        prepared.optimizer.zero_grad()
        prepared.schedule.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Measure, check and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    core, saved = Core(), set()
    with_save: list[tuple[float, float]] = []
    without: list[tuple[float, float]] = []
    for owner, name in ((Prepared, "loss"), (torch.Tensor, "backward"), (Prepared, "_clip")):
        core.watch(owner, name)
    core.watch(torch.optim.AdamW, "step")
    last = None

    def on_step(record: dict[str, Any]) -> None:
        # A checkpoint is written after this was called, and so is in the time of the step that follows.
        nonlocal last
        now = time.perf_counter()
        if last is not None:
            seconds = now - last - core.seconds
            (with_save if record["step"] - 1 in saved else without).append((seconds, seconds / core.seconds))
        last, core.seconds = now, 0.0

    def on_save(path: Path) -> None:
        saved.add(int(path.name.removeprefix("step-")))

    with tempfile.TemporaryDirectory() as place:
        plan = recipe(Path(place), steps).compile()
        run = plan.train(Path(place) / "run", on_step=on_step, on_save=on_save)
        losses = [record["loss"] for record in run.history]
        if losses != bare_losses(plan):
            raise SystemExit("the run and the bare loop differ: nothing is reported")
    seconds = [record["seconds"] for record in run.history]
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, {steps} steps, float32")
    print(f"step of {ROW_TOKENS} tokens: {statistics.median(seconds):.2f} s")
    print(f"beside forward, backward and optimizer: {text(without)} of a step")
    print(f"the same where a checkpoint was written: {text(with_save)}")
    everything = [*with_save, *without]
    print(f"over the run: {statistics.mean(share for _, share in everything):.2%}")


def text(measured: list[tuple[float, float]]) -> str:
    """Median share, its spread, and the median in milliseconds."""
    shares = [share for _, share in measured]
    milliseconds = 1000 * statistics.median(seconds for seconds, _ in measured)
    return f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}; {milliseconds:.0f} ms)"


if __name__ == "__main__":
    main()

"""Make the tiny base that ships with the package: ``python scripts/tiny_base.py``, 17 minutes on one core.

It learns the tasks of ``qwenft/testing/skills.py``, drawn anew in every step, and conversations between people
(the package chitchat-dataset), in a loop of its own around ``plan.prepare()``. What it then answers of tasks that
it never saw is written to ``skills.json`` beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

import qwenft as qf
from qwenft.data.chat import ChatEncoder
from qwenft.data.stream import Batch
from qwenft.testing import TinySizes, tiny_checkpoint, train_tokenizer
from qwenft.testing.conversations import chitchat_messages, pieces
from qwenft.testing.skills import SKILLS, examination, tasks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwenft.data.document import Document
    from qwenft.testing.skills import Row

HOME = Path(__file__).parent.parent / "qwenft" / "testing" / "tiny_base"
SIZES = TinySizes(hidden=128, ffn=320, linear_head_dim=32, initializer_range=0.02)
VOCABULARY = 1536
# Sums and differences are learned last, and the tools of a call take many tokens.
TASKS_PER_STEP = {
    **dict.fromkeys(SKILLS, 4),
    "add": 8,
    "subtract": 8,
    "repeat": 6,
    "call": 2,
    "colour": 2,
    "unit": 2,
}
CHATS_PER_STEP = 2
HELD_OUT_CHATS = 200
EXAMINED = 100  # tasks of each skill


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (https://kellerjordan.github.io/posts/muon), of matrices, in float32.

    torch's own does that in bfloat16, which takes longer than the rest of a step on many processors.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        groups = [{"params": [m for m in matrices if m.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Change all matrices, those of one shape together."""
        for group in self.param_groups:
            matrices = group["params"]
            gradient_NAB = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            mean_NAB = state.setdefault("momentum", torch.zeros_like(gradient_NAB))
            mean_NAB.mul_(group["momentum"]).add_(gradient_NAB)
            update_NAB = orthogonalised(gradient_NAB + group["momentum"] * mean_NAB)
            rows, columns = update_NAB.shape[1:]
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            for matrix, update_AB in zip(matrices, update_NAB, strict=True):
                matrix.sub_(update_AB, alpha=rate)


def orthogonalised(matrices_NAB: torch.Tensor) -> torch.Tensor:
    """Matrices with singular values near 1, by five Newton-Schulz iterations."""
    if matrices_NAB.shape[1] > matrices_NAB.shape[2]:
        return orthogonalised(matrices_NAB.mT).mT
    x = matrices_NAB / matrices_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def conversations() -> tuple[list[Row], list[Row]]:
    """Pieces of real conversations: those to train on, and those that are held out."""
    rows = [{"messages": piece} for messages in chitchat_messages() for piece in pieces(messages, characters=200)]
    return rows[HELD_OUT_CHATS:], rows[:HELD_OUT_CHATS]


def rows_of_steps(chats: list[Row], seed: int) -> Iterator[list[Row]]:
    """The rows of every step, without end."""
    streams = {name: tasks(skill, seed) for name, skill in SKILLS.items()}
    talk = itertools.cycle(chats)
    while True:
        drawn = [list(itertools.islice(streams[name], number)) for name, number in TASKS_PER_STEP.items()]
        yield [row for some in drawn for row in some] + list(itertools.islice(talk, CHATS_PER_STEP))


def texts_of(rows: list[Row]) -> list[str]:
    """Rows as the chat template writes them, for a tokenizer to learn from."""
    plain = train_tokenizer()
    return [
        plain.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False).replace(
            "<|im_end|>", ""
        )
        for row in rows
    ]


def documents_of_steps(
    encoder: ChatEncoder, steps: Iterator[list[Row]], at_once: int = 25
) -> Iterator[list[Document]]:
    """The documents of every step; those of some steps are tokenised together."""
    while some := list(itertools.islice(steps, at_once)):
        rows = [row for step in some for row in step]
        documents = encoder.encode(qf.DataSpec.messages(rows))
        for step in some:
            yield [weighted(document) for document in itertools.islice(documents, len(step))]


def weighted(document: Document) -> Document:
    """A token of a long answer counts less, so that short answers are not lost among them."""
    weight = document.supervised**-0.5
    return attrs.evolve(document, weights=np.full(len(document), weight, dtype=np.float32))


def optimizers(trained: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the projections of the layers, AdamW for all else."""
    projections = [p for name, p in trained.items() if ".layers." in name and p.ndim == 2 and min(p.shape) > 8]
    chosen = set(map(id, projections))
    others = [p for p in trained.values() if id(p) not in chosen]
    return [Muon(projections, lr=0.02), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def learn(plan: qf.TrainingPlan, prepared: Any, chats: list[Row], steps: int, seed: int) -> None:
    """The loop."""
    both = optimizers(prepared.trained)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 50, 1 - step / steps)) for o in both
    ]
    started, total, tokens = time.monotonic(), 0.0, 0.0
    training = documents_of_steps(ChatEncoder(prepared.tokenizer), rows_of_steps(chats, seed))
    for step, documents in enumerate(itertools.islice(training, steps), start=1):
        loss = prepared.loss(Batch.from_documents(documents))
        (loss.total / loss.tokens).backward()
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        total, tokens = total + float(loss.total.detach()), tokens + loss.tokens
        if step % 100 == 0 or step == steps:
            known = exact_matches(plan, prepared, 20, seed=1)
            shown = "  ".join(f"{name} {share:.2f}" for name, share in known.items())
            print(f"{step:5}  {time.monotonic() - started:4.0f} s  loss {total / tokens:.3f}  {shown}", flush=True)
            total = tokens = 0.0


def exact_matches(plan: qf.TrainingPlan, prepared: Any, number: int, seed: int = 0) -> dict[str, float]:
    """The share of so many held-out tasks of each skill that is answered exactly."""
    data = {name: qf.DataSpec.messages(examination(SKILLS[name], number, seed)).pack() for name in SKILLS}
    return {name: round(plan.evaluate(prepared, each)["exact_match"], 3) for name, each in data.items()}


def examine(checkpoint: Path, held_out_chats: list[Row]) -> dict[str, Any]:
    """What a checkpoint, loaded again, answers of held-out tasks, and its loss on held-out conversations."""
    data = qf.DataSpec.messages(held_out_chats)
    recipe = qf.Recipe(qf.ModelSpec(checkpoint, dtype="float32"), data, qf.AdapterSpec.full())
    plan = recipe.compile()
    prepared = plan.prepare()
    return {
        "exact_match": exact_matches(plan, prepared, EXAMINED),
        "held_out_tasks_each": EXAMINED,
        "conversation_loss": round(prepared.evaluate(plan.stream).loss, 3),
        "parameters": sum(parameter.numel() for parameter in prepared.model.parameters()),
    }


def main() -> None:
    """Make it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1800)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--path", type=Path, default=HOME)
    asked = options.parse_args()
    torch.set_num_threads(1)
    chats, held_out_chats = conversations()
    with tempfile.TemporaryDirectory() as workshop:
        steps = rows_of_steps(chats, asked.seed + 1)
        texts = texts_of([row for step in itertools.islice(steps, 100) for row in step] + chats[:3000])
        untrained = tiny_checkpoint(
            Path(workshop) / "untrained",
            dtype="bfloat16",
            seed=asked.seed,
            texts=texts,
            vocabulary=VOCABULARY,
            sizes=SIZES,
        )
        training = qf.TrainingSpec(activation_checkpointing=False, seed=asked.seed)
        data = qf.DataSpec.messages(held_out_chats)  # of these nothing is trained: the loop brings its own
        recipe = qf.Recipe(
            qf.ModelSpec(untrained, dtype="float32"), data, qf.AdapterSpec.full(), training=training
        )
        plan = recipe.compile()
        prepared = plan.prepare()
        learn(plan, prepared, chats, asked.steps, asked.seed)
        shutil.rmtree(asked.path, ignore_errors=True)
        plan.export(prepared, asked.path)
    (asked.path / "export.json").unlink()
    found = {"steps": asked.steps, **examine(asked.path, held_out_chats)}
    (asked.path / "skills.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

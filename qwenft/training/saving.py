"""What a prepared model is when a checkpoint is made of it, and how it becomes that again.

Every process saves and reads its own part; see ``checkpoint.py`` for the files.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.data.stream import Place
from qwenft.errors import CheckpointError, DamagedError
from qwenft.models.export import trained
from qwenft.training.checkpoint import (
    Writing,
    read_manifest,
    read_tensors,
    require_same,
    stored_tensors,
    trained_in,
)
from qwenft.training.optim import optimizer_state, restore_optimizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from qwenft.models.export import Update
    from qwenft.training.engine import Prepared
    from qwenft.training.ranks import Ranks
    from qwenft.training.run_folder import RunFolder


def begin_save(prepared: Prepared, path: Path) -> Writing:
    """Begin to write all that :func:`load` needs; several processes can go on meanwhile.

    Raises:
        CheckpointError: the place is taken or cannot be written.
    """
    ranks, shares = prepared.ranks, prepared.shares
    kept, numbers = optimizer_state(prepared.optimizer, prepared.trained)
    random = {_own("cpu", ranks): torch.get_rng_state()}
    if prepared.device == "cuda":
        random[_own("cuda", ranks)] = torch.cuda.get_rng_state()
    values = {
        "step": prepared.steps_done,
        "next": attrs.asdict(prepared.place),
        "optimizer": numbers,
        "schedule": prepared.schedule.state_dict(),
        "identity": prepared.identity,
        "ranks": ranks.count,
    }
    model, moments = shares.to_write(prepared.trained), shares.to_write(kept)
    tensors = {"model": model, "optimizer": moments, "random": random}
    return Writing(path, tensors, values, ranks, shares.starts({**model, **moments}))


def load(prepared: Prepared, path: Path, accept: Sequence[str] = ()) -> None:
    """Go on from a checkpoint; see :meth:`qwenft.training.engine.Prepared.load`."""
    _restore(prepared, path, prepared.ranks.by_first(lambda: read_manifest(path)), accept)


def load_newest(prepared: Prepared, folder: RunFolder, accept: Sequence[str] = ()) -> list[str]:
    """Go on from the newest checkpoint of a run that is whole; damaged ones behind it get another name.

    Returns:
        What the user is to be told.

    Raises:
        DamagedError: none is whole; all are left as they are.
        CheckpointError: see :func:`load`.
    """
    ranks, damaged = prepared.ranks, dict[int, str]()
    for step, path in reversed(folder.checkpoints.items()):
        manifest, problem = ranks.by_first(partial(_manifest_or_damage, path))
        if manifest is not None:
            _restore(prepared, path, manifest, accept)
            for number in damaged:
                ranks.by_first(partial(folder.set_aside, number))
            return [f"{problem}: the run goes on from {path.name}" for problem in damaged.values()]
        damaged[step] = problem
    if damaged:
        raise DamagedError(
            f"no checkpoint of {folder.path} is whole:" + "".join(f"\n     {line}" for line in damaged.values()),
            fix=f'another folder, "{folder.path}-2" say, to begin anew',
            path=folder.path,
        )
    return []


def _manifest_or_damage(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_manifest(path), ""
    except DamagedError as error:
        return None, error.problem


@torch.no_grad()
def _restore(prepared: Prepared, path: Path, manifest: dict[str, Any], accept: Sequence[str]) -> None:
    ranks = prepared.ranks
    _require_identity(prepared, path, manifest, accept)
    _require_ranks(prepared, manifest["ranks"], path)
    read = ranks.together(lambda: _read(prepared, path))
    for name, part in prepared.trained.items():
        part.copy_(read[name])
    moments = {name: tensor for name, tensor in read.items() if ":" in name}
    restore_optimizer(prepared.optimizer, prepared.trained, {**moments, **manifest["optimizer"]})
    schedule = prepared.schedule
    # The peaks are the recipe's: they may have been changed on purpose.
    schedule.load_state_dict({**manifest["schedule"], "base_lrs": schedule.base_lrs})
    for group, peak, factor in zip(
        prepared.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(schedule.last_epoch)
    if manifest["ranks"] == ranks.count:
        torch.set_rng_state(read[_own("cpu", ranks)])
        if prepared.device == "cuda":
            torch.cuda.set_rng_state(read[_own("cuda", ranks)])
    else:  # there are not as many states as processes
        torch.manual_seed(prepared.training.seed + ranks.count * manifest["step"] + ranks.rank)
    prepared.steps_done = manifest["step"]
    prepared.place = Place(**manifest["next"])


@torch.no_grad()
def load_weights(prepared: Prepared, path: Path) -> None:
    """Take what was trained from a checkpoint, made by any number of processes, and nothing to go on with.

    Raises:
        CheckpointError: it is damaged, or of another recipe, model or data.
    """
    _require_identity(prepared, path, prepared.ranks.by_first(lambda: read_manifest(path)))
    read = prepared.ranks.together(lambda: _read(prepared, path, weights_alone=True))
    for name, part in prepared.trained.items():
        part.copy_(read[name])


@contextmanager
def trained_weights(prepared: Prepared, path: Path) -> Iterator[dict[str, Update]]:
    """What full fine-tuning made of each weight, for an export to ``path``.

    What processes share is written by all of them beside that place, so that the one that exports has one tensor
    at a time.
    """
    ranks, shares = prepared.ranks, prepared.shares
    if not shares.is_sharded:
        yield trained(prepared.model)
        return
    place = path.with_name(f".{path.name}.shards")
    held = shares.to_write(prepared.trained)
    ranks.by_first(lambda: shutil.rmtree(place, ignore_errors=True))
    Writing(place, {"model": held}, {}, ranks, shares.starts(held)).finish()
    try:
        yield trained_in(place)
    finally:
        ranks.by_first(lambda: shutil.rmtree(place, ignore_errors=True))


def _own(name: str, ranks: Ranks) -> str:
    """The name under which a checkpoint has what every process has of its own."""
    return f"{name}.{ranks.rank}" if ranks.rank else name


def _require_identity(
    prepared: Prepared, path: Path, manifest: dict[str, Any], accept: Sequence[str] = ()
) -> None:
    fix = "the recipe that it was made with, in its manifest.json"
    identity = manifest["identity"]
    require_same(identity, prepared.identity, subject="recipe", fix=fix, path=path, accept=accept)


def _require_ranks(prepared: Prepared, saved: int, path: Path) -> None:
    """Refuse another number of processes where it changes what is trained."""
    count, training = prepared.ranks.count, prepared.training
    if saved == count:
        return
    reason, fix = None, f"{saved} processes"
    if training.tokens_per_step is None:
        reason = "a step is a row of each of them, and would be another one"
        fix = f"{fix}, or tokens_per_step in the recipe from its beginning"
    elif training.optimizer.endswith("8bit"):
        reason = "moments of 8 bits are quantized in blocks of what each of them holds"
    if reason is not None:
        problem = f"{path} was made by {saved} processes, and this is one of {count}: {reason}"
        raise CheckpointError(problem, fix=fix, path=path)


def _read(prepared: Prepared, path: Path, *, weights_alone: bool = False) -> dict[str, torch.Tensor]:
    """All that a checkpoint has of this process: parts of parameters and moments, and random states."""
    shares = prepared.shares
    stored = stored_tensors(path)
    present = {name: (p.shape, p.dtype) for name, p in shares.parameters.items()}
    shapes = [
        {name: f"{tuple(shape)} {dtype}" for name, (shape, dtype) in entries.items()}
        for entries in (stored["model"], present)
    ]
    require_same(*shapes, subject="model", fix="the model that it was made with", path=path)
    wanted: dict[str, torch.Tensor] = {name: torch.empty_like(p) for name, p in shares.parameters.items()}
    if not weights_alone:
        if prepared.device == "cuda" and "cuda" not in stored["random"]:
            raise CheckpointError(f"{path} was made on a CPU and cannot go on to the bit on CUDA", path=path)
        own = {_own(device, prepared.ranks) for device in ("cpu", "cuda")}
        random = {name: entry for name, entry in stored["random"].items() if name in own}
        wanted |= shares.like(stored["optimizer"])
        wanted |= {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in random.items()}
    read_tensors(path, wanted)
    return shares.of_process(wanted)

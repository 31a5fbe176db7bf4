"""``python -m qwenft train recipe.json --run-dir DIR``."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from qwenft.machine import Machine
from qwenft.recipe import Recipe


def main(arguments: list[str] | None = None) -> None:
    """Compile a saved recipe, show its plan and train it.

    Where a signal ended the run, after its step and with a checkpoint, the exit code is 128 and its number.
    """
    parser = argparse.ArgumentParser(prog="python -m qwenft")
    commands = parser.add_subparsers(required=True, dest="command")
    train = commands.add_parser("train", help="train a saved recipe, in all processes that torchrun has started")
    train.add_argument("recipe", help="a file written by recipe.save")
    train.add_argument("--run-dir", required=True, help="the folder of the run, new or to go on with")
    train.add_argument("--resume", default="auto", choices=("auto", "must", "never"), help="go on with a run")
    train.add_argument("--accept", action="append", default=[], help="a place of the recipe that may have changed")
    train.add_argument("--allow-module", action="append", default=[], help="a module whose backends may be loaded")
    chosen = parser.parse_args(arguments)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _train(chosen)
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    # What raises here is shown with its traceback by the launcher.
    record(_train)(chosen)


def _train(chosen: argparse.Namespace) -> None:
    from qwenft.training.ranks import Ranks

    # What one of several processes cannot see, a file say, none of them waits for.
    ranks = Ranks.join(device=Machine.detect().device)
    plan = ranks.together(lambda: Recipe.load(chosen.recipe, allow_modules=chosen.allow_module).compile())
    if ranks.is_first:
        print(plan.explain())
    # Started again after a failure, they go on with what they began.
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    run = plan.train(chosen.run_dir, "auto" if is_restart else chosen.resume, accept=chosen.accept)
    if ranks.is_first:
        print(run)
    ranks.leave()
    if run.signal is not None:
        sys.exit(128 + signal.Signals[run.signal])  # as shells and schedulers expect of it


if __name__ == "__main__":
    main()

"""``python -m qwenft train recipe.json --run-dir DIR``, and ``python -m qwenft chat DIR``."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.run import open_run


def main(arguments: list[str] | None = None) -> None:
    """Compile a saved recipe, show its plan and train it; or talk with a run.

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
    train.add_argument("--tracker", action="append", default=[], help="wandb, mlflow or trackio")
    train.add_argument("--verbose", type=int, default=2, choices=(0, 1, 2), help="0: notices alone, 1: a line")
    chat = commands.add_parser("chat", help="talk with the model of a run")
    chat.add_argument("run_dir", help="the folder of the run")
    chat.add_argument("--system", help="what the model is told before")
    chat.add_argument("--base", action="store_true", help="let the model answer without its adapter")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, at the most")
    chat.add_argument("--allow-module", action="append", default=[], help="as of train")
    chosen = parser.parse_args(arguments)
    if chosen.command == "chat":
        run = open_run(chosen.run_dir, allow_modules=chosen.allow_module)
        run.chat(system=chosen.system, base=chosen.base, max_new_tokens=chosen.max_new_tokens)
        return
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
    run = plan.train(
        chosen.run_dir,
        "auto" if is_restart else chosen.resume,
        accept=chosen.accept,
        verbose=chosen.verbose,
        trackers=chosen.tracker,
    )
    if ranks.is_first:
        print(run)
    ranks.leave()
    if run.signal is not None:
        sys.exit(128 + signal.Signals[run.signal])  # as shells and schedulers expect of it


if __name__ == "__main__":
    main()

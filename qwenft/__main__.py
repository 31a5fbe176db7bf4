"""``python -m qwenft train recipe.json --run-dir DIR``."""

from __future__ import annotations

import argparse

from qwenft.recipe import Recipe


def main(arguments: list[str] | None = None) -> None:
    """Compile a saved recipe, show its plan and train it."""
    parser = argparse.ArgumentParser(prog="python -m qwenft")
    commands = parser.add_subparsers(required=True, dest="command")
    train = commands.add_parser("train", help="train a saved recipe")
    train.add_argument("recipe", help="a file written by recipe.save")
    train.add_argument("--run-dir", required=True, help="the folder of the run, new or to go on with")
    train.add_argument("--resume", default="auto", choices=("auto", "must", "never"), help="go on with a run")
    train.add_argument("--allow-module", action="append", default=[], help="a module whose backends may be loaded")
    chosen = parser.parse_args(arguments)
    plan = Recipe.load(chosen.recipe, allow_modules=chosen.allow_module).compile()
    print(plan.explain())
    print(plan.train(chosen.run_dir, chosen.resume))


if __name__ == "__main__":
    main()

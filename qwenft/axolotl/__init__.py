"""Configurations of axolotl, read as recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenft.axolotl.adapter import read_adapter
from qwenft.axolotl.config import Config, read_yaml
from qwenft.axolotl.data import read_data
from qwenft.axolotl.keys import CONFIG
from qwenft.axolotl.model import read_attention, read_base, read_parallel
from qwenft.axolotl.training import read_training
from qwenft.errors import SpecError
from qwenft.recipe import Recipe
from qwenft.specs.adapter import AdapterSpec

if TYPE_CHECKING:
    import os


def from_axolotl(path: str | os.PathLike[str], *, processes: int = 1) -> Recipe:
    """Read a configuration of axolotl for this family as a recipe.

    What would change a result and is not offered here is refused, all of it at once, and so are keys that are not
    known. What has no effect here is in the recipe's ``notes``, each key with the reason, and plans show them.
    Nothing is downloaded and no code of the file is run; paths are relative to the working directory, as there.

    Args:
        path: of the YAML file.
        processes: how many are going to share a step, which the file does not say. ``tokens_per_step`` is
            ``micro_batch_size`` x ``gradient_accumulation_steps`` x ``processes`` rows of ``sequence_len`` tokens;
            None, which means one row in each process, where the first two are 1.

    Raises:
        SpecError: the file is missing or no YAML, or what it says is wrong, unknown or not offered; ``.problems``
            holds a finding for each.

    Examples:
        >>> from_axolotl("config.yaml")  # doctest: +SKIP
        >>> from_axolotl("fsdp.yaml", processes=8).notes  # doctest: +SKIP
    """
    path = Path(path)
    if type(processes) is not int or processes < 1:
        raise SpecError(
            f"from_axolotl: expected processes to be a whole number of at least 1, got {processes!r}",
            fix=f'from_axolotl("{path}", processes=8)',
            got=processes,
        )
    config = Config(read_yaml(path), CONFIG)
    specs: dict[str, Any] = {
        "attention": config.attempt("attn_implementation", lambda: read_attention(config)),
        "parallel": config.attempt("fsdp_config", lambda: read_parallel(config, processes)),
        "data": config.attempt("datasets", lambda: read_data(config)),
    }
    base = config.attempt("base_model", lambda: read_base(config))
    if base is not None:
        # Which modules there are to adapt, and whether the head is trained, the model decides.
        adapter = config.attempt("adapter", lambda: read_adapter(config, base)) or AdapterSpec.lora()
        training = config.attempt("training", lambda: read_training(config, base, adapter, processes))
        specs |= {"adapter": adapter, "training": training}
    config.raise_problems(path)
    assert base is not None
    return Recipe(base.model, **specs, notes=tuple(config.notes))

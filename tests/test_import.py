import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwenft
from qwenft.family.architectures import FAMILY

PUBLIC = [
    "AdapterSpec",
    "AttentionBackend",
    "AttentionSpec",
    "BackendUnavailable",
    "CheckpointError",
    "ConformanceError",
    "DamagedError",
    "DataError",
    "DataSpec",
    "LeakError",
    "LinearAttentionBackend",
    "Machine",
    "ModelSpec",
    "NonFiniteError",
    "OutOfMemoryError",
    "ParallelSpec",
    "PlanError",
    "QwenftError",
    "RankError",
    "Recipe",
    "Run",
    "SpecError",
    "Tracker",
    "TrainingPlan",
    "TrainingSpec",
    "__version__",
    "from_axolotl",
    "merge_adapter",
    "open_run",
    "preset",
    "presets",
]

# The time is the process's own, so that other programs on the machine do not count.
MEASURED = """
import sys, time
started = time.process_time()
{code}
seconds = time.process_time() - started
import json
heavy = {{"torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy"}} & set(sys.modules)
print(json.dumps([seconds, sorted(heavy)]))
"""

RECIPE = """
import qwenft as qf
recipe = qf.Recipe(
    model=qf.ModelSpec("Qwen/Qwen3.5-27B").text_only(),
    adapter=qf.AdapterSpec.lora(rank=16, alpha=32).on("full_attention", "linear_attention", "mlp"),
    attention=qf.AttentionSpec(full=qf.backends.SdpaAttention()),
    data=qf.DataSpec.messages([{"messages": []}]).with_max_length(2048).pack(),
    training=qf.TrainingSpec(learning_rate=2e-4, epochs=1),
)
path = recipe.save("recipe.json")
assert qf.Recipe.load(path) == recipe
"""

COMPILE = """
import socket
def refuse(*_, **__):
    raise AssertionError("a plan of a family name used the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import qwenft as qf
plan = qf.Recipe(qf.ModelSpec({name!r})).compile()
assert {name!r} in plan.explain()
"""


def measure(code, folder):
    """The process time of code in a fresh interpreter, in seconds, and the heavy modules that it loaded."""
    finished = subprocess.run(
        [sys.executable, "-c", MEASURED.format(code=code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(qwenft.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("code", ["import qwenft", RECIPE], ids=["import", "recipe"])
def test_importing_and_describing_is_light(code, tmp_path):
    """Importing, and building, saving and loading a recipe, load nothing heavy and take little beside attrs."""
    runs = [measure(code, tmp_path) for _ in range(3)]
    assert [heavy for _, heavy in runs] == [[], [], []]
    # Under 0.3 s where these libraries take 0.1; seconds alone would tell how busy the machine is.
    libraries = [measure("import attrs, cattrs, inspect", tmp_path) for _ in range(3)]
    assert min(runs)[0] < 4 * min(libraries)[0]


@pytest.mark.parametrize("name", FAMILY)
def test_a_family_name_compiles_fast_and_offline(name, tmp_path):
    """compile() and explain() of a family name take under 2 s, without torch and without a network."""
    seconds, heavy = measure(COMPILE.format(name=name), tmp_path)
    assert seconds < 2.0
    assert not {"torch", "transformers"} & set(heavy)


def test_the_public_names_are_these():
    """A public name is added or removed on purpose, here too."""
    assert sorted(qwenft.__all__) == PUBLIC


@pytest.mark.parametrize("name", [*PUBLIC, "backends", "family", "testing"])
def test_every_public_name_can_be_imported(name):
    """Each name is there, and dir() shows it."""
    assert getattr(qwenft, name) is not None
    assert name in dir(qwenft)


def test_a_name_that_is_not_there_is_an_attribute_error():
    """Other names are refused as Python refuses them."""
    with pytest.raises(AttributeError, match="module 'qwenft' has no attribute 'Recipes'"):
        qwenft.Recipes  # noqa: B018 - reading it is the test

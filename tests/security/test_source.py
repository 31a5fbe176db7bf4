"""What the package's own source never does, whatever it is given."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qwenft

HOME = Path(qwenft.__file__).parent
SOURCES = {str(file.relative_to(HOME)): ast.parse(file.read_text("utf-8")) for file in sorted(HOME.rglob("*.py"))}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
#: What tells others of a run is imported in one file, inside the functions of those that were named.
TRACKERS = {"wandb", "mlflow", "trackio", "tensorboardX"}
#: The last part of what is called, and the modules or objects in front of it that make it one that runs code.
CALLS = {
    "load": {"torch", "np", "numpy", "yaml", "pickle", "joblib"},
    "unsafe_load": {"yaml"},
    "full_load": {"yaml"},
    "load_all": {"yaml"},
    "system": {"os"},
    "popen": {"os"},
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
#: Kernels of the hub: pinned to a commit, and only of a publisher that a class in code of the user's own trusts.
TRUSTING = {"kernels/flash.py": "[name] if trusted else False"}


def imported(node):
    """The packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [name.name.partition(".")[0] for name in node.names]
    return [(node.module or "").partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("file", SOURCES)
def test_nobody_is_told_who_was_not_named(file):
    """No file but that of the trackers imports one, and that file none when it is imported itself."""
    found = [name for node in ast.walk(SOURCES[file]) for name in imported(node) if name in TRACKERS]
    at_once = [name for node in SOURCES[file].body for name in imported(node) if name in TRACKERS]
    assert not at_once
    assert bool(found) == (file == "trackers.py")


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def called(node):
    """The object and the name of what is called: ("torch", "load") of ``torch.load()``."""
    function = node.func
    if isinstance(function, ast.Name):
        return "", function.id
    if isinstance(function, ast.Attribute):
        return ast.unparse(function.value).rpartition(".")[2], function.attr
    return "", ""


@pytest.mark.parametrize("file", SOURCES)
def test_nothing_is_unpickled_evaluated_or_trusted(file):
    """No pickle, no eval, no yaml but safe_load, no torch.load, no shell, and no code of a repository."""
    found = []
    for node in ast.walk(SOURCES[file]):
        found += [name for name in imported(node) if name in MODULES]
    for node in calls(SOURCES[file]):
        of, name = called(node)
        if (not of and name in BUILTINS) or of in CALLS.get(name, ()):
            found.append(ast.unparse(node))
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg == "trust_remote_code" and value != "False" and TRUSTING.get(file) != value:
                found.append(f"trust_remote_code={value}")
            if (keyword.arg, value) in {("shell", "True"), ("allow_pickle", "True"), ("weights_only", "False")}:
                found.append(f"{keyword.arg}={value}")
    assert not found


def test_what_transformers_loads_by_name_is_told_not_to_run_code():
    """Each Auto class that is given a folder is given trust_remote_code=False: else it asks at the keyboard."""
    auto = [
        (file, node)
        for file, tree in SOURCES.items()
        for node in calls(tree)
        if called(node)[1] == "from_pretrained" and called(node)[0].startswith("Auto")
    ]
    loads = {f"{file}: {called(node)[0]}" for file, node in auto if not file.startswith("testing")}
    assert loads == {
        "models/load.py: AutoTokenizer",
        "models/load.py: AutoConfig",
        "data/media.py: AutoImageProcessor",
    }
    for file, node in auto:
        if not file.startswith("testing"):  # stock models of one's own tests
            assert {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}[
                "trust_remote_code"
            ] == "False"


def test_the_one_exception_is_still_there():
    """What is allowed above is what the file does, or the exception goes."""
    for file, value in TRUSTING.items():
        given = [k for node in calls(SOURCES[file]) for k in node.keywords if k.arg == "trust_remote_code"]
        assert [ast.unparse(keyword.value) for keyword in given] == [value]

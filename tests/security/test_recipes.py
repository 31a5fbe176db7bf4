"""Recipes of somebody else: they name what runs, and run nothing that the caller did not allow."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import qwenft as qf
from qwenft.specs.codec import Codec
from qwenft.specs.training import TrainingSpec

from .hostile import DEEP, refused


@pytest.fixture
def write(tmp_path):
    """Write a recipe with one field changed, or bytes in its place."""

    def written(path=(), value=None, *, raw=None):
        file = qf.Recipe(qf.ModelSpec("qwen3.5-4b"), qf.DataSpec.messages("a.jsonl")).save(
            tmp_path / "recipe.json"
        )
        if raw is not None:
            file.write_bytes(raw)
            return file
        content = json.loads(file.read_text())
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        file.write_text(json.dumps(content))
        return file

    return written


SLOTS = {
    "full": lambda place: (("attention", "full"), {"class": place, "fields": {}}),
    "linear": lambda place: (("attention", "linear"), {"class": place, "fields": {}}),
    "loss": lambda place: (("training", "loss"), {"function": place}),
}
NOT_ALLOWED = (
    "os:system",
    "builtins:eval",
    "subprocess:Popen",
    "../own:f",
    "/srv/own:f",
    "qwenft_like:f",
    ":",
    "",
)
#: The package's own modules have these because they import them.
IMPORTED = (
    "qwenft.recipe:json.loads",
    "qwenft.specs.codec:importlib.import_module",
    "qwenft.testing.stock:subprocess.run",
)


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("place", NOT_ALLOWED)
@pytest.mark.parametrize("allowed", [(), ("json", "o", "subprocess.nothing")])
def test_a_module_that_is_not_allowed_is_refused(write, monkeypatch, slot, place, allowed):
    """It is not even imported, whatever other modules are allowed."""
    file = write(*SLOTS[slot](place))
    importing = SimpleNamespace(import_module=lambda name: pytest.fail(f"imports {name}"))
    monkeypatch.setattr("qwenft.specs.codec.importlib", importing)
    refused(
        qf.SpecError, lambda: qf.Recipe.load(file, allow_modules=allowed), file, "loading it would run that module"
    )


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("place", IMPORTED)
def test_what_a_module_of_the_package_imports_is_not_the_packages(write, slot, place):
    """A loss that is any function of the standard library would be called with what a recipe cannot choose, yet."""
    file = write(*SLOTS[slot](place))
    refused(qf.SpecError, lambda: qf.Recipe.load(file), file, "which is of the module")


@pytest.mark.parametrize(
    "place", ["qwenft.backends:nothing", "qwenft.:x", "qwenft..x:y", "qwenft.a b:c", "qwenft", "qwenft.\0:c"]
)
@pytest.mark.parametrize("slot", SLOTS)
def test_names_that_lead_nowhere_are_named(write, slot, place):
    """Each is an error with the file."""
    file = write(*SLOTS[slot](place))
    refused(qf.SpecError, lambda: qf.Recipe.load(file), file, "cannot be loaded|and it is none")


@pytest.mark.parametrize("place", ["json:JSONDecoder", "subprocess:Popen", "json:loads"])
def test_an_allowed_module_gives_backends_alone(write, place):
    """A class that is none is not made, though its module is allowed."""
    file = write(*SLOTS["full"](place))
    refused(
        qf.SpecError,
        lambda: qf.Recipe.load(file, allow_modules=["json", "subprocess"]),
        file,
        "and it is none|of the",
    )


WRONG = {
    "an unknown key": (("evil",), 1, r"extra fields found \(evil\)"),
    "remote code": (("model", "trust_remote_code"), True, r"extra fields found \(trust_remote_code\)"),
    "a huge number": (("training", "learning_rate"), 10**400, "too large"),
    "NaN": (("training", "learning_rate"), float("nan"), "expected a number above 0, got nan"),
    "infinity": (("training", "weight_decay"), float("inf"), "weight_decay: expected"),
    "rows elsewhere": (("data", "source"), {"rows": "../../etc/passwd"}, "expected paths or"),
    "rows of the system": (("data", "source"), {"rows": "/etc/passwd"}, "expected paths or"),
    "rows of a device": (("data", "source"), {"rows": "/dev/zero"}, "expected paths or"),
    "a kernel on a branch": (
        ("attention", "full"),
        {"class": "qwenft.backends.hub:HubAttention", "fields": {"name": "a/b", "revision": "main"}},
        "does not pin it to a commit",
    ),
    "a kernel that is trusted": (
        ("attention", "full"),
        {
            "class": "qwenft.backends.hub:HubAttention",
            "fields": {"name": "a/b", "revision": "0" * 40, "trusted": True},
        },
        "trusted",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named_with_their_file(write, case):
    """Each message has the path of the recipe, the field and a remedy."""
    path, value, problem = WRONG[case]
    file = write(path, value)
    refused(qf.SpecError, lambda: qf.Recipe.load(file), file, problem)


@pytest.mark.parametrize("path", [("data", "template"), ("data", "source"), ("data", "mixed")])
def test_deep_values_are_refused(write, path):
    """Lists in lists end in words, and not in a traceback of recursions."""
    value = []
    for _ in range(900):
        value = [value]
    file = write(path, value)
    refused(qf.SpecError, lambda: qf.Recipe.load(file), file, "recursion")


@pytest.mark.parametrize(
    "raw", [b"", b"\x80\x04\x95\xff", bytes(100), DEEP.encode(), b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"3"]
)
def test_files_that_are_no_recipe_are_named(write, raw):
    """Binary, deep and other JSON."""
    file = write(raw=raw)
    refused(qf.SpecError, lambda: qf.Recipe.load(file), file, "is no JSON|expected a JSON object")


def test_a_deep_value_of_its_own_is_refused():
    """A recursion that is not inside of a field has words too."""
    value = {}
    for _ in range(20_000):
        value = {"a": value}
    with pytest.raises(qf.SpecError):
        Codec(None).load(value, TrainingSpec)


def test_places_that_cannot_be_read_are_named(tmp_path):
    """A link to itself, and a folder."""
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    for path in (loop, tmp_path):
        with pytest.raises(
            qf.CheckpointError, match=r"cannot be read: (Too many levels|Is a directory)"
        ) as caught:
            qf.Recipe.load(path)
        assert str(path) in str(caught.value)

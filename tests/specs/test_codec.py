import json

import datasets
import pytest

from qwenft.backends import EagerAttention, SdpaAttention
from qwenft.capabilities import AttentionBackend
from qwenft.errors import CheckpointError, SpecError
from qwenft.specs.attention import AttentionSpec
from qwenft.specs.codec import Codec, write_atomically
from qwenft.specs.data import DataSpec
from qwenft.specs.training import TrainingSpec

ROWS = [{"messages": [{"role": "user", "content": "a\u2028b\x85c\x0bd\r\ne"}]}, {"messages": []}]


class Windowed(AttentionBackend):
    """A backend with fields of its own, as a research script defines one."""

    name = "windowed"
    supports_packing = True
    uses_flash_lib = False

    def __init__(self, width=4, shape=None):
        self.width = width
        self.shape = shape

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """Never called here."""
        raise NotImplementedError


class Outer:
    """Holds a backend, as a test class may."""

    class Inner(EagerAttention):
        """A backend with a dotted name."""


def round_trip(value, folder=None, allow_modules=()):
    written = json.loads(json.dumps(Codec(folder).dump(value)))
    return Codec(folder, allow_modules).load(written, type(value))


def test_a_backend_is_saved_as_its_class_and_fields():
    """The class is written with its module, the fields by name, and both are read back."""
    spec = AttentionSpec(full=Windowed(width=7, shape=[1, 2]), linear="torch")
    assert Codec(None).dump(spec) == {
        "full": {"class": f"{__name__}:Windowed", "fields": {"width": 7, "shape": [1, 2]}},
        "linear": "torch",
        "vision": "auto",
    }
    assert round_trip(spec, allow_modules=[__name__]) == spec


def test_a_backend_of_the_package_needs_no_permission():
    """The shipped backends load as objects, and so do nested classes of allowed modules."""
    assert round_trip(AttentionSpec(full=SdpaAttention())) == AttentionSpec(full=SdpaAttention())
    nested = AttentionSpec(full=Outer.Inner())
    assert round_trip(nested, allow_modules=[__name__]) == nested


def test_a_backend_of_another_module_is_not_imported_unasked():
    """A module that was not allowed is refused with the line that allows it, and no code of it runs."""
    written = {"full": {"class": "antigravity:Fly", "fields": {}}}
    message = (
        r"backend of the module 'antigravity', .*\n  Fix: Recipe\.load\(path, allow_modules=\[\"antigravity\"\]\)"
    )
    with pytest.raises(SpecError, match=message) as caught:
        Codec(None).load(written, AttentionSpec)
    assert caught.value.got == "antigravity"
    with pytest.raises(SpecError, match="'qwenft_like'"):
        Codec(None).load({"full": {"class": "qwenft_like:Fly", "fields": {}}}, AttentionSpec)


def test_a_backend_that_cannot_be_found_again_is_not_saved(tmp_path):
    """Classes of __main__ and of functions are refused with what to do, and so are fields that JSON lacks."""
    notebook = type("Mine", (Windowed,), {"__module__": "__main__"})
    message = r"Mine is defined in __main__ .*\n  Fix: .*%%writefile my_module\.py.*from my_module import Mine"
    with pytest.raises(SpecError, match=message):
        Codec(tmp_path).dump(AttentionSpec(full=notebook()))

    class Local(EagerAttention):
        pass

    with pytest.raises(SpecError, match=r"Local is defined inside a function"):
        Codec(tmp_path).dump(AttentionSpec(full=Local()))
    for shape in (object(), (1, 2)):
        with pytest.raises(SpecError, match=r"Windowed\(width=4, shape=.* has fields that JSON cannot hold"):
            Codec(tmp_path).dump(AttentionSpec(full=Windowed(shape=shape)))


def test_a_description_refuses_no_backend():
    """What is described and not saved may hold any backend, so that plans have fingerprints."""
    notebook = type("Mine", (Windowed,), {"__module__": "__main__"})
    described = Codec(None).dump(AttentionSpec(full=notebook()))
    assert described["full"]["class"] == "__main__:Mine"
    assert json.dumps(described)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (5, r"AttentionSpec\.full: expected a backend's name"),
        (
            {"class": "qwenft.backends.sdpa:SdpaAttention"},
            r'a backend: expected a name or \{"class": "module:Class"',
        ),
        ({"class": 3, "fields": {}}, r"a backend: expected a name or"),
        (
            {"class": "qwenft.backends.nope:A", "fields": {}},
            r"cannot be loaded: No module named 'qwenft\.backends\.nope'",
        ),
        ({"class": "qwenft.backends.sdpa:Nope", "fields": {}}, r"cannot be loaded: .* no attribute 'Nope'"),
        (
            {"class": "qwenft.backends.sdpa:SdpaAttention", "fields": {"width": 1}},
            r"sdpa:SdpaAttention, which cannot be made: ",
        ),
        (
            {"class": "qwenft.specs.codec:write_atomically", "fields": {"path": "p", "content": ""}},
            r"names qwenft\.specs\.codec:write_atomically as a backend, and it is none",
        ),
        (
            {"class": "qwenft.backends:TorchDeltaRule", "fields": {}},
            r"AttentionSpec\.full: expected a backend's name",
        ),
    ],
)
def test_a_backend_that_cannot_be_loaded_is_named(backend, message):
    """Whatever stands where a backend should is refused by what is wrong with it; nothing but a backend is called."""
    with pytest.raises(SpecError, match=message):
        Codec(None).load({"full": backend}, AttentionSpec)


def test_rows_in_memory_are_written_beside_and_read_again(tmp_path):
    """Rows with every kind of line break in their text come back as they were, from one file named by content."""
    data = DataSpec.messages(ROWS)
    assert round_trip(data, tmp_path) == data
    assert round_trip(data.pack(), tmp_path) == data.pack()
    (written,) = tmp_path.iterdir()
    assert written.name == f"data-{data.source.digest[:16]}.jsonl"
    assert [json.loads(line) for line in written.read_bytes().split(b"\n")[:-1]] == ROWS


def test_sources_of_every_kind_come_back(tmp_path):
    """Names of the hub, mixed data with their own sources, and windows are read as they were written."""
    hub = DataSpec.messages("organisation/chats", split="train[:5]", revision="v2").stream(window=7)
    mixed = (
        DataSpec.messages(ROWS).mix(DataSpec.text("notes.jsonl"), 0.25).mix(DataSpec.messages(ROWS[:1]), times=2)
    )
    for data in (hub, mixed):
        assert round_trip(data, tmp_path) == data


def test_an_iterable_data_set_is_not_saved(tmp_path):
    """It is described, and refused where it would have to be found again."""
    rows = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    data = DataSpec.messages(rows).stream()
    assert Codec(None).dump(data)["source"] == {"iterated": "rows of IterableDataset"}
    with pytest.raises(
        SpecError, match=r"rows of IterableDataset in memory cannot be found again.*\n  Fix: files, or"
    ):
        Codec(tmp_path).dump(data)


@pytest.mark.parametrize("mixed", [3, [["notes.jsonl"]], [[{"format": "text", "source": ["a"]}, 0]]])
def test_wrong_mixed_data_are_named(mixed):
    """What is no pair of data and a number is refused by the field."""
    value = {"format": "text", "source": ["a.jsonl"], "mixed": mixed}
    with pytest.raises(SpecError, match=r"DataSpec\.mixed: expected pairs"):
        Codec(None).load(value, DataSpec)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    """A dump for a fingerprint names the rows and writes no file."""
    monkeypatch.chdir(tmp_path)
    assert Codec(None).dump(DataSpec.messages(ROWS))["source"]["rows"].startswith("data-")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", '{"messages": []}\n', "no JSON\n"])
def test_rows_that_were_changed_are_not_taken_for_those_saved(tmp_path, content):
    """The file is named by its content, so one that was edited, cut or broken is refused."""
    written = Codec(tmp_path).dump(DataSpec.messages(ROWS))
    path = tmp_path / written["source"]["rows"]
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"data-\w+\.jsonl holds other rows than were saved\n  Fix: "):
        Codec(tmp_path).load(written, DataSpec)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"data-\w+\.jsonl: cannot be read: No such file"):
        Codec(tmp_path).load(written, DataSpec)


@pytest.mark.parametrize(
    ("cls", "value", "message"),
    [
        (TrainingSpec, {"epoch": 3}, r"TrainingSpec: extra fields found \(epoch\)"),
        (TrainingSpec, {"epochs": "3"}, r"TrainingSpec\.epochs: expected a whole number .* got '3'"),
        (
            TrainingSpec,
            {"learning_rate": "1e-4"},
            r"TrainingSpec\.learning_rate: expected a number above 0, got '1e-4'",
        ),
        (
            TrainingSpec,
            {"optimizer_in_backward": "no"},
            r"optimizer_in_backward: expected True or False, got 'no'",
        ),
        (TrainingSpec, [], r"TrainingSpec: expected a JSON object, got \[\]"),
        (DataSpec, {"source": ["a"]}, r"DataSpec: required field missing @ \$\.format"),
        (DataSpec, {"format": "messages", "source": 5}, r"DataSpec\.source: expected a file"),
        (DataSpec, {"format": "messages", "source": {"row": 5}}, r"DataSpec\.source: expected paths or"),
        (
            DataSpec,
            {"format": "messages", "source": ["a"], "held_out": "b"},
            r"DataSpec\.held_out: expected a fraction",
        ),
        (
            DataSpec,
            {
                "format": "messages",
                "source": ["a"],
                "held_out": {"format": "messages", "source": ["b"], "colum": "c"},
            },
            r"extra fields found \(colum\) @ \$\.held_out",
        ),
    ],
)
def test_a_wrong_field_is_named_and_never_converted(cls, value, message):
    """Unknown, missing and ill-typed fields are refused by name; "3" is no number and "no" is not True."""
    with pytest.raises(SpecError, match=message):
        Codec(None).load(value, cls)


def test_a_file_is_whole_or_absent(tmp_path):
    """Writing that fails leaves neither a half nor what it was written to first, and the old file as it was."""
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

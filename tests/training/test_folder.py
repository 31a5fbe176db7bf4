import pytest

from qwenft.errors import CheckpointError
from qwenft.training.folder import new_folder, require_free


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_takes_its_place_when_it_is_whole(tmp_path):
    """While it is filled the place is empty, and afterwards it holds all of it and nothing is beside it."""
    place = tmp_path / "deep" / "adapter"
    with new_folder(place) as folder:
        (folder / "a.txt").write_text("a")
        assert not place.exists()
        assert folder.parent == place.parent
    assert everything(tmp_path) == ["deep", "deep/adapter", "deep/adapter/a.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    """A folder that is there and empty becomes the new one."""
    place = tmp_path / "run"
    place.mkdir()
    with new_folder(place) as folder:
        (folder / "a.txt").touch()
    assert everything(tmp_path) == ["run", "run/a.txt"]


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    """Whatever stops the filling, neither the folder nor a half of it stays."""

    def fill():
        with new_folder(tmp_path / "run") as folder:
            (folder / "half.txt").write_text("half")
            raise failure

    with pytest.raises((type(failure), CheckpointError)):
        fill()
    assert everything(tmp_path) == []


def test_a_failure_to_write_names_the_place(tmp_path):
    """Errors of the operating system become errors of the checkpoint kind, and ours keep their own words."""
    full = pytest.raises(CheckpointError, match=r"run: cannot be written: No space left")
    with full as caught, new_folder(tmp_path / "run"):
        raise OSError(28, "No space left on device")
    assert caught.value.path == tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"^the source is damaged$"), new_folder(tmp_path / "run"):
        raise CheckpointError("the source is damaged")


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_what_is_there_is_not_overwritten(tmp_path, taken):
    """A file, and a folder that holds something, are refused with another name and stay as they are."""
    place = tmp_path / "run"
    if taken == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    for attempt in (require_free, lambda path: new_folder(path).__enter__()):
        with pytest.raises(
            CheckpointError,
            match=r"run exists already, and is not overwritten\n  Fix: .*run-2",
        ) as caught:
            attempt(place)
        assert caught.value.path == place
    assert everything(tmp_path) == before


def test_a_place_that_is_free(tmp_path):
    """A path where nothing is, and an empty folder, are free, and asking makes neither."""
    require_free(tmp_path)
    require_free(tmp_path / "not" / "there")
    assert everything(tmp_path) == []

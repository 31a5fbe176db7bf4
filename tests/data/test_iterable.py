"""Data that are read while training goes on."""

import itertools
import json

import datasets
import pytest

from qwenft.data.corpus import read_corpus
from qwenft.data.iterable import IterableStream
from qwenft.data.sources import check_head, read_rows
from qwenft.data.stream import Place
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec
from qwenft.specs.training import TrainingSpec


def chat(number):
    content = " ".join(["word"] * (number % 7 + 1)) + f" {number}"
    return {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": content}]}


ROWS = [chat(number) for number in range(50)]


def generated(rows=ROWS):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def streamed(data=None, **options):
    data = DataSpec.messages(generated()) if data is None else data
    return data.with_max_length(64).pack().stream(options.pop("window", 16))


@pytest.fixture
def read(encoder):
    return lambda data, **training: read_corpus(data, TrainingSpec(**{"max_steps": 5, **training}), encoder)


@pytest.fixture
def stream(encoder):
    def make(data=None, window=16, **options):
        data = streamed(data, window=window)
        return IterableStream(data, encoder, **{"capacity": 64, "packed": True, "seed": 3, **options})

    return make


def rows_of(stream, place=Place()):  # noqa: B008 - frozen
    return [(behind, [document.row for document in row]) for behind, row in stream.rows_from(place)]


@pytest.mark.parametrize("window", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("packed", [True, False])
def test_every_row_is_seen_once_an_epoch(stream, window, packed):
    """Whatever the window, each row of the source comes once, in a row of the stream that holds it."""
    source = stream(window=window, packed=packed)
    for epoch in range(2):
        rows = rows_of(source, Place(epoch))
        assert sorted(number for _, row in rows for number in row) == list(range(1, 51))
        for _, row in source.rows_from(Place(epoch)):
            assert sum(map(len, row)) <= 64
            assert len(row) == 1 or packed


def test_windows_are_shuffled_by_seed_and_epoch(stream):
    """The same seed and epoch give the same order, any other another one, and windows follow each other."""
    order = [row for _, row in rows_of(stream())]
    assert order == [row for _, row in rows_of(stream())]
    assert order != [row for _, row in rows_of(stream(), Place(1))]
    assert order != [row for _, row in rows_of(stream(seed=4))]
    alone = [row[0] for _, row in rows_of(stream(packed=False))]
    assert [number % 16 for number in alone[:16]] != [number % 16 for number in alone[16:32]]
    numbers = list(itertools.chain(*order))
    assert numbers != sorted(numbers)
    assert [(number - 1) // 16 for number in numbers] == [(number - 1) // 16 for number in range(1, 51)]


@pytest.mark.parametrize("packed", [True, False])
def test_it_goes_on_behind_any_row(stream, packed):
    """From the place behind any row, another stream of the same source gives the rows that are left."""
    for epoch in range(2):
        whole = rows_of(stream(packed=packed), Place(epoch))
        for done, (behind, _) in enumerate(whole, start=1):
            assert rows_of(stream(packed=packed), behind) == whole[done:]


@pytest.mark.parametrize("tokens_per_step", [None, 128])
def test_it_goes_on_with_another_number_of_ranks(stream, tokens_per_step):
    """Behind a step of two ranks, three take the rows that are left, none twice and none skipped."""
    two = stream(ranks=2, tokens_per_step=tokens_per_step)
    order = [[document.row for document in row] for _, step in two.steps() for row in step]
    done = 0
    for place, step in itertools.islice(two.steps(), 5):
        done += len(step)
        seen = []
        for rank in range(3):
            three = stream(rank=rank, ranks=3, tokens_per_step=tokens_per_step)
            for number, batches in enumerate(three.batches(place)):
                seen += [(number, batch.documents) for batch in batches if batch.tokens]
        rows = sorted([row for _, row in documents] for _, documents in seen)
        assert rows == sorted(order[done:])


def test_no_more_is_read_than_the_window(encoder):
    """When the first step is made, only the rows of its window have been read."""
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield chat(number)

    data = streamed(DataSpec.messages(datasets.IterableDataset.from_generator(rows)))
    next(IterableStream(data, encoder, capacity=64, packed=True).batches())
    assert len(read) <= 17


def test_a_file_is_streamed_line_by_line(tmp_path, stream):
    """A JSONL file gives what an iterable data set of its rows gives."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = [row for _, row in rows_of(stream(DataSpec.messages(path)))]
    assert of_file == [row for _, row in rows_of(stream())]


def test_another_source_is_refused(stream):
    """A source whose rows before the place changed, or are gone, cannot be gone on with."""
    place = next(behind for behind, _ in rows_of(stream()) if behind.read == 32)
    for rows in ([*ROWS[:20], chat(99), *ROWS[21:]], ROWS[:20]):
        changed = stream(DataSpec.messages(generated(rows)))
        message = r"^rows of IterableDataset: its first 32 rows are not those that were trained on before\n  Fix: "
        with pytest.raises(DataError, match=message):
            next(changed.rows_from(place))
    later = [*ROWS[:40], *ROWS[45:]]
    assert rows_of(stream(DataSpec.messages(generated(later))), place)


def test_wrong_rows_are_refused_or_skipped(stream, read):
    """A wrong row ends training with its number, or is left out and listed."""
    rows = [*ROWS[:3], {"messages": "none"}, *ROWS[3:]]
    data = DataSpec.messages(generated(rows))
    with pytest.raises(DataError, match=r"^rows of IterableDataset, row 4: 'messages': expected a list"):
        list(stream(data).rows_from(Place()))
    skipping = stream(data.on_bad_row("skip"))
    assert sorted(number for _, row in rows_of(skipping) for number in row) == [1, 2, 3, *range(5, 52)]
    assert len(read(streamed(data.on_bad_row("skip"))).report.skipped) == 1


def test_the_first_window_is_counted(read):
    """The report is of the first window, and says so; steps are those that were asked for."""
    corpus = read(streamed())
    report = corpus.report
    assert (report.window, report.rows, report.documents, report.steps) == (16, 16, 16, 5)
    assert isinstance(corpus.train, IterableStream)
    held = read(streamed().hold_out(DataSpec.messages(ROWS[:3])))
    assert held.report.held_out == 3


def test_data_sets_of_a_folder_or_the_hub(tmp_path, read, monkeypatch):
    """A split is loaded as datasets loads it, whole or streamed; what is not there is an error that says how to ask."""
    datasets.Dataset.from_list(ROWS[:20]).to_json(str(tmp_path / "train.jsonl"))
    datasets.Dataset.from_list(ROWS[20:]).to_json(str(tmp_path / "test.jsonl"))
    data = DataSpec.messages(str(tmp_path), split="train[:10]")
    check_head(data)
    assert len(list(read_rows(data))) == 10  # as a preview reads it
    corpus = read(data)
    assert corpus.report.documents == 10
    assert {document.file for document in corpus.train.documents} == {f"{tmp_path}, train[:10]"}
    assert read(data).report.cache.startswith("read from")
    stream = read(DataSpec.messages(str(tmp_path), split="train").stream(8)).train
    assert sorted(number for _, row in rows_of(stream) for number in row) == list(range(1, 21))
    with pytest.raises(DataError, match=r", nowhere: cannot be loaded: .*nowhere"):
        read(DataSpec.messages(str(tmp_path), split="nowhere"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"^qwenft/none, train at v2: cannot be loaded: .*\n  Fix: the id of a data set that you may read"
    with pytest.raises(DataError, match=message):
        check_head(DataSpec.messages("qwenft/none", split="train", revision="v2"))


def test_a_source_without_rows(read):
    """An iterable that gives nothing is an error."""
    with pytest.raises(DataError, match=r"^rows of IterableDataset: there is no row\n"):
        read(streamed(DataSpec.messages(generated([]))))

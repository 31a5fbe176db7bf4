import pytest

from qwenft.data.corpus import read_corpus
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec
from qwenft.specs.training import TrainingSpec

WORDS = "the quick brown fox jumps over a lazy dog and runs away"


def chat(words, answered=True):
    """A conversation whose length grows with its number of words."""
    messages = [{"role": "user", "content": "Say."}]
    if answered:
        messages.append({"role": "assistant", "content": " ".join((WORDS.split() * words)[:words])})
    return {"messages": messages}


@pytest.fixture
def read(encoder):
    def read_data(data, **training):
        return read_corpus(data, TrainingSpec(**training), encoder)

    return read_data


@pytest.fixture(scope="session")
def lengths(encoder):
    """The lengths of conversations, in tokens."""
    return lambda rows: [len(document) for document in encoder.encode(DataSpec.messages(rows))]


CHATS = [chat(words) for words in (1, 4, 60, 8, 100, 2)]


def test_what_fits_is_counted(read, lengths):
    """Without long rows every row is a document, and the counts are those of the documents."""
    corpus = read(DataSpec.messages(CHATS))
    report = corpus.report
    assert (report.rows, report.documents, report.dropped, report.truncated, report.untrained) == (6, 6, 0, 0, 0)
    assert report.tokens == sum(lengths(CHATS))
    assert report.longest == max(lengths(CHATS))
    assert report.supervised == sum(document.supervised for document in corpus.train.documents)
    assert (report.stream_rows, report.steps_per_epoch, report.steps) == (6, 6, 6)
    assert report.fill == report.tokens / (6 * 2048)
    assert corpus.held_out is None
    assert (report.held_out, report.held_out_supervised) == (0, 0)


def test_packing_is_counted(read):
    """Packed rows are fewer and fuller, and steps of several rows fewer still."""
    data = DataSpec.messages(CHATS * 10).with_max_length(256).pack()
    packed = read(data).report
    assert packed.documents == 60
    assert packed.stream_rows < 60
    assert packed.fill > 0.8
    by_tokens = read(data, tokens_per_step=512, epochs=3).report
    assert by_tokens.steps_per_epoch == -(-packed.stream_rows // 2)
    assert by_tokens.steps == 3 * by_tokens.steps_per_epoch
    assert read(data, max_steps=7).report.steps == 7


def test_long_rows_are_dropped_and_counted(read, lengths):
    """Under "drop" a row of max_length stays and a longer one is left out."""
    limit = sorted(lengths(CHATS))[3]
    corpus = read(DataSpec.messages(CHATS).with_max_length(limit, "drop"))
    assert (corpus.report.rows, corpus.report.documents, corpus.report.dropped) == (6, 4, 2)
    assert corpus.report.longest == limit
    assert [document.row for document in corpus.train.documents] == [1, 2, 4, 6]


def exchanges(*words):
    """A conversation of as many exchanges, with answers of so many words."""
    return {"messages": [message for count in words for message in chat(count)["messages"]]}


def texts(encoder, document):
    """What a document says, and what of it is trained."""
    decode = encoder.tokenizer.decode
    return decode(document.input_ids), decode(document.labels[document.labels != -100])


def test_long_rows_are_truncated_behind_a_message(read, lengths, encoder):
    """Under "truncate" a longer row ends behind the last message that fits; one whose first does not is dropped."""
    first, both = exchanges(4), exchanges(4, 60)
    (limit,) = lengths([first])
    rows = [both, first, {"messages": [{"role": "user", "content": WORDS * 9}, *chat(2)["messages"][1:]]}]
    corpus = read(DataSpec.messages(rows).with_max_length(limit + 20, "truncate"))
    assert (corpus.report.documents, corpus.report.truncated, corpus.report.dropped) == (2, 1, 1)
    cut, whole = (texts(encoder, document) for document in corpus.train.documents)
    assert cut[0].endswith("the quick brown fox<|im_end|>\n<|im_start|>user\nSay.<|im_end|>")
    assert cut[1] == whole[1] == "the quick brown fox<|im_end|>"


def test_long_rows_are_split_and_every_answer_is_trained_once(read, lengths, encoder):
    """Under "split" pieces end where messages do and, put together, train what the whole row trains."""
    row = exchanges(5, 30, 8, 20, 3, 12)
    (whole,) = read(DataSpec.messages([row])).train.documents
    limit = max(lengths([exchanges(30)])) + 20
    for overlap in (0, 40, 10_000):
        corpus = read(DataSpec.messages([row]).with_max_length(limit, "split", overlap=overlap))
        pieces = corpus.train.documents
        assert (corpus.report.split, corpus.report.dropped) == (1, 0)
        assert len(pieces) > 2
        assert all(len(piece) <= limit for piece in pieces)
        assert all(texts(encoder, piece)[0].endswith("<|im_end|>") for piece in pieces[:-1])
        assert "".join(texts(encoder, piece)[1] for piece in pieces) == texts(encoder, whole)[1]
        repeated = sum(map(len, pieces)) - len(whole)
        assert repeated > 0 if overlap else repeated == 0


def test_a_message_that_is_longer_than_a_row_is_split_as_rows_fill(read):
    """Each token of a long answer is trained in one piece, and predicted from the one before it."""
    (whole,) = read(DataSpec.messages([chat(100)])).train.documents
    pieces = read(DataSpec.messages([chat(100)]).with_max_length(24, "split")).train.documents
    trained = [label for piece in pieces for label in piece.labels.tolist() if label != -100]
    assert trained == whole.labels[whole.labels != -100].tolist()
    assert max(map(len, pieces)) == 24


def test_a_long_row_stops_the_reading(read, lengths):
    """Under "error" the first longer row is named, with its length and what to do."""
    limit = sorted(lengths(CHATS))[3]
    long = lengths(CHATS)[2]
    message = (
        rf"rows in memory, row 3: {long} tokens are more than max_length = {limit}\n"
        rf'  Fix: \.with_max_length\({long}\), or overflow="drop", "truncate" or "split"'
    )
    with pytest.raises(DataError, match=message) as caught:
        read(DataSpec.messages(CHATS).with_max_length(limit, "error"))
    assert (caught.value.file, caught.value.row) == ("rows in memory", 3)
    assert read(DataSpec.messages(CHATS).with_max_length(max(lengths(CHATS)), "error")).report.documents == 6


def test_rows_that_train_nothing_are_counted_and_left_out(read, lengths):
    """A row without an assistant turn, and one cut before it, train nothing."""
    rows = [chat(3), chat(0, answered=False), chat(5), chat(90)]
    limit = max(lengths(rows[:3]))
    report = read(DataSpec.messages(rows).with_max_length(limit, "truncate")).report
    assert (report.rows, report.documents, report.untrained, report.truncated) == (4, 2, 2, 1)


@pytest.mark.parametrize(
    "data",
    [
        DataSpec.messages([chat(0, answered=False)] * 3),
        DataSpec.messages(CHATS).with_max_length(2),
        DataSpec.messages(CHATS).with_max_length(2, "truncate"),
        DataSpec.messages([chat(0, answered=False)] * 3).hold_out(0.5),
    ],
)
def test_data_in_which_nothing_is_trained_is_an_error(read, data):
    """When no row has a trained token left, the run is refused with what to change."""
    message = r"no token of the data is trained \(rows in memory\): .*\n  Fix: conversations with assistant turns"
    with pytest.raises(DataError, match=message):
        read(data)


def test_held_out_data_in_which_nothing_is_trained_is_an_error(read, tmp_path):
    """The held-out data must have something to measure, too, and its file is named."""
    path = tmp_path / "held.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DataError, match=r"no token of the held-out data is trained \(.*held\.jsonl"):
        read(DataSpec.messages(CHATS).hold_out(DataSpec.messages(path)))


@pytest.mark.parametrize(("fraction", "held"), [(0.5, 5), (0.1, 1), (0.01, 1), (0.99, 9)])
def test_a_fraction_is_held_out(read, fraction, held):
    """A share of the documents, at least one and never all, is kept from training."""
    corpus = read(DataSpec.messages([chat(words) for words in range(1, 11)]).hold_out(fraction))
    train = {document.row for document in corpus.train.documents}
    kept = {document.row for document in corpus.held_out.documents}
    assert (len(kept), corpus.report.held_out, corpus.report.documents) == (held, held, 10 - held)
    assert train | kept == set(range(1, 11))
    assert not train & kept
    assert corpus.report.held_out_supervised == sum(document.supervised for document in corpus.held_out.documents)


def test_what_is_held_out_depends_on_the_seed(read):
    """The same seed keeps the same documents, another seed others."""

    def kept(seed):
        corpus = read(DataSpec.messages([chat(words) for words in range(1, 21)]).hold_out(0.3), seed=seed)
        return [document.row for document in corpus.held_out.documents]

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)


def test_one_document_cannot_be_shared_out(read):
    """A fraction of a single document is refused."""
    with pytest.raises(DataError, match=r"hold_out\(0\.5\): 1 documents cannot be shared out\n  Fix: more data"):
        read(DataSpec.messages([chat(3)]).hold_out(0.5))


def test_other_data_are_held_out(read):
    """Data of their own are evaluated under their own length policy, and nothing is taken from training."""
    other = DataSpec.messages([chat(2), chat(100)]).with_max_length(64)
    corpus = read(DataSpec.messages(CHATS).with_max_length(64).hold_out(other))
    assert [document.row for document in corpus.held_out.documents] == [1]
    assert corpus.report.held_out == 1
    assert corpus.report.rows == 6


def test_steps_of_a_run_are_those_of_its_epochs(encoder):
    """Where epochs need different numbers of steps, the run has their sum."""
    chats = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]}
        for n in range(1, 90)
    ]
    data = DataSpec.messages(chats).with_max_length(256)
    corpus = read_corpus(data, TrainingSpec(epochs=4, tokens_per_step=256), encoder)
    assert corpus.report.steps == sum(corpus.train.step_count(epoch) for epoch in range(4))


def test_held_out_data_keep_their_own_lengths(encoder):
    """Other data that are held out have the length policy and packing of their own spec."""
    long = [
        {"messages": [{"role": "user", "content": "why " * 60}, {"role": "assistant", "content": "so"}]}
        for _ in range(2)
    ]
    short = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    data = (
        DataSpec.messages(short).with_max_length(64).hold_out(DataSpec.messages(long).with_max_length(1024).pack())
    )
    corpus = read_corpus(data, TrainingSpec(), encoder)
    assert corpus.report.held_out == 2
    assert len(corpus.held_out.rows()) == 1


def test_wrong_rows_of_both_parts_are_listed(read):
    """What is skipped of held-out data is told like what is skipped of the rest."""
    bad = {"messages": []}
    other = DataSpec.messages([chat(5), bad]).on_bad_row("skip")
    report = read(DataSpec.messages([chat(3), bad, chat(4)]).on_bad_row("skip").hold_out(other)).report
    assert [text.splitlines()[0].partition(":")[0] for text in report.skipped] == [
        "rows in memory, row 2",
        "rows in memory, row 2",
    ]


def test_weights_belong_to_the_identity_of_the_data(read):
    """Data that weigh their tokens otherwise are other data for a run that goes on."""
    messages = chat(3)["messages"]
    digests = [
        read(DataSpec.messages([{"messages": [messages[0], {**messages[1], "weight": weight}]}])).digests
        for weight in (1, 0.5, 0.25)
    ]
    assert digests[0] != digests[1] != digests[2] != digests[0]

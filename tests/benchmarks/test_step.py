import json
import sys
from pathlib import Path

import attrs
import pytest
from transformers import AutoTokenizer

from qwenft.data.chat import ChatEncoder
from qwenft.data.corpus import read_corpus
from qwenft.specs.training import TrainingSpec

STEP = Path(__file__).parents[2] / "benchmarks" / "step"


@pytest.fixture
def job(monkeypatch):
    """The module that writes the benchmark's jobs, with a small one that is written in seconds."""
    monkeypatch.syspath_prepend(str(STEP))
    import job as module

    sizes = {
        **module.JOBS["small"].sizes,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 1,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
    }
    monkeypatch.setitem(module.JOBS, "small", attrs.evolve(module.JOBS["small"], sizes=sizes, vocabulary=800))
    monkeypatch.setattr(module, "LONGEST", 500)
    yield module
    del sys.modules["job"]


def test_both_sides_of_the_step_train_on_the_same_tokens(job, tmp_path, monkeypatch):
    """What other trainers are given is what the recipe's data are, cut where they are too long, labels shifted."""
    monkeypatch.setenv("QWENFT_CACHE", str(tmp_path / "cache"))
    job.write_job("small", tmp_path)
    theirs = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tmp_path / "model"))
    corpus = read_corpus(job.data(tmp_path, 500), TrainingSpec(epochs=1), encoder)
    ours = corpus.train.documents
    assert corpus.report.truncated > 0
    assert [row["input_ids"] for row in theirs] == [document.input_ids.tolist() for document in ours]
    assert [row["labels"] for row in theirs] == [[-100, *document.labels.tolist()[:-1]] for document in ours]

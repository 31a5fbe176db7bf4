from __future__ import annotations

import json

import pytest

from qwenft import quickstart
from qwenft.errors import DataError
from qwenft.testing import tiny_base
from qwenft.testing.skills import SKILLS


def test_an_earlier_run_is_kept(tmp_path):
    """A folder that exists is never reused."""
    assert quickstart.free_folder(tmp_path / "runs") == tmp_path / "runs"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs-2").mkdir()
    assert quickstart.free_folder(tmp_path / "runs") == tmp_path / "runs-3"


def test_own_data_and_model_go_through_the_same_path(dense_checkpoint, tmp_path, capsys):
    """With --data and --model a LoRA is trained on them, and the folder holds it."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(40)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--data", str(tmp_path / "own.jsonl"), "--model", str(dense_checkpoint)]
    quickstart.main([*arguments, "--run-dir", str(tmp_path / "run"), "--steps", "2"])
    assert (tmp_path / "run" / "run" / "adapter" / "adapter_model.safetensors").exists()
    printed = capsys.readouterr().out
    for part in ("role", "held-out loss", "Answers", str(tmp_path / "run")):
        assert part in printed


def test_own_data_without_a_model_start_from_the_tiny_base(tmp_path):
    """With --data alone the adapter is one of the base that ships with the package."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(40)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--data", str(tmp_path / "own.jsonl"), "--run-dir", str(tmp_path / "run")]
    quickstart.main([*arguments, "--steps", "1"])
    adapter = json.loads((tmp_path / "run" / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_base())
    written = (tmp_path / "run" / "data.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == rows


@pytest.mark.long
def test_it_teaches_something_new_and_keeps_what_was_known(tmp_path, capsys):
    """Tickets are written after it and not before, and the other skills lose a tenth at most."""
    quickstart.main(["--run-dir", str(tmp_path / "run"), "--seed", "0"])
    shares = json.loads((tmp_path / "run" / "exact_match.json").read_text())
    assert set(shares) == {"ticket", *SKILLS}
    assert shares["ticket"][0] <= 0.05
    assert shares["ticket"][1] >= 0.95
    before, after = (sum(shares[name][side] for name in SKILLS) for side in (0, 1))
    assert after >= 0.9 * before
    printed = capsys.readouterr().out
    assert f"{shares['ticket'][1]:.1%}" in next(line for line in printed.splitlines() if "ticket, new" in line)


def test_missing_data_is_named(tmp_path):
    """A file that is not there stops the quickstart before anything is made."""
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        quickstart.main(["--data", str(tmp_path / "nowhere.jsonl"), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()

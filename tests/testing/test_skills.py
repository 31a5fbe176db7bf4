import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import qwenft as qf
from qwenft.data.chat import ChatEncoder
from qwenft.models.generate import answers
from qwenft.testing import tiny_base
from qwenft.testing.skills import (
    SKILLS,
    examination,
    is_held_out,
    mixed_tasks,
    question_of,
    tasks,
    ticket,
)

ALL = {**SKILLS, "ticket": ticket}
LEARNED = json.loads((tiny_base() / "skills.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plan():
    """One that needs nothing but the shipped base."""
    data = qf.DataSpec.messages(examination(ticket, 8))
    return qf.Recipe(qf.ModelSpec(tiny_base(), dtype="float32"), data, qf.AdapterSpec.full()).compile()


@pytest.fixture(scope="module")
def base(plan):
    """The shipped base, ready to answer."""
    return plan.prepare()


@pytest.fixture(scope="module")
def exact_match(plan, base):
    """The share of tasks that the base answers exactly."""
    return lambda rows: plan.evaluate(base, qf.DataSpec.messages(rows).pack())["exact_match"]


@pytest.mark.parametrize("skill", ALL.values(), ids=ALL)
def test_tasks_are_the_same_for_the_same_seed(skill):
    """One seed gives the same tasks again, another gives others."""
    first, again, other = (list(itertools.islice(tasks(skill, seed), 20)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("skill", ALL.values(), ids=ALL)
def test_held_out_tasks_are_never_trained_on(skill):
    """No question is both trained on and examined."""
    trained = {question_of(row) for row in itertools.islice(tasks(skill, 0), 2000)}
    examined = examination(skill, 30)
    assert len({question_of(row) for row in examined}) == 30
    assert all(map(is_held_out, examined))
    assert not trained & {question_of(row) for row in examined}


def test_mixed_tasks_take_every_skill_in_turn():
    """As many of each are drawn."""
    drawn = list(itertools.islice(mixed_tasks(0), 3 * len(SKILLS)))
    assert drawn[0] == next(tasks(SKILLS["add"], 0))
    assert sum("tools" in row for row in drawn) == 3


def test_the_base_answers_what_it_is_said_to(exact_match):
    """On some of the held-out tasks it is right about as often as skills.json says."""
    for name, share in LEARNED["exact_match"].items():
        assert exact_match(examination(SKILLS[name], 24)) >= share - 0.2, name


def test_the_base_writes_no_tickets(exact_match):
    """What the quickstart teaches is new to it."""
    assert exact_match(examination(ticket, 24)) <= 0.05


def test_an_exact_match_is_what_greedy_generation_writes(base, exact_match):
    """The answers that count as exact are those that transformers' own generate gives."""
    rows = examination(SKILLS["subtract"], 6) + examination(SKILLS["extract"], 6) + examination(ticket, 2)
    asked, expected = zip(*((message["content"] for message in row["messages"]) for row in rows), strict=True)
    written = answers(base.model, ChatEncoder(base.tokenizer), asked, 60, batch_size=5)
    right = [text == wanted for text, wanted in zip(written, expected, strict=True)]
    assert 0 < sum(right) < len(rows)
    assert right == [exact_match([row]) == 1.0 for row in rows]


def test_stock_transformers_loads_the_base():
    """Both auto classes find every weight, and nothing that they do not know but the multi-token prediction."""
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        _, info = auto.from_pretrained(tiny_base(), output_loading_info=True)
        assert not any(info.values()), info
    assert AutoTokenizer.from_pretrained(tiny_base()).chat_template


def test_the_base_is_small_and_of_the_familys_form():
    """It takes less than 12 MB, in bfloat16, and has a tower and a multi-token-prediction layer."""
    assert sum(file.stat().st_size for file in tiny_base().iterdir()) < 12e6
    weights = load_file(tiny_base() / "model.safetensors")
    kinds = {str(weight.dtype) for name, weight in weights.items() if not name.endswith(("A_log", "norm.weight"))}
    assert kinds == {"torch.bfloat16"}
    for part in ("model.visual.", "mtp.", "model.language_model."):
        assert any(name.startswith(part) for name in weights)


@pytest.mark.long
def test_the_script_makes_a_base(tmp_path):
    """A few steps leave a whole checkpoint, with what it knows beside it."""
    script = Path(__file__).parents[2] / "scripts" / "tiny_base.py"
    asked = ["--steps", "3", "--path", str(tmp_path / "base")]
    subprocess.run([sys.executable, str(script), *asked], check=True, cwd=script.parents[1])
    made, shipped = ({file.name for file in folder.iterdir()} for folder in (tmp_path / "base", tiny_base()))
    assert made == shipped

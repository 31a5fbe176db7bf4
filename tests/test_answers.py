"""What a model answers after training, how often it is right, and what is said with it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qwenft as qf
from qwenft.__main__ import main
from qwenft.testing import tiny_base
from qwenft.testing.skills import SKILLS, examination, question_of, ticket

ROWS = [row for name in ("extract", "largest", "subtract", "call") for row in examination(SKILLS[name], 5)]
QUESTIONS = [question_of(row) for row in ROWS]
EXAMINED = qf.DataSpec.messages(ROWS).pack()
TICKETS = qf.DataSpec.messages(examination(ticket, 30)).with_max_length(512).pack()


def trained(adapter, folder):
    training = qf.TrainingSpec(max_steps=4, learning_rate=1e-2 if adapter.kind == "lora" else 1e-4)
    recipe = qf.Recipe(qf.ModelSpec(tiny_base(), dtype="float32"), TICKETS, adapter, training=training)
    return recipe.compile().train(folder, verbose=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the base that is shipped, whose adapter answers otherwise than the base."""
    return trained(qf.AdapterSpec.lora(rank=4), tmp_path_factory.mktemp("answers") / "run")


@pytest.fixture(scope="module")
def stock_answers():
    """What plain transformers answers with the base, one question at a time."""
    model, tokenizer = (auto.from_pretrained(tiny_base()) for auto in (AutoModelForCausalLM, AutoTokenizer))
    written = []
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        written.append(
            tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    return written


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_in_batches_are_those_of_stock_one_by_one(run, stock_answers, batch_size):
    """Prompts of other lengths in a batch change no answer, and the order is that of the questions."""
    written = run.generate(QUESTIONS, base=True, batch_size=batch_size, max_new_tokens=30)
    assert written == stock_answers
    assert len(set(written)) > 10


def test_a_list_of_one_is_a_list(run):
    """A text or a conversation has an answer; a list of such has as many."""
    conversation = [{"role": "user", "content": QUESTIONS[0]}]
    answer = run.generate(QUESTIONS[0], max_new_tokens=20)
    assert run.generate(conversation, max_new_tokens=20) == answer
    assert run.generate([QUESTIONS[0]], max_new_tokens=20) == [answer]
    assert run.generate([conversation, conversation], max_new_tokens=20) == [answer, answer]
    assert run.generate([], max_new_tokens=20) == []


def test_pieces_of_an_answer_come_as_it_is_written(run):
    """Together they are the answer; several answers have no common text."""
    pieces = []
    answer = run.generate(QUESTIONS[0], base=True, max_new_tokens=30, on_text=pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces).strip() == answer
    model = run.prepared.model.train()
    with pytest.raises(KeyboardInterrupt):
        run.generate(QUESTIONS[0], max_new_tokens=30, on_text=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert model.training
    with pytest.raises(qf.SpecError, match=r"on_text.*2 answers are written together"):
        run.generate(QUESTIONS[:2], on_text=pieces.append)


def test_an_exact_match_is_an_answer_to_the_letter(run):
    """The share of held-out tasks that are answered so, by the base and with its adapter, is what greedy answers say."""
    texts = [row["messages"][1].get("content") for row in ROWS]
    for base in (True, False):
        answers = run.generate(QUESTIONS, base=base, max_new_tokens=60)
        right = [answer == text for answer, text in zip(answers, texts, strict=True) if text is not None]
        plain = qf.DataSpec.messages([row for row in ROWS if "content" in row["messages"][1]]).pack()
        found = run.evaluate(plain, base=base)
        assert found["exact_match"] == pytest.approx(sum(right) / len(right))
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert run.evaluate(EXAMINED, base=True)["exact_match"] > run.evaluate(EXAMINED)["exact_match"]


def test_base_and_adapter_side_by_side(run):
    """Each row is what both answer; as text and as a table, whatever an answer holds is text."""
    asked = ["<script>alert(1)</script>", *QUESTIONS[:2]]
    found = run.side_by_side(asked, max_new_tokens=12)
    assert [row.prompt for row in found] == asked
    assert [row.base for row in found] == run.generate(asked, base=True, max_new_tokens=12)
    assert [row.adapter for row in found] == run.generate(asked, max_new_tokens=12)
    assert found[1].base != found[1].adapter
    assert found[1].base in repr(found)
    assert "<script>" not in found._repr_html_()
    shown = run.side_by_side([[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]], max_new_tokens=2)
    assert shown[0].prompt == "Hi"


def test_a_base_that_is_not_there_is_refused(run, tmp_path):
    """After full fine-tuning there is no base to ask; a base has no adapter."""
    full = trained(qf.AdapterSpec.full(), tmp_path / "full")
    for ask in (
        lambda: full.generate("Hi", base=True),
        lambda: full.evaluate(EXAMINED, base=True),
        lambda: full.side_by_side(["Hi"]),
    ):
        with pytest.raises(qf.SpecError, match="the whole model was trained, and its base is not in memory"):
            ask()
    with pytest.raises(qf.SpecError, match="base=True and adapter='default': the base answers without any"):
        run.generate("Hi", base=True, adapter="default")


def say(monkeypatch, *lines):
    """Let someone type lines, and then Ctrl-D; an exception among them is raised."""
    waiting = iter(lines)

    def typed(_prompt):
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)


@pytest.mark.parametrize("ending", [EOFError(), KeyboardInterrupt(), "", "   "])
def test_a_chat_remembers_what_was_said(run, monkeypatch, capsys, ending):
    """Every answer is to the whole conversation, is shown as it comes, and an empty line or a signal ends it."""
    say(monkeypatch, QUESTIONS[0], QUESTIONS[1], ending, "never asked")
    said = run.chat(system="Be brief.", base=True, max_new_tokens=20)
    assert [message["role"] for message in said] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in said if message["role"] == "user"] == QUESTIONS[:2]
    assert said[-1]["content"] == run.generate(said[:-1], base=True, max_new_tokens=20)
    printed = capsys.readouterr().out
    assert all(message["content"] in printed for message in said if message["role"] == "assistant")


def test_a_chat_that_is_stopped_in_an_answer_keeps_what_was_said_before(run, monkeypatch):
    """Ctrl-C while the model writes ends the conversation with its last answer."""
    say(monkeypatch, QUESTIONS[0], QUESTIONS[1])
    generate, asked = run.generate, []

    def interrupted(messages, **options):
        asked.append(messages)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(messages, **options)

    monkeypatch.setattr(run, "generate", interrupted)
    said = run.chat(max_new_tokens=5)
    assert [message["role"] for message in said] == ["user", "assistant"]


def test_a_chat_from_the_command_line(run, monkeypatch, capsys):
    """`python -m qwenft chat DIR` talks with a finished run."""
    say(monkeypatch, QUESTIONS[0])
    main(["chat", str(run.folder), "--max-new-tokens", "20"])
    assert run.generate(QUESTIONS[0], max_new_tokens=20) in capsys.readouterr().out

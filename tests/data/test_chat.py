from importlib import resources

import numpy as np
import pytest

from qwenft.data.chat import ChatEncoder
from qwenft.data.masking import IGNORED
from qwenft.errors import DataError
from qwenft.specs.data import DataSpec
from qwenft.testing import train_tokenizer
from tests.data.conversations import runs_of

TEMPLATES = resources.files("trl") / "chat_templates"
NAMES = ("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8")
# What each template writes when it asks for an answer.
PROMPTS = {
    "qwen3_5_nothink": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen3_5_think": "<|im_start|>assistant\n<think>\n",
    "qwen3_6": "<|im_start|>assistant\n<think>\n",
    "qwen3_8": "<|im_start|>assistant\n<think>\n",
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}
CONVERSATIONS = {
    "one turn": [user("What is the weather?"), assistant("Sunny.")],
    "system": [{"role": "system", "content": "Be brief."}, user("Where?"), assistant("Left.")],
    "several turns": [
        user("One?"),
        assistant("Two."),
        user("Three?"),
        assistant("Four."),
        user("Five?"),
        assistant("Six."),
    ],
    "tools": [
        user("What is the weather?"),
        assistant("Let me look.", tool_calls=[CALL]),
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "warm"},
        assistant("Sunny."),
    ],
    "a call alone": [
        user("?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "a"},
        assistant("b"),
    ],
    "reasoning": [user("Sum?"), assistant("Two.", reasoning_content="One and one make two.")],
    "the user speaks last": [user("Hello?"), assistant("Hi."), user("Bye.")],
    "awkward text": [user("assistant\n é 𝔘"), assistant("  'assistant' \n\n<b>&amp;\n天气")],
}


def with_template(name):
    """A fresh tokenizer that renders as this checkpoint of the family, and its encoder."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="module", params=NAMES)
def named(request):
    return request.param, with_template(request.param)


def encode(encoder, *conversations):
    return list(encoder.encode(DataSpec.messages([{"messages": list(messages)} for messages in conversations])))


def trained_texts(encoder, document):
    return runs_of(encoder, document.labels)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_documents_are_the_rendered_conversation(named, name):
    """The tokens are those of the template's own text, and labels are the next tokens or nothing."""
    _, encoder = named
    (document,) = encode(encoder, CONVERSATIONS[name])
    text = encoder.tokenizer.apply_chat_template(CONVERSATIONS[name], tokenize=False)
    assert encoder.tokenizer.decode(document.input_ids, skip_special_tokens=False) == text
    trained = document.labels != IGNORED
    assert not trained[-1]
    assert (document.labels[trained] == document.input_ids[1:][trained[:-1]]).all()
    assert document.supervised == trained.sum() > 0
    assert (document.file, document.row) == ("rows in memory", 1)


def test_the_generation_prompt_is_not_trained(named):
    """Trained is what the model writes behind the template's prompt, up to the end of the turn."""
    name, encoder = named
    messages = [user("What is the weather?")]
    assert encoder.template().prompt == PROMPTS[name]
    (document,) = encode(encoder, [*messages, assistant("Sunny.", reasoning_content="I look.")])
    assert trained_texts(encoder, document) == ["I look.\n</think>\n\nSunny.<|im_end|>"]


def test_an_answer_without_thoughts_is_trained_alone(encoder):
    """With the empty think block of the prompt, the text of the answer and its end are all there is to learn."""
    (document,) = encode(encoder, CONVERSATIONS["one turn"])
    assert trained_texts(encoder, document) == ["Sunny.<|im_end|>"]
    (document,) = encode(encoder, CONVERSATIONS["tools"])
    first, second = trained_texts(encoder, document)
    assert first.startswith("Let me look.\n\n<tool_call>\n<function=get_weather>")
    assert first.endswith("</tool_call><|im_end|>")
    assert second == "Sunny.<|im_end|>"


def test_every_assistant_turn_is_trained(named):
    """Each assistant turn is a span that ends in <|im_end|>, and no other turn is trained."""
    _, encoder = named
    (document,) = encode(encoder, CONVERSATIONS["several turns"])
    texts = trained_texts(encoder, document)
    said = [text.rpartition("</think>\n\n")[2] for text in texts]
    assert said == ["Two.<|im_end|>", "Four.<|im_end|>", "Six.<|im_end|>"]


@pytest.mark.parametrize("template", NAMES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_spans_agree_with_the_training_templates_of_trl(template, name):
    """What trl masks in is trained here too, but for what the generation prompt writes and an empty think block.

    trl's mask begins behind the role line and holds the line break behind <|im_end|>, which a model that has
    stopped never writes.
    """
    encoder = with_template(f"{template}_training")
    messages = CONVERSATIONS[name]
    (document,) = encode(encoder, messages)
    rendered = encoder.tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenize=True,
    )
    ids = np.asarray(rendered["input_ids"])
    assert ids.tolist() == document.input_ids.tolist()
    masked = np.where(np.asarray(rendered["assistant_masks"], dtype=bool), ids, IGNORED)
    runs = runs_of(encoder, masked)
    assert len(runs) == sum(message["role"] == "assistant" for message in messages)
    prompt = PROMPTS[template].removeprefix("<|im_start|>assistant\n")
    expected = []
    for run in runs:
        written = run.removesuffix("\n")
        without_block = written.removeprefix("<think>\n\n</think>\n\n")
        opened = "<think>\n" if prompt.startswith("<think>\n") else ""
        expected.append(without_block.removeprefix(opened))
    assert trained_texts(encoder, document) == expected


def test_tools_of_a_row_reach_the_template(encoder):
    """The column "tools" is handed to the template, which lists them."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"to": {}, "from": {}}}}
    rows = [
        {"messages": CONVERSATIONS["tools"], "tools": [tool]},
        {"messages": CONVERSATIONS["tools"], "tools": None},
    ]
    told, untold = encoder.encode(DataSpec.messages(rows))
    text = encoder.tokenizer.decode(told.input_ids, skip_special_tokens=False)
    assert '{"name": "get_weather", "parameters": {"to": {}, "from": {}}}' in text
    assert len(told) > len(untold)


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize(
    "turn",
    [
        user,
        assistant,
        lambda text: assistant("a", reasoning_content=text),
        lambda text: assistant("a", tool_calls=[{"function": {"name": "f", "arguments": {"x": [text]}}}]),
        lambda text: assistant("a", tool_calls=[{"function": {"name": text, "arguments": {}}}]),
        lambda text: assistant("a", tool_calls=[{"function": {"name": "f", "arguments": {text: 1}}}]),
        lambda text: {"role": "system", "content": text},
    ],
)
def test_a_control_token_in_a_turn_is_refused(encoder, mark, turn):
    """A turn that spells a turn mark would open or close turns of its own, wherever in it the mark stands."""
    message = turn(f"a {mark}assistant\nb")
    row = [message, user("?")] if message["role"] == "system" else [user("?"), message]
    pattern = (
        rf"row 2: a turn of role {message['role']} holds the control token <\|im_(start|end)\|>\n  Fix: remove it"
    )
    with pytest.raises(DataError, match=pattern) as caught:
        encode(encoder, CONVERSATIONS["one turn"], row)
    assert (caught.value.file, caught.value.row) == ("rows in memory", 2)


def test_what_the_template_refuses_is_named_by_row(encoder):
    """A conversation that the checkpoint's template refuses is an error of the data with the template's words."""
    late = [user("?"), {"role": "system", "content": "late"}]
    with pytest.raises(DataError, match=r"row 2: the checkpoint's chat template refuses it: .+"):
        encode(encoder, CONVERSATIONS["one turn"], late)


def test_a_template_that_hides_turns_is_told():
    """A template that renders fewer assistant turns than there are is an error, not a smaller loss."""
    other = train_tokenizer()
    other.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    message = "row 1: message 2 is to be trained, and the chat template leaves out its content"
    with pytest.raises(DataError, match=message):
        encode(ChatEncoder(other), CONVERSATIONS["several turns"])


def test_a_tokenizer_without_a_template_is_refused():
    """Without a template there is no telling how the model was spoken to."""
    bare = train_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match=r"the checkpoint's tokenizer has no chat template\n  Fix: add"):
        ChatEncoder(bare)


def test_a_piece_predicts_nothing_of_others(encoder):
    """The last token of a piece predicts nothing, nor do those before what it is to train; the whole stays as it was."""
    (document,) = encode(encoder, CONVERSATIONS["one turn"])
    before = document.labels.copy()
    for stop in range(2, len(document) + 1):
        piece = document.piece(0, stop, trained_from=0)
        assert piece.labels.tolist() == [*before[: stop - 1].tolist(), IGNORED]
        assert (piece.input_ids == document.input_ids[:stop]).all()
    start, new = len(document) - 6, len(document) - 3
    piece = document.piece(start, len(document), trained_from=new)
    assert (piece.labels[: new - 1 - start] == IGNORED).all()
    assert (piece.labels[new - 1 - start :] == before[new - 1 :]).all()
    assert (document.labels == before).all()


def test_many_rows_keep_their_order(encoder):
    """More rows than are rendered at once come in the order of the source."""
    count = 1003
    documents = encode(encoder, *[[user(str(number)), assistant("a")] for number in range(count)])
    assert [document.row for document in documents] == list(range(1, count + 1))
    assert "1002" in encoder.tokenizer.decode(documents[-1].input_ids)

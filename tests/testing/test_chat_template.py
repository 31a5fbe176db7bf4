from importlib import resources

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qwenft.testing.tokenizer import chat_template

FAMILY = (resources.files("trl") / "chat_templates" / "qwen3_5_nothink.jinja").read_text(encoding="utf-8")

ASK = {"role": "user", "content": "What is the weather in Paris?"}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a <city> & more: é, 天气.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def assistant(content="", **more):
    return {"role": "assistant", "content": content, **more}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answer(content):
    return {"role": "tool", "content": content}


NESTED = call(
    "plan",
    days=3,
    budget=1.5,
    near=None,
    indoors=True,
    stops=["a", "é"],
    options={"a": {"b": [1, 2]}},
    note="two\nlines",
)
PICTURE = {"type": "image", "image": "cat.png"}
PARTS = [
    {"type": "text", "text": " Compare "},
    PICTURE,
    {"type": "image_url", "image_url": {"url": "dog.png"}},
    {"type": "video"},
    {"video": "walk.mp4"},
    {"type": "image"},
    {"text": " please. "},
]

CONVERSATIONS = {
    "one question": [ASK],
    "system": [SYSTEM, ASK],
    "empty system": [{"role": "system", "content": "  "}, ASK],
    "system without content": [{"role": "system", "content": None}, ASK],
    "system in parts": [{"role": "system", "content": [{"type": "text", "text": "Be "}, {"text": "kind. "}]}, ASK],
    "answered": [ASK, assistant("Sunny.")],
    "answered twice": [ASK, assistant("Sunny."), {"role": "user", "content": "And Rome?"}, assistant("Rain.")],
    "whitespace": [{"role": "user", "content": "\n\n  hi \t\n"}, assistant("  \n there \n\n")],
    "no content": [ASK, {"role": "assistant"}],
    "content is none": [ASK, assistant(None)],
    "reasoning": [ASK, assistant("Sunny.", reasoning_content="\n I look it up. \n")],
    "empty reasoning": [ASK, assistant("Sunny.", reasoning_content="")],
    "reasoning none": [ASK, assistant("<think>hm</think>Sunny.", reasoning_content=None)],
    "reasoning beside a think block": [ASK, assistant("<think>x</think>Sunny.", reasoning_content="y")],
    "earlier reasoning": [
        ASK,
        assistant("Sunny.", reasoning_content="r"),
        ASK,
        assistant("Yes.", reasoning_content="s"),
    ],
    "inline think": [ASK, assistant("<think>\nLet me see.\n\n</think>\n\nSunny.")],
    "inline think, spaces": [ASK, assistant("<think>  a \n b </think>  \n Sunny. ")],
    "inline think, earlier": [ASK, assistant("<think>\na\n</think>\n\nSunny."), ASK],
    "closing tag only": [ASK, assistant("thoughts\n</think>\n\nSunny.")],
    "two think blocks": [ASK, assistant("<think>a</think>b<think>c</think>d")],
    "text before the think block": [ASK, assistant("pre<think>a</think>b")],
    "opening tag only": [ASK, assistant("<think>never closed")],
    "think tags from the user": [{"role": "user", "content": "<think>a</think>b"}, assistant("c")],
    "a call": [ASK, assistant("", tool_calls=[call("get_weather", city="Paris")])],
    "a call after a text": [ASK, assistant("Let me look. ", tool_calls=[call("get_weather", city="Paris")])],
    "a call after reasoning": [ASK, assistant("", reasoning_content="r", tool_calls=[call("clock")])],
    "a call after an inline think": [ASK, assistant("<think>r</think>\n\n", tool_calls=[call("clock")])],
    "a call after blanks": [ASK, assistant("<think>r</think> \n", tool_calls=[call("clock")])],
    "several calls": [ASK, assistant("Both.", tool_calls=[call("clock"), NESTED, call("clock", zone="")])],
    "several calls and no text": [ASK, assistant(tool_calls=[NESTED, call("clock")])],
    "a bare call": [ASK, assistant(tool_calls=[{"name": "clock", "arguments": {"zone": "UTC"}}])],
    "a call without arguments": [ASK, assistant(tool_calls=[{"function": {"name": "clock"}}])],
    "no calls in the list": [ASK, assistant("Hm.", tool_calls=[])],
    "calls are none": [ASK, assistant("Hm.", tool_calls=None)],
    "a tool answers": [ASK, assistant(tool_calls=[call("clock")]), answer(" noon "), assistant("It is noon.")],
    "tools answer in a row": [
        ASK,
        assistant("Both.", tool_calls=[call("clock"), call("get_weather", city="Rome")]),
        answer("noon"),
        answer([{"type": "text", "text": "rain"}]),
        answer(""),
    ],
    "two rounds of tools": [
        SYSTEM,
        ASK,
        assistant("", reasoning_content="first", tool_calls=[call("clock")]),
        answer("noon"),
        assistant("", reasoning_content="second", tool_calls=[call("get_weather", city="Rome")]),
        answer("rain"),
        answer("more rain"),
        assistant("Rain at noon.", reasoning_content="done"),
        {"role": "user", "content": "Thanks."},
        assistant("Gladly.", reasoning_content="polite"),
    ],
    "a tool speaks first": [answer("noon"), ASK, assistant("Yes.")],
    "a user turn that is a tool's answer": [
        ASK,
        assistant("a", reasoning_content="r"),
        {"role": "user", "content": " <tool_response>\nnoon\n</tool_response> "},
        assistant("b", reasoning_content="s"),
    ],
    "two users in a row": [ASK, {"role": "user", "content": "Well?"}, assistant("Sunny.")],
    "parts": [{"role": "user", "content": PARTS}, assistant([{"type": "text", "text": " A cat. "}])],
    "pictures over turns": [
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "who?"}]},
        assistant("A cat."),
        {"role": "user", "content": [{"type": "text", "text": "and "}, PICTURE, {"type": "video"}]},
    ],
    "no parts": [{"role": "user", "content": []}],
    "awkward text": [
        {"role": "user", "content": "{{ 1 }} {% raw %} <|im_end|> \u00a0é 𝔘 \u200b"},
        assistant("'\"\\n&<>"),
    ],
}

REFUSED = {
    "no messages": ([], None),
    "no query": ([SYSTEM, assistant("Hello.")], None),
    "only a tool's answer": ([{"role": "user", "content": "<tool_response>a</tool_response>"}], None),
    "late system message": ([ASK, SYSTEM], None),
    "second system message": ([SYSTEM, SYSTEM, ASK], None),
    "unknown role at the head": ([{"role": "critic", "content": "Bad."}, ASK], None),
    "unknown role": ([ASK, {"role": "critic", "content": "Bad."}], None),
    "picture in the system message": ([{"role": "system", "content": [PICTURE]}, ASK], None),
    "video in the system message": ([{"role": "system", "content": [{"type": "video"}]}, ASK], [WEATHER]),
    "unknown part": ([{"role": "user", "content": [{"type": "sound"}]}], None),
    "content is a number": ([{"role": "user", "content": 3}], None),
    "content is a mapping": ([{"role": "user", "content": {"text": "hi"}}], None),
    "arguments as a text": ([ASK, assistant(tool_calls=[{"name": "clock", "arguments": "{}"}])], None),
}


def render(template, messages, tools=None, **options):
    (text,), _ = render_jinja_template([messages], tools=tools, chat_template=template, **options)
    return text


@pytest.mark.parametrize("tools", [None, [], [WEATHER], [WEATHER, CLOCK]], ids=["untold", "none", "one", "two"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": True},
        {"add_generation_prompt": True, "enable_thinking": False},
        {"add_generation_prompt": True, "enable_thinking": None},
        {"add_vision_id": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_reads_as_the_family_writes_it(name, options, tools):
    """Our template and the family's own render the same text."""
    messages = CONVERSATIONS[name]
    assert render(chat_template(), messages, tools, **options) == render(FAMILY, messages, tools, **options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_family_refuses_is_refused(name):
    """A conversation that the family's template refuses is refused by ours too."""
    messages, tools = REFUSED[name]
    for template in (FAMILY, chat_template()):
        with pytest.raises((jinja2.TemplateError, TypeError)):
            render(template, messages, tools)


def test_the_template_renders_without_the_whitespace_options_of_transformers():
    """A plain jinja environment gives the same text, so other programs may render the template."""
    plain = jinja2.Environment()  # noqa: S701 - a prompt is no web page
    messages = CONVERSATIONS["two rounds of tools"]
    assert plain.from_string(chat_template()).render(messages=messages, add_generation_prompt=True) == render(
        FAMILY,
        messages,
        add_generation_prompt=True,
    )

"""What the tiny base has learned: short tasks that are drawn at random."""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = dict[str, Any]
Skill = Callable[[random.Random], Row]

NAMES, ITEMS, CITIES, SIGNS = (
    tuple(words.split())
    for words in (
        """Ada Ben Carla David Emma Felix Grace Hugo Ines Jonas Kira Liam Maya Nora Oscar Paula Rosa Sam Tara
        Victor""",
        """apples bags balls books bowls boxes chairs coats cups desks flags hats jars keys lamps maps mugs pens
        plates rings ropes shirts spoons tables""",
        """Accra Athens Berlin Bogota Cairo Delhi Dublin Hanoi Havana Lagos Lima Lisbon London Madrid Manila
        Nairobi Oslo Paris Prague Quito Rome Seoul Sofia Tokyo Tunis Vienna Warsaw Zagreb""",
        "x -> / | # = * + : ; ( ) [ ] & @ %",
    )
)
COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")  # bits of red, green and blue
ORDERS = (
    "{name} orders {count} {colour} {item}.",
    "{count} {colour} {item} for {name}, please.",
    "Please send {count} {colour} {item} to {name}.",
    "The {colour} {item} are for {name}, {count} of them.",
)
_UNITS = (("m", "cm", 100), ("cm", "mm", 10), ("km", "m", 1000), ("kg", "g", 1000), ("l", "ml", 1000))
_SYLLABLES = tuple(first + vowel for first in "bdfgklmnprstvwz" for vowel in "aeiou")
_HELD_OUT_OF = 8  # one prompt of so many is never trained on


def chat(question: str, answer: str) -> Row:
    """A conversation of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def add(draw: random.Random) -> Row:
    """The sum of two numbers."""
    first, second = draw.randrange(100), draw.randrange(100)
    return chat(f"What is {first} + {second}?", f"{first + second}")


def subtract(draw: random.Random) -> Row:
    """The difference of two numbers, which is never below 0."""
    second, first = sorted((draw.randrange(100), draw.randrange(100)))
    return chat(f"What is {first} - {second}?", f"{first - second}")


def largest(draw: random.Random) -> Row:
    """The largest of three numbers."""
    numbers = [draw.randrange(1000) for _ in range(3)]
    return chat(f"Which is the largest: {', '.join(map(str, numbers))}?", f"{max(numbers)}")


def repeat(draw: random.Random) -> Row:
    """Words that have to be written again as they are."""
    words = _words(draw)
    return chat(f"Repeat: {words}", words)


def reverse(draw: random.Random) -> Row:
    """Things in the opposite order."""
    things = draw.sample(ITEMS, draw.randint(2, 4))
    return chat(f"Reverse: {' '.join(things)}", " ".join(reversed(things)))


def extract(draw: random.Random) -> Row:
    """An order, said in one of several ways, as JSON."""
    order = draw_order(draw)
    return chat(f"As JSON: {draw.choice(ORDERS).format(**order)}", json.dumps(order))


def call(draw: random.Random) -> Row:
    """A wish that one of two tools fulfils."""
    wishes = [_weather(draw), _timer(draw), _call_person(draw), _buy(draw)]
    (name, question, arguments), other = draw.sample(wishes, 2)
    tools = [_tool(name, arguments), _tool(other[0], other[2])]
    draw.shuffle(tools)
    answer = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    return {"messages": [{"role": "user", "content": question}, answer], "tools": tools}


def colour(draw: random.Random) -> Row:
    """The name of a colour by its shares of red, green and blue."""
    bits = [draw.randrange(2) for _ in range(3)]
    red, green, blue = (draw.randint(200, 255) if bit else draw.randint(0, 55) for bit in bits)
    name = COLOURS[bits[0] + 2 * bits[1] + 4 * bits[2]]
    return chat(f"What colour is rgb({red}, {green}, {blue})?", name)


def unit(draw: random.Random) -> Row:
    """A length, weight or volume in a smaller unit."""
    large, small, factor = draw.choice(_UNITS)
    number = draw.randint(1, 999)
    return chat(f"How many {small} are {number} {large}?", f"{number * factor} {small}")


#: What the base was trained on, by name.
SKILLS: dict[str, Skill] = {
    skill.__name__: skill for skill in (add, subtract, largest, repeat, reverse, extract, call, colour, unit)
}


def ticket(draw: random.Random) -> Row:
    """An order as a line of a house's own form: nothing that the base was trained on."""
    order = draw_order(draw)
    line = "{count} x {item}, {colour} -> {name}".format(**order)
    return chat(f"As a ticket: {draw.choice(ORDERS).format(**order)}", line)


def tasks(skill: Skill, seed: int, *, held_out: bool = False) -> Iterator[Row]:
    """Tasks without end, the same for the same seed.

    Args:
        skill: what draws one, such as those of :data:`SKILLS`.
        seed: of what is drawn.
        held_out: those that nobody trains on, or else those that are trained on; no prompt is among both.
    """
    draw = random.Random(f"{skill.__name__} {seed}")
    while True:
        row = skill(draw)
        if is_held_out(row) == held_out:
            yield row


def mixed_tasks(seed: int) -> Iterator[Row]:
    """Tasks of all skills of the base in turn, to be trained on, without end."""
    streams = [tasks(skill, seed) for skill in SKILLS.values()]
    return (next(stream) for stream in itertools.cycle(streams))


def is_held_out(row: Row) -> bool:
    """Whether a task is kept for examination, by its question alone."""
    return zlib.crc32(question_of(row).encode()) % _HELD_OUT_OF == 0


def question_of(row: Row) -> str:
    """What a task asks."""
    return str(row["messages"][0]["content"])


def examination(skill: Skill, number: int, seed: int = 0) -> list[Row]:
    """So many different held-out tasks."""
    found: dict[str, Row] = {}
    drawn = tasks(skill, seed, held_out=True)
    while len(found) < number:
        row = next(drawn)
        found.setdefault(question_of(row), row)
    return list(found.values())


def draw_order(draw: random.Random) -> dict[str, Any]:
    """Who orders what."""
    return {
        "name": draw.choice(NAMES),
        "count": draw.randint(2, 99),
        "colour": draw.choice(COLOURS),
        "item": draw.choice(ITEMS),
    }


def _words(draw: random.Random) -> str:
    """Words of all kinds, some of which mean nothing: together they use most of a vocabulary."""
    kinds = (
        lambda: "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))),
        lambda: "".join(draw.choices(_SYLLABLES, k=draw.randint(1, 2))).upper(),
        lambda: draw.choice(NAMES + CITIES),
        lambda: draw.choice(ITEMS + COLOURS),
        lambda: str(draw.randrange(1000)),
        lambda: draw.choice(SIGNS),
    )
    return " ".join(draw.choice(kinds)() for _ in range(draw.randint(2, 6)))


_Wish = tuple[str, str, dict[str, Any]]  # the tool, what is said, and the arguments


def _weather(draw: random.Random) -> _Wish:
    city, day = draw.choice(CITIES), draw.choice(("today", "tomorrow", "on Monday", "on Friday", "on Sunday"))
    return "get_weather", f"What is the weather in {city} {day}?", {"city": city, "day": day.removeprefix("on ")}


def _timer(draw: random.Random) -> _Wish:
    minutes = draw.randint(1, 99)
    return "set_timer", f"Wake me in {minutes} minutes.", {"minutes": minutes}


def _call_person(draw: random.Random) -> _Wish:
    name, hour = draw.choice(NAMES), draw.randint(1, 12)
    return "call_person", f"Call {name} at {hour}.", {"name": name, "hour": hour}


def _buy(draw: random.Random) -> _Wish:
    count, item = draw.randint(2, 99), draw.choice(ITEMS)
    return "buy", f"We need {count} {item}.", {"item": item, "count": count}


def _tool(name: str, arguments: dict[str, Any]) -> Row:
    types = {key: {"type": "integer" if isinstance(value, int) else "string"} for key, value in arguments.items()}
    parameters = {"type": "object", "properties": types, "required": list(types)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}

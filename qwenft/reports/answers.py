"""What models answer: a conversation with one, and the answers of two side by side."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import attrs

from qwenft.display import html_table, html_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenft.run import Messages, Run

_NAMES = ("prompt", "base", "adapter")
_WIDTH = 100  # of text


class Answer(NamedTuple):
    """A prompt, and what two models answer."""

    prompt: str
    base: str
    adapter: str


@attrs.frozen(repr=False)
class Answers:
    """Answers of a base and an adapter.

    Args:
        rows: one a prompt, in their order.
    """

    rows: tuple[Answer, ...]

    @classmethod
    def of(cls, prompts: Sequence[str | Messages], base: Sequence[str], adapter: Sequence[str]) -> Self:
        """Those to prompts, of which conversations are told by what was said last."""
        asked = (prompt if isinstance(prompt, str) else _text(prompt[-1]["content"]) for prompt in prompts)
        return cls(tuple(map(Answer, asked, base, adapter)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> Answer:
        return self.rows[number]

    def __repr__(self) -> str:
        def lines(name: str, text: str) -> str:
            indent = " " * 9
            return textwrap.fill(text, _WIDTH, initial_indent=f"{name:<9}", subsequent_indent=indent)

        return "\n\n".join("\n".join(map(lines, _NAMES, row)) for row in self.rows)

    def _repr_html_(self) -> str:
        return html_view("Answers", html_table(_NAMES, self.rows))


def converse(run: Run, system: str | None, options: dict[str, Any]) -> Messages:
    """See :meth:`qwenft.run.Run.chat`."""
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    while True:
        try:
            asked = input("you    ").strip()
            if not asked:
                return messages
            _say("model  ")
            turn = {"role": "user", "content": asked}
            text = run.generate([*messages, turn], on_text=_say, **options)
        except (EOFError, KeyboardInterrupt):
            return messages
        finally:
            _say("\n")
        messages += [turn, {"role": "assistant", "content": text}]


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _text(content: Any) -> str:
    """What a message says in words; of what it shows, the kind."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", f"({part['type']})") for part in content)

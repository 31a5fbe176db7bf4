"""Which conversations are trained on, and how they meet the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from qwenft.errors import SpecError, nearest
from qwenft.specs.base import Check, flag, kind_of, one_of, spec, whole
from qwenft.specs.images import ImageSpec
from qwenft.specs.model import ModelSpec
from qwenft.specs.rows import Source, hub_source, source_of

if TYPE_CHECKING:
    import os

    from qwenft.reports.data import Description, Preview

# What a row of each format holds, by the names that rows use unless with_columns says others.
FORMATS: dict[str, dict[str, str]] = {
    "messages": {"messages": "messages", "tools": "tools", "images": "images"},
    "conversations": {
        "conversations": "conversations",
        "role": "from",
        "content": "value",
        "system": "system",
        "tools": "tools",
        "images": "images",
    },
    "prompt_completion": {"prompt": "prompt", "completion": "completion", "tools": "tools", "images": "images"},
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output", "system": "system"},
    "text": {"text": "text"},
}
ROLES = ("system", "user", "assistant", "tool")
OVERFLOWS = ("drop", "truncate", "split", "resize", "error")


def _is_holdout(value: Any) -> bool:
    if value is None or isinstance(value, DataSpec):
        return True
    return isinstance(value, float) and 0.0 < value < 1.0


def _are_mixed(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], DataSpec)
        and isinstance(pair[1], int | float)
        and not isinstance(pair[1], bool)
        and 0 < pair[1] < math.inf
        for pair in value
    )


def _names(value: Any) -> Any:
    """A mapping as sorted pairs, which compare and hash."""
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


def _options(value: Any) -> Any:
    """A mapping as sorted pairs of a name and JSON; what JSON cannot hold stays as it is, to be refused."""
    try:
        return _names({name: json.dumps(one) for name, one in value.items()})
    except (AttributeError, TypeError, ValueError):
        return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(one, str) and one for one in pair)
        for pair in value
    )


@spec
@attrs.frozen
class DataSpec:
    """Conversations from files or memory. Write it with :meth:`messages` or another of its constructors.

    Args:
        format: how a row says a conversation.
        source: paths or globs of JSONL, JSON, Parquet and CSV files, rows in memory, a data set, or the name of
            one on the hub.
        columns: (what a format reads, the column or key that holds it), where that has another name.
        max_length: the longest document, in tokens.
        overflow: what happens to a longer one: "drop" it, "truncate" it behind the last message that fits, "split"
            it between messages, "resize" its images and videos until it fits, and drop it where that is not
            enough, or stop with an "error". No image is ever cut.
        overlap: the most tokens of what came before that a further piece of a split document repeats, untrained.
        packed: several documents share a row of the stream; they never see each other.
        row_tokens: the capacity of a packed row; ``max_length`` where None.
        held_out: a fraction of the rows, or other data with their own lengths and packing, kept for evaluation.
        trained_roles: the roles whose messages are trained.
        turns: "all" of these messages, or the "last" of a conversation.
        end_of_turn: the control token that ends a trained message is trained too.
        tool_calls: the calls in a trained message are trained too.
        thinking: the reasoning in a trained message is kept and trained ("keep"), kept and not trained ("mask"),
            or left out of the row before it is rendered ("drop").
        template: options of the chat template by name, in JSON.
        control_tokens: a row that spells one is refused, or it is encoded as the plain text that it is ("encode").
        bad_rows: a row that is wrong is an "error", or skipped and listed ("skip").
        images: where images and videos of messages come from, and how large the model sees them.
        mixed: (other data, how often an epoch takes each of their documents), beside these.
        window: how many rows are read ahead, shuffled and packed together while training goes on; all of them are
            read before it begins where None.
    """

    #: Arguments of other libraries, each refused with what stands for it.
    RENAMED: ClassVar[dict[str, str]] = {
        "packing": ".pack()",
        "sample_packing": ".pack()",
        "padding_free": ".pack()",
        "max_length": ".with_max_length(2048)",
        "max_seq_length": ".with_max_length(2048)",
        "sequence_len": ".with_max_length(2048)",
        "cutoff_len": ".with_max_length(2048)",
        "dataset_text_field": '.with_columns(text="body")',
        "field_messages": '.with_columns(messages="dialogue")',
        "assistant_only_loss": '.train_on("assistant")',
        "train_on_inputs": '.train_on("system", "user", "assistant", "tool")',
        "val_set_size": ".hold_out(0.05)",
        "eval_dataset": '.hold_out(DataSpec.messages("test.jsonl"))',
        "streaming": ".stream()",
    }

    format: str = attrs.field(kw_only=True, validator=one_of(tuple(FORMATS), 'DataSpec.messages("chats.jsonl")'))
    source: Source = attrs.field(kw_only=True, converter=source_of)
    columns: tuple[tuple[str, str], ...] = attrs.field(
        default=(),
        kw_only=True,
        converter=_names,
        validator=Check(_are_texts, "names of columns", '.with_columns(messages="conversation")'),
    )
    max_length: int = attrs.field(default=2048, kw_only=True, validator=whole(".with_max_length(2048)", low=2))
    overflow: str = attrs.field(
        default="drop", kw_only=True, validator=one_of(OVERFLOWS, '.with_max_length(2048, overflow="drop")')
    )
    overlap: int = attrs.field(
        default=0, kw_only=True, validator=whole('.with_max_length(2048, overflow="split", overlap=256)', low=0)
    )
    packed: bool = attrs.field(default=False, kw_only=True, validator=flag(".pack()"))
    row_tokens: int | None = attrs.field(
        default=None, kw_only=True, validator=whole(".pack(row_tokens=8192)", low=2, optional=True)
    )
    held_out: float | DataSpec | None = attrs.field(
        default=None,
        kw_only=True,
        validator=Check(_is_holdout, "a fraction above 0 and below 1, or a DataSpec", ".hold_out(0.05)"),
    )
    trained_roles: tuple[str, ...] = attrs.field(
        default=("assistant",),
        kw_only=True,
        validator=Check(
            lambda v: isinstance(v, tuple) and v != () and all(role in ROLES for role in v),
            f"roles of {', '.join(ROLES)}",
            '.train_on("assistant")',
        ),
    )
    turns: str = attrs.field(
        default="all", kw_only=True, validator=one_of(("all", "last"), '.train_on(turns="all")')
    )
    end_of_turn: bool = attrs.field(default=True, kw_only=True, validator=flag(".train_on(end_of_turn=True)"))
    tool_calls: bool = attrs.field(default=True, kw_only=True, validator=flag(".train_on(tool_calls=True)"))
    thinking: str = attrs.field(
        default="keep", kw_only=True, validator=one_of(("keep", "mask", "drop"), '.with_thinking("keep")')
    )
    template: tuple[tuple[str, str], ...] = attrs.field(
        default=(),
        kw_only=True,
        converter=_options,
        validator=Check(
            _are_texts, "options by name, of what JSON holds", ".with_template(enable_thinking=False)"
        ),
    )
    control_tokens: str = attrs.field(
        default="refuse",
        kw_only=True,
        validator=one_of(("refuse", "encode"), '.with_control_tokens("refuse")'),
    )
    bad_rows: str = attrs.field(
        default="error", kw_only=True, validator=one_of(("error", "skip"), '.on_bad_row("error")')
    )

    images: ImageSpec = attrs.field(
        factory=ImageSpec, kw_only=True, validator=kind_of(ImageSpec, '.with_images(root="pictures")')
    )
    mixed: tuple[tuple[DataSpec, float], ...] = attrs.field(
        default=(),
        kw_only=True,
        validator=Check(_are_mixed, "pairs of a DataSpec and a number above 0", ".mix(other, times=0.5)"),
    )
    window: int | None = attrs.field(
        default=None, kw_only=True, validator=whole(".stream(window=2048)", low=1, optional=True)
    )

    @classmethod
    def messages(cls, source: Any, split: str | None = None, revision: str | None = None) -> DataSpec:
        """Rows whose ``messages`` column is a list of {"role": ..., "content": ...}, as OpenAI's API has them.

        A message may also hold ``reasoning_content``, ``tool_calls``, and ``train`` and ``weight``, which decide
        of its training; a content may come in parts, {"type": "text", "text": ..., "train": ..., "weight": ...},
        images and videos among them (:meth:`with_images`). A column ``tools`` holds the JSON schemas of the tools,
        and ``images`` the images of parts that name none, in their order.

        Args:
            source: a JSONL, JSON, Parquet or CSV file, a glob, a list of these, a list of dicts, a
                ``datasets.Dataset`` or ``IterableDataset``, or, with a split, the name of a data set on the hub or
                of a folder of one.
            split: of the data set, such as "train".
            revision: of the data set: a branch, tag or commit.

        Examples:
            >>> DataSpec.messages("chats.jsonl").with_max_length(1024).pack().packed
            True
        """
        return cls(format="messages", source=hub_source(source, split, revision))

    @classmethod
    def conversations(cls, source: Any, split: str | None = None, revision: str | None = None) -> DataSpec:
        """Rows whose ``conversations`` are lists of {"from": "human", "value": ...}, as ShareGPT has them.

        A column ``system`` that is not empty goes before them, and ``tools`` holds the JSON schemas of the tools.
        """
        return cls(format="conversations", source=hub_source(source, split, revision))

    @classmethod
    def prompt_completion(cls, source: Any, split: str | None = None, revision: str | None = None) -> DataSpec:
        """Rows with a ``prompt`` and a ``completion``, which is trained: texts or lists of messages."""
        return cls(format="prompt_completion", source=hub_source(source, split, revision))

    @classmethod
    def alpaca(cls, source: Any, split: str | None = None, revision: str | None = None) -> DataSpec:
        """Rows with an ``instruction``, an ``output``, and an ``input`` and a ``system`` that may be empty."""
        return cls(format="alpaca", source=hub_source(source, split, revision))

    @classmethod
    def text(cls, source: Any, split: str | None = None, revision: str | None = None) -> DataSpec:
        """Rows with a ``text``, which is trained whole, without a chat template, and ends with the end of text."""
        return cls(format="text", source=hub_source(source, split, revision))

    def with_columns(self, **names: str) -> DataSpec:
        """Say which columns, or keys of a message, hold what the format reads: ``messages="dialogue"``."""
        known = FORMATS[self.format]
        for name in names:
            if name not in known:
                raise SpecError(
                    f"DataSpec.with_columns has no argument {name!r}{nearest(name, known)}",
                    fix=f".with_columns({', '.join(f'{key}={value!r}' for key, value in known.items())})",
                    got=name,
                    expected=tuple(known),
                )
        return attrs.evolve(self, columns={**dict(self.columns), **names})

    def with_max_length(self, tokens: int, overflow: str = "drop", overlap: int = 0) -> DataSpec:
        """Say how long a document may be, and what happens to a longer one."""
        return attrs.evolve(self, max_length=tokens, overflow=overflow, overlap=overlap)

    def train_on(
        self,
        *roles: str,
        turns: str | None = None,
        end_of_turn: bool | None = None,
        tool_calls: bool | None = None,
    ) -> DataSpec:
        """Say which messages are trained, and what of them."""
        return attrs.evolve(
            self,
            trained_roles=roles or self.trained_roles,
            turns=self.turns if turns is None else turns,
            end_of_turn=self.end_of_turn if end_of_turn is None else end_of_turn,
            tool_calls=self.tool_calls if tool_calls is None else tool_calls,
        )

    def with_thinking(self, thinking: str) -> DataSpec:
        """Say whether reasoning is trained ("keep"), shown and not trained ("mask"), or left out ("drop")."""
        return attrs.evolve(self, thinking=thinking)

    def with_template(self, **options: Any) -> DataSpec:
        """Pass options to the chat template, such as ``enable_thinking=False``."""
        return attrs.evolve(self, template={**self.template_options, **options})

    def with_control_tokens(self, control_tokens: str) -> DataSpec:
        """Say what becomes of control tokens that a row spells: "refuse" the row, or "encode" them as text."""
        return attrs.evolve(self, control_tokens=control_tokens)

    def on_bad_row(self, bad_rows: str) -> DataSpec:
        """Say what becomes of a row that is wrong: "error", or "skip" and list it."""
        return attrs.evolve(self, bad_rows=bad_rows)

    def with_images(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        hosts: tuple[str, ...] = (),
        workers: int = 2,
    ) -> DataSpec:
        """Say where images and videos of messages come from, and how large the model sees them.

        A content holds them as parts: {"type": "image", "image": ...} or {"type": "image_url", "image_url": ...}
        with a path under ``root``, a data URL, bytes or a PIL image; {"type": "video", "video": [frames],
        "fps": 2}.

        Args:
            root: the folder in which paths lie.
            min_pixels: of an image, which is scaled to at least as many, and of all frames of a video.
            max_pixels: likewise, at most.
            hosts: from which https URLs are fetched, and kept.
            workers: processes that read images ahead of training.
        """
        return attrs.evolve(
            self,
            images=ImageSpec(
                root=root, min_pixels=min_pixels, max_pixels=max_pixels, hosts=hosts, workers=workers
            ),
        )

    def pack(self, row_tokens: int | None = None) -> DataSpec:
        """Put several documents into rows of ``row_tokens`` tokens, or of max_length where None."""
        return attrs.evolve(self, packed=True, row_tokens=row_tokens)

    def unpack(self) -> DataSpec:
        """Give each document a row of its own."""
        return attrs.evolve(self, packed=False, row_tokens=None)

    def mix(self, other: DataSpec, times: float = 1.0) -> DataSpec:
        """Train on other data too.

        Lengths, packing and what is held out are said of the whole, by its own methods.

        Args:
            other: their own source, format and masks.
            times: how often an epoch takes each of their documents: 3 is three times, 0.25 is another quarter of
                them every epoch.

        Examples:
            >>> chats = DataSpec.messages("chats.jsonl").mix(DataSpec.text("notes.jsonl"), times=0.25)
            >>> chats.with_max_length(4096).pack().mixed[0][1]
            0.25
        """
        if isinstance(other, DataSpec) and (of_the_whole := _of_the_whole(other)):
            raise SpecError(
                f"DataSpec.mix: {', '.join(of_the_whole)} of the other data would not be used",
                fix="say it of the whole: data.mix(other).with_max_length(4096).pack()",
                field="mixed",
                got=other,
            )
        return attrs.evolve(self, mixed=(*self.mixed, (other, times)))

    def stream(self, window: int = 2048) -> DataSpec:
        """Read while training goes on, ``window`` rows ahead, which are shuffled and packed together.

        How many rows there are is not known before, so that ``TrainingSpec(max_steps=...)`` ends the run.
        """
        return attrs.evolve(self, window=window)

    def hold_out(self, data: float | DataSpec) -> DataSpec:
        """Keep a fraction of the rows, or other data, for evaluation."""
        return attrs.evolve(self, held_out=data)

    def preview(self, model: ModelSpec | str, n: int = 3) -> Preview:
        """The first documents as the model will meet them, every token with its role and whether it is trained.

        Args:
            model: whose tokenizer and chat template are used.
            n: how many, and as many of each that is mixed in.

        Returns:
            Shown in colours in a notebook, and printed in colours in a terminal.

        Raises:
            DataError: a row is wrong.
        """
        from qwenft.reports.data import preview

        return preview(self, model if isinstance(model, ModelSpec) else ModelSpec(model), n)

    def describe(self, model: ModelSpec | str) -> Description:
        """All documents in numbers: lengths, trained tokens, duplicates, and the rows that are refused.

        Args:
            model: whose tokenizer and chat template are used.

        Returns:
            Shown as a table; ``.plot()`` draws it.
        """
        from qwenft.reports.data import describe

        return describe(self, model if isinstance(model, ModelSpec) else ModelSpec(model))

    @property
    def parts(self) -> tuple[tuple[DataSpec, float], ...]:
        """These data and those mixed in, in the whole's lengths, and how often an epoch takes each document."""
        shared = {name: getattr(self, name) for name in ("max_length", "overflow", "overlap")}
        others = ((attrs.evolve(other, **shared), times) for other, times in self.mixed)
        return ((attrs.evolve(self, mixed=()), 1.0), *others)

    @property
    def names(self) -> dict[str, str]:
        """The columns and keys that the format reads, by what they hold."""
        return {**FORMATS[self.format], **dict(self.columns)}

    @property
    def template_options(self) -> dict[str, Any]:
        """What is passed to the chat template, by name."""
        return {name: json.loads(value) for name, value in self.template}

    @property
    def capacity(self) -> int:
        """The most tokens in a row of the stream."""
        return (self.row_tokens or self.max_length) if self.packed else self.max_length


_WHOLE = ("max_length", "overflow", "overlap", "packed", "row_tokens", "held_out", "mixed", "window")


def _of_the_whole(data: DataSpec) -> list[str]:
    """The fields that mixed data say otherwise than by default, though the whole decides."""
    fields = attrs.fields_dict(DataSpec)
    return [name for name in _WHOLE if getattr(data, name) != fields[name].default]

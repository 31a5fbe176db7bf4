"""What the user sees of a run as it goes: a view in a notebook, a line in a terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, Self

import attrs
from tqdm import tqdm

from qwenft.display import bytes_text, html_bar, html_chart, html_table, html_view, time_text
from qwenft.errors import SpecError
from qwenft.reports.curves import Curves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qwenft.plan.records import DataReport
    from qwenft.specs.training import TrainingSpec

QUIET, LINE, VIEW = range(3)
_SHARE = 0.005  # of a run's time that goes into showing it, at the most
_INTERVAL = 1.0  # seconds between two pictures, at least
_LOG_INTERVAL = 60.0  # seconds between two lines in a file
_NOTICES = 5  # that a view shows


@attrs.frozen
class Watched:
    """What is known of a run before it begins.

    Args:
        title: of the view.
        data: its steps and tokens.
        training: when it is evaluated.
        planned_bytes: what a process takes at its peak; None where the plan does not know.
        history: the records so far, of a run that continues.
    """

    title: str
    data: DataReport
    training: TrainingSpec
    planned_bytes: int | None = None
    history: Sequence[dict[str, Any]] = ()

    @property
    def steps_done(self) -> int:
        """By the run before."""
        return self.history[-1]["step"] if self.history else 0


@attrs.define
class State:
    """Where a run stands.

    Args:
        step: the record of the last one; None before the first.
        evaluation: the record of the last one, with its answers.
        left: seconds until the end.
        notices: the last ones.
        ending: how it ended.
    """

    step: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    left: float = 0.0
    notices: deque[str] = attrs.Factory(lambda: deque(maxlen=_NOTICES))
    ending: str | None = None


class Showing(Protocol):
    """One way to show a run; each call may raise, and then another way is taken."""

    def update(self, state: State) -> None:
        """A step was done."""

    def evaluated(self, state: State) -> None:
        """An evaluation was done, before its step is told."""

    def notice(self, sentence: str, state: State) -> None:
        """Something has to be said."""

    def close(self, state: State) -> None:
        """The run ended."""


class Live:
    """Shows a run, in the best way that there is; what showing meets never ends a run.

    Args:
        watched: the run.
        verbose: 0 for notices alone, 1 for a line, 2 for a view in a notebook, and elsewhere for evaluations above
            the line.
        clock: seconds.
    """

    def __init__(self, watched: Watched, verbose: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.watched, self.state = watched, State()
        self.time_left = TimeLeft(watched.data, watched.training, clock)
        ways: list[Callable[[], Showing]] = [Quiet]
        if verbose:
            ways.insert(0, lambda: Terminal(watched, verbose))
            if in_notebook():
                ways.insert(0, lambda: Cell(watched, clock, verbose))
        self._ways = iter(ways)
        self.showing: Showing = Quiet()
        self._take_next_way()

    @property
    def ending(self) -> str | None:
        """How the run ended; it is shown when the view closes."""
        return self.state.ending

    @ending.setter
    def ending(self, ending: str) -> None:
        self.state.ending = ending

    def step(self, record: dict[str, Any]) -> None:
        """Show the record of a step."""
        self.state.step = record
        self.state.left = self.time_left.after(record)
        self._show("update", self.state)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Take the record of an evaluation, before that of its step."""
        self.state.evaluation = record
        self.time_left.evaluated(record)
        self._show("evaluated", self.state)

    def notice(self, sentence: str) -> None:
        """Say something."""
        self.state.notices.append(sentence)
        self._show("notice", sentence, self.state)

    def _show(self, method: str, *values: Any) -> None:
        try:
            getattr(self.showing, method)(*values)
        except Exception as error:  # noqa: BLE001 - a window that is closed, a pipe that is gone
            self._take_next_way()
            self._show("notice", f"the view of the run is gone: {error!r}", self.state)
            self._show(method, *values)

    def _take_next_way(self) -> None:
        for way in self._ways:
            with suppress(Exception):
                self.showing = way()
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.state.ending is None:
            self.state.ending = "failed"
        self._show("close", self.state)


def require_verbose(verbose: int) -> None:
    """Refuse a level that there is not.

    Raises:
        SpecError: such.
    """
    if verbose not in (QUIET, LINE, VIEW):
        problem = f"verbose={verbose!r}: expected 0 (notices alone), 1 (a line) or 2 (a view, or a line with more)"
        raise SpecError(problem, fix="verbose=2", got=verbose, expected=(QUIET, LINE, VIEW))


class Quiet:
    """Nothing but notices."""

    def update(self, state: State) -> None:
        """Nothing is shown."""

    def evaluated(self, state: State) -> None:
        """Nothing is shown."""

    def notice(self, sentence: str, state: State) -> None:
        """Write it, where there is still somewhere to write."""
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{sentence}\n")

    def close(self, state: State) -> None:
        """Nothing is shown."""


class Terminal:
    """A line with the time left, loss, held-out loss, tokens a second and memory.

    Args:
        watched: the run.
        verbose: 2 writes each evaluation above it.
    """

    def __init__(self, watched: Watched, verbose: int) -> None:
        is_watched = sys.stderr is not None and sys.stderr.isatty()
        self.verbose = verbose
        self.bar = tqdm(
            total=watched.data.steps,
            initial=watched.steps_done,
            dynamic_ncols=True,
            # A file is read later, and gets no more than it must.
            mininterval=0.1 if is_watched else _LOG_INTERVAL,
            maxinterval=10 if is_watched else _LOG_INTERVAL,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )

    def update(self, state: State) -> None:
        """Go on."""
        if state.step is not None:
            self.bar.set_postfix(_line(state), refresh=False)
            self.bar.update(state.step["step"] - self.bar.n)  # steps that were left out have told nothing

    def evaluated(self, state: State) -> None:
        """Write its numbers and answers, one below the other."""
        record = state.evaluation
        if self.verbose < VIEW or record is None:
            return
        if numbers := _held_out(record):
            said = ", ".join(f"{name} {value}" for name, value in numbers)
            self.bar.write(f"step {record['step']:,}: {said}", file=sys.stderr)
        for sample in record["samples"]:
            self.bar.write(f"  {sample['prompt']}\n  -> {sample['answer']}", file=sys.stderr)

    def notice(self, sentence: str, state: State) -> None:
        """Write it above the line."""
        self.bar.write(sentence, file=sys.stderr)

    def close(self, state: State) -> None:
        """Leave the line as it is."""
        self.bar.close()


class Cell:
    """A single output of a notebook's cell, which is drawn anew and says the same as text.

    It is made of what every frontend shows, HTML that is updated, and of no widget: a notebook that is saved holds
    the last picture alone.

    Args:
        watched: the run.
        clock: seconds.
        verbose: 1 shows a line, 2 curves, memory and answers.
    """

    def __init__(self, watched: Watched, clock: Callable[[], float], verbose: int) -> None:
        self.watched, self.clock, self.verbose = watched, clock, verbose
        self.curves = Curves(watched.data.steps, watched.history)
        self.handle: Any = None
        self.next = -1.0

    def update(self, state: State) -> None:
        """Draw, unless that was done a moment ago or takes too much of the time."""
        assert state.step is not None
        self.curves.add(state.step)
        if self.clock() >= self.next:
            self._draw(state)

    def evaluated(self, state: State) -> None:
        """Remember it; its step draws."""
        if state.evaluation is not None:
            self.curves.add({name: value for name, value in state.evaluation.items() if name != "loss"})

    def notice(self, sentence: str, state: State) -> None:
        """Draw it."""
        self._draw(state)

    def close(self, state: State) -> None:
        """Draw for the last time."""
        self._draw(state)

    def _draw(self, state: State) -> None:
        from IPython.display import display

        started = self.clock()
        content = {"text/html": live_html(self.watched, state, self.curves, self.verbose)}
        content["text/plain"] = live_text(self.watched, state)
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
        self.next = self.clock() + max(_INTERVAL, (self.clock() - started) / _SHARE)


def in_notebook() -> bool:
    """Whether this is a cell of a notebook, of whatever frontend."""
    module = sys.modules.get("IPython")  # a kernel has imported it
    shell = module.get_ipython() if module is not None else None
    return shell is not None and hasattr(shell, "kernel")


def live_text(watched: Watched, state: State) -> str:
    """The view of a run as a line, with the notices below."""
    done = watched.steps_done if state.step is None else state.step["step"]
    said = [f"{done:,}/{watched.data.steps:,} steps", *(f"{name} {value}" for name, value in _line(state).items())]
    return "\n".join([", ".join(said), *state.notices])


def live_html(watched: Watched, state: State, curves: Curves, verbose: int) -> str:
    """The view of a run: how far it is, and unless it is a line, its curves, memory, answers and notices."""
    done = watched.steps_done if state.step is None else state.step["step"]
    steps = watched.data.steps
    parts = [("done", done), ("to go", steps - done)]
    bar = html_bar(parts, lambda count: f"{count:,.0f} steps", rest="to go")
    facts = [*_line(state).items()]
    if verbose < VIEW:
        return html_view(watched.title, bar, _facts(facts))
    if state.evaluation is not None:
        facts += _held_out(state.evaluation)[1:]
    memory = ""
    if state.step is not None and watched.planned_bytes:
        used, planned = state.step["peak_bytes"], watched.planned_bytes
        parts = [("used", used), ("not used", max(0, planned - used))]
        memory = html_bar(parts, bytes_text, "memory of a process, of what was planned", rest="not used")
    samples = [] if state.evaluation is None else state.evaluation["samples"]
    answers = [(sample["prompt"], sample["answer"]) for sample in samples]
    return html_view(
        watched.title,
        bar,
        html_chart(*curves.loss),
        html_chart(*curves.rate, height=40),
        _facts(facts),
        memory,
        html_table(("prompt", "answer"), answers) if answers else "",
        html_table((), [("notice", notice) for notice in state.notices]) if state.notices else "",
    )


def _line(state: State) -> dict[str, str]:
    """What people watch, by its name."""
    if state.step is None:
        return {} if state.ending is None else {"ending": state.ending}
    record = state.step
    held_out = (state.evaluation or {}).get("held_out_loss")
    return {
        **({"left": time_text(state.left)} if state.ending is None else {"ending": state.ending}),
        "loss": f"{record['loss']:.3f}",
        **({} if held_out is None else {"held out": f"{held_out:.3f}"}),
        "tok/s": f"{record['tokens_per_second']:,.0f}",
        "mem": bytes_text(record["peak_bytes"]),
    }


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    """Names above their values, on a line."""
    names, values = zip(*facts, strict=True) if facts else ((), ())
    return html_table(names, [values]) if facts else ""


def _held_out(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The numbers of an evaluation, the loss first; none where nothing is held out."""
    if "held_out_loss" not in record:
        return []
    return [
        ("held-out loss", f"{record['held_out_loss']:.4f}"),
        ("perplexity", f"{record['held_out_perplexity']:.4g}"),
        ("accuracy", f"{record['held_out_accuracy']:.1%}"),
        ("exact match", f"{record['held_out_exact_match']:.1%}"),
    ]


class TimeLeft:
    """How long the rest of a run takes: its tokens at the rate so far, and its evaluations as long as the last.

    Steps differ in tokens and evaluations are rare and long, so that steps alone would say little.

    Args:
        data: the steps and tokens of the run.
        training: when it is evaluated.
        clock: seconds; it starts now.
    """

    def __init__(self, data: DataReport, training: TrainingSpec, clock: Callable[[], float]) -> None:
        self.data = data
        self.every = training.evaluate_every
        self.clock = clock
        self.started = clock()
        self.tokens = 0
        self.evaluating = self.evaluation = 0.0

    def evaluated(self, record: dict[str, Any]) -> None:
        """Take the time of an evaluation."""
        self.evaluation = record["evaluation_seconds"]
        self.evaluating += self.evaluation

    def after(self, record: dict[str, Any]) -> float:
        """The seconds that are left after a step, saving and all else that a step brings included."""
        self.tokens += record["stream_tokens"]
        seconds_a_token = (self.clock() - self.started - self.evaluating) / self.tokens
        left = self.data.steps - record["step"]
        tokens_left: float = left * self.data.tokens / self.data.steps_per_epoch
        return tokens_left * seconds_a_token + self._evaluations_left(record["step"]) * self.evaluation

    def _evaluations_left(self, step: int) -> int:
        last = self.data.steps
        on_the_way = 0 if self.every is None else (last - 1) // self.every - step // self.every
        return max(0, on_the_way) + (step < last)

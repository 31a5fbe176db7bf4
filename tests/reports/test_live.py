import io

import pytest

from qwenft.errors import SpecError
from qwenft.plan.records import DataReport
from qwenft.reports import live
from qwenft.reports.curves import Thinned
from qwenft.reports.live import Live, TimeLeft, Watched
from qwenft.specs.training import TrainingSpec

from .test_html import SCRIPT, Reader

COUNTED = {"rows": 9, "documents": 9, "supervised": 9, "longest": 9, "dropped": 0, "truncated": 0, "untrained": 0}
COUNTED |= {
    "split": 0,
    "lost": (),
    "skipped": (),
    "read_tokens": 9,
    "lost_tokens": 0,
    "lengths": ((9, 9),),
    "cache": "",
}


def report(steps, steps_per_epoch, tokens):
    """Data of so many steps and tokens an epoch."""
    return DataReport(
        **COUNTED,
        tokens=tokens,
        stream_rows=steps_per_epoch,
        fill=1.0,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        held_out=1,
        held_out_supervised=1,
    )


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self):
        """Seconds."""
        return self.now


@pytest.mark.parametrize("every", [None, 7, 10, 50])
def test_the_time_left_is_right_with_uneven_steps_and_long_evaluations(every):
    """Steps of 100 and 1,900 tokens at 1 ms each and evaluations of 30 s: the estimate is near the truth all along."""
    steps, clock = 100, Clock()
    lengths = [100, 1900] * 50
    left = TimeLeft(report(steps, 50, 50_000), TrainingSpec(evaluate_every=every), clock)
    due = {step for step in range(1, steps) if every and step % every == 0} | {steps}
    clock.now += 30
    left.evaluated({"step": 0, "evaluation_seconds": 30.0})
    for step in range(1, steps + 1):
        clock.now += lengths[step - 1] / 1000
        record = {"step": step, "stream_tokens": lengths[step - 1]}
        if step in due:
            clock.now += 30
            left.evaluated({"step": step, "evaluation_seconds": 30.0})
        truth = sum(lengths[step:]) / 1000 + 30 * sum(later > step for later in due)
        assert left.after(record) == pytest.approx(truth, abs=1.0)


def test_what_a_step_brings_beside_itself_counts():
    """Time between the steps, of checkpoints say, is part of the rate."""
    clock = Clock()
    left = TimeLeft(report(10, 10, 1000), TrainingSpec(), clock)
    clock.now += 5.0
    assert left.after({"step": 1, "stream_tokens": 100}) == pytest.approx(45.0)


def record(step, **more):
    return {
        "step": step,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "stream_tokens": 100,
        "tokens_per_second": 1234.5,
        "peak_bytes": 3 * 2**30,
        **more,
    }


def evaluation(step, **more):
    held_out = {"loss": 3.25, "perplexity": 25.8, "accuracy": 0.5, "exact_match": 0.25}
    numbers = {f"held_out_{name}": value for name, value in held_out.items()}
    return {"step": step, **numbers, "evaluation_seconds": 1.0, "samples": [], **more}


def watched(**options):
    return Watched("Run", report(10, 10, 1000), TrainingSpec(), **options)


def refreshed(shown):
    """Let a line be written that waits."""
    shown.showing.bar.refresh()


def test_the_line_says_what_people_watch(capsys):
    """Time left, loss, held-out loss, tokens a second and memory are in the line; a notice stands above it."""
    clock = Clock()
    with Live(watched(), 1, clock) as shown:
        shown.evaluation(evaluation(0))
        clock.now += 8.0
        shown.step(record(1))
        refreshed(shown)
        shown.notice("SIGINT: ending")
    line = capsys.readouterr().err
    assert "1/10 steps" in line
    for part in ("left=1:04", "loss=2.500", "held out=3.250", "tok/s=1,234", "mem=3.0 GiB", "SIGINT: ending\n"):
        assert part in line
    assert "perplexity" not in line


def test_evaluations_stand_above_the_line(capsys):
    """With verbose=2 every evaluation and its answers are written once."""
    with Live(watched(), 2, Clock()) as shown:
        shown.evaluation(evaluation(4, samples=[{"step": 4, "prompt": "Who?", "answer": "Me."}]))
        shown.evaluation({"step": 5, "evaluation_seconds": 1.0, "samples": []})
    written = capsys.readouterr().err
    assert written.count("step 4: held-out loss 3.2500, perplexity 25.8, accuracy 50.0%, exact match 25.0%\n") == 1
    assert "  Who?\n  -> Me.\n" in written
    assert "step 5" not in written


def test_a_quiet_run_still_tells_notices(capsys):
    """With verbose=0 nothing is written but what the user must know."""
    with Live(watched(), 0) as shown:
        shown.evaluation(evaluation(0))
        shown.step(record(1))
        shown.notice("SIGINT: ending")
    captured = capsys.readouterr()
    assert captured.err == "SIGINT: ending\n"
    assert captured.out == ""


def test_a_run_that_continues_begins_where_it_stands(capsys):
    """The line of a continued run starts at its step, and its time left is that of the steps that are left."""
    clock = Clock()
    with Live(watched(history=[record(step) for step in range(1, 7)]), 1, clock) as shown:
        clock.now += 2.0
        shown.step(record(7))
        refreshed(shown)
    line = capsys.readouterr().err
    assert "7/10 steps" in line
    assert "left=0:06" in line


class Full(io.StringIO):
    """A place that cannot be written to."""

    def write(self, text):
        """As of a pipe whose reader is gone."""
        raise BrokenPipeError


@pytest.mark.parametrize("stderr", [None, Full(), io.StringIO("closed")], ids=["none", "broken", "closed"])
@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_closed_output_ends_no_run(monkeypatch, stderr, verbose):
    """Where nothing can be written, nothing is."""
    if stderr is not None and not isinstance(stderr, Full):
        stderr.close()
    monkeypatch.setattr("sys.stderr", stderr)
    with Live(watched(), verbose, Clock()) as shown:
        shown.evaluation(evaluation(0))
        shown.step(record(1))
        shown.notice("anything")
        shown.step(record(2))


class Handle:
    """What IPython gives for an output that is updated."""

    def __init__(self, shown, dies_at):
        self.shown, self.dies_at = shown, dies_at

    def update(self, content, **_):
        """Draw anew."""
        if len(self.shown) == self.dies_at:
            msg = "the frontend is gone"
            raise RuntimeError(msg)
        self.shown.append(content)


def cell(monkeypatch, dies_at=None):
    """The contents that an output of a cell gets, one after the other."""
    shown = []

    def display(content, **_):
        shown.append(content)
        return Handle(shown, dies_at)

    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    return shown


def test_a_cell_is_drawn_anew_in_one_output(monkeypatch, capsys):
    """Curves, memory against the plan, answers and notices are in it, whatever they hold is text, and so is its twin."""
    shown, clock = cell(monkeypatch), Clock()
    with Live(watched(planned_bytes=4 * 2**30), 2, clock) as view:
        view.evaluation(evaluation(0, samples=[{"step": 0, "prompt": SCRIPT, "answer": SCRIPT}]))
        for step in range(1, 6):
            clock.now += 2.0
            view.step(record(step, loss=3.0 - step / 10))
        view.notice(SCRIPT)
        view.ending = "finished"
    assert len(shown) == 7
    html, text = shown[-1]["text/html"], shown[-1]["text/plain"]
    assert "<script" not in html
    reader = Reader()
    reader.feed(html)
    assert reader.opened == []
    said = "".join(reader.text)
    for part in (
        "done 5 steps",
        "loss from 2.9 to 2.5",
        "learning rate from 0.001",
        "used 3.0 GiB",
        "not used 1.0 GiB",
    ):
        assert part in said
    for part in ("finished", "25.0%", "3.250", SCRIPT):
        assert part in said
    assert "5/10 steps, ending finished, loss 2.500, held out 3.250" in text
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("took", "most"), [(0.1, 6), (0.0, 101)])
def test_showing_takes_a_small_share_of_the_time(monkeypatch, took, most):
    """A picture that takes 0.1 s is drawn every 20 s, and none more often than once a second."""
    clock = Clock()
    shown = cell(monkeypatch)
    drawn = live.live_html

    def slow(*values):
        clock.now += took
        return drawn(*values)

    monkeypatch.setattr(live, "live_html", slow)
    view, began = Live(Watched("Run", report(2000, 2000, 9), TrainingSpec()), 2, clock), clock.now
    for step in range(1, 2000):
        clock.now = max(clock.now, began + step / 20)
        view.step(record(step))
    assert 4 <= len(shown) <= most


@pytest.mark.parametrize("dies_at", [1, 3])
def test_a_view_that_dies_is_followed_by_the_line(monkeypatch, capsys, dies_at):
    """A frontend that fails in the middle is said once, and the line goes on from there."""
    shown, clock = cell(monkeypatch, dies_at), Clock()
    with Live(watched(), 2, clock) as view:
        for step in range(1, 9):
            clock.now += 2.0
            view.step(record(step))
        refreshed(view)
    assert len(shown) == dies_at
    written = capsys.readouterr().err
    assert written.count("the view of the run is gone: RuntimeError('the frontend is gone')") == 1
    assert "8/10 steps" in written


def test_a_level_that_there_is_not_is_refused():
    """It is named with what there is."""
    with pytest.raises(SpecError, match=r"verbose=3: expected 0 \(notices alone\), 1 \(a line\) or 2"):
        live.require_verbose(3)


def test_curves_keep_no_more_than_a_picture_shows():
    """Of 100,000 steps a few hundred points are kept, which follow the values, the last ones too."""
    kept = Thinned()
    for step in range(100_000):
        kept.add(step, 3.0 * step)
    assert 200 <= len(kept.points) <= 400
    assert all(y == pytest.approx(3.0 * x) for x, y in kept.points)
    assert kept.points[-1][0] > 99_000
    few = Thinned()
    for step in range(5):
        few.add(step, step)
    assert few.points == [(step, step) for step in range(5)]

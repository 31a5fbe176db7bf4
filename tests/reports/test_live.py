import pytest

from qwenft.plan.records import DataReport
from qwenft.reports.live import Progress, TimeLeft
from qwenft.specs.training import TrainingSpec

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
        "stream_tokens": 100,
        "tokens_per_second": 1234.5,
        "peak_bytes": 3 * 2**30,
        **more,
    }


def test_the_line_says_what_people_watch(capsys):
    """Time left, loss, held-out loss, tokens a second and memory are in the line; a notice stands above it."""
    clock = Clock()
    with Progress(report(10, 10, 1000), TrainingSpec(), clock=clock) as progress:
        progress.evaluation({"step": 0, "held_out_loss": 3.25, "evaluation_seconds": 1.0})
        clock.now += 8.0
        progress.step(record(1))
        progress.bar.refresh()
        progress.notice("SIGINT: ending")
    line = capsys.readouterr().err
    assert "1/10 steps" in line
    for part in ("left=1:04", "loss=2.500", "held out=3.250", "tok/s=1,234", "mem=3.0 GiB", "SIGINT: ending\n"):
        assert part in line


def test_a_quiet_line_still_tells_notices(capsys):
    """Not shown, it writes nothing but what the user must know."""
    with Progress(report(10, 10, 1000), TrainingSpec(), shown=False) as progress:
        progress.step(record(1))
        progress.notice("SIGINT: ending")
    captured = capsys.readouterr()
    assert captured.err == "SIGINT: ending\n"
    assert captured.out == ""


def test_a_run_that_continues_begins_where_it_stands(capsys):
    """The line of a continued run starts at its step, and its time left is that of the steps that are left."""
    clock = Clock()
    with Progress(report(10, 10, 1000), TrainingSpec(), 6, clock=clock) as progress:
        clock.now += 2.0
        progress.step(record(7))
        progress.bar.refresh()
    line = capsys.readouterr().err
    assert "7/10 steps" in line
    assert "left=0:06" in line

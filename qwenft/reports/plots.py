"""Plots of runs, plans and data, with matplotlib."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwenft.errors import SpecError, nearest
from qwenft.reports.curves import smoothed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qwenft.run import Run
    from qwenft.training_plan import TrainingPlan

    Panels = Mapping[str, Callable[[Any, Any], None]]


class NotebookFigure(Figure):  # type: ignore[misc] # matplotlib has no types here
    """A figure that belongs to no window, and that a notebook shows whether or not it has set pyplot up."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def plot_lengths(lengths: Any, supervised: Any, max_length: int) -> Any:
    """How many documents are how long, and how many of their tokens are trained.

    Returns:
        A matplotlib figure.
    """
    figure = NotebookFigure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(lengths, bins=40)
    if len(lengths) and max(lengths) > max_length:
        left.axvline(max_length, color="tab:red", lw=1, label="max_length")
        left.legend(frameon=False)
    left.set(xlabel="tokens of a document", ylabel="documents")
    right.hist(supervised / lengths if len(lengths) else [], bins=40, range=(0, 1), color="tab:green")
    right.set(xlabel="share of them that is trained", ylabel="documents")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def plot(value: Run | TrainingPlan, panels: Sequence[str], known: Panels) -> Any:
    """Panels of a run or a plan, one below the other.

    Args:
        value: what is drawn.
        panels: their names.
        known: what draws each, into axes.

    Returns:
        A matplotlib figure.

    Raises:
        SpecError: no such panel.
    """
    for name in panels:
        if name not in known:
            problem = f"plot({name!r}): expected one of {', '.join(known)}{nearest(str(name), known)}"
            raise SpecError(problem, fix=f'plot("{next(iter(known))}")', got=name, expected=tuple(known))
    figure = NotebookFigure(figsize=(7, 0.5 + 3 * len(panels)), layout="constrained")
    # Panels of a run are over the same steps.
    for name, axes in zip(
        panels, figure.subplots(len(panels), squeeze=False, sharex=known is RUN)[:, 0], strict=True
    ):
        known[name](axes, value)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if known is RUN:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_runs(runs: Mapping[str, Run]) -> Any:
    """The smoothed and the held-out loss of several runs in one picture, by the names that they are given.

    Returns:
        A matplotlib figure.
    """
    figure = NotebookFigure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        steps, losses = _of(run, "loss")
        (line,) = axes.plot(steps, smoothed(losses), lw=1.5, label=name)
        axes.plot(*_of(run, "held_out_loss"), "o", ms=4, color=line.get_color())
    axes.set(xlabel="step", ylabel="loss (nats a token; held out: dots)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _of(run: Run, name: str) -> tuple[list[int], list[Any]]:
    """The steps that have a value of that name, and the values."""
    records = [record for record in run.history if name in record]
    return [record["step"] for record in records], [record[name] for record in records]


def _draw_loss(axes: Any, run: Run) -> None:
    steps, losses = _of(run, "loss")
    axes.plot(steps, losses, lw=0.7, alpha=0.4, color="tab:blue", label="training")
    axes.plot(steps, smoothed(losses), lw=1.5, color="tab:blue", label="training, smoothed")
    if run.held_out_losses:
        axes.plot(*_of(run, "held_out_loss"), "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.legend(frameon=False)


def _draw_gradient(axes: Any, run: Run) -> None:
    axes.plot(*_of(run, "grad_norm"), lw=1)
    if (limit := run.recipe.training.max_grad_norm) is not None:
        axes.axhline(limit, color="tab:red", lw=1, label="clipped at")
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="gradient norm", yscale="log")


def _draw_rate(axes: Any, run: Run) -> None:
    axes.plot(*_of(run, "learning_rate"), lw=1)
    axes.set(xlabel="step", ylabel="learning rate")


def _draw_throughput(axes: Any, run: Run) -> None:
    axes.plot(*_of(run, "tokens_per_second"), lw=1)
    axes.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))


def _draw_experts(axes: Any, run: Run) -> None:
    steps, loads = _of(run, "expert_load")
    if not steps:
        raise SpecError("plot('experts'): the model has no routed experts", fix='plot("loss")', got="experts")
    for layer, of_layer in enumerate(zip(*loads, strict=True)):
        axes.plot(steps, of_layer, lw=1, label=f"layer {layer}")
    axes.axhline(1, color="grey", lw=1)
    axes.set(xlabel="step", ylabel="busiest expert / even share")
    if len(loads[0]) <= 8:
        axes.legend(frameon=False, ncols=4)


def _draw_memory(axes: Any, plan: TrainingPlan) -> None:
    memory = plan.memory
    parts = {**memory.by_component, **memory.assumed}
    left, least = 0.0, 0.001 * memory.needed_bytes  # what is less is not seen
    for name, count in sorted(parts.items(), key=lambda part: -part[1]):
        if count < least:
            continue
        axes.barh(0, count / 2**30, left=left / 2**30, label=f"{name} {count / 2**30:.2f}")
        left += count
    axes.axvline(plan.forecast.memory_limit / 2**30, color="tab:red", lw=1, label="of the machine")
    axes.set(xlabel="GiB of a process at the peak", yticks=[], ylim=(-0.6, 2))
    axes.legend(frameon=False, ncols=3, fontsize="small", loc="upper left")


def _draw_lengths(axes: Any, plan: TrainingPlan) -> None:
    data = plan.recipe.data
    assert data is not None
    ends, counts = zip(*plan.data.lengths, strict=True) if plan.data.lengths else ((), ())
    axes.bar(ends, counts, width=-0.95 * ends[0] if ends else 1, align="edge")
    axes.axvline(data.max_length, color="tab:red", lw=1, label="max_length")
    axes.set(xlabel="tokens of a row of the source", ylabel="rows")
    axes.legend(frameon=False)


def _draw_fill(axes: Any, plan: TrainingPlan) -> None:
    data = plan.recipe.data
    assert data is not None
    rows = [sum(map(len, row)) for _, step in plan.stream.steps() for row in step]
    axes.hist([tokens / data.capacity for tokens in rows], bins=40, range=(0, 1))
    axes.set(xlabel="share of a row's capacity that its documents fill", ylabel="rows of the stream")


RUN: Panels = {
    "loss": _draw_loss,
    "gradient": _draw_gradient,
    "rate": _draw_rate,
    "throughput": _draw_throughput,
    "experts": _draw_experts,
}
PLAN: Panels = {"memory": _draw_memory, "lengths": _draw_lengths, "fill": _draw_fill}

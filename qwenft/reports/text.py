"""Plans and runs as text."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from qwenft.display import bytes_text, text_table, time_text
from qwenft.plan.coverage import Coverage

if TYPE_CHECKING:
    from qwenft.machine import Machine
    from qwenft.plan.records import DataReport, StateBytes
    from qwenft.run import Run
    from qwenft.specs.training import TrainingSpec
    from qwenft.training_plan import TrainingPlan

BARS = " ▁▂▃▄▅▆▇█"
_BAR = 40  # characters of the bar of memory
_LEVELS = {"error": "error", "blocked": "blocked here", "note": "note"}


COVERAGE = (*Coverage.HEADER, "held in")


def coverage_rows(plan: TrainingPlan) -> list[tuple[str, ...]]:
    """Of each role what :data:`COVERAGE` names: what is trained of it, and how its weights are held."""
    held: dict[str, list[str]] = {}
    for row in plan.storage:
        held.setdefault(row.role, []).append(f"{row.held_in} {bytes_text(row.bytes)}")
    return [(*row, ", ".join(held[row[0]])) for row in plan.coverage.rows()]


def facts(plan: TrainingPlan) -> list[tuple[str, str]]:
    """What a plan says in a line each: name and value."""
    recipe, draft = plan.recipe, plan.draft
    precision = recipe.model.dtype
    if draft.storage.kind is not None:
        scales = " with quantized scales" if draft.storage.double_quant else ""
        precision += f", large matrices in {draft.storage.kind}{scales}"
    if draft.compute_dtype != precision:
        precision += f", computed in {draft.compute_dtype}"
    half = "with vision tower" if recipe.model.vision else "text half"
    place = "of" if recipe.adapter.kind == "full" else "beside"
    held = sum(row.held for row in plan.coverage)
    method = "full fine-tuning" if recipe.adapter.kind == "full" else f"LoRA rank {draft.adapter.rank}"
    return [
        ("model", f"{draft.checkpoint.name} ({half}, {precision})"),
        ("machine", machine_text(plan.machine)),
        *((("processes", processes_text(plan)),) if recipe.parallel.kind != "single" else ()),
        ("trained", f"{method}: {plan.trained_parameters:,} parameters {place} {held:,}"),
        ("attention", ", ".join(f"{slot.name} = {slot.backend.name}" for slot in draft.slots)),
        ("data", data_text(plan)),
        *((("lengths", lengths_text(plan.data)), ("tokens", plan.data.cache)) if plan.data_is_known else ()),
        ("training", training_text(recipe.training)),
        ("state", state_text(plan.state, draft.ranks)),
        ("activations", activations_text(recipe.training)),
        ("memory", memory_text(plan)),
        *((("", bar_text(plan)),) if plan.forecast.memory_is_known else ()),
        ("time", time_of_steps(plan)),
        ("disk", disk_text(plan)),
    ]


def training_text(training: TrainingSpec) -> str:
    """Optimizer, learning rates and what is added to plain cross entropy, in a sentence."""
    chosen = training.chosen_loss
    loss = f"; loss {chosen}" if isinstance(chosen, str) else f"; loss {chosen.__name__}()"
    rates = "".join(f", {role} {rate:g}" for role, rate in training.learning_rates)
    where = " in backward" if training.optimizer_in_backward else ""
    extras = (
        ("LoRA+ ratio", training.lora_plus_ratio if training.lora_plus_ratio != 1 else 0),
        ("NEFTune alpha", training.neftune_alpha),
        ("label smoothing", training.label_smoothing),
        ("z-loss", training.z_loss),
        ("load-balancing loss", training.router_aux_loss),
        ("weight decay", training.weight_decay),
        ("gradients clipped at", training.max_grad_norm or 0),
    )
    listed = "".join(f"; {name} {value:g}" for name, value in extras if value)
    course = f"learning rate {training.learning_rate:g}{rates} ({training.schedule})"
    compiled = "; norms and gates compiled" if training.compile_elementwise else ""
    return f"{training.optimizer}{where}, {course}{listed}{loss}{compiled}"


def processes_text(plan: TrainingPlan) -> str:
    """How many processes there are, and what they share."""
    parallel, count = plan.recipe.parallel, plan.draft.ranks
    if count == 1:
        return f"1, which shares nothing ({parallel.kind} is for more)"
    if parallel.kind == "ddp":
        return f"{count}, each with the whole model (ddp)"
    over = "the processes of each node" if parallel.hybrid else "all"
    offloaded = ", kept in host memory" if parallel.offload else ""
    return f"{count}; weights, gradients and moments are shared out over {over}{offloaded} (fsdp2)"


def state_text(state: StateBytes, ranks: int = 1) -> str:
    """What a run, or each of its processes, holds from its first step to its last."""
    each = " in each process" if ranks > 1 else ""
    parts = (
        ("frozen weights", state.weights),
        ("trained", state.trained),
        ("gradients", state.gradients),
        ("optimizer", state.optimizer),
    )
    listed = ", ".join(f"{name} {bytes_text(count)}" for name, count in parts)
    on_host = f"; {bytes_text(state.on_host)} more on the host" if state.on_host else ""
    return f"{bytes_text(state.total)}{each}: {listed}{on_host}; activations come on top"


def activations_text(training: TrainingSpec) -> str:
    """What of a step is kept for backward, in a sentence."""
    every = training.activation_checkpointing
    if not every:
        return "kept for backward"
    layers = "every layer" if every == 1 else f"one layer in {every}"
    kept = "kept on the host until then" if training.activation_offloading else "kept"
    return f"{layers} computed again in backward, its input {kept}"


def memory_text(plan: TrainingPlan) -> str:
    """The peak of a step by component, or that it has not been simulated."""
    if not plan.forecast.memory_is_known:
        return "not yet computed (plan.memory simulates a step)"
    memory = plan.memory
    parts = sorted(memory.by_component.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {bytes_text(count)}" for name, count in parts if count)
    beside = ", ".join(f"{name} {bytes_text(count)}" for name, count in memory.assumed.items())
    left_out = f"; NOT counted: what the kernels of {', '.join(memory.left_out)} hold" if memory.left_out else ""
    return (
        f"{bytes_text(memory.peak_bytes)} of live tensors at most, in {memory.moment}, with {memory.tokens:,} "
        f"tokens, {memory.supervised:,} of them trained: {listed}; beside them, assumed: {beside}{left_out}"
    )


def bar_parts(plan: TrainingPlan) -> list[tuple[str, int]]:
    """What fills the memory of a process in the largest step, the largest first; what is free comes last."""
    memory = plan.memory
    live = sorted(((n, count) for n, count in memory.by_component.items() if count), key=lambda part: -part[1])
    free = max(0, plan.forecast.memory_limit - memory.needed_bytes)
    return [*live, ("assumed", sum(memory.assumed.values())), ("free", free)]


def bar_text(plan: TrainingPlan) -> str:
    """The same as a bar of characters, with what is missing where it does not fit."""
    needed, limit = plan.memory.needed_bytes, plan.forecast.memory_limit
    whole = max(needed, limit)
    bar, drawn, done = "", 0, 0
    fills = itertools.cycle("█▓▒░")
    for name, count in bar_parts(plan):
        done += count
        width = round(_BAR * done / whole) - drawn
        drawn += width
        bar += width * ({"free": " ", "assumed": "·"}.get(name) or next(fills))
    return f"[{bar}] {verdict_text(plan)}"


def verdict_text(plan: TrainingPlan) -> str:
    """Whether a plan fits, in bytes."""
    needed, limit = plan.memory.needed_bytes, plan.forecast.memory_limit
    verdict = "fits" if plan.fits else f"{bytes_text(needed - limit)} too much"
    return f"{bytes_text(needed)} of {bytes_text(limit)}: {verdict}"


def time_of_steps(plan: TrainingPlan) -> str:
    """How long steps take, and what that counts."""
    if not plan.machine.bandwidth:
        return f"not estimated: how fast {plan.machine.name} is is not known"
    if not plan.forecast.time_is_known:
        return "not yet computed (plan.time simulates a step)"
    found = plan.time
    step = f"{found.step_seconds:.3g} s a step of {found.tokens:,} tokens, {found.tokens_per_second:,.0f} a second"
    run = "" if found.run_seconds is None else f"; all {found.steps:,} steps {time_text(found.run_seconds)}"
    counted = f"{found.operations / 1e12:,.3g} TFLOP and {bytes_text(found.moved)} moved"
    if found.slower is None:
        return f"at least {step}{run} ({counted} at the highest rates; no data, evaluations or checkpoints)"
    return f"{step}{run} ({counted}, {found.slower:.3g} times slower than the highest rates, as measured here)"


def machine_text(machine: Machine) -> str:
    """A machine with what is assumed to be installed there."""
    if not machine.libraries:
        return machine.name
    listed = " and ".join(f"{name} {version}" for name, version in machine.libraries)
    return f"{machine.name}, assumed to have {listed}"


def disk_text(plan: TrainingPlan) -> str:
    """What the checkpoints of a run take."""
    training, one = plan.recipe.training, plan.checkpoint_bytes
    interval = "every tenth of the run" if training.save_every is None else f"every {training.save_every:,} steps"
    kept = training.keep_checkpoints + (training.keep_best and 1)
    return f"a checkpoint of {bytes_text(one)} {interval}, {kept} kept: {bytes_text(kept * one)}"


def data_text(plan: TrainingPlan) -> str:
    """The data in a sentence, or that they have not been counted."""
    if plan.recipe.data is None:
        return "none"
    if not plan.data_is_known:
        return "not yet computed (plan.data tokenises them)"
    data = plan.data
    lost = [
        f"{count:,} rows {what}"
        for count, what in (
            (data.dropped, "dropped"),
            (data.truncated, "truncated"),
            (data.split, "split"),
            (data.untrained, "untrained"),
            (len(data.skipped), "wrong and skipped"),
            *((count, f"lose {what} to the template") for what, count in data.lost),
        )
        if count
    ]
    return (
        ("" if data.window is None else f"streamed, of the first {data.rows:,} rows: ")
        + f"{data.documents:,} documents, {data.tokens:,} tokens, {data.supervised:,} of them supervised"
        + (f", {data.vision_tokens:,} of {_media_text(data)}" if data.vision_tokens else "")
        + "; "
        f"{data.stream_rows:,} rows filled to {data.fill:.0%}; {data.steps:,} steps"
        + (f"; {data.held_out:,} documents held out" if data.held_out else "")
        + (f"; {', '.join(lost)}" if lost else "")
        + (f"; {data.lost_tokens / data.read_tokens:.1%} of the tokens lost" if data.lost_tokens else "")
    )


def _media_text(data: DataReport) -> str:
    counts = [(data.images, "image"), (data.videos, "video")]
    return " and ".join(f"{count:,} {kind}{'s' * (count != 1)}" for count, kind in counts if count)


def lengths_text(data: DataReport) -> str:
    """How long rows are before the length policy, as a row of bars.

    Examples:
        >>> from types import SimpleNamespace
        >>> lengths_text(SimpleNamespace(lengths=((10, 4), (20, 8), (30, 0), (40, 1))))
        '▄█ ▁ up to 40 tokens'
    """
    most = max(count for _, count in data.lengths)
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // most)] for _, count in data.lengths)
    return f"{bars} up to {data.lengths[-1][0]:,} tokens"


def render_plan(plan: TrainingPlan) -> str:
    """The whole plan."""
    lines = [f"{name:<11} {value}" for name, value in facts(plan)]
    rows = text_table(COVERAGE, coverage_rows(plan), right=(2, 3, 4))
    findings = [f"{_LEVELS[finding.level]}: {finding}" for finding in plan.findings]
    return "\n".join([*lines, "", rows, "", *findings])


def render_run(run: Run) -> str:
    """A run in a few lines."""
    steps = [record for record in run.history if "loss" in record]
    lines = [f"run of {len(steps):,} steps in {run.folder}"]
    if steps:
        lines.append(f"loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")
        compiling, whole = (
            sum(record.get(name, 0.0) for record in steps) for name in ("compile_seconds", "seconds")
        )
        if compiling:
            lines.append(f"compiling took {compiling:.0f} of its {whole:,.0f} s")
    if run.held_out_losses:
        lines.append(f"held out {run.held_out_losses[0][1]:.4f} to {run.held_out_losses[-1][1]:.4f}")
    if run.best_step is not None and run.ending != "interrupted":
        lines.append(f"with the weights of step {run.best_step:,}, the best")
    if run.ending != "finished":
        done = run.history[-1]["step"] if run.history else 0
        lines.append(f"{run.ending} at step {done:,} of {run.steps:,}")
    if run.ending == "interrupted":
        lines.append(f'plan.train("{run.folder}") continues from {run.checkpoint}')
    return ", ".join(lines)

"""The loop over steps, on ``Prepared`` and nothing else."""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from qwenft.data.chat import ChatEncoder
from qwenft.data.stream import places_text
from qwenft.errors import CheckpointError, NonFiniteError, RankError
from qwenft.models.generate import answers
from qwenft.training.diagnosis import RECENT, usual_loss
from qwenft.training.interruption import Interruption
from qwenft.training.memory_use import is_shortage, peak_bytes, shortage
from qwenft.training.results import FINISHED, INTERRUPTED, STOPPED_EARLY, Ending, StepResult
from qwenft.training.saving import begin_save
from qwenft.training.stalls import Pulse, is_of_collective, suspects_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from qwenft.data.stream import Batch
    from qwenft.training.checkpoint import Writing
    from qwenft.training.engine import Prepared
    from qwenft.training.run_folder import RunFolder

SAVES = 10  # checkpoints of a run whose recipe gives no interval


@attrs.frozen
class Listeners:
    """Plain functions that a run calls; what they return is not looked at.

    Args:
        on_step: with the record of each step, after that of its evaluation.
        on_evaluate: with the record of each evaluation, and its answers under "samples".
        on_save: with the folder of each checkpoint.
        on_notice: with a sentence for the user.
    """

    on_step: Callable[[dict[str, Any]], Any]
    on_evaluate: Callable[[dict[str, Any]], Any]
    on_save: Callable[[Any], Any]
    on_notice: Callable[[str], Any]


def train(
    prepared: Prepared, folder: RunFolder, history: list[dict[str, Any]], listeners: Listeners, *, state_bytes: int
) -> Ending:
    """Train to the end of the recipe, from where ``prepared`` stands.

    All processes of a run call it; the first of them alone writes metrics and tells who listens.

    Args:
        prepared: model, optimizer and data.
        folder: of the run, which gets checkpoints and a line of metrics a step. They are not held in memory: a run
            of weeks takes no more of it than a short one.
        history: the records so far: `step, epoch, loss, learning_rate, grad_norm, tokens,
            stream_tokens, ranks, seconds, compile_seconds, tokens_per_second, peak_bytes, state_bytes`,
            `expert_load, idle_experts` of a mixture of experts, `mtp_loss` where that layer is trained, and
            `held_out_loss, held_out_perplexity, held_out_accuracy, held_out_exact_match, evaluation_seconds` where
            it was evaluated.
        listeners: who is told.
        state_bytes: of weights, gradients and optimizer, repeated in every record.

    Raises:
        CheckpointError: a checkpoint cannot be written, and the recipe does not go on without or it is the last;
            those before it are whole.
        NonFiniteError: a loss or gradient is not finite, and the recipe does not leave the step out.
        OutOfMemoryError: a step found too little memory.
        RankError: another process stalled or is gone.
        KeyboardInterrupt: a second signal came.
    """
    course, ranks = _Course.after(history, prepared, folder, listeners), prepared.ranks
    if not history and (before := course.evaluation(0)):
        course.record({"step": 0, **before})
    course.list_skipped(prepared.corpus.report.skipped)
    with Interruption(listeners.on_notice) as interruption, Pulse(ranks, listeners.on_notice) as pulse:
        for epoch, batches in prepared.remaining():
            if course.is_exhausted():
                break
            pulse.step = prepared.steps_done + 1
            values = course.trained(batches, pulse)
            values |= {"epoch": epoch, "ranks": ranks.count, **course.held(state_bytes)}
            step = values["step"]
            course.list_skipped(map(str, prepared.corpus.train.take_skipped()))
            course.record({**values, **course.evaluation(step)})
            told = ranks.gather((interruption.signal, course.is_written))
            signals = [signal for signal, _ in told if signal is not None]
            if all(is_written for _, is_written in told):
                course.finish_save()
            if signals or course.is_saved(step) or course.is_exhausted():
                course.save(step, is_last=bool(signals) or step == course.steps or course.is_exhausted())
            if signals and step < course.steps:
                course.finish_save()
                return Ending(INTERRUPTED, signals[0])
    course.finish_save()
    return Ending(STOPPED_EARLY if course.is_exhausted() else FINISHED)


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The trained step of the lowest held-out loss; None where none was evaluated."""
    evaluated = [record for record in history if record["step"] and "held_out_loss" in record]
    return min(evaluated, key=lambda record: record["held_out_loss"])["step"] if evaluated else None


@attrs.define
class _Course:
    """What the loop does between steps."""

    prepared: Prepared
    folder: RunFolder
    listeners: Listeners
    evaluated: list[dict[str, Any]]
    losses: deque[float]
    skipped: int
    leapt: int = -RECENT
    writing: Writing | None = None
    writes_last: bool = False
    state_bytes: int | None = None

    @classmethod
    def after(
        cls, history: list[dict[str, Any]], prepared: Prepared, folder: RunFolder, listeners: Listeners
    ) -> _Course:
        """What goes on behind the records of a history."""
        return cls(
            prepared,
            folder,
            listeners,
            evaluated=[record for record in history if "held_out_loss" in record],
            losses=deque((record["loss"] for record in history if "loss" in record), RECENT),
            skipped=sum("skipped" in record for record in history),
        )

    def trained(self, batches: Sequence[Batch], pulse: Pulse) -> dict[str, Any]:
        """Train a step; what is recorded of it."""
        prepared, started = self.prepared, time.perf_counter()
        try:
            result = prepared.step(batches)
        except NonFiniteError as error:
            return self._left_out(batches, error)
        except (RuntimeError, MemoryError) as error:
            if is_shortage(error):
                raise shortage(prepared, batches, error) from error
            if is_of_collective(error) and (suspects := pulse.suspects()):
                problem = f"step {prepared.steps_done + 1}: {suspects_text(suspects)}"
                raise RankError(problem, fix=self._goes_on, rank=min(suspects)) from error
            raise
        seconds = time.perf_counter() - started
        values = {name: value for name, value in attrs.asdict(result).items() if value not in ((), None)}
        if (usual := usual_loss(self.losses, result.loss)) is not None:
            values["usual_loss"] = usual
            self._tell_leap(result, usual, batches)
        self.losses.append(result.loss)
        return {**values, "seconds": seconds, "tokens_per_second": result.stream_tokens / seconds}

    def _tell_leap(self, result: StepResult, usual: float, batches: Sequence[Batch]) -> None:
        """Tell of the first leap of several."""
        if result.step - self.leapt > RECENT:
            places = places_text([place for batch in batches for place in batch.documents])
            self.notice(f"step {result.step}: the loss leaps to {result.loss:.3f} from {usual:.3f}, in {places}")
        self.leapt = result.step

    def _left_out(self, batches: Sequence[Batch], error: NonFiniteError) -> dict[str, Any]:
        """Leave a step out as the recipe allows it; else tell from where the run can go on."""
        training, last = self.prepared.training, self._last_checkpoint
        allowed = training.non_finite == "skip" and self.skipped < training.max_skipped
        if not allowed:
            limit = f" ({self.skipped} steps were left out before)" if self.skipped else ""
            whole = "no checkpoint has been written" if last is None else f"the last good checkpoint is {last}"
            raise NonFiniteError(
                f"{error.problem}; {whole}{limit}", fix=error.fix, **{**error.values, "checkpoint": last}
            ) from error
        self.skipped += 1
        self.prepared.skip(batches)
        self.notice(f"left out: {error.problem}")
        return {"step": error.step, "skipped": [list(place) for place in error.documents]}

    def notice(self, sentence: str) -> None:
        """Say something, once for all processes."""
        if self.speaks:
            self.listeners.on_notice(sentence)

    @property
    def _last_checkpoint(self) -> Path | None:
        return next(reversed(self.folder.checkpoints.values()), None)

    @property
    def _goes_on(self) -> str:
        last = self._last_checkpoint
        return f"the same train() again: it {'begins anew' if last is None else f'continues from {last}'}"

    @property
    def speaks(self) -> bool:
        """Whether this process is the one that writes."""
        return self.prepared.ranks.is_first

    def list_skipped(self, errors: Iterable[str]) -> None:
        """Write the errors of rows that are left out."""
        if self.speaks:
            self.folder.list_skipped(errors)

    def record(self, values: dict[str, Any]) -> None:
        """Write a record, and tell who listens."""
        samples = values.pop("samples", [])
        if "held_out_loss" in values:
            self.evaluated.append(values)
        if not self.speaks:
            return
        self.folder.append("metrics.jsonl", values)
        for sample in samples:
            self.folder.append("samples.jsonl", sample)
        if "evaluation_seconds" in values:
            self.listeners.on_evaluate({**values, "samples": samples})
        if "loss" in values:
            self.listeners.on_step(values)

    def evaluation(self, step: int) -> dict[str, Any]:
        """What is measured and answered at a step; nothing where it is not due."""
        training = self.prepared.training
        if not (step in (0, self.steps) or _is_multiple(step, training.evaluate_every)):
            return {}
        started = time.perf_counter()
        values: dict[str, Any] = {}
        if self.prepared.corpus.held_out is not None:
            found = self.prepared.evaluate(self.prepared.corpus.held_out)
            values = {
                "held_out_loss": found.loss,
                "held_out_perplexity": found.perplexity,
                "held_out_accuracy": found.accuracy,
                "held_out_exact_match": found.exact_match,
            }
        if training.sample_prompts:
            values["samples"] = self._samples(step)
        return {**values, "evaluation_seconds": time.perf_counter() - started} if values else {}

    def _samples(self, step: int) -> list[dict[str, Any]]:
        prepared, prompts = self.prepared, self.prepared.training.sample_prompts
        encoder = ChatEncoder(prepared.tokenizer)
        texts = answers(prepared.model, encoder, prompts, prepared.training.sample_tokens)
        found = zip(prompts, texts, strict=True)
        return [{"step": step, "prompt": prompt, "answer": text} for prompt, text in found]

    def is_saved(self, step: int) -> bool:
        """Whether a step gets a checkpoint by itself."""
        training = self.prepared.training
        if step == self.steps or _is_multiple(step, training.save_every or max(1, self.steps // SAVES)):
            return True
        return training.keep_best and best_step(self.evaluated) == step

    def held(self, planned: int) -> dict[str, int]:
        """The memory of the process that took the most of it, and the state that is planned for one alone."""
        prepared = self.prepared
        if self.state_bytes is None:  # the same from the first step on
            self.state_bytes = planned if prepared.ranks.count == 1 else prepared.state_bytes
        held = prepared.ranks.gather((peak_bytes(prepared.device), self.state_bytes))
        return {"peak_bytes": max(peak for peak, _ in held), "state_bytes": max(state for _, state in held)}

    def save(self, step: int, *, is_last: bool) -> None:
        """Write a checkpoint; several processes go on while it is written."""
        self.finish_save()
        self.writes_last = is_last
        if self.speaks:
            self.folder.flush()
        with self._as_saving():
            self.writing = begin_save(self.prepared, self.folder.checkpoint(step))
        if self.prepared.ranks.count == 1:
            self.finish_save()

    @property
    def is_written(self) -> bool:
        """Whether this process has written its part of a checkpoint that has not taken its place."""
        return self.writing is not None and self.writing.is_done

    def finish_save(self) -> None:
        """Let a checkpoint take its place as soon as it is written, and remove those that are no longer kept."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        with self._as_saving():
            writing.finish()
            self.prepared.ranks.by_first(self._keep)
        if self.speaks and writing.path.exists():
            self.listeners.on_save(writing.path)

    def _keep(self) -> None:
        training, checkpoints = self.prepared.training, self.folder.checkpoints
        best = best_step(self.evaluated) if training.keep_best else None
        self.folder.mark_latest(max(checkpoints))
        self.folder.drop_checkpoints(keep=training.keep_checkpoints, best=best)

    @contextmanager
    def _as_saving(self) -> Iterator[None]:
        """Go on where a checkpoint fails, if the recipe allows it and another one comes."""
        try:
            yield
        except (CheckpointError, RankError) as error:  # in the first process, and in those that it told
            if self.prepared.training.failed_save == "stop" or self.writes_last:
                raise CheckpointError(
                    error.problem, fix=f"room on the disk, then {self._goes_on}", path=error.values.get("path")
                ) from error
            self.notice(f"a checkpoint is missing: {error.problem}")

    def is_exhausted(self) -> bool:
        """Whether the held-out loss has not fallen for as many evaluations as the recipe has patience for."""
        patience = self.prepared.training.patience
        losses = [record["held_out_loss"] for record in self.evaluated]
        return patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.prepared.corpus.report.steps


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from itertools import groupby
from operator import itemgetter

import pytest
import torch

import qwenft as qf
from qwenft.data.stream import Batch, Place
from qwenft.training.diagnosis import usual_loss
from qwenft.training.engine import Prepared
from qwenft.training.interruption import Interruption
from qwenft.training.results import FINISHED, INTERRUPTED, STOPPED_EARLY

from .helpers import chats, comparable, recipe, weights, written

LORA = qf.AdapterSpec.lora(rank=4)


def evaluated(run):
    return [record for record in run.history if "held_out_loss" in record]


def test_evaluation_is_that_of_all_logits(dense_checkpoint):
    """Loss, perplexity and accuracy are what torch computes from all logits, without what training adds to its loss."""
    training = {"label_smoothing": 0.2, "z_loss": 0.1, "neftune_alpha": 50.0}
    prepared = recipe(dense_checkpoint, held_out=0.3, **training).compile().prepare()
    found = prepared.evaluate(prepared.corpus.held_out)
    assert prepared.model.training
    prepared.model.eval()
    losses, right, exact = [], [], []
    with torch.no_grad():
        for _, row in prepared.corpus.held_out.rows_from(Place()):
            batch = Batch.from_documents(row)
            kept = batch.labels != -100
            logits = prepared.logits(batch)[kept]
            losses += torch.nn.functional.cross_entropy(logits, batch.labels[kept], reduction="none").tolist()
            right += (logits.argmax(-1) == batch.labels[kept]).tolist()
            of_documents = zip(right[-int(kept.sum()) :], batch.layout.document_ids[kept].tolist(), strict=True)
            exact += [all(token for token, _ in group) for _, group in groupby(of_documents, key=itemgetter(1))]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.accuracy == pytest.approx(sum(right) / len(right))
    assert found.exact_match == sum(exact) / len(exact)
    assert found.tokens == len(losses)


def test_evaluation_at_intervals_changes_no_step(dense_checkpoint, tmp_path):
    """With evaluations, samples and dropout between them, steps are those of a run without, to the bit."""
    options = {"adapter": qf.AdapterSpec.lora(rank=4, dropout=0.2), "max_steps": 5, "neftune_alpha": 5.0}
    data = qf.DataSpec.messages(chats(12)).with_max_length(128).pack()
    other = qf.DataSpec.messages(chats()[12:]).with_max_length(128)
    plain = recipe(dense_checkpoint, **options).with_data(data)
    watched = plain.with_data(data.hold_out(other)).with_training(evaluate_every=2, sample_prompts=("Hi",))
    runs = [
        asked.compile().train(tmp_path / name, verbose=0)
        for name, asked in {"plain": plain, "watched": watched}.items()
    ]
    losses = [[record["loss"] for record in run.history if "loss" in record] for run in runs]
    assert losses[0] == losses[1]
    assert [record["step"] for record in evaluated(runs[1])] == [0, 2, 4, 5]
    for record in evaluated(runs[1]):
        assert record["held_out_perplexity"] == pytest.approx(math.exp(record["held_out_loss"]))
        assert 0 <= record["held_out_accuracy"] <= 1
    assert runs[1].evaluate()["accuracy"] == runs[1].history[-1]["held_out_accuracy"]


def test_samples_are_answered_at_every_evaluation(dense_checkpoint, tmp_path):
    """Each prompt has an answer at each evaluation, in samples.jsonl, in the run, and for who listens."""
    heard = []
    prompts = ("What follows one and two?", "Hi")
    plan = recipe(dense_checkpoint, max_steps=4, evaluate_every=2, sample_prompts=prompts, sample_tokens=5)
    run = plan.compile().train(tmp_path / "run", verbose=0, on_evaluate=heard.append)
    assert [(s["step"], s["prompt"]) for s in run.samples] == [(n, p) for n in (0, 2, 4) for p in prompts]
    assert run.samples[-1]["answer"] == run.generate("Hi", max_new_tokens=5)
    assert [sample for record in heard for sample in record["samples"]] == run.samples
    assert all("samples" not in record for record in written(run.folder))


def test_callbacks_hear_what_happens(dense_checkpoint, tmp_path):
    """Each is called with its own: records of steps, of evaluations, folders of checkpoints, and the run."""
    heard = {name: [] for name in ("on_step", "on_evaluate", "on_save", "on_end")}
    plan = recipe(dense_checkpoint, max_steps=4, held_out=0.2, evaluate_every=3, save_every=2).compile()
    listeners = {name: found.append for name, found in heard.items()}
    run = plan.train(tmp_path / "run", verbose=0, **listeners)
    assert [record["step"] for record in heard["on_step"]] == [1, 2, 3, 4]
    assert heard["on_step"] == [record for record in run.history if "loss" in record]
    assert [record["step"] for record in heard["on_evaluate"]] == [0, 3, 4]
    assert heard["on_save"] == [tmp_path / "run" / "checkpoints" / f"step-{step}" for step in (2, 4)]
    assert heard["on_end"] == [run]


def test_the_best_step_is_kept_and_ends_the_run(dense_checkpoint, tmp_path):
    """With keep_best the checkpoint of the lowest held-out loss stays, and model and results are its."""
    options = {"held_out": 0.3, "evaluate_every": 1, "learning_rate": 0.1, "schedule": "constant", "max_steps": 8}
    plan = recipe(dense_checkpoint, keep_best=True, keep_checkpoints=1, **options).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    best = run.best_step
    losses = {record["step"]: record["held_out_loss"] for record in evaluated(run)[1:]}
    assert losses[best] == min(losses.values())
    assert 1 <= best < 8
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")} == {f"step-{best}", "step-8"}
    assert run.evaluate()["loss"] == losses[best]
    exported = recipe(tmp_path / "run" / "model", **options).compile().prepare()
    assert exported.evaluate(run.prepared.corpus.held_out).loss == pytest.approx(losses[best], rel=1e-6)
    last = recipe(dense_checkpoint, **options).compile().train(tmp_path / "last", verbose=0)
    assert last.evaluate()["loss"] == losses[8]
    again = plan.train(tmp_path / "run", verbose=0)
    assert again.evaluate()["loss"] == losses[best]


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_run_that_gets_no_better(dense_checkpoint, tmp_path, patience):
    """A run stops after so many evaluations in a row without a lower held-out loss, with a checkpoint and results."""
    training = {"held_out": 0.2, "evaluate_every": 1, "learning_rate": 3.0, "max_steps": 9}
    asked = recipe(dense_checkpoint, **training)
    run = asked.with_training(asked.training.early_stopping(patience)).compile().train(tmp_path / "r", verbose=0)
    losses = [record["held_out_loss"] for record in evaluated(run)]
    assert run.ending == STOPPED_EARLY
    assert len(losses) - 1 - losses.index(min(losses)) == patience
    assert run.checkpoint.name == f"step-{run.history[-1]['step']}"
    assert (tmp_path / "r" / "model" / "model.safetensors").exists()
    assert f"stopped early at step {run.history[-1]['step']} of 9" in repr(run)


def test_a_run_that_gets_better_is_patient(dense_checkpoint, tmp_path):
    """A falling held-out loss goes on to the end."""
    plan = recipe(dense_checkpoint, held_out=0.2, evaluate_every=1, patience=1, max_steps=4, learning_rate=1e-4)
    assert plan.compile().train(tmp_path / "run", verbose=0).ending == FINISHED


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"evaluate_every": 9}, r"evaluate_every: the run has 4 steps, and step 9 is never reached"),
        ({"evaluate_every": 2, "patience": 2}, r"patience: 4 steps are evaluated 2 times, .* never ends before"),
    ],
)
def test_what_the_run_ends_before_is_refused(dense_checkpoint, training, message):
    """Intervals that the data cannot give are errors, before a weight is read."""
    plan = recipe(dense_checkpoint, held_out=0.2, max_steps=4, **training).compile()
    with pytest.raises(qf.DataError, match=message):
        _ = plan.data


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_with_a_checkpoint(dense_checkpoint, tmp_path, capsys, number):
    """Ctrl-C and SIGTERM finish the step, save, and return a run that says where it is and how it goes on."""
    before = signal.getsignal(number)
    plan = recipe(dense_checkpoint, max_steps=6).compile()
    ended = []

    def stop(record):
        if record["step"] == 2:
            signal.raise_signal(number)

    run = plan.train(tmp_path / "run", verbose=0, on_step=stop, on_end=ended.append)
    assert run.ending == INTERRUPTED
    assert [record["step"] for record in run.history] == [1, 2]
    assert run.checkpoint == tmp_path / "run" / "checkpoints" / "step-2"
    assert ended == [run]
    assert run.adapter_path is None
    assert not (tmp_path / "run" / "model").exists()
    assert f'interrupted at step 2 of 6, plan.train("{tmp_path}/run") continues from' in repr(run)
    notice = f"{number.name}: ending after this step with a checkpoint; once more ends at once"
    assert notice in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_at_once(dense_checkpoint, tmp_path, monkeypatch):
    """A second Ctrl-C raises KeyboardInterrupt where it comes, and what is on disk is whole."""
    step = Prepared.step

    def interrupted(prepared, batches):
        if prepared.steps_done == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(prepared, batches)

    monkeypatch.setattr(Prepared, "step", interrupted)
    plan = recipe(dense_checkpoint, max_steps=6, save_every=2).compile()
    with pytest.raises(KeyboardInterrupt):
        plan.train(tmp_path / "run", verbose=0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-2"]
    assert [record["step"] for record in written(tmp_path / "run")] == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_are_left_alone():
    """Where no handler can be set, a run goes on without."""
    found = []

    def enter():
        with Interruption(print) as interruption:
            found.append((interruption.signal, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(None, signal.default_int_handler)]


@pytest.mark.long
def test_sigterm_ends_the_command_cleanly(dense_checkpoint, tmp_path):
    """The command line saves at SIGTERM, says how the run goes on, and ends with the code of that signal."""
    recipe(dense_checkpoint, max_steps=2000).save(tmp_path / "recipe.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "qwenft", "train", str(tmp_path / "recipe.json"), "--run-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        pass
    process.terminate()
    out, error = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "SIGTERM: ending after this step" in error
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert f"continues from run/checkpoints/{checkpoint.name}" in out


def poisoned(hidden, batch, head):
    """A loss that is infinite for the seventh row, and finite for all others."""
    total = head(hidden).logsumexp(-1).sum()
    return total * math.inf if ("rows in memory", 7) in batch.documents else total


def steep(hidden, batch, head):
    """A loss of finite value whose gradient is not."""
    return (hidden - hidden.detach()).sqrt().sum() + head(hidden).logsumexp(-1).sum() * batch.tokens


def test_a_loss_that_is_not_finite_names_the_document(dense_checkpoint, tmp_path):
    """The run stops before the optimizer's step and names step, file and row; the checkpoint before is whole."""
    plan = recipe(dense_checkpoint, tokens_per_step=256, save_every=1, loss=poisoned, epochs=1).compile()
    with pytest.raises(qf.NonFiniteError, match=r"loss inf, .*; in rows in memory, row 7; it began in") as caught:
        plan.train(tmp_path / "run", verbose=0)
    assert caught.value.layer == "the loss"
    last = caught.value.step - 1
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoints" / f"step-{last}"
    assert f"the last good checkpoint is {caught.value.checkpoint}\n" in str(caught.value)
    assert caught.value.documents == (("rows in memory", 7),)
    assert isinstance(caught.value, FloatingPointError)
    assert len(written(tmp_path / "run")) == caught.value.step - 1


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(dense_checkpoint, tmp_path):
    """What is left out is as if it had not been trained on, is listed by file and row, and is told."""
    options = {"save_every": 1, "loss": poisoned, "epochs": 3, "non_finite": "skip", "packed": False}
    plan = recipe(dense_checkpoint, **options, max_skipped=2).compile()
    with pytest.raises(qf.NonFiniteError, match=r"row 7; .*\(2 steps were left out before\)"):
        plan.train(tmp_path / "limited", verbose=0)
    run = recipe(dense_checkpoint, **options, max_skipped=3).compile().train(tmp_path / "run", verbose=0)
    left_out = [record for record in run.history if "skipped" in record]
    assert [record["skipped"] for record in left_out] == 3 * [[["rows in memory", 7]]]
    assert all("loss" not in record for record in left_out)
    assert len(run.history) == 60
    assert len([notice for notice in run.notices if notice.startswith("left out: step ")]) == 3
    assert run.plot()._repr_png_().startswith(b"\x89PNG")

    prepared = plan.prepare()
    for _, batches in prepared.remaining():
        if any(("rows in memory", 7) in batch.documents for batch in batches):
            prepared.skip(batches)
        else:
            prepared.step(batches)
    assert all(torch.equal(p, weights(run)[name]) for name, p in prepared.model.named_parameters())


def test_a_run_that_leaves_steps_out_goes_on_to_the_bit(dense_checkpoint, tmp_path):
    """Interrupted behind a step that was left out, a run ends as it would have, and so it counts towards the limit."""
    plan = recipe(dense_checkpoint, loss=poisoned, epochs=2, non_finite="skip", packed=False).compile()
    whole = plan.train(tmp_path / "whole", verbose=0)
    (first, _) = [record["step"] for record in whole.history if "skipped" in record]

    def stop(record):
        if record["step"] == first + 1:
            signal.raise_signal(signal.SIGINT)

    plan.train(tmp_path / "parts", verbose=0, on_step=stop)
    run = plan.train(tmp_path / "parts", verbose=0)
    assert comparable(run.history) == comparable(whole.history)
    assert all(torch.equal(weight, weights(run)[name]) for name, weight in weights(whole).items())


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj", "model.layers.1.linear_attn.out_proj"])
def test_the_layer_where_it_began_is_named(dense_checkpoint, name):
    """A weight that overflows in forward, and a gradient that does in backward, are named by the module or weight."""
    prepared = recipe(dense_checkpoint, adapter=qf.AdapterSpec.full()).compile().prepare()
    batches = next(prepared.batches())
    parameter = prepared.trained[f"{name}.weight"]
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(qf.NonFiniteError, match=rf"it began in {name}\.weight, backward") as caught:
        prepared.step(batches)
    assert caught.value.layer == f"{name}.weight"
    hook.remove()
    with torch.no_grad():
        parameter.fill_(math.inf)
    with pytest.raises(qf.NonFiniteError, match=r"loss nan, .*, forward") as caught:
        prepared.step(batches)
    assert name.startswith(caught.value.layer) or caught.value.layer == name


def test_a_loss_that_leaps_is_noted(dense_checkpoint, tmp_path):
    """Step, usual loss and documents are told of the first of several; each stands in the record, and no ordinary loss."""
    plan = recipe(dense_checkpoint, loss=leaping, epochs=2, packed=False, learning_rate=1e-5).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    leaps = [record for record in run.history if "usual_loss" in record]
    high = [record["step"] for record in run.history if record["loss"] > 50]
    assert len(high) == 4
    assert [record["step"] for record in leaps] == [step for step in high if step > 16]  # of fewer none is usual
    assert all(record["usual_loss"] < 10 for record in leaps)
    assert len(leaps) >= 2
    (notice,) = run.notices
    assert notice.startswith(f"step {leaps[0]['step']}: the loss leaps to ")
    assert "rows in memory, row 7" in notice or "rows in memory, row 9" in notice


def test_a_loss_near_nothing_does_not_leap():
    """What is learned by heart has losses that differ by factors, and by no more than a few thousandths."""
    learned = [1e-5 * (1 + number % 3) for number in range(64)]
    assert usual_loss(learned, 5e-3) is None
    assert usual_loss(learned, 0.5) == pytest.approx(2e-5)


def leaping(hidden, batch, head):
    """A loss that is enormous for two rows, and ordinary for all others."""
    total = cross_entropy(hidden, batch, head)
    return total + 100 * batch.tokens if batch.documents[0][1] in {7, 9} else total


def test_a_step_that_is_refused_changes_nothing(dense_checkpoint):
    """After a loss or a gradient that is not finite, weights, optimizer and step are as they were."""
    for loss, word in ((poisoned, "in rows"), (steep, "in one of rows")):
        prepared = recipe(dense_checkpoint, loss=loss).compile().prepare()
        before = {name: p.detach().clone() for name, p in prepared.trained.items()}
        with pytest.raises(qf.NonFiniteError, match=word):  # noqa: PT012 - which batch holds the row is chance
            for batches in prepared.batches():
                before = {name: p.detach().clone() for name, p in prepared.trained.items()}
                done = prepared.steps_done
                prepared.step(batches)
        assert prepared.steps_done == done
        assert all(torch.equal(p, before[name]) for name, p in prepared.trained.items())
        assert all(p.grad is None for p in prepared.trained.values())


def test_a_loss_of_ones_own_is_what_is_trained(dense_checkpoint, tmp_path):
    """A plain function replaces the loss: one that computes cross entropy gives the same run."""
    options = {"max_steps": 3, "held_out": 0.2, "adapter": LORA}
    runs = [
        recipe(dense_checkpoint, **options, **loss).compile().train(tmp_path / name, verbose=0)
        for name, loss in {"own": {"loss": cross_entropy}, "built in": {}}.items()
    ]
    for mine, theirs in zip(comparable(runs[0].history), comparable(runs[1].history), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    loaded = qf.Recipe.load(tmp_path / "own" / "recipe.json", allow_modules=[__name__])
    assert loaded.training.loss is cross_entropy


def cross_entropy(hidden, batch, head):
    """Cross entropy over all logits."""
    return torch.nn.functional.cross_entropy(head(hidden), batch.labels, reduction="sum")


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_runs_on_a_cpu_are_equal_to_the_bit(moe_checkpoint, tmp_path, threads, deterministic):
    """By default a run repeats for a given number of threads, and asking for it changes nothing."""
    torch.set_num_threads(threads)
    try:
        plan = recipe(moe_checkpoint, max_steps=3, deterministic=deterministic, dtype="bfloat16").compile()
        runs = [plan.train(tmp_path / name, verbose=0) for name in ("a", "b")]
    finally:
        torch.set_num_threads(1)
    assert comparable(runs[0].history) == comparable(runs[1].history)
    assert all(torch.equal(weight, weights(runs[1])[name]) for name, weight in weights(runs[0]).items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_script_of_fifteen_lines_is_train(dense_checkpoint, tmp_path):
    """A loop of one's own, with dropout, noise, rounding and evaluation, ends with the weights of train()."""
    options = {"dtype": "bfloat16", "held_out": 0.2, "evaluate_every": 2, "neftune_alpha": 5.0, "epochs": 2}
    plan = recipe(dense_checkpoint, **options, optimizer="adamw_8bit", tokens_per_step=256).compile()
    run = plan.train(tmp_path / "run", verbose=0)

    prepared = plan.prepare()
    losses = []
    for epoch in range(2):
        for batches in prepared.batches(epoch):
            result = prepared.step(batches)
            losses.append(result.loss)
            if result.step % 2 == 0:
                prepared.evaluate(prepared.corpus.held_out)

    assert losses == [record["loss"] for record in run.history if "loss" in record]
    assert all(torch.equal(p, weights(run)[name]) for name, p in prepared.model.named_parameters())


def test_roles_learn_at_their_own_rates(dense_checkpoint):
    """Every parameter of a role is in its group, adapters by the module that they adapt."""
    asked = recipe(dense_checkpoint, adapter=LORA)
    rated = asked.with_training(asked.training.with_learning_rate(mlp=1e-5))
    for adapter, part in ((LORA, "mlp."), (qf.AdapterSpec.full(), ".mlp.")):
        prepared = rated.with_adapter(adapter).compile().prepare()
        rates = {p: group["initial_lr"] for group in prepared.optimizer.param_groups for p in group["params"]}
        assert len(rates) == len(prepared.trained)
        for name, parameter in prepared.trained.items():
            assert rates[parameter] == (1e-5 if part in name else 1e-3), name


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    "training",
    [{}, {"optimizer": "adamw_8bit"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}],
    ids=json.dumps,
)
@pytest.mark.parametrize("tokens_per_step", [None, 256])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_plan_counts_what_a_run_holds(request, kind, method, training, tokens_per_step):
    """The bytes of weights, gradients and moments in the plan are those of the tensors of a step."""
    checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
    roles = {"dense": ("mlp", "full_attention"), "moe": ("routed_experts", "full_attention")}[kind]
    adapter = {"full": qf.AdapterSpec.full(), "lora": LORA.on(*roles)}[method]
    options = {"dtype": "bfloat16", "tokens_per_step": tokens_per_step}
    plan = recipe(checkpoint, adapter=adapter, **training, **options).compile()
    prepared = plan.prepare()
    gradients = []
    prepared.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(p.grad.nbytes for p in prepared.trained.values()))
    )
    prepared.step(next(prepared.batches()))
    kept = [item for p in prepared.trained.values() for item in prepared.optimizer.state[p].items()]
    state = sum(
        value.nbytes for key, value in kept if key.rstrip("12") not in {"step", "qmap"} and value is not None
    )
    assert state == plan.state.optimizer
    assert sum(p.nbytes for p in prepared.trained.values()) == plan.state.trained
    assert gradients == [plan.state.gradients]

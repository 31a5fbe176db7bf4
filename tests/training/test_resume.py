"""A run that was stopped anywhere ends as one that was not: weights, metrics, samples and order of documents, to the
bit.
"""

from __future__ import annotations

import json
import shutil
import signal

import datasets
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import qwenft as qf
from qwenft.training.engine import Prepared
from qwenft.training.results import FINISHED, INTERRUPTED, STOPPED_EARLY

from .helpers import chats, comparable, recipe, weights, written

LORA = qf.AdapterSpec.lora(rank=4, dropout=0.1)
KINDS = {
    "lora": {"adapter": LORA, "neftune_alpha": 5.0, "dtype": "bfloat16"},
    "pairs taken out, copies and tokens": {
        "adapter": qf.AdapterSpec.lora(rank=4, initialization="pissa").train_fully("norms").train_tokens(7, 3),
        "dtype": "bfloat16",
    },
    "full": {"held_out": 0.2, "evaluate_every": 2},
    "full in bfloat16": {"dtype": "bfloat16"},
    "multi-token prediction": {"adapter": qf.AdapterSpec.full().train_mtp(), "dtype": "bfloat16"},
    "8-bit": {"optimizer": "adamw_8bit", "dtype": "bfloat16", "tokens_per_step": 256},
    "sgd with master weights": {
        "optimizer": "sgd",
        "momentum": 0.9,
        "dtype": "bfloat16",
        "master_weights": True,
    },
}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A checkpoint with a tower, and conversations about pictures."""
    folder = tmp_path_factory.mktemp("seeing")
    checkpoint = qf.testing.tiny_checkpoint(folder / "checkpoint", "vision")
    rows = []
    for number in range(8):
        PIL.Image.new("RGB", (64, 32 * (1 + number % 3)), (30 * number, 200, 9)).save(folder / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "What?"}]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": f"The {number}."},
                ]
            }
        )
    data = qf.DataSpec.messages(rows).with_images(folder, workers=0).with_max_length(64)
    return qf.Recipe(
        qf.ModelSpec(checkpoint).with_vision(),
        data,
        qf.AdapterSpec.lora(rank=4, dropout=0.2).on("full_attention", "vision"),
        training=qf.TrainingSpec(learning_rate=1e-3, max_steps=6),
    )


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_on_images_goes_on_to_the_bit(seeing, stop, tmp_path):
    """Reading images draws no random number that dropout would then draw otherwise."""
    whole = seeing.compile().train(tmp_path / "whole", verbose=0)
    prepared = seeing.compile().prepare()
    left = prepared.remaining()
    for _ in range(stop):
        prepared.step(next(left)[1])
    prepared.save(tmp_path / "checkpoint")
    again = seeing.compile().prepare()
    again.load(tmp_path / "checkpoint")
    losses = [again.step(batches).loss for _, batches in again.remaining()]
    assert losses == [record["loss"] for record in whole.history][stop:]
    for name, parameter in again.trained.items():
        assert torch.equal(parameter, whole.prepared.trained[name]), name


@pytest.fixture
def order(monkeypatch):
    """The documents of every step, in the order in which they were trained on."""
    seen = []
    step = Prepared.step

    def watched(prepared, batches):
        seen.append([batch.documents for batch in batches])
        return step(prepared, batches)

    monkeypatch.setattr(Prepared, "step", watched)
    return seen


def interrupt(_record):
    """What Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def contents(folder):
    """The bytes of every file, but of the lock's, which says who was here."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def assert_same(run, wanted):
    """Two runs have the same weights and records, in memory and on disk."""
    assert comparable(run.history) == comparable(wanted.history)
    assert written(run.folder) == run.history
    for name, weight in weights(wanted).items():
        assert torch.equal(weights(run)[name], weight), name


QUICK = [("lora", True), ("full in bfloat16", False)]


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        pytest.param(
            kind,
            packed,
            id=f"{kind}-{'packed' if packed else 'unpacked'}",
            marks=[] if (kind, packed) in QUICK else [pytest.mark.long],
        )
        for kind in KINDS
        for packed in (True, False)
    ],
)
def test_a_run_that_is_interrupted_at_every_step(dense_checkpoint, tmp_path, order, kind, packed):
    """Ended after each step of two epochs, and continued each time, a run is the uninterrupted one."""
    plan = recipe(dense_checkpoint, epochs=2, packed=packed, **KINDS[kind]).compile()
    whole = plan.train(tmp_path / "whole", verbose=0)
    in_order = list(order)
    order.clear()
    assert whole.ending == FINISHED
    steps = plan.data.steps
    assert plan.data.steps_per_epoch < steps
    for step in range(1, steps):
        if not packed and 4 < step < steps - 4 and step != plan.data.steps_per_epoch:
            continue
        stop_at = step

        def stop(record, stop_at=stop_at):
            if record["step"] == stop_at:
                interrupt(record)

        run = plan.train(tmp_path / "parts", verbose=0, on_step=stop)
        assert run.ending == INTERRUPTED
        assert run.history[-1]["step"] == step
        assert run.checkpoint == tmp_path / "parts" / "checkpoints" / f"step-{step}"
    run = plan.train(tmp_path / "parts", verbose=0)
    assert run.ending == FINISHED
    assert order == in_order
    assert_same(run, whole)
    for name in ("adapter", "model"):
        for file in (tmp_path / "whole").glob(f"{name}/*.safetensors"):
            assert (tmp_path / "parts" / name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("step", [1, 5, *(pytest.param(step, marks=pytest.mark.long) for step in (4, 7))])
def test_a_run_that_crashes_between_checkpoints(dense_checkpoint, tmp_path, step):
    """A crash after any step is continued from the checkpoint before it, and what was written since is repeated."""

    def crash(record):
        if record["step"] == step:
            msg = "a cable was pulled"
            raise RuntimeError(msg)

    plan = recipe(dense_checkpoint, max_steps=8, save_every=3, held_out=0.2, evaluate_every=2).compile()
    whole = plan.train(tmp_path / "whole", verbose=0)
    with pytest.raises(RuntimeError, match="a cable was pulled"):
        plan.train(tmp_path / "parts", verbose=0, on_step=crash)
    assert written(tmp_path / "parts")[-1]["step"] == step
    assert_same(plan.train(tmp_path / "parts", "must" if step > 3 else "auto", verbose=0), whole)


def test_a_run_that_has_ended_is_returned_as_it_was(dense_checkpoint, tmp_path):
    """train() on a finished run trains nothing, and returns its weights and records; results that are lost return."""
    plan = recipe(dense_checkpoint, max_steps=3, held_out=0.2).compile()
    whole = plan.train(tmp_path / "run", verbose=0)
    before = weights(whole)
    shutil.rmtree(tmp_path / "run" / "model")
    steps = []
    again = plan.train(tmp_path / "run", verbose=0, on_step=steps.append)
    assert steps == []
    assert again.ending == FINISHED
    assert again.history == whole.history
    assert all(torch.equal(weights(again)[name], weight) for name, weight in before.items())
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_finished_run_that_is_made_longer_has_its_last_result(dense_checkpoint, tmp_path, kind):
    """What it came to before is kept under another name, which is told; until it ends again it is not finished."""
    adapter = qf.AdapterSpec.lora(rank=4) if kind == "lora" else qf.AdapterSpec.full()
    asked = recipe(dense_checkpoint, adapter=adapter, max_steps=2, schedule="constant", warmup_ratio=0.0)
    before = asked.compile().train(tmp_path / "run", verbose=0)
    name = "adapter" if kind == "lora" else "model"
    first = load_files(tmp_path / "run" / name)
    plan, accept = asked.with_training(max_steps=5, save_every=1).compile(), ["recipe.training.max_steps"]
    stopped = plan.train(
        tmp_path / "run", verbose=0, accept=accept, on_step=lambda r: r["step"] == 3 and interrupt(r)
    )
    assert qf.open_run(tmp_path / "run").ending == "interrupted"
    assert stopped.adapter_path is None
    run = plan.train(tmp_path / "run", verbose=0, accept=accept)
    alone = plan.train(tmp_path / "alone", verbose=0)
    kept, found = (load_files(tmp_path / "run" / place) for place in (f"{name}-step-2", name))
    for wanted, tensors in ((first, kept), (load_files(alone.folder / name), found)):
        assert wanted.keys() == tensors.keys()
        assert all(torch.equal(wanted[key], tensors[key]) for key in wanted)
    assert before.ending == run.ending == "finished"
    assert f"the run goes on: its {name} of step 2 is {name}-step-2 now" in run.notices


def load_files(folder):
    """The tensors of all files of a folder."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_a_run_that_stopped_early_is_over(dense_checkpoint, tmp_path):
    """Continued, a run whose patience has ended trains nothing more."""
    plan = recipe(
        dense_checkpoint, max_steps=9, held_out=0.2, evaluate_every=1, patience=2, learning_rate=3.0
    ).compile()
    run = plan.train(tmp_path / "run", verbose=0)
    assert run.ending == STOPPED_EARLY
    again = plan.train(tmp_path / "run", verbose=0)
    assert again.ending == STOPPED_EARLY
    assert again.history == run.history


def test_a_streamed_run_goes_on_in_the_middle_of_a_window(dense_checkpoint, tmp_path, order):
    """Data that are read while training goes on are gone on with behind the last step, in the next epoch too."""
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    asked = recipe(dense_checkpoint, max_steps=9, adapter=LORA)
    plan = asked.with_data(qf.DataSpec.messages(rows).with_max_length(128).pack().stream(window=8)).compile()
    whole = plan.train(tmp_path / "whole", verbose=0)
    in_order = list(order)
    assert whole.history[-1]["epoch"] == 1
    order.clear()
    for step in range(1, 9):

        def stop(record, stop_at=step):
            if record["step"] == stop_at:
                interrupt(record)

        assert plan.train(tmp_path / "parts", verbose=0, on_step=stop).ending == INTERRUPTED
    run = plan.train(tmp_path / "parts", verbose=0)
    assert order == in_order
    assert_same(run, whole)
    rows.write_text("".join(json.dumps(row) + "\n" for row in reversed(chats())))
    with pytest.raises(qf.CheckpointError, match="is of another recipe"):
        asked.with_data(plan.recipe.data).compile().train(tmp_path / "parts", verbose=0)


def test_rows_that_are_left_out_are_listed_once(dense_checkpoint, tmp_path):
    """Those of every window, and of data that are all read before, wherever the run was stopped."""
    rows = chats()
    for place in (2, 11, 19):
        rows.insert(place, {"messages": "none"})
    data = qf.DataSpec.messages(rows).on_bad_row("skip").with_max_length(128)
    asked = recipe(dense_checkpoint, max_steps=26, adapter=LORA)
    streamed = qf.DataSpec.messages(datasets.IterableDataset.from_generator(lambda: iter(rows)))
    plan = asked.with_data(streamed.on_bad_row("skip").with_max_length(128).stream(window=8)).compile()
    for step in (9, 17):  # in the middle of windows whose wrong rows are listed already

        def stop(record, stop_at=step):
            if record["step"] == stop_at:
                interrupt(record)

        assert plan.train(tmp_path / "streamed", verbose=0, on_step=stop).ending == INTERRUPTED
    plan.train(tmp_path / "streamed", verbose=0)
    asked.with_data(data).compile().train(tmp_path / "whole", verbose=0)
    for name in ("streamed", "whole"):
        lines = [json.loads(line) for line in (tmp_path / name / "skipped.jsonl").read_text().splitlines()]
        places = [line["error"].partition(":")[0].rpartition(" ")[2] for line in lines]
        assert places == ["3", "12", "20"], name


def test_an_iterable_data_set_trains(dense_checkpoint, tmp_path):
    """A datasets.IterableDataset trains and goes on; its run folder holds no recipe, which the plan says."""
    data = qf.DataSpec.messages(datasets.IterableDataset.from_generator(lambda: iter(chats()))).stream(window=8)
    plan = recipe(dense_checkpoint, max_steps=6, adapter=LORA).with_data(data).compile()
    assert "cannot be found again by a saved recipe; the run folder will hold no recipe.json" in plan.explain()
    whole = plan.train(tmp_path / "whole", verbose=0)

    def stop(record):
        if record["step"] == 3:
            interrupt(record)

    assert plan.train(tmp_path / "parts", verbose=0, on_step=stop).ending == INTERRUPTED
    assert_same(plan.train(tmp_path / "parts", verbose=0), whole)
    assert not (tmp_path / "parts" / "recipe.json").exists()


def test_a_script_saves_and_loads_in_its_own_loop(dense_checkpoint, tmp_path):
    """A loop of one's own goes on from a checkpoint with what is left of the recipe, as train() does."""
    plan = recipe(dense_checkpoint, epochs=2, adapter=LORA).compile()
    whole = plan.train(tmp_path / "whole", verbose=0)
    prepared = plan.prepare()
    for _, batches in prepared.remaining():
        if prepared.step(batches).step == 4:
            prepared.save(tmp_path / "checkpoint")
            break
    torch.manual_seed(99)
    later = plan.prepare()
    later.load(tmp_path / "checkpoint")
    losses = [later.step(batches).loss for _, batches in later.remaining()]
    assert losses == [record["loss"] for record in whole.history[4:]]
    for wanted, got in zip(whole.prepared.model.parameters(), later.model.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_what_a_killed_save_left_is_removed(dense_checkpoint, tmp_path):
    """A checkpoint that was half written, or half removed, is no checkpoint, and is gone once the run goes on."""
    plan = recipe(dense_checkpoint, max_steps=3, save_every=1).compile()
    plan.train(tmp_path / "run", verbose=0, on_step=interrupt)
    for name in (".step-2.writing", ".step-0.leaving"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
        (tmp_path / "run" / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    run = plan.train(tmp_path / "run", "must", verbose=0)
    assert run.ending == FINISHED
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"latest", "step-2", "step-3"}
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-3\n"


def test_how_often_it_is_saved_may_change(dense_checkpoint, tmp_path):
    """A run goes on with other intervals and another number of checkpoints; its recipe.json says the new ones."""
    asked = recipe(dense_checkpoint, max_steps=4, save_every=1, keep_checkpoints=3)
    asked.compile().train(tmp_path / "run", verbose=0, on_step=lambda r: r["step"] == 2 and interrupt(r))
    changed = asked.with_training(save_every=4, keep_checkpoints=1)
    changed.compile().train(tmp_path / "run", "must", verbose=0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-4"]
    assert qf.Recipe.load(tmp_path / "run" / "recipe.json") == changed


@pytest.mark.parametrize("begun", ["with a checkpoint", "without one"])
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda r: r.with_training(learning_rate=5e-4),
            r"recipe\.training\.learning_rate: 0\.001 there, 0\.0005 here",
        ),
        (lambda r: r.with_model(dtype="bfloat16"), r"recipe\.model\.dtype: 'float32' there, 'bfloat16' here"),
        (lambda r: r.with_attention(full="eager"), r"recipe\.attention\.full: 'auto' there, 'eager' here"),
        (
            lambda r: r.with_data(source=chats(19)),
            r"data\.rows in memory: '20 documents, [\d,]+ tokens, sha256 \w+' there, '19 documents",
        ),
    ],
    ids=["rate", "dtype", "backend", "data"],
)
def test_another_recipe_is_refused_with_the_difference(dense_checkpoint, tmp_path, begun, change, difference):
    """What was trained with something else is neither continued nor touched, and each difference is told."""
    asked = recipe(dense_checkpoint, max_steps=3)

    def stop(record):
        if begun == "with a checkpoint":
            interrupt(record)
        else:
            raise InterruptedError

    try:
        asked.compile().train(tmp_path / "run", verbose=0, on_step=stop)
    except InterruptedError:
        assert begun == "without one"
    before = contents(tmp_path / "run")
    other = change(asked).compile()
    with pytest.raises(
        qf.CheckpointError, match=rf"run is of another recipe:\n(.*\n)*     {difference}"
    ) as caught:
        other.train(tmp_path / "run", verbose=0)
    assert caught.value.differences
    assert "run-2" in caught.value.fix
    assert contents(tmp_path / "run") == before
    if begun == "with a checkpoint":
        with pytest.raises(qf.CheckpointError, match=difference):
            other.prepare().load(tmp_path / "run" / "checkpoints" / "step-1")


def test_a_change_that_is_accepted_is_trained_with(dense_checkpoint, tmp_path):
    """The rest of the run has the new learning rate and the new data; the old place is kept, and all of it is told."""
    asked = recipe(dense_checkpoint, max_steps=6, save_every=1, schedule="linear")
    asked.compile().train(tmp_path / "run", verbose=0, on_step=lambda r: r["step"] == 3 and interrupt(r))
    changed = asked.with_training(learning_rate=5e-4).with_data(source=chats(19))
    plan = changed.compile()
    with pytest.raises(qf.CheckpointError, match=r"data\.rows in memory") as caught:
        plan.train(tmp_path / "run", verbose=0, accept=["recipe.training"])
    assert not any("learning_rate" in line for line in caught.value.differences)
    assert 'accept=["recipe.training.learning_rate"]' in caught.value.fix
    accept = ["recipe.training.learning_rate", "recipe.data", "data"]
    run = plan.train(tmp_path / "run", "must", verbose=0, accept=accept)
    assert [record["step"] for record in run.history] == [1, 2, 3, 4, 5, 6]
    alone = changed.compile().train(tmp_path / "alone", verbose=0)
    rates = [record["learning_rate"] for record in run.history]
    assert rates[3:] == [record["learning_rate"] for record in alone.history][3:]
    assert rates[:3] == [2 * record["learning_rate"] for record in alone.history][:3]
    assert any(
        notice == "changed, and accepted: recipe.training.learning_rate: 0.001 there, 0.0005 here"
        for notice in run.notices
    )
    assert plan.train(tmp_path / "run", "must", verbose=0, accept=accept).notices == run.notices


@pytest.mark.parametrize("accept", ["recipe.training.learning_rat", "training", ""])
def test_only_what_there_is_can_be_accepted(dense_checkpoint, tmp_path, accept):
    """A place that no recipe has is refused, with the nearest."""
    plan = recipe(dense_checkpoint, max_steps=2).compile()
    with pytest.raises(qf.SpecError, match=rf"accept='{accept}': no such place in a recipe"):
        plan.train(tmp_path / "run", verbose=0, accept=[accept])
    assert not (tmp_path / "run").exists()


def test_another_optimizer_is_never_accepted(dense_checkpoint, tmp_path):
    """Its state is of another kind."""
    asked = recipe(dense_checkpoint, max_steps=3)
    asked.compile().train(tmp_path / "run", verbose=0, on_step=interrupt)
    for accept in ("recipe.training.optimizer", "recipe.training", "recipe"):
        with pytest.raises(qf.CheckpointError, match=r"recipe\.training\.optimizer: 'adamw' there, 'sgd' here"):
            asked.with_training(optimizer="sgd").compile().train(tmp_path / "run", verbose=0, accept=[accept])


def test_what_is_done_about_failures_may_change(dense_checkpoint, tmp_path):
    """A run that ended at a loss that is not finite goes on with the same recipe, told to leave such steps out."""
    asked = recipe(dense_checkpoint, max_steps=3)
    asked.compile().train(tmp_path / "run", verbose=0, on_step=interrupt)
    other = asked.with_training(non_finite="skip", max_skipped=3, failed_save="stop")
    assert other.compile().train(tmp_path / "run", "must", verbose=0).ending == FINISHED


def test_other_weights_under_the_same_name_are_refused(dense_checkpoint, moe_checkpoint, tmp_path):
    """A base whose files were replaced since is told, and so is a checkpoint of another model."""
    base = tmp_path / "base"
    shutil.copytree(dense_checkpoint, base)
    plan = recipe(base, max_steps=2, adapter=LORA).compile()
    plan.train(tmp_path / "run", verbose=0, on_step=interrupt)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(qf.CheckpointError, match=r"weights\.model\.safetensors: '[\d,]+ bytes, sha256"):
        recipe(base, max_steps=2, adapter=LORA).compile().train(tmp_path / "run", verbose=0)
    prepared = recipe(moe_checkpoint, max_steps=2, adapter=LORA).compile().prepare()
    with pytest.raises(
        qf.CheckpointError, match=r"recipe\.model\.source: .*/base' there, .*moe.*/checkpoint' here"
    ):
        prepared.load(tmp_path / "run" / "checkpoints" / "step-1")


def test_resume_says_what_may_be_continued(dense_checkpoint, tmp_path):
    """Asked for "must" it refuses to begin anew, for "never" to continue; another word is no word of it."""
    plan = recipe(dense_checkpoint, max_steps=2).compile()
    with pytest.raises(
        qf.CheckpointError, match=r'run holds no checkpoint to continue from\n  Fix: resume="auto"'
    ):
        plan.train(tmp_path / "run", "must", verbose=0)
    assert not (tmp_path / "run").exists()
    plan.train(tmp_path / "run", "never", verbose=0, on_step=interrupt)
    with pytest.raises(qf.CheckpointError, match="run exists already, and is not overwritten"):
        plan.train(tmp_path / "run", "never", verbose=0)
    assert plan.train(tmp_path / "run", "must", verbose=0).ending == FINISHED
    with pytest.raises(qf.SpecError, match=r"train\(resume='atuo'\): .*did you mean 'auto'"):
        plan.train(tmp_path / "run", "atuo", verbose=0)

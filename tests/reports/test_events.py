import signal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.helpers import recipe


def test_tensorboard_reads_what_a_run_wrote(dense_checkpoint, tmp_path):
    """TensorBoard's own reader finds every number of every step once, also of a run that crashed and continued."""

    def crash(record):
        if record["step"] == 3:
            msg = "a cable was pulled"
            raise RuntimeError(msg)

    options = {"held_out": 0.2, "evaluate_every": 2, "sample_prompts": ("Hi",), "sample_tokens": 3}
    plan = recipe(dense_checkpoint, max_steps=5, save_every=2, **options).compile()
    try:
        plan.train(tmp_path / "run", progress=False, on_step=crash)
    except RuntimeError:
        run = plan.train(tmp_path / "run", progress=False)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps = [record for record in run.history if "loss" in record]
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_bytes", "state_bytes"):
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert sorted(found) == [1, 2, 3, 4, 5]
        assert len(events.Scalars(f"train/{name}")) == 5
        if name == "loss":
            assert all(abs(found[record["step"]] - record["loss"]) < 1e-5 for record in steps)
    for name in ("loss", "perplexity", "accuracy", "exact_match"):
        assert [event.step for event in events.Scalars(f"held_out/{name}")] == [0, 2, 4, 5]
    assert "Hi/text_summary" in events.Tags()["tensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

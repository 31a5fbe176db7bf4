"""The model card of a run: what was trained on what, how, with what result, and how to load it."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import attrs
from huggingface_hub import ModelCardData

from qwenft.display import time_text
from qwenft.reports.text import BARS, COVERAGE, coverage_rows, data_text
from qwenft.specs.codec import Codec
from qwenft.specs.data import DataSpec
from qwenft.specs.rows import HubRows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from qwenft.run import Run
    from qwenft.training_plan import TrainingPlan

_FILES = 10  # of data or weights, shown with their digests; all of them are in the digest of the whole
_COLUMNS = 60  # of a curve of bars
_METRICS = ("held_out_loss", "held_out_perplexity", "held_out_accuracy")
# Of a training spec, what watches and keeps a run; the questions asked on the way are the user's own.
_NO_SETTINGS = {"sample_prompts", "sample_tokens", "save_every", "keep_checkpoints", "failed_save", "max_skipped"}

# Of an adapter spec, what full fine-tuning has no use for.
_OF_PAIRS = {"rank", "alpha", "dropout", "rslora", "dora", "initialization"}


@attrs.frozen
class Place:
    """Where a result is published.

    Args:
        repo_id: "name/model".
        revision: the branch; the main one where None.
        picture: the name of the loss curve's picture there; None where there is none.
    """

    repo_id: str
    revision: str | None = None
    picture: str | None = None


def render_card(
    run: Run, place: Place, *, adapter: bool, environment: Mapping[str, Any], terms: Mapping[str, str]
) -> str:
    """The card as Markdown below a header of metadata.

    It names files and folders without their paths.

    Args:
        run: what was trained.
        place: where the card will lie.
        adapter: it speaks of an adapter beside its base; else of a whole model.
        environment: of ``environment.json``.
        terms: the license of the base, under the names of the metadata; empty where it is not known.
    """
    plan = run.plan
    parts = [
        ("", _summary(run, adapter=adapter)),
        ("Use", _snippet(plan, place, adapter=adapter)),
        ("Results", _results(run, place)),
        ("What was trained", _coverage(plan)),
        ("Settings", _table(("", ""), _settings(plan))),
        ("Data", _data(plan)),
        ("Base", _digests("file", list(plan.identity["weights"].items()))),
        ("Versions", _table(("", ""), [*environment["versions"].items(), ("plan", plan.fingerprint)])),
    ]
    sections = [f"## {title}\n\n{body}" if title else body for title, body in parts]
    name = place.repo_id.rpartition("/")[2]
    return (
        "\n\n".join([f"---\n{_metadata(run, adapter=adapter, terms=terms)}\n---", f"# {name}", *sections]) + "\n"
    )


def base_name(plan: TrainingPlan) -> str:
    """What a run's base is called elsewhere: its id on the hub, or the name of its folder without the path."""
    return plan.draft.checkpoint.hub_id or Path(plan.recipe.model.source).resolve().name


def _metadata(run: Run, *, adapter: bool, terms: Mapping[str, str]) -> str:
    plan = run.plan
    base = plan.draft.checkpoint.hub_id
    relation = "adapter" if adapter else "finetune"
    data_sets = list(dict.fromkeys(rows.name for rows in _hub_rows(plan.recipe.data)))
    evaluated = any("held_out_loss" in record for record in run.history)
    header = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        datasets=data_sets or None,
        library_name="peft" if adapter else "transformers",
        metrics=["perplexity", "accuracy"] if evaluated else None,
        pipeline_tag="image-text-to-text" if plan.recipe.model.vision else "text-generation",
        tags=["qwenft", *(["lora"] if plan.recipe.adapter.kind == "lora" else [])],
        **terms,
    )
    return str(header.to_yaml())


def _hub_rows(data: DataSpec | None) -> list[HubRows]:
    """The data sets of the hub among the data; a folder that is read like one is none."""
    specs = [spec for spec in (data, data and data.held_out) if isinstance(spec, DataSpec)]
    sources = [part.source for spec in specs for part, _ in spec.parts]
    return [source for source in sources if isinstance(source, HubRows) and not Path(source.name).exists()]


def _summary(run: Run, *, adapter: bool) -> str:
    plan = run.plan
    hub_id, name = plan.draft.checkpoint.hub_id, base_name(plan)
    base = f"[{name}](https://huggingface.co/{hub_id})" if hub_id else f"`{name}`, which is not on the hub"
    revision = plan.recipe.model.revision
    at = f" at `{revision}`" if revision else ""
    lora = f"LoRA of rank {plan.draft.adapter.rank}"
    if adapter:
        subject = f"An adapter, {lora}, for {base}{at}"
    elif plan.recipe.adapter.kind == "lora":
        subject = f"The whole model, with {lora} merged in, made of {base}{at}"
    else:
        subject = f"The whole model, fine-tuned in full, made of {base}{at}"
    return f"{subject}. Trained with qwenft on {plan.data.documents:,} documents."


def _snippet(plan: TrainingPlan, place: Place, *, adapter: bool) -> str:
    """Code that loads what is published, and asks it something."""
    auto = "AutoModelForCausalLM" if plan.draft.checkpoint.is_text_only else "AutoModelForImageTextToText"
    revision = f', revision="{place.revision}"' if place.revision else ""
    there, dtype = f'"{place.repo_id}"{revision}', f'dtype="{plan.recipe.model.dtype}"'
    if adapter:
        asked = plan.recipe.model.revision
        at = f', revision="{asked}"' if asked else ""
        where = "" if plan.draft.checkpoint.hub_id else "  # a folder of your own"
        load = f"""
            import peft
            from transformers import {auto}, AutoTokenizer

            base = {auto}.from_pretrained("{base_name(plan)}"{at}, {dtype}){where}
            model = peft.PeftModel.from_pretrained(base, {there})"""
    else:
        load = f"""
            from transformers import {auto}, AutoTokenizer

            model = {auto}.from_pretrained({there}, {dtype})"""
    ask = f"""
            tokenizer = AutoTokenizer.from_pretrained({there})
            inputs = tokenizer.apply_chat_template(
                [{{"role": "user", "content": "Hello!"}}],
                add_generation_prompt=True, return_dict=True, return_tensors="pt",
            )
            output = model.generate(**inputs, max_new_tokens=256)
            print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    return f"```python\n{textwrap.dedent(load + ask).strip()}\n```"


def _results(run: Run, place: Place) -> str:
    steps = [record for record in run.history if "loss" in record]
    held_out = [record for record in run.history if "held_out_loss" in record]
    end = steps[-1]["step"] if run.best_step is None else run.best_step
    last = next(record for record in steps if record["step"] == end)
    rows = [("training loss (nats a token)", f"{steps[0]['loss']:.4f}", f"{last['loss']:.4f}")]
    if held_out:
        final = next(record for record in reversed(held_out) if record["step"] <= end)
        rows += [
            (
                name.replace("_", " ").replace("held out", "held-out"),
                f"{held_out[0][name]:.4f}",
                f"{final[name]:.4f}",
            )
            for name in _METRICS
        ]
    best = ", the best" if run.best_step is not None else ""
    tokens = sum(record["stream_tokens"] for record in steps)
    seconds = sum(record["seconds"] for record in steps)
    took = f"{len(steps):,} steps on {tokens:,} tokens took {time_text(seconds)} on {run.plan.machine.name}"
    told = f"{took}; the run {run.ending if run.ending != 'finished' else 'went to its end'}."
    picture = [f"![Loss over the steps]({place.picture})"] if place.picture else []
    curves = "\n".join(
        _curve(name, [(record["step"], record[key]) for record in records])
        for name, key, records in (("training", "loss", steps), ("held out", "held_out_loss", held_out))
        if records
    )
    table = _table(("", "at the start", f"at step {end:,}{best}"), rows, right=(1, 2))
    return "\n\n".join([table, told, *picture, f"```text\n{curves}\n```"])


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    """Values over the steps as bars, each the mean of as many neighbours as it takes to fit."""
    width = -(-len(points) // _COLUMNS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    means = [sum(value for _, value in group) / len(group) for group in groups]
    low, high = min(means), max(means)
    bars = "".join(BARS[1 + round((len(BARS) - 2) * (mean - low) / ((high - low) or 1))] for mean in means)
    return f"{name:<8} {bars} {means[0]:.3f} to {means[-1]:.3f}, steps {points[0][0]:,} to {points[-1][0]:,}"


def _coverage(plan: TrainingPlan) -> str:
    held = sum(row.held for row in plan.coverage)
    place = "of" if plan.recipe.adapter.kind == "full" else "beside"
    table = _table(COVERAGE, coverage_rows(plan), right=(2, 3, 4))
    return f"{plan.trained_parameters:,} parameters {place} {held:,}.\n\n{table}"


def _settings(plan: TrainingPlan) -> list[tuple[str, str]]:
    """Every setting of the adapter and of the training that is not off, and what runs them."""
    recipe, draft = plan.recipe, plan.draft
    dump = Codec(folder=None).dump
    full = draft.adapter.kind == "full"
    adapter = {name: value for name, value in dump(draft.adapter).items() if not full or name not in _OF_PAIRS}
    training = {name: value for name, value in dump(recipe.training).items() if name not in _NO_SETTINGS}
    training["loss"] = recipe.training.chosen_loss
    few_bits = draft.storage.kind or "none"
    return [
        ("method", "full fine-tuning" if full else "LoRA"),
        *(
            (name.replace("_", " "), _value(value))
            for name, value in {**adapter, **training}.items()
            if name == "seed" or (value and name != "kind")
        ),
        ("weights held in", recipe.model.dtype),
        ("large matrices quantized to", few_bits),
        ("computed in", draft.compute_dtype),
        *((f"{slot.name} attention", f"`{slot.backend.name}`") for slot in draft.slots),
    ]


def _value(value: Any) -> str:
    if callable(value):
        return f"{value.__name__}()"
    if isinstance(value, list | tuple):
        pairs = (" ".join(map(_value, one)) if isinstance(one, list | tuple) else _value(one) for one in value)
        return ", ".join(pairs)
    if value is True:
        return "yes"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data(plan: TrainingPlan) -> str:
    data = plan.recipe.data
    assert data is not None
    packing = f"packed into rows of {data.capacity:,} tokens" if data.packed else "a document a row"
    on_hub = {str(rows) for rows in _hub_rows(data)}
    digests = [(_source_name(source, on_hub), digest) for source, digest in plan.identity["data"].items()]
    lines = [
        f"{data_text(plan)}.",
        f"At most {data.max_length:,} tokens a document, {packing}; trained on: {', '.join(data.trained_roles)}.",
    ]
    return "\n\n".join([*lines, _digests("source", digests)])


def _source_name(source: str, on_hub: set[str]) -> str:
    """A source without the path to it; the name of a data set on the hub is left as it is."""
    held_out = "held out, " if source.startswith("held out, ") else ""
    source = source.removeprefix(held_out)
    return held_out + (source if source in on_hub else PurePath(source).name)


def _digests(what: str, digests: list[tuple[str, str]]) -> str:
    """The first digests, and one of all of them."""
    whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    left = [(f"{len(digests) - _FILES:,} more", "")] if len(digests) > _FILES else []
    return f"Fingerprint `{whole}`.\n\n{_table((what, 'what it holds'), [*digests[:_FILES], *left])}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of Markdown; a bar in a cell does not end it."""
    rule = ["--:" if column in right else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

"""Images and videos in the flat stream, against stock transformers one document at a time."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

import qwenft as qf
from qwenft.models.bind import causal_of
from qwenft.testing import tiny_checkpoint

from .helpers import relative

SIZES = [(64, 64), (96, 40), (33, 130), (200, 150), (64, 96)]


def picture(number, size):
    """Noise of a size (width, height), another for every number."""
    values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def chat(parts, answer):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes, and the frames of a video."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        picture(number, size).save(folder / f"{number}.png")
    for frame in range(5):
        picture(100 + frame, (70, 66)).save(folder / f"frame-{frame}.png")
    return folder


def image(number):
    return {"type": "image", "image": f"{number}.png"}


VIDEO = {"type": "video", "video": [f"frame-{frame}.png" for frame in range(5)], "fps": 2}
ROWS = [
    chat(["What is it? ", image(0)], "A square."),
    chat(["No picture here."], "None."),
    chat([image(1), "and", image(2), image(3), "and again", image(4)], "Four of them."),
    chat(["A film:", VIDEO, "and a still", image(0)], "Both."),
]


@pytest.fixture(scope="module", params=["vision", pytest.param("moe-vision", marks=pytest.mark.long)])
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint with a processor, whose scan remembers."""
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param) / "checkpoint", request.param, a_log=-3.0)


def plan_of(checkpoint, folder, rows=ROWS, adapter=None, **images):
    data = qf.DataSpec.messages(rows).with_max_length(4096).pack().with_images(folder, **images)
    return qf.Recipe(
        qf.ModelSpec(checkpoint, dtype="float32").with_vision(),
        data,
        qf.AdapterSpec.full() if adapter is None else adapter,
        training=qf.TrainingSpec(learning_rate=1e-3, epochs=1),
    ).compile()


def stock_inputs(document, vision, config):
    """What stock is called with for one document: pixels of images and of videos apart, and its own positions."""
    ids = document.input_ids[None]
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id) + 2 * (ids == config.video_token_id),
    }
    if vision is None:
        return {"input_ids": ids}
    kinds = [1 if grid[0] == 1 else 2 for grid in vision.grid_thw.tolist()]
    patches = vision.pixel_values.split(vision.grid_thw.prod(1).tolist())
    for kind, pixels, grid in (
        (1, "pixel_values", "image_grid_thw"),
        (2, "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [number for number, one in enumerate(kinds) if one == kind]
        if mine:
            inputs |= {pixels: torch.cat([patches[n] for n in mine]), grid: vision.grid_thw[mine]}
    return inputs


@pytest.mark.usefixtures("without_fla")
@pytest.mark.parametrize("checkpoint", ["vision", "moe-vision"], indirect=True)
def test_packed_equals_stock_one_by_one(checkpoint, folder):
    """Logits, loss and the gradients of every parameter, of texts, images of all sizes and a video in one row."""
    prepared = plan_of(checkpoint, folder).prepare()
    ((batch,),) = prepared.batches()
    assert len(batch.layout) == len(ROWS)
    mine = prepared.logits(batch)
    loss = prepared.loss(batch)
    names = dict(prepared.model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(loss.total, list(names.values())), strict=True))

    stock = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)
    total = 0.0
    logits = []
    for document in batch.split():
        inputs = stock_inputs(document, document.vision, stock.config)
        logits.append(stock(**inputs).logits[0])
        each = torch.nn.functional.cross_entropy(logits[-1], document.labels, reduction="sum", ignore_index=-100)
        total = total + each
    assert relative(torch.cat(logits), mine) < 1e-4
    assert float(total.detach()) == pytest.approx(float(loss.total.detach()), rel=1e-5)
    parameters = dict(stock.named_parameters())
    wanted = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    assert wanted.keys() == gradients.keys()
    for name, gradient in wanted.items():
        assert relative(gradient, gradients[name]) < 1e-4 or gradient.abs().max() < 1e-6, name


@pytest.mark.usefixtures("without_fla")
def test_positions_are_those_of_stock(checkpoint, folder):
    """Time, height and width of every token, document by document."""
    prepared = plan_of(checkpoint, folder).prepare()
    ((batch,),) = prepared.batches()
    model = causal_of(prepared.model).model
    for document in batch.split():
        if document.vision is not None:
            inputs = stock_inputs(document, document.vision, prepared.model.config)
            wanted, _ = model.get_rope_index(
                inputs["input_ids"],
                inputs["mm_token_type_ids"],
                image_grid_thw=inputs.get("image_grid_thw"),
                video_grid_thw=inputs.get("video_grid_thw"),
            )
            assert torch.equal(document.vision.position_ids, wanted[:, 0])


def test_no_document_reaches_another(checkpoint, folder):
    """Other pixels in one document change its logits and, in a dense model to the bit, no other's."""
    prepared = plan_of(checkpoint, folder).prepare()
    ((batch,),) = prepared.batches()
    prepared.model.eval()
    with torch.no_grad():
        before = prepared.logits(batch).split(batch.layout.lengths)
        changed = batch.split()
        number = next(n for n, one in enumerate(changed) if one.vision is not None)
        first = int(batch.vision.places[0])
        assert batch.layout.starts[number] <= first < batch.layout.starts[number + 1]
        count = int(changed[number].vision.grid_thw.prod(1).sum())
        batch.vision.pixel_values[:count] *= -1
        after = prepared.logits(batch).split(batch.layout.lengths)
    for place, (one, other) in enumerate(zip(before, after, strict=True)):
        if place == number:
            assert relative(one, other) > 1e-2
        elif "moe" in str(checkpoint):
            assert relative(one, other) < 1e-5
        else:
            assert torch.equal(one, other)


def test_pixels_are_those_of_the_processor(checkpoint, folder):
    """Of every image what the checkpoint's own processor makes of it."""
    plan = plan_of(checkpoint, folder)
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint)
    for document in plan.encoder.encode(plan.recipe.data):
        for medium in document.media:
            if medium.kind == "image":
                wanted = processor(images=[PIL.Image.open(medium.pictures[0].source)], return_tensors="np")
                assert wanted["image_grid_thw"].tolist() == [list(medium.grid)]
                np.testing.assert_array_equal(plan.encoder.media.pixels(medium), wanted["pixel_values"])


def trained(plan):
    """What of the tower, the merger and the text half is trained; all of it moves in two steps, and nothing else."""
    prepared = plan.prepare()
    before = {name: parameter.detach().clone() for name, parameter in prepared.model.named_parameters()}
    for _ in range(2):  # of a pair, the second is needed to move the first of its matrices
        prepared.step(next(prepared.batches()))
    changed = {name for name, p in prepared.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(prepared.trained)
    return {("merger" if "merger" in name else "tower") if ".visual." in name else "text" for name in changed}


@pytest.mark.parametrize(
    ("adapter", "wanted"),
    [
        (qf.AdapterSpec.lora(rank=4), {"text"}),
        (qf.AdapterSpec.lora(rank=4).on("full_attention", "vision"), {"text", "tower"}),
        (qf.AdapterSpec.lora(rank=4).on("vision_merger"), {"merger"}),
        (qf.AdapterSpec.lora(rank=4).train_fully("vision_merger"), {"text", "merger"}),
        (qf.AdapterSpec.full(), {"text", "tower", "merger"}),
        (qf.AdapterSpec.full().freeze("vision", "vision_merger"), {"text"}),
    ],
)
@pytest.mark.parametrize("checkpoint", ["vision"], indirect=True)
def test_what_is_trained_is_reached(checkpoint, folder, adapter, wanted):
    """Every trained parameter of the text half, the tower and the merger moves, and nothing else does."""
    plan = plan_of(checkpoint, folder, adapter=adapter)
    assert trained(plan) == wanted


def test_a_frozen_tower_keeps_nothing_for_backward(checkpoint, folder):
    """Where nothing of the tower is trained it runs without a graph."""
    seen = []
    for adapter in (qf.AdapterSpec.lora(rank=4), qf.AdapterSpec.full()):
        prepared = plan_of(checkpoint, folder, adapter=adapter).prepare()
        tower = causal_of(prepared.model).model.visual
        tower.register_forward_hook(lambda *call: seen.append(call[-1].pooler_output.requires_grad))
        ((batch,),) = prepared.batches()
        prepared.loss(batch)
    assert seen == [False, True]


def test_the_layer_that_looks_ahead_is_refused_images(checkpoint, folder):
    """It would see placeholders; said before the first step."""
    with pytest.raises(qf.DataError, match="is trained on text, and the data hold images"):
        plan_of(checkpoint, folder, adapter=qf.AdapterSpec.full().train_mtp()).prepare()


def test_checkpointed_activations_give_the_same_gradients(checkpoint, folder):
    """Layers of the text half and blocks of the tower computed again in backward change nothing."""
    gradients = []
    for every in (False, True):
        recipe = plan_of(checkpoint, folder).recipe.with_training(activation_checkpointing=every)
        prepared = recipe.compile().prepare()
        blocks = causal_of(prepared.model).model.visual.blocks
        runs = []
        # Hooks of the block itself stay outside of what is computed again.
        blocks[0].norm1.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        ((batch,),) = prepared.batches()
        prepared.loss(batch).total.backward()
        assert len(runs) == 1 + every
        gradients.append({name: p.grad.clone() for name, p in prepared.trained.items()})
    for name, gradient in gradients[0].items():
        assert relative(gradient, gradients[1][name]) < 1e-6 or gradient.abs().max() < 1e-6, name


@pytest.mark.usefixtures("without_fla")
@pytest.mark.parametrize("checkpoint", ["vision"], indirect=True)
def test_a_run_on_images_from_its_first_step_to_its_answer(checkpoint, folder, tmp_path, monkeypatch):
    """Trained, evaluated, resumed to the bit, asked and exported: each with images."""
    rows = [chat([image(n % 5), f"Number {n}?"], f"It is {n}.") for n in range(8)]
    plan = plan_of(checkpoint, folder, rows, workers=0)
    data = plan.recipe.data.with_max_length(100)
    plan = plan.recipe.with_data(data).with_training(epochs=2, tokens_per_step=100).compile()
    assert "of 8 images" in (plan.data and plan.explain())
    run = plan.train(tmp_path / "run", verbose=0)
    losses = [record["loss"] for record in run.history]
    assert losses[-1] < losses[0]
    found = run.evaluate(plan.recipe.data)
    assert found["loss"] < losses[0]
    prepared = plan.prepare()
    steps = list(prepared.batches())
    again = [prepared.step(batches).loss for batches in steps[:2]]
    assert again == losses[:2]
    asked = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(folder / "0.png")}, {"type": "text", "text": "Number 0?"}],
        }
    ]
    answer = run.generate(asked, max_new_tokens=8)
    other = [{"role": "user", "content": [{"type": "image", "image": str(folder / "3.png")}]}]
    others = [run.generate(messages, max_new_tokens=8) for messages in (other, "Number 4?")]
    monkeypatch.chdir(folder)
    near = [{"role": "user", "content": [{"type": "image", "image": "3.png"}]}]
    assert run.generate(near, max_new_tokens=8) == others[0]
    together = [other, [{"role": "user", "content": "Number 4?"}], asked]
    assert run.generate(together, max_new_tokens=8) == [*others, answer]
    stock = transformers.AutoModelForImageTextToText.from_pretrained(run.export(tmp_path / "merged")).eval()
    document = plan.encoder.prompt(asked, plan.recipe.data.images)
    ids = torch.from_numpy(document.input_ids)[None].long()
    medium = document.media[0]
    output = stock.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(plan.encoder.media.pixels(medium)),
        image_grid_thw=torch.tensor([medium.grid]),
        mm_token_type_ids=(ids == stock.config.image_token_id).int(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=run.prepared.tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    assert answer == run.prepared.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()

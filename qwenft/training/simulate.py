"""Memory and work of a step, counted in a simulation: the modules that train, on tensors that hold nothing.

Models are built on the meta device, and given fake tensors for parameters (torch's ``FakeTensorMode``), with which
a step goes through all of its operations. The middle of a deep model, whose layers are alike, is simulated once.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwenft.data.stream import Batch, VisionInputs
from qwenft.family.inventory import role_of
from qwenft.kernels.chunks import CHUNK
from qwenft.kernels.device import planned_on
from qwenft.models.bind import causal_of, decoder_of
from qwenft.models.load import model_on_meta, named_weights
from qwenft.models.lora import base_name
from qwenft.models.mtp import one_token_on
from qwenft.plan.memory import LayerBytes, MemoryReport, assumed_bytes
from qwenft.plan.records import accumulates
from qwenft.training.in_backward import step_in_backward
from qwenft.training.learner import Learner
from qwenft.training.live_bytes import BACKWARD, COLLECTIVES, FORWARD, HOST, LOSS, UPDATE, LiveBytes
from qwenft.training.prepare import adapted
from qwenft.training.ranks import ALONE, Ranks
from qwenft.training.rounding import StochasticRounding
from qwenft.training.shallow import AGAIN, give_memory, make_scales, shallow, trained_in
from qwenft.training.shards import mesh_of, share_out
from qwenft.training.stand_ins import (
    AttentionStandIn,
    Held,
    HostLayout,
    LinearStandIn,
    Mark,
    keep_on_host,
    know_values,
)
from qwenft.training.trained import local_of
from qwenft.training.work import Work, seconds_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qwenft.data.stream import Stream
    from qwenft.family.architectures import Architecture
    from qwenft.plan.draft import Draft, Slot

#: What a step raises that asks a tensor for a value, or calls what torch knows no shapes of.
NOT_FOLLOWED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@attrs.frozen
class Row:
    """A micro-batch, as far as its memory depends on it.

    Args:
        lengths: tokens of its documents.
        supervised: how many tokens are trained.
        accumulates: other micro-batches of its step were before it.
        grids: frames, rows and columns of patches of each image and video.
    """

    lengths: tuple[int, ...]
    supervised: int
    accumulates: bool = False
    grids: tuple[tuple[int, int, int], ...] = ()

    @property
    def patches(self) -> int:
        """Of all images and videos."""
        return sum(map(math.prod, self.grids))

    @property
    def chunks(self) -> int:
        """Of Gated DeltaNet, which cuts each document into chunks by itself: many short ones have more."""
        return sum(-(-length // CHUNK) for length in self.lengths)


def largest_rows(stream: Stream) -> list[Row]:
    """Of an epoch the row with most tokens, and of those with most that are trained.

    Behind it the ones with most chunks and with most patches, where they have more of them.
    """
    rows, several = [], False
    for _, step in stream.steps():
        several = several or len(step) > stream.ranks
        rows += step
    found = [
        Row(
            tuple(map(len, row)),
            sum(document.supervised for document in row),
            several,
            tuple(medium.grid for document in row for medium in document.media),
        )
        for row in rows
    ]
    longest = max(found, key=lambda row: (sum(row.lengths), row.supervised))
    chosen = [longest]
    for size in (attrgetter("chunks"), attrgetter("patches")):
        largest = max(found, key=lambda row: (size(row), sum(row.lengths)))
        if size(largest) > size(longest) and largest not in chosen:
            chosen.append(largest)
    return chosen


@attrs.frozen
class Simulated:
    """What a step takes in a process.

    Args:
        memory: what it holds at once.
        seconds: of forward and backward on the micro-batch, at the rates of the machine.
        update_seconds: of what comes behind them, once a step.
        operations: of matrix products in forward and backward.
        moved: bytes that operations read and write in forward and backward.
        sent: bytes of collectives.
    """

    memory: MemoryReport
    seconds: float
    update_seconds: float
    operations: float
    moved: float
    sent: float


def simulate(draft: Draft, row: Row, left_out: Sequence[str] = ()) -> Simulated:
    """Count what a step takes in one process.

    Args:
        draft: what is planned.
        row: its micro-batch.
        left_out: attention slots of which no more is counted than arguments, results and gradients.
    """
    few, repeats = shallow(draft)
    trained = trained_in(few, draft)
    few_layers = attrs.evolve(draft, architecture=few, trained=trained)
    live = LiveBytes()
    with torch.random.fork_rng(), planned_on(draft.machine.device), _processes(draft) as ranks:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        learner, batch, following = _learner(few_layers, row, live, fakes, ranks=ranks, left_out=left_out)
        with fakes:
            _step(learner, live, batch, following, draft, accumulating=row.accumulates)
            update = _updated(draft)
    state = draft.state
    start = {"weights": state.weights, "trained": state.trained, "optimizer": state.optimizer}
    start["inputs"] = sum(tensor.nbytes for tensor in _inputs(batch))
    if row.accumulates:  # those of the shallow model are in the record
        start["gradients"] = state.gradients - draft.state_of(few, trained).gradients
    if draft.parallel.kind == "ddp" and draft.ranks > 1:
        start[COLLECTIVES] = state.trained  # in the buckets of DistributedDataParallel
    peaks = [live.peak(start, repeats), update.peak({**start, "gradients": 0}, {})]
    peak = max(peaks, key=lambda peak: sum(peak.by_component.values()))
    memory = MemoryReport(
        by_component=peak.by_component,
        moment=peak.segment.name,
        layers=_layers(live, draft.architecture),
        tokens=sum(row.lengths),
        supervised=row.supervised,
        left_out=tuple(f"{s.backend.name} ({s.name})" for s in draft.slots if s.name in left_out),
        assumed=assumed_bytes(draft.machine, sum(peak.by_component.values()), ranks=draft.ranks),
    )
    work = list(live.work(repeats))
    # Read and written: what is trained and the optimizer's; read: gradients.
    behind = Work("float32", moved=2.0 * (state.trained + state.optimizer) + state.gradients)
    buckets = Work("float32", sent=2.0 * start.get(COLLECTIVES, 0))
    return Simulated(
        memory,
        seconds=seconds_of([*work, buckets], draft.machine),
        update_seconds=seconds_of([behind], draft.machine),
        operations=sum(each.operations for each in work),
        moved=sum(each.moved for each in work),
        sent=sum(each.sent for each in (*work, buckets)),
    )


def _learner(
    draft: Draft, row: Row, live: LiveBytes, fakes: FakeTensorMode, *, ranks: Ranks, left_out: Sequence[str]
) -> tuple[Learner, Batch, Batch | None]:
    """The model of a draft with its optimizer, its micro-batch, and what the multi-token-prediction layer sees."""
    architecture = draft.architecture
    mesh = mesh_of(draft.parallel, ranks, "cpu") if ranks.count > 1 else None
    model = adapted(
        model_on_meta(architecture, draft.storage),
        architecture,
        adapter=draft.adapter,
        trained=draft.trained,
        training=draft.training,
        backends={slot.name: _followed(slot, row, live, left_out) for slot in draft.slots},
        compute_dtype=draft.compute_dtype,
        source=draft.model.source,
        on_meta=True,
    )
    batch = _batch(row, architecture)
    following = one_token_on(batch).located() if draft.adapter.mtp_weight else None
    with fakes:
        give_memory(model)
        if mesh is not None:
            share_out(model, draft.parallel, mesh, named_weights(architecture), draft.storage)
        live.ignore(make_scales(model, architecture, draft.storage))
        live.ignore(_inputs(batch := _faked(batch, fakes)))
    learner = Learner(
        model,
        draft.training,
        device="cpu",
        role_of=lambda name: role_of(architecture, base_name(name)),
        mtp_weight=draft.adapter.mtp_weight,
        ranks=ranks,
    )
    return learner, batch, following


@contextmanager
def _processes(draft: Draft) -> Iterator[Ranks]:
    """The first of the processes of a plan, whose collectives reach nobody (torch's own "fake" process group)."""
    if draft.shards == 1:
        yield ALONE
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=draft.ranks)
    try:
        yield Ranks(count=draft.ranks, local_count=draft.local_ranks)
    finally:
        dist.destroy_process_group()


def _batch(row: Row, architecture: Architecture) -> Batch:
    tokens = sum(row.lengths)
    ids = torch.zeros(tokens, dtype=torch.int64)
    positions = torch.arange(tokens - row.supervised, tokens)
    layout = HostLayout.from_lengths(row.lengths)
    vision, tower = None, architecture.vision
    if row.grids and tower is not None:
        values = tower.in_channels * tower.temporal * tower.patch**2
        vision = VisionInputs(
            torch.zeros(row.patches, values),
            torch.tensor(row.grids),
            torch.arange(row.patches // tower.merge**2),
            layout.position_ids.expand(3, -1).clone(),
        )
    return Batch(ids, torch.zeros_like(ids), layout, positions=positions, vision=vision)


def _inputs(batch: Batch) -> list[torch.Tensor]:
    vision = batch.vision
    of_images = [] if vision is None else [vision.pixel_values, vision.places, vision.position_ids]
    return [batch.input_ids, batch.labels, *of_images]


def _faked(batch: Batch, fakes: FakeTensorMode) -> Batch:
    """The same of tensors that hold nothing; grids, positions and layout keep their values."""
    vision = batch.vision
    if vision is not None:
        names = ("pixel_values", "places", "position_ids")
        vision = attrs.evolve(vision, **{name: fakes.from_tensor(getattr(vision, name)) for name in names})
    ids, labels = fakes.from_tensor(batch.input_ids), fakes.from_tensor(batch.labels)
    return attrs.evolve(batch, input_ids=ids, labels=labels, vision=vision)


def _updated(draft: Draft) -> LiveBytes:
    """The update of bfloat16 weights, recorded: as many at a time as are rounded together, of whatever layers."""
    live = LiveBytes()
    live.begin(UPDATE, "update")
    training, dtype = draft.training, getattr(torch, draft.storage.dtype)
    at_once = draft.adapter.kind == "full" and not training.optimizer_in_backward
    if not at_once or training.master_weights or dtype == torch.float32:
        return live
    weights = [entry.weight for entry in draft.trained for _ in range(entry.weight.instances)]
    parameters = [
        torch.nn.Parameter(
            torch.empty(weight.shape, dtype=torch.float32)
            if weight.is_float32
            else torch.empty(-(-weight.shape[0] // draft.shards), *weight.shape[1:], dtype=dtype)
        )
        for weight in weights
    ]
    live.ignore(parameters)
    with live:
        for parameter in parameters:
            if accumulates(training):
                parameter.grad_dtype = torch.float32
            parameter.grad = torch.empty_like(parameter, dtype=parameter.grad_dtype)
            live.label(parameter.grad, "gradients")
        StochasticRounding(_Idle(parameters, {})).step()
    return live


def _step(
    learner: Learner,
    live: LiveBytes,
    batch: Batch,
    following: Batch | None,
    draft: Draft,
    *,
    accumulating: bool,
) -> None:
    """One step on a micro-batch, recorded; ``accumulating``, others were before it, whose gradients are there."""
    model, training = learner.model, draft.training
    if training.activation_offloading:
        keep_on_host(model, live)
    decoder, tower = decoder_of(model), getattr(causal_of(model).model, "visual", None)
    _mark(decoder.layers, decoder.norm, "layer", live, is_whole=len(decoder.layers) == draft.architecture.layers)
    if tower is not None and draft.architecture.vision is not None:
        depth = draft.architecture.vision.depth
        _mark(tower.blocks, tower.merger, "block", live, is_whole=len(tower.blocks) == depth)
    know_values(model, live)
    live.ignore(map(local_of, model.parameters()))
    live.ignore(model.buffers())
    for name, part in learner.trained.items():
        parameter = learner.shares.parameters[name]
        component = HOST if draft.is_offloaded and part is not parameter else "gradients"

        def label(_: torch.Tensor, part: torch.Tensor = part, component: str = component) -> None:
            if part.grad is not None:
                live.label(part.grad, component)

        parameter.register_post_accumulate_grad_hook(label)
        if accumulating:
            with live:
                part.grad = torch.empty_like(part, dtype=part.grad_dtype)
            label(part)
    optimizer = learner.optimizer
    idle = _Idle(optimizer.param_groups, {})
    learner.optimizer = StochasticRounding(idle) if isinstance(optimizer, StochasticRounding) else idle
    with ExitStack() as stack:
        if training.optimizer_in_backward:
            stack.enter_context(step_in_backward(learner.optimizer, learner.shares))
        stack.enter_context(learner.algorithms())
        stack.enter_context(live)
        total = learner.loss_of(batch, following).total / batch.tokens
        live.begin(BACKWARD, "backward through the loss")
        total.backward()
        live.begin(UPDATE, "update")
        learner.shares.sum_whole()
        if not training.optimizer_in_backward:
            learner.clip_gradients()


class _Idle(torch.optim.Optimizer):
    """Updates nothing: optimizers do it in place, and what they keep is counted apart."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None


def _mark(layers: Any, behind: Any, kind: str, live: LiveBytes, *, is_whole: bool) -> None:
    """Divide the record by layers, forward and backward.

    Args:
        layers: of the decoder, or blocks of the tower.
        behind: the module that comes next: behind the decoder the loss begins.
        kind: "layer" or "block".
        live: the record.
        is_whole: they are all that the model has; else the middle third stands for more.
    """
    count = len(layers)
    middle = range(0) if is_whole else range(count // 3, 2 * count // 3)
    forward_again, backward_again = AGAIN[kind]

    def enter(number: int, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if live.phase == FORWARD:
            if number < count:
                live.begin(FORWARD, f"forward, {kind} {number}", forward_again if number in middle else None)
            elif kind == "layer":
                live.begin(LOSS, "loss")
            else:
                live.begin(FORWARD, "merger")
        return (Mark.apply(args[0], partial(leave, number - 1)), *args[1:])

    def leave(number: int) -> None:
        live.begin(BACKWARD, f"backward, {kind} {number}", backward_again if number in middle else None)

    for number, module in enumerate((*layers, behind)):
        module.register_forward_pre_hook(partial(enter, number))


def _followed(slot: Slot, row: Row, live: LiveBytes, left_out: Sequence[str]) -> Any:
    """The backend of a slot, or what stands for it where its kernels cannot be followed."""
    if slot.backend.traceable and slot.name not in left_out:
        return slot.backend
    lengths = row.lengths
    if slot.name == "vision":
        lengths = tuple(rows * columns for frames, rows, columns in row.grids for _ in range(frames))
    problem = attrs.evolve(slot.problem, lengths=lengths)
    stand_in = LinearStandIn if slot.name == "linear" else AttentionStandIn
    return stand_in(Held.of(slot.backend, problem, live))


def _layers(live: LiveBytes, architecture: Architecture) -> tuple[LayerBytes, ...]:
    """What a layer of each kind, not the last, keeps for backward."""
    kept: dict[str, int] = {}
    forward = [segment for segment in live.segments if segment.name.startswith("forward, layer")]
    for kind, segment in zip(architecture.layer_types, forward[:-1], strict=False):
        kept[kind] = live.kept(segment)
    counts = {kind: architecture.layer_types.count(kind) for kind in kept}
    return tuple(LayerBytes(kind, counts[kind], count) for kind, count in kept.items())

"""How much slower a step is on this machine than what is counted of it: a short one is measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import attrs
import torch

from qwenft.data.stream import Batch
from qwenft.family.inventory import role_of
from qwenft.kernels.layout import SequenceLayout
from qwenft.models.load import model_on_meta
from qwenft.models.lora import base_name
from qwenft.specs.parallel import ParallelSpec
from qwenft.training.learner import Learner
from qwenft.training.prepare import adapted
from qwenft.training.shallow import give_memory, make_scales, period, trained_in
from qwenft.training.simulate import Row, simulate

if TYPE_CHECKING:
    from qwenft.plan.draft import Draft

#: Rows that are measured, of which the first is taken that should take so many seconds at most.
_TOKENS, _SECONDS = (512, 128, 32), 2.0
_TURNS = 3


def slower_than_counted(draft: Draft, memory: int) -> float | None:
    """The time of forward and backward over what is counted of them, of a few layers of random weights.

    Args:
        draft: a plan for this machine; its text half is measured.
        memory: bytes that may be used.

    Returns:
        None where these few layers take more than half of the memory, or too long.
    """
    few = _few_layers(draft)
    if 2 * few.state.total > memory:
        return None
    for tokens in _TOKENS:
        counted = simulate(few, Row((tokens,), tokens)).seconds
        if counted <= _SECONDS:
            return _measured(few, tokens) / counted
    return None


def _few_layers(draft: Draft) -> Draft:
    """One layer of each kind, as often as they take turns."""
    whole = draft.architecture.text_only()
    count = period(whole.layer_types)
    kinds: Any = whole.layer_types[:count]
    few = attrs.evolve(whole, layers=count, layer_types=kinds)
    of_text = tuple(entry for entry in draft.trained if entry.weight.half == "text")
    return attrs.evolve(
        draft,
        architecture=few,
        trained=trained_in(few, attrs.evolve(draft, trained=of_text)),
        training=attrs.evolve(draft.training, embeddings_on_host=False),
        slots=tuple(slot for slot in draft.slots if slot.name != "vision"),
        parallel=ParallelSpec.single(),
        ranks=1,
        local_ranks=1,
    )


def _measured(draft: Draft, tokens: int) -> float:
    """Seconds of forward and backward: the least of a few turns, after one that is not counted."""
    device = draft.machine.device
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        learner = Learner(
            _random_model(draft),
            draft.training,
            device=device,
            role_of=lambda name: role_of(draft.architecture, base_name(name)),
        )
        ids = torch.randint(draft.architecture.vocabulary, (tokens,))
        batch = Batch(ids, ids, SequenceLayout.from_lengths([tokens])).located().to(device)
        found = []
        with learner.algorithms():
            for _ in range(1 + _TURNS):
                start = time.perf_counter()
                learner.loss_of(batch).total.backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                found.append(time.perf_counter() - start)
                for part in learner.trained.values():
                    part.grad = None
    return min(found[1:])


def _random_model(draft: Draft) -> Any:
    """The model of a draft, where it computes, of small random weights."""
    device = draft.machine.device
    model = adapted(
        model_on_meta(draft.architecture, draft.storage),
        draft.architecture,
        adapter=draft.adapter,
        trained=draft.trained,
        training=draft.training,
        backends=draft.backends,
        compute_dtype=draft.compute_dtype,
        source=draft.model.source,
        on_meta=True,
    )
    with torch.no_grad(), torch.device(device):
        give_memory(model)
        model.to(device)  # the buffers, which hold values
        for tensor in (*model.parameters(), *make_scales(model, draft.architecture, draft.storage)):
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
            else:
                tensor.zero_()
    return model

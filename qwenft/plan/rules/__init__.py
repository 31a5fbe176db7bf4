"""What can be wrong with a recipe: one small function a rule.

A rule takes a draft and yields findings; it decides nothing and changes nothing. Combinations are checked here
and nowhere else; a field by itself is checked by its spec.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenft.plan.rules import adapter, attention, memory, model, parallel, run, training

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qwenft.plan.draft import Draft
    from qwenft.plan.findings import Finding

RULES: tuple[Callable[[Draft], Iterator[Finding]], ...] = (
    model.vision_tower,
    attention.vision_attention,
    model.precision,
    model.quantization,
    adapter.loaded_adapter,
    adapter.roles_exist,
    adapter.adapter_fields,
    adapter.layers_exist,
    adapter.targets_match,
    adapter.multi_token_prediction,
    adapter.lora_limits,
    adapter.initialization,
    adapter.trained_beside,
    adapter.not_trained,
    attention.packing_is_exact,
    attention.backend_can,
    attention.backend_chosen,
    attention.backend_differs,
    attention.backend_from_network,
    run.recipe_is_kept,
    run.lengths_fit,
    run.streaming,
    training.optimizer_fields,
    training.schedule_fields,
    training.learning_rates,
    training.loss_fields,
    training.router_loss,
    training.cut_cross_entropy,
    training.trained_precision,
    memory.has_a_host,
    memory.activation_offloading,
    memory.optimizer_in_backward,
    memory.embeddings_on_host,
    parallel.processes,
    parallel.parallel_fields,
    parallel.sharded,
    parallel.repeated,
    training.compilation,
    training.determinism,
    training.evaluation,
    run.can_run_here,
    run.data_loss,
)


def check(draft: Draft) -> tuple[Finding, ...]:
    """Everything that the rules find, in their order."""
    return tuple(finding for rule in RULES for finding in rule(draft))

"""What is trained: LoRA on what peft would find by these names, or whole roles."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qwenft.axolotl.values import LORA
from qwenft.errors import SpecError, nearest
from qwenft.family.inventory import inventory
from qwenft.family.roles import roles_of
from qwenft.plan.coverage import matches, trained_weights
from qwenft.specs.adapter import AdapterSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qwenft.axolotl.config import Config
    from qwenft.axolotl.model import Base
    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight

_UNUSED = "in the vision tower, which is not loaded: without images it learns nothing"


def read_adapter(config: Config, base: Base) -> AdapterSpec:
    """LoRA where there is an adapter, and full fine-tuning where there is none.

    Raises:
        SpecError: the kind of adapter is not offered.
    """
    kind = config.get("adapter")
    if kind is None:
        return _full(config, base)
    if kind not in ("lora", "qlora"):
        raise SpecError(f"expected lora or qlora, got {kind!r}", fix="adapter: lora", got=kind)
    if config.has("unfrozen_parameters"):
        config.refuse(
            "unfrozen_parameters", "beside an adapter nothing else is trained", "lora_modules_to_save: [...]"
        )
    if config.has("freeze_mm_modules"):
        config.note("freeze_mm_modules", "an adapter trains what it names alone")
    return _loaded(config) if config.has("lora_model_dir") else _lora(config, base)


def _full(config: Config, base: Base) -> AdapterSpec:
    for key in LORA:
        if config.has(key):
            config.note(key, "there is no adapter: full fine-tuning has no pairs")
    spec = AdapterSpec.full()
    present = roles_of(base.loaded)
    if config.has("unfrozen_parameters"):
        roles = _unfrozen(config, base)
        if set(roles) != set(present):
            spec = spec.on(*roles)
    if config.get("freeze_mm_modules"):
        tower = [role for role in ("vision", "vision_merger") if role in present]
        if not tower:
            config.note("freeze_mm_modules", "the vision tower is not loaded")
        return spec.freeze(*tower)
    return spec


def _unfrozen(config: Config, base: Base) -> tuple[str, ...]:
    """The roles that patterns select as a whole, which a name matches from its beginning, dots being dots."""
    found: set[str] = set()
    names = _names_by_role(base, base.loaded)
    everything = set().union(*_names_by_role(base, base.checkpoint).values())
    loaded = set().union(*names.values())
    for pattern in config.get("unfrozen_parameters", ()):
        if re.search(r"\[\d*(:\d*)?\]$", pattern):
            config.refuse("unfrozen_parameters", f"{pattern} is a part of a parameter", "patterns of whole ones")
            continue
        compiled = _compiled(config, "unfrozen_parameters", re.sub(r"\.(?!\+)", r"\.", pattern))
        matched = {name for name in everything if compiled is None or compiled.match(name)}
        if not matched:
            config.refuse("unfrozen_parameters", f"{pattern} matches no parameter", "model.language_model.layers")
        elif not matched & loaded:
            config.note("unfrozen_parameters", f"{pattern} is {_UNUSED}")
        found |= matched
    roles = tuple(role for role, of_role in names.items() if of_role <= found)
    partly = {role for role, of_role in names.items() if of_role & found and role not in roles}
    if partly:
        config.refuse(
            "unfrozen_parameters",
            f"roles are trained as a whole, and of {', '.join(sorted(partly))} the patterns match a part",
            f"patterns of whole roles, here {', '.join(names)}; or leave it out, then "
            'recipe.with_adapter(AdapterSpec.full().on("mlp").with_layers(30, 31))',
        )
    return roles


def _names_by_role(base: Base, part: Architecture) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {role: set() for role in roles_of(part)}
    for weight in inventory(part):
        names[weight.role] |= set(weight.names(text_only=base.checkpoint.is_text_only))
    return names


def _loaded(config: Config) -> AdapterSpec:
    for key in LORA:
        if key not in ("lora_model_dir", "loraplus_lr_ratio", "loraplus_lr_embedding") and config.has(key):
            config.note(key, "what the adapter in lora_model_dir adapts, and how, its files say")
    return AdapterSpec.load(config.get("lora_model_dir", "adapter"))


def _lora(config: Config, base: Base) -> AdapterSpec:
    for key, example in (("lora_r", "lora_r: 16"), ("lora_alpha", "lora_alpha: 32")):
        config.missing(key, example)
    spec = AdapterSpec.lora(
        rank=config.get("lora_r", 16),
        alpha=config.get("lora_alpha", 32),
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("peft_use_rslora", False),
        dora=config.get("peft_use_dora", False),
        initialization=_initialization(config),
    )
    copied = _copied(config, base)
    chosen = {weight for weight in _targets(config, base) if weight.role not in copied}
    return _trained_beside(config, base, _on_weights(spec, chosen, base), copied)


def _initialization(config: Config) -> str:
    asked = config.get("peft_init_lora_weights", True)
    if asked is False:
        config.refuse("peft_init_lora_weights", "an adapter begins as nothing", "peft_init_lora_weights: true")
    return asked if isinstance(asked, str) else "kaiming"


def _on_weights(spec: AdapterSpec, chosen: set[Weight], base: Base) -> AdapterSpec:
    """The adapter on these weights and no others: in roles where they are whole, by their names where not."""
    adaptable = [weight for weight in inventory(base.loaded) if weight.lora_target is not None]
    of_role = {role: {w for w in adaptable if w.role == role} for role in roles_of(base.loaded)}
    roles = [role for role, weights in of_role.items() if weights and weights <= chosen]
    rest = [weight for weight in adaptable if weight in chosen and weight.role not in roles]
    spec = spec.on(*roles)
    for target, with_names in (("module", "with_target_modules"), ("parameter", "with_target_parameters")):
        names = [weight.lora_name for weight in rest if weight.lora_target == target]
        if names:
            spec = getattr(spec, with_names)(*names)
    assert {entry.weight for entry in trained_weights(base.loaded, spec)} == chosen
    return spec


def _targets(config: Config, base: Base) -> Iterator[Weight]:
    """The weights of the loaded half that the keys of LoRA name."""
    asked = config.get("lora_target_modules")
    every_linear = config.get("lora_target_linear") or (isinstance(asked, str) and asked.lower() == "all-linear")
    if not any(config.has(key) for key in ("lora_target_modules", "lora_target_parameters")) and not every_linear:
        config.missing("lora_target_modules", "lora_target_modules: [q_proj, k_proj, v_proj, o_proj]")
    if every_linear:
        yield from _linears(config, base)
    if isinstance(asked, list):
        for suffix in asked:
            yield from _named(config, "lora_target_modules", suffix, base, _ends_in(suffix))
    elif asked is not None and not every_linear:
        pattern = _compiled(config, "lora_target_modules", asked)
        if pattern is not None:
            yield from _named(config, "lora_target_modules", asked, base, pattern.fullmatch)
    parameters = config.get("lora_target_parameters", [])
    for suffix in [parameters] if isinstance(parameters, str) else parameters:
        yield from _named(config, "lora_target_parameters", suffix, base, _ends_in(suffix))


def _linears(config: Config, base: Base) -> Iterator[Weight]:
    key = "lora_target_linear" if config.get("lora_target_linear") else "lora_target_modules"
    without = (
        "lm_head" if base.loaded.is_text_only else "lm_head and the convolution of the vision tower's patches"
    )
    config.note(key, f"every linear layer but {without}")
    yield from (w for w in inventory(base.loaded) if w.kind == "linear" and w.role != "lm_head")


def _ends_in(suffix: str) -> Callable[[str], bool]:
    return lambda name: matches(suffix, name)


def _named(config: Config, key: str, target: str, base: Base, found: Callable[[str], Any]) -> Iterator[Weight]:
    """The weights that one target names; it is refused where peft would take less, more or none."""
    kind = "module" if key == "lora_target_modules" else "parameter"
    hits = []
    for weight in inventory(base.checkpoint):
        text_only = base.checkpoint.is_text_only
        names = weight.module_names(text_only=text_only) if kind == "module" else weight.names(text_only=text_only)
        count = sum(bool(found(name)) for name in names)
        if count:
            hits.append((weight, count == len(names)))
    reached = [weight for weight, _ in hits if weight.lora_target == kind]
    halves = ("text",) if base.loaded.is_text_only else ("text", "vision")
    loaded = [weight for weight in reached if weight.half in halves]
    modules = {weight.module for weight in reached}
    others = [w.module_suffix for w, _ in hits if w.module not in modules and w.half in halves]
    if not reached or others:
        known = sorted({w.lora_name for w in inventory(base.checkpoint) if w.lora_target == kind})
        what = (
            f"names {', '.join(dict.fromkeys(others))}, which LoRA does not reach here"
            if others
            else "names nothing"
        )
        config.refuse(key, f"{target!r} {what}{nearest(target, known)}", f"of {', '.join(known)}")
    elif not all(whole for weight, whole in hits if weight in reached):
        config.refuse(key, f"{target!r} names some layers of a module", "peft_layers_to_transform: [30, 31]")
    elif not loaded:
        config.note(
            key, f"{target!r} is in the vision tower, which is not loaded: without images it learns nothing"
        )
    yield from loaded


def _compiled(config: Config, key: str, pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error as problem:
        config.refuse(key, f"{pattern!r} is no regular expression: {problem}", "a list of names")
        return None


def _copied(config: Config, base: Base) -> tuple[str, ...]:
    """The roles of ``lora_modules_to_save``, which must be whole ones."""
    found: set[Weight] = set()
    for name in config.get("lora_modules_to_save", ()):
        of_name = {w for w in inventory(base.loaded) if any(matches(name, full) for full in w.module_names())}
        if not of_name:
            tied = name == "lm_head" and base.loaded.tied
            reason = "is tied to embed_tokens, and goes with it" if tied else "names no module"
            config.refuse(
                "lora_modules_to_save", f"{name} {reason}", "[embed_tokens]" if tied else "[embed_tokens, lm_head]"
            )
        found |= of_name
    of_role = {role: {w for w in inventory(base.loaded) if w.role == role} for role in {w.role for w in found}}
    parts = sorted(role for role, weights in of_role.items() if not weights <= found)
    if parts:
        config.refuse(
            "lora_modules_to_save",
            f"roles are trained as a whole, and of {', '.join(parts)} it names a part",
            "[embed_tokens, lm_head], or recipe.with_adapter(recipe.adapter.train_fully(...))",
        )
    return tuple(role for role in roles_of(base.loaded) if role in of_role)


def _trained_beside(config: Config, base: Base, spec: AdapterSpec, copied: tuple[str, ...]) -> AdapterSpec:
    spec = spec.train_fully(*copied) if copied else spec
    if ids := _tokens(config, base):
        spec = spec.train_tokens(*ids)
    layers = config.get("peft_layers_to_transform", ())
    if not layers:
        return spec
    pairs = [entry.weight for entry in trained_weights(base.loaded, spec) if entry.how == "pair"]
    if isinstance(config.get("lora_target_modules"), str) or any(
        weight.half == "vision" or not weight.layers or weight.lora_target == "parameter" for weight in pairs
    ):
        config.refuse(
            "peft_layers_to_transform",
            "it is for modules of decoder layers, named in a list",
            "lora_target_modules: [q_proj, k_proj, v_proj, o_proj]",
        )
    if config.get("peft_layers_pattern", "layers") not in ("layers", ["layers"], []):
        config.refuse("peft_layers_pattern", "decoder layers are called layers", "peft_layers_pattern: layers")
    return spec.with_layers(*layers)


def _tokens(config: Config, base: Base) -> list[int]:
    """The tokens whose rows are trained, those of an output head always with those of the embeddings."""
    asked: Any = config.get("peft_trainable_token_indices")
    if not asked:
        return []
    by_module = asked if isinstance(asked, dict) else {"embed_tokens": asked}
    wanted = {"embed_tokens"} if base.loaded.tied else {"embed_tokens", "lm_head"}
    lists = list(by_module.values())
    if set(by_module) != wanted or any(ids != lists[0] for ids in lists) or not isinstance(lists[0], list):
        config.refuse(
            "peft_trainable_token_indices",
            f"the rows of {' and '.join(sorted(wanted))} are trained together",
            f"{{{', '.join(f'{name}: [248077]' for name in sorted(wanted))}}}",
        )
    return list(lists[0]) if isinstance(lists[0], list) else []


def trained_roles(base: Base, spec: AdapterSpec) -> set[str]:
    """The roles of which something is trained; none are known of an adapter that is loaded."""
    return set() if spec.path is not None else {e.weight.role for e in trained_weights(base.loaded, spec)}

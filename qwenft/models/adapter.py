"""What an adapter holds, by the weights of the base that it is beside: from a folder, or from a model.

Plans look at folders through this file, and so it loads no torch until a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import attrs
from safetensors import SafetensorError, safe_open

from qwenft.errors import CheckpointError
from qwenft.family.inventory import inventory
from qwenft.family.parameters import added_sizes
from qwenft.models.checkpoint import read_object, require_own_files
from qwenft.models.weights import canonical
from qwenft.plan.coverage import TrainedWeight
from qwenft.specs.adapter import AdapterSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from qwenft.family.architectures import Architecture
    from qwenft.family.inventory import Weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FIX = f"a folder with {CONFIG} and {TENSORS}, such as run.adapter_path"
_DTYPES = ("F32", "BF16", "F16")
#: A repeated group: names of modules need none, and such patterns can take for ever to match nothing.
_REPEATED = re.compile(r"\)[*+{]")
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}
#: What changes the update that a pair makes, or the base, and is not read here.
_REFUSED = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "fan_in_fan_out",
)
#: Initial pairs that peft takes out of the base, which the adapter alone does not say how to do again.
_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@attrs.frozen
class Beside:
    """What an adapter has beside one weight of the base, in one layer.

    Args:
        name: of the weight, without ``language_model``.
        weight: which one.
        layer: of which layer; None outside of them.
        how: a "pair", a "copy", or "rows" of tokens.
        tensors: the adapter's own names: "a", "b" and with DoRA "magnitude" of a pair; "copy"; "rows".
        rank: of the pair.
        alpha: of the pair.
        scaling: of what the pair multiplies to.
    """

    name: str
    weight: Weight
    layer: int | None
    how: Literal["pair", "copy", "rows"]
    tensors: dict[str, str]
    rank: int = 0
    alpha: float = 0.0
    scaling: float = 0.0


@attrs.frozen(eq=False)
class Adapter:
    """A LoRA adapter in the form of peft's files.

    Args:
        config: ``adapter_config.json``.
        shapes: of its tensors, by their names in the file.
        read: gives one of them.
        origin: where it is from, for messages.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    origin: str

    @classmethod
    def of_folder(cls, folder: Path) -> Adapter:
        """The adapter in a folder of peft's.

        Raises:
            CheckpointError: there is none, it is damaged, or of a kind that is not read.
        """
        try:
            require_own_files(folder)
            config = read_object(folder / CONFIG, _FIX)
            with safe_open(folder / TENSORS, framework="pt") as tensors:
                names = list(tensors.keys())
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in names}
        except (OSError, SafetensorError) as error:
            problem = f"{folder} is no adapter of peft, or a damaged one: {getattr(error, 'problem', error)}"
            raise CheckpointError(problem, fix=getattr(error, "fix", _FIX), path=folder) from None
        require_lora(config, str(folder))
        _require_values(config, folder)
        for name, dtype in dtypes.items():
            if dtype not in _DTYPES:
                problem = f"{folder / TENSORS}: {name} is held in {dtype}, expected {', '.join(_DTYPES)}"
                raise CheckpointError(problem, fix="the adapter saved again", path=folder)
        if not shapes:
            raise CheckpointError(
                f"{folder}: its {TENSORS} holds no tensor: it would load as nothing",
                fix="the adapter saved again",
                path=folder,
            )

        # Several experts are merged with tensors of the same pair.
        @lru_cache(maxsize=4)
        def read(name: str) -> torch.Tensor:
            with safe_open(folder / TENSORS, framework="pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(name)
                return tensor

        return cls(config, shapes, read, str(folder))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the tokens whose rows it has."""
        found = self.config.get("trainable_token_indices") or ()
        lists = list(found.values()) if isinstance(found, dict) else [found]
        if any(ids != lists[0] for ids in lists):
            raise self._error("it has rows of other tokens in the embeddings than in the head")
        return tuple(lists[0]) if lists else ()

    @property
    def spec(self) -> AdapterSpec:
        """Its options, as a recipe would write them; what it is beside is in :meth:`trained_weights`."""
        config = self.config
        return attrs.evolve(
            AdapterSpec.lora(
                rank=config["r"],
                alpha=config["lora_alpha"],
                dropout=float(config.get("lora_dropout") or 0.0),
                rslora=bool(config.get("use_rslora")),
                dora=bool(config.get("use_dora")),
            ),
            tokens=self.tokens,
        )

    def trained_weights(self, loaded: Architecture) -> tuple[TrainedWeight, ...]:
        """What training it trains, where layers that are alike are one.

        Raises:
            CheckpointError: see :meth:`beside`.
        """
        layers: dict[tuple[Any, ...], list[int]] = {}
        for entry in self.beside(loaded):
            of_one = layers.setdefault((entry.weight, entry.how, entry.rank, entry.alpha), [])
            if entry.layer is not None:
                of_one.append(entry.layer)
        found = []
        for (weight, how, rank, alpha), where in layers.items():
            sizes: tuple[int, ...] = (weight.size,)
            if how == "pair":
                sizes = added_sizes(weight, rank, dora=self.spec.dora)
            elif how == "rows":
                sizes = (len(self.tokens) * weight.shape[1],)
            found.append(TrainedWeight(attrs.evolve(weight, layers=tuple(sorted(where))), how, sizes, rank, alpha))
        return tuple(found)

    def beside(self, base: Architecture) -> tuple[Beside, ...]:
        """What it has beside each weight of a base.

        Raises:
            CheckpointError: it is of another base, or its ranks are not those that its config says.
        """
        places = {
            canonical(name): (weight, layer)
            for weight in inventory(base)
            for name, layer in zip(weight.names(), weight.layers or (None,), strict=True)
        }
        grouped: dict[tuple[str, str], dict[str, str]] = {}
        for stored in self.shapes:
            name, part = self._place(stored, places)
            tensors = grouped.setdefault((name, "pair" if part in ("a", "b", "magnitude") else part), {})
            if part in tensors:
                problem = f"it holds {tensors[part]} and {stored}, which are beside the same weight"
                raise self._error(problem, fix="the adapter saved again")
            tensors[part] = stored
        found = []
        for (name, how), tensors in grouped.items():
            if name == "lm_head.weight" and base.tied:
                self._require_tied(how, tensors, grouped)
            elif name not in places:
                is_tower = base.is_text_only and name.startswith("model.visual.")
                why = "no tower is loaded" if is_tower else "its base is another"
                own = f"its own base, {self.config.get('base_model_name_or_path')!r}"
                raise self._error(
                    f"it holds {next(iter(tensors.values()))}, and {base.name} has no {name}: {why}",
                    fix=f"recipe.with_model(vision=True), or {own}" if is_tower else own,
                )
            else:
                found.append(self._checked(name, *places[name], how, tensors))
        return tuple(found)

    def _place(self, stored: str, places: Mapping[str, Any]) -> tuple[str, str]:
        """The weight that a tensor is beside, and what of it."""
        name = canonical(stored.removeprefix("base_model.model."))
        for ending, part in _PARTS.items():
            if name.endswith(ending):
                module = re.sub(r"(\.base_layer)+$", "", name.removesuffix(ending))
                return self._parameter(module, stored.removesuffix(ending), places), part
        return name.replace(".modules_to_save.", "."), "copy"

    def _parameter(self, module: str, layer: str, places: Mapping[str, Any]) -> str:
        """The parameter of a module that a layer of peft's is beside: of experts, the stack that its pair fits."""
        sizes = tuple(
            self.shapes.get(f"{layer}.{part}.weight", ())[axis:][:1]
            for part, axis in (("lora_B", 0), ("lora_A", 1))
        )
        for stack in (f"{module}.gate_up_proj", f"{module}.down_proj"):
            if stack in places and sizes == tuple((size,) for size in places[stack][0].shape[1:]):
                return stack
        return f"{module}.weight"

    def _checked(self, name: str, weight: Weight, layer: int | None, how: Any, tensors: dict[str, str]) -> Beside:
        shapes = {part: self.shapes[stored] for part, stored in tensors.items()}
        if how == "copy":
            self._require_shapes(name, shapes, {"copy": weight.shape})
            return Beside(name, weight, layer, how, tensors)
        if how == "rows":
            self._require_shapes(name, shapes, {"rows": (len(self.tokens), weight.shape[1])})
            return Beside(name, weight, layer, how, tensors)
        rank, alpha = (
            self._of_pattern("rank_pattern", name, "r"),
            self._of_pattern("alpha_pattern", name, "lora_alpha"),
        )
        *stack, rows, columns = weight.shape
        if weight.kind == "embedding":
            rows, columns = columns, rows
        pairs = rank * (stack[0] if stack else 1)
        expected: dict[str, tuple[int, ...]] = {"a": (pairs, columns), "b": (rows, pairs)}
        if self.config.get("use_dora") and weight.lora_target == "module":
            expected["magnitude"] = (rows,)
        self._require_shapes(name, shapes, expected)
        scaling = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        return Beside(name, weight, layer, how, tensors, rank, alpha, scaling)

    def _require_shapes(self, name: str, got: dict[str, tuple[int, ...]], expected: dict[str, Any]) -> None:
        flat = {part: shape if part != "magnitude" else (max(shape),) for part, shape in got.items()}
        if flat != expected:
            raise self._error(
                f"what it has beside {name} is of the shapes {got}, and its config and the base make it "
                f"{expected}",
                fix=f"its own base, {self.config.get('base_model_name_or_path')!r}, and its own {CONFIG}",
            )

    def _of_pattern(self, pattern: str, name: str, otherwise: str) -> Any:
        """A number of peft's config for a weight: a regular expression's, or that of all."""
        module = name.removesuffix(".weight")
        names = (module, name, module.replace("model.", "model.language_model.", 1))
        for key, value in (self.config.get(pattern) or {}).items():
            if any(re.match(rf"(.*\.)?({key})$", each) for each in names):
                return value
        return self.config[otherwise]

    def _require_tied(
        self, how: str, tensors: dict[str, str], grouped: Mapping[tuple[str, str], dict[str, str]]
    ) -> None:
        """Of a head that is the embedding, what the embedding gets too is right, and nothing else."""
        embeddings = grouped.get(("model.embed_tokens.weight", how), {})
        same = how != "pair" and embeddings and self.read(tensors[how]).equal(self.read(embeddings[how]))
        if not same:
            raise self._error(
                "it changes the output head alone, which its base ties to the embeddings: merged, it would change "
                "both",
                fix='an adapter without "lm_head"',
            )

    def _error(self, problem: str, fix: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {problem}", fix=fix, path=self.origin)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= 2**24


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**24


def _is_pattern(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(accepts(of_one) and _matches(key) for key, of_one in value.items())


def _matches(pattern: str) -> bool:
    """Whether a regular expression is one, that matches in no time."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(pattern) < 500 and not _REPEATED.search(pattern)


def _is_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, Mapping) else [value]
    return all(
        isinstance(ids, list) and all(type(one) is int and 0 <= one < 2**31 for one in ids) for ids in lists
    )


#: What stands in peft's config and decides of the update: whether it can be left out, what it is, and in words.
_VALUES: dict[str, tuple[bool, Callable[[Any], bool], str]] = {
    "r": (False, _is_rank, "a whole number of at least 1"),
    "lora_alpha": (False, _is_alpha, "a number above 0"),
    "lora_dropout": (
        True,
        lambda value: type(value) in (int, float) and 0 <= value < 1,
        "a number from 0 to below 1",
    ),
    "use_rslora": (True, lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (True, lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (True, lambda value: _is_pattern(value, _is_rank), "ranks by patterns of names"),
    "alpha_pattern": (True, lambda value: _is_pattern(value, _is_alpha), "alphas by patterns of names"),
    "trainable_token_indices": (True, _is_tokens, "ids of tokens"),
}


def _require_values(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what stands in an adapter's config and is not what peft writes there.

    Raises:
        CheckpointError: such.
    """
    for name, (is_optional, accepts, expected) in _VALUES.items():
        got = config.get(name)
        if not (is_optional and got is None) and not accepts(got):
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {got!r:.200}, expected {expected}",
                fix="the adapter saved again",
                path=folder,
            )


def require_lora(config: Mapping[str, Any], origin: str) -> None:
    """Refuse what is no LoRA adapter, or one whose update is more than its pairs.

    Raises:
        CheckpointError: such.
    """
    kind = config.get("peft_type") if isinstance(config, dict) else config
    got = [name for name in _REFUSED if kind == "LORA" and config.get(name)]
    if kind != "LORA":
        got = [f"peft_type={kind!r}"]
    elif config.get("bias", "none") != "none":
        got = [f"bias={config['bias']!r}"]
    elif str(config.get("init_lora_weights")).startswith(_OF_ANOTHER_BASE):
        raise CheckpointError(
            f"{origin}: its pairs were taken out of the base (init_lora_weights={config['init_lora_weights']!r}), "
            "and it does not say what was left",
            fix="peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain",
            path=origin,
        )
    if got:
        raise CheckpointError(f"{origin}: {', '.join(got)} is not read", fix="a LoRA adapter", path=origin)

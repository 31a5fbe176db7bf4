"""AttentionSpec is the only place that chooses attention: what is seen in the source of the whole package."""

import ast
from pathlib import Path

import pytest

import qwenft

ROOT = Path(qwenft.__file__).parent
# What computes attention, and the names that stand for it.
COMPUTE = ("backends", "kernels")
KERNELS = {"attention", "flash", "flex", "fla", "gated_delta_rule", "short_conv", "reference"}
# transformers' and torch's own ways of choosing.
CHOOSING = {
    "attn_implementation",
    "_attn_implementation",
    "set_attn_implementation",
    "experts_implementation",
    "AttentionInterface",
    "AttentionMaskInterface",
    "ALL_ATTENTION_FUNCTIONS",
    "register_patch_mapping",
    "scaled_dot_product_attention",
    "sdpa_kernel",
    "enable_flash_sdp",
    "flash_attn",
    "flash_attn_varlen_func",
    "causal_conv1d_fn",
    "chunk_gated_delta_rule",
    "torch_chunk_gated_delta_rule",
}
# Compiling resolves the spec; a reader of configurations asks whether a name is one; proofs and suites name the
# references that all else is compared with.
RESOLVES = "compilation.py"
ASKS = "axolotl/model.py"
COMPARES = ("models/verify.py", "models/probe.py", "testing/conformance.py")
REFERENCES = {"EagerAttention", "ReferenceDeltaRule"}
# A process of its own that runs stock transformers, the arguments of others that a spec refuses, the keys of
# axolotl's configurations that become a spec, and what a config.json names, which is cleared before it is followed.
EXEMPT = {
    "models/load.py": {"_attn_implementation"},
    "axolotl/__init__.py": {"attn_implementation"},
    "axolotl/model.py": {"attn_implementation"},
    "axolotl/values.py": {"attn_implementation"},
    "testing/stock.py": {"attn_implementation", "experts_implementation"},
    "specs/attention.py": {"attn_implementation"},
}


def modules():
    """Every module outside of what computes attention, by its path in the package."""
    paths = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
    return {name: path for name, path in paths.items() if not name.startswith(COMPUTE)}


def imports(tree):
    """Every module and name that is imported, as "module" and "module:name"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}:{alias.name}" for alias in node.names)


def words(tree):
    """Every identifier, attribute, keyword and string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("name", modules())
def test_no_other_module_chooses_attention(name):
    """Outside of backends and kernels no module calls a kernel, names a backend or sets a library's own switch."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    assert CHOOSING & set(words(tree)) <= EXEMPT.get(name, set())
    found = set(imports(tree))
    assert not {f"qwenft.kernels.{kernel}" for kernel in KERNELS} & {item.partition(":")[0] for item in found}
    named = {item for item in found if item.startswith("qwenft.backends") or item == "qwenft:backends"}
    if name in (RESOLVES, ASKS):
        assert named == {"qwenft:backends"}
    elif name in COMPARES:
        assert {item.partition(":")[2] for item in named} == REFERENCES
    else:
        assert not named


def test_compiling_takes_backends_from_the_spec_alone():
    """It finds the names of the spec and the candidates of "auto", and names no backend itself."""
    tree = ast.parse((ROOT / RESOLVES).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "backends"
    }
    assert used == {"find", "automatic"}

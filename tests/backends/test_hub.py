"""Kernels from the hub without a GPU and without the hub: twins stand for `kernels.get_kernel` (as of 0.17.2) and for
the kernels' functions, so that what is tested is our adapter. Where `kernels` is installed, one test goes through it.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from types import ModuleType

import attrs
import pytest
import torch
from torch.nn import functional

from qwenft.backends.eager import EagerAttention
from qwenft.backends.hub import KNOWN, HubAttention
from qwenft.capabilities import AttentionProblem
from qwenft.errors import BackendUnavailable, SpecError
from qwenft.kernels.flash import hub_kernel
from qwenft.kernels.layout import SequenceLayout
from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.specs.model import ModelSpec
from qwenft.testing import check_attention


def with_card(name):
    """This machine, if it had such a card: what is installed is looked up."""
    return attrs.evolve(Machine.named(name), libraries=None)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "kernels-community/flash-attn2"
needs_kernels = pytest.mark.skipif(
    "kernels" not in importlib.metadata.packages_distributions(), reason="kernels is not installed"
)


def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False):
    """What flash_attn_func computes for [B, L, heads, D], its mask aligned to the bottom right, without more."""
    S, L = q.shape[1], k.shape[1]
    output = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=torch.ones(S, L, dtype=torch.bool).tril(L - S) if causal else None,
        scale=softmax_scale,
        enable_gqa=True,
    )
    return output.transpose(1, 2)


def flash_attn_varlen_func(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    deterministic=False,
):
    """What flash_attn_varlen_func computes, with the log-sum-exp beside it as vllm-flash-attn3 returns it."""
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    asked, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    documents = zip(q.split(asked), k.split(lengths), v.split(lengths), strict=True)
    outputs = [
        flash_attn_func(*(x[None] for x in document), softmax_scale=softmax_scale, causal=causal)[0]
        for document in documents
    ]
    return torch.cat(outputs), q.new_zeros(q.shape[1], len(q))


class Hub:
    """Stands for the package `kernels`, and remembers what was asked of it."""

    def __init__(self, **offered):
        self.kernel = ModuleType("kernel")
        vars(self.kernel).update(offered)
        self.asked = []
        self.failure = None

    def get_kernel(
        self,
        repo_id,
        *,
        revision=None,
        version=None,
        backend=None,
        user_agent=None,
        trust_remote_code=False,
        check_arch=True,
    ):
        """Takes and remembers what the package's own function takes."""
        self.asked.append((repo_id, revision, trust_remote_code))
        if self.failure is not None:
            raise self.failure
        return self.kernel


@pytest.fixture
def hub(monkeypatch):
    """Puts a twin in the place of `kernels`; called with what the kernel is to offer."""

    def install(**offered):
        twin = Hub(**offered)
        package = ModuleType("kernels")
        package.get_kernel = twin.get_kernel
        monkeypatch.setitem(sys.modules, "kernels", package)
        return twin

    hub_kernel.cache_clear()
    yield install
    hub_kernel.cache_clear()


class Packing(HubAttention):
    """Says of an unknown kernel what its user knows."""

    supports_packing = True
    needs_half_precision = True


class Trusted(HubAttention):
    """Trusts its publisher."""

    trusted = True


class Renamed(HubAttention):
    """A kernel whose function is called otherwise."""

    supports_packing = True

    def attend(self, query, key, value, *, layout, scale, causal=True):
        """Calls the kernel's one function."""
        return self.load().mix(query, key, value, layout=layout, scale=scale, causal=causal)


def install_metadata(monkeypatch, folder, version):
    """Give this process the metadata of a `kernels` that is not there."""
    place = folder / f"kernels-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def inputs(layout, heads=(4, 2), dim=16):
    generator = torch.Generator().manual_seed(0)
    lengths = (sum(layout.query_lengths), layout.total, layout.total)
    return [
        torch.randn(length, count, dim, generator=generator)
        for length, count in zip(lengths, (heads[0], heads[1], heads[1]), strict=True)
    ]


def problem(head_dim=256, device="cuda", capability=None):
    return AttentionProblem(device, "bfloat16", 8, 2, head_dim, 2048, capability)


@pytest.mark.parametrize(
    "revision", [None, "main", "v1", 1, "0123456", COMMIT.upper(), COMMIT + "0", COMMIT[:-1] + "g", COMMIT + "\n"]
)
def test_what_is_not_a_commit_is_refused(revision):
    """A branch, a tag, a version or half a commit moves, and is refused with the line that pins it."""
    with pytest.raises(SpecError) as found:
        HubAttention(NAME, revision=revision)
    assert str(found.value) == (
        f"HubAttention: {NAME} is code from the network, and revision = {revision!r} does not pin it to a commit\n"
        f'  Fix: HubAttention("{NAME}", revision="<40 hex digits>")'
    )
    assert found.value.got == revision


@pytest.mark.parametrize(
    "name", ["flash-attn2", "", "/", "org/", "a/b/c", "-a/b", "../b", "org/n me", "org/né", None]
)
def test_what_is_not_a_repository_is_refused(name):
    """A name that is none of a repository is refused with the form of one."""
    with pytest.raises(SpecError) as found:
        HubAttention(name, revision=COMMIT)
    assert str(found.value) == (
        f'HubAttention: a kernel is named "org/name", got {name!r}\n'
        '  Fix: HubAttention("org/name", revision="<40 hex digits>")'
    )


def test_the_string_of_recipes():
    """The string form names repository and commit, and without a commit is refused as the object is."""
    assert HubAttention.parse(f"{NAME}@{COMMIT}") == HubAttention(NAME, revision=COMMIT)
    assert type(Packing.parse(f"org/name@{COMMIT}")) is Packing
    for text, revision in ((NAME, None), (f"{NAME}@", None), (f"{NAME}@main", "main"), (f"{NAME}@a@b", "a@b")):
        with pytest.raises(SpecError, match=rf"revision = {revision!r} does not pin it to a commit") as found:
            HubAttention.parse(text)
        assert found.value.fix == f'HubAttention("{NAME}", revision="<40 hex digits>")'
    with pytest.raises(SpecError, match='a kernel is named "org/name"'):
        HubAttention.parse(f"flash-attn2@{COMMIT}")


def test_kernels_compare_by_name_and_commit():
    """Two of one repository and commit are equal, of another commit not."""
    kernel = HubAttention(NAME, revision=COMMIT)
    assert kernel == HubAttention(NAME, revision=COMMIT)
    assert hash(kernel) == hash(HubAttention(NAME, revision=COMMIT))
    assert kernel != HubAttention(NAME, revision="0" * 40)
    assert kernel != HubAttention("org/name", revision=COMMIT)
    assert repr(kernel) == f"HubAttention(name={NAME!r}, revision={COMMIT!r})"


def test_a_recipe_keeps_name_and_commit(tmp_path):
    """A saved recipe is loaded with the same commit, without permission for a module, and says what it fetches."""
    recipe = Recipe(ModelSpec("Qwen3.5-0.8B")).with_attention(full=HubAttention(NAME, revision=COMMIT))
    loaded = Recipe.load(recipe.save(tmp_path / "recipe.json"))
    assert loaded == recipe
    assert loaded.attention.full.remote_code == f"{NAME}@{COMMIT}"


def test_a_saved_recipe_without_a_commit_is_refused(tmp_path):
    """A recipe that was edited to follow a branch is not loaded."""
    recipe = Recipe(ModelSpec("Qwen3.5-0.8B")).with_attention(full=HubAttention(NAME, revision=COMMIT))
    path = recipe.save(tmp_path / "recipe.json")
    path.write_text(path.read_text().replace(COMMIT, "main"))
    with pytest.raises(SpecError, match="revision = 'main' does not pin it to a commit"):
        Recipe.load(path)


def test_a_saved_recipe_trusts_nobody(tmp_path):
    """That a publisher is trusted stands in a class, and a recipe with it needs permission for its module."""
    recipe = Recipe(ModelSpec("Qwen3.5-0.8B")).with_attention(full=Trusted("org/name", revision=COMMIT))
    path = recipe.save(tmp_path / "recipe.json")
    with pytest.raises(SpecError, match="allow_modules"):
        Recipe.load(path)
    written = json.loads(path.read_text())
    written["attention"]["full"]["class"] = "qwenft.backends.hub:HubAttention"
    written["attention"]["full"]["fields"]["trusted"] = True
    path.write_text(json.dumps(written))
    with pytest.raises(SpecError, match="trusted"):
        Recipe.load(path)


@pytest.mark.parametrize("name", KNOWN)
def test_known_kernels_declare_what_they_do(name):
    """Builds of flash-attention pack, and compute in 16 bits."""
    kernel = HubAttention(name, revision=COMMIT)
    assert kernel.name == name
    assert (kernel.supports_packing, kernel.uses_flash_lib, kernel.needs_half_precision) == (True, True, True)


def test_of_other_kernels_nothing_is_believed():
    """An unknown kernel is not given packed documents, unless a subclass says that it may."""
    kernel = HubAttention("org/name", revision=COMMIT)
    assert (kernel.supports_packing, kernel.uses_flash_lib, kernel.needs_half_precision) == (False, False, False)
    assert kernel.refuses(problem(1000)) is None
    packing = Packing("org/name", revision=COMMIT)
    assert (packing.supports_packing, packing.uses_flash_lib, packing.needs_half_precision) == (True, False, True)


def test_a_known_kernel_conforms_on_a_twin(hub):
    """With boundaries and a result as the kernels have them, documents stay apart and gradients are right."""
    twin = hub(flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_func=None)
    report = check_attention(HubAttention(NAME, revision=COMMIT), dtype="bfloat16")
    assert {row.error for row in report.rows if row.check == "other documents unchanged"} == {0.0}
    assert ("last tokens ask", "gradient of key") in {(row.case, row.check) for row in report.rows}
    assert twin.asked == [(NAME, COMMIT, False)]


@pytest.mark.parametrize("kind", [HubAttention, Packing])
def test_a_kernel_without_boundaries_conforms_on_a_twin(kind, hub):
    """A kernel of batches alone is called for each document, so that it cannot mix them even where it packs."""
    hub(flash_attn_func=flash_attn_func)
    report = check_attention(kind("org/name", revision=COMMIT), dtype="bfloat16")
    assert ("last tokens ask", "gradient of key") in {(row.case, row.check) for row in report.rows}


def test_a_kernel_of_batches_takes_scale_and_direction(hub):
    """Scale and causality reach the kernel for each document."""
    hub(flash_attn_func=flash_attn_func)
    layout = SequenceLayout([5, 1, 7], query_lengths=[2, 1, 7])
    tensors = inputs(layout)
    for causal in (True, False):
        result = HubAttention("org/name", revision=COMMIT).attend(
            *tensors, layout=layout, scale=0.3, causal=causal
        )
        expected = EagerAttention().attend(*tensors, layout=layout, scale=0.3, causal=causal)
        torch.testing.assert_close(result, expected)


def test_other_functions_are_named(hub):
    """A kernel that has neither function is answered with those it has, and with what to write."""
    hub(mix=lambda: None, scan=lambda: None, _hidden=lambda: None, VERSION=1)
    layout = SequenceLayout([3])
    with pytest.raises(BackendUnavailable) as found:
        HubAttention("org/name", revision=COMMIT).attend(*inputs(layout), layout=layout, scale=1.0)
    assert str(found.value) == (
        f"org/name@{COMMIT} has no flash_attn_varlen_func and no flash_attn_func; it has mix, scan\n"
        "  Fix: a subclass of HubAttention that overrides attend() and calls self.load()"
    )
    hub_kernel.cache_clear()
    hub()
    with pytest.raises(BackendUnavailable, match="it has no functions"):
        HubAttention("org/name", revision=COMMIT).attend(*inputs(layout), layout=layout, scale=1.0)


def test_a_subclass_calls_what_it_knows(hub):
    """A subclass reaches the kernel's module, and calls it in its own way."""
    hub(mix=lambda *stream, scale, **_: stream[0] * scale)
    layout = SequenceLayout([3])
    query, key, value = inputs(layout)
    result = Renamed("org/name", revision=COMMIT).attend(query, key, value, layout=layout, scale=2.0)
    assert torch.equal(result, query * 2)


def test_a_publisher_is_trusted_by_a_subclass_alone(hub):
    """The hub's list of publishers holds, unless a subclass trusts this repository."""
    twin = hub()
    HubAttention("org/name", revision=COMMIT).load()
    Trusted("org/name", revision=COMMIT).load()
    assert twin.asked == [("org/name", COMMIT, False), ("org/name", COMMIT, ["org/name"])]


@pytest.mark.parametrize(
    ("failure", "fix"),
    [
        (
            ValueError("Kernel repository 'org/name' is not from a trusted publisher. Set trust_remote_code=True"),
            "trusted = True in a subclass of HubAttention, if you trust its publisher",
        ),
        (
            ValueError("Kernel repository 'org/name' could not verify publisher trust status."),
            "HF_HUB_OFFLINE=1 in the environment, where the hub is out of reach and the kernel in its cache",
        ),
        (FileNotFoundError("Cannot find a build variant for this system"), None),
        (RuntimeError("CUDA capability 7.5 of the current device is not supported"), None),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_kernel_that_does_not_load_says_why(failure, fix, hub):
    """What the package says is handed on, with our own fix where it asks for an argument that nobody here sees."""
    hub().failure = failure
    with pytest.raises(BackendUnavailable) as found:
        HubAttention("org/name", revision=COMMIT).load()
    assert found.value.problem == f"org/name@{COMMIT} cannot be loaded: {failure}"
    assert found.value.fix == fix
    assert found.value.__cause__ is failure


@pytest.mark.usefixtures("hub")
def test_a_missing_package_is_named(monkeypatch):
    """Without the package `kernels` its install line is the fix, called or asked."""

    def none_is_installed(distribution):
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setattr(importlib.metadata, "version", none_is_installed)
    kernel = HubAttention(NAME, revision=COMMIT)
    with pytest.raises(BackendUnavailable, match=f"^{NAME}@{COMMIT} cannot be loaded: ") as found:
        kernel.load()
    assert found.value.fix == "pip install kernels"
    answer = kernel.availability(with_card("H100-80GB"))
    assert (answer.usable, answer.reason, answer.remedy) == (
        False,
        "kernels is not installed",
        "pip install kernels",
    )


@pytest.mark.parametrize(
    ("name", "card", "kernels", "reason", "remedy"),
    [
        (NAME, "H100-80GB", "0.17.2", "", ""),
        (NAME, "RTX5090", "0.14.0", "", ""),
        ("org/name", "T4", "0.17.2", "", ""),
        (NAME, "T4", "0.17.2", "it is for compute capability 8.x, 9.x, 10.x, 12.x, the GPU has 7.5", ""),
        (
            "kernels-community/vllm-flash-attn3",
            "A100-80GB",
            "0.17.2",
            "it is for compute capability 9.x, the GPU has 8.0",
            "",
        ),
        (
            NAME,
            "H100-80GB",
            "0.13.0",
            "it needs kernels 0.14.0 or newer, found 0.13.0",
            'pip install "kernels>=0.14.0"',
        ),
    ],
)
def test_what_a_kernel_needs_to_run(*, name, card, kernels, reason, remedy, monkeypatch, tmp_path):
    """A GPU that a known build is for, and a `kernels` that asks whether a publisher is trusted."""
    install_metadata(monkeypatch, tmp_path, kernels)
    found = HubAttention(name, revision=COMMIT).availability(with_card(card))
    assert (found.usable, found.reason, found.remedy) == (reason == "", reason, remedy)


@pytest.mark.parametrize("name", [NAME, "org/name"])
def test_no_kernel_runs_without_a_gpu_of_nvidia(name):
    """On a CPU a kernel is not available, and refuses what a layer asks."""
    kernel = HubAttention(name, revision=COMMIT)
    machine = Machine("a laptop", "cpu", cores=2, host_bytes=2**30)
    assert kernel.availability(machine).reason == "it needs an NVIDIA GPU"
    assert kernel.refuses(problem(device="cpu")) == "it computes on NVIDIA GPUs only, not on 'cpu'"


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("flash-attn2", (8, 9), None),
        ("flash-attn2", None, None),
        ("flash-attn3", (9, 0), None),
        ("vllm-flash-attn3", (9, 0), None),
        ("flash-attn4", None, "head dim 256: it takes multiples of 32 up to 128"),
        (
            "flash-attn4",
            (10, 0),
            "head dim 256: it takes multiples of 32 up to 128 on compute capability 10.0",
        ),
    ],
)
def test_head_dims_of_known_kernels(name, capability, message):
    """The head dim of the family is refused by the build that has no kernels for it."""
    kernel = HubAttention(f"kernels-community/{name}", revision=COMMIT)
    assert kernel.refuses(problem(capability=capability)) == message


def test_asking_about_a_kernel_loads_nothing():
    """Recipes and plans make and ask backends: no torch, no `kernels` and no network."""
    code = (
        "import sys\n"
        "from qwenft.backends.hub import HubAttention\n"
        "from qwenft.capabilities import AttentionProblem\n"
        "from qwenft.machine import Machine\n"
        f"kernel = HubAttention({NAME!r}, revision={COMMIT!r})\n"
        "kernel.availability(Machine.named('H100-80GB'))\n"
        "kernel.refuses(AttentionProblem('cuda', 'bfloat16', 8, 2, 256, 64, (9, 0)))\n"
        "assert not {'torch', 'kernels', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_kernels
def test_the_real_package_loads_a_kernel(tmp_path):
    """The package itself takes our call, for a kernel that lies on disk as it would after the download."""
    build = tmp_path / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("def flash_attn_func(q, k, v, softmax_scale, causal):\n    return q * 2\n")
    metadata = {"name": "probe", "id": "probe_1", "version": 1, "license": "MIT", "python-depends": []}
    metadata["backend"] = {"type": "cpu"}
    (build / "metadata.json").write_text(json.dumps(metadata))
    code = (
        "import torch\n"
        "from qwenft.backends.hub import HubAttention\n"
        "from qwenft.kernels.layout import SequenceLayout\n"
        f"kernel = HubAttention('org/probe', revision={COMMIT!r})\n"
        "x = torch.ones(3, 2, 8)\n"
        "assert (kernel.attend(x, x, x, layout=SequenceLayout([2, 1]), scale=1.0) == 2).all()"
    )
    local = {"LOCAL_KERNELS": f"org/probe={tmp_path}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | local)

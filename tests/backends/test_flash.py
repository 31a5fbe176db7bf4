"""The flash-attention backends without a GPU: a twin stands for the packages' function, so that what is tested is
our adapter, what it passes and how it takes the result, and none of the packages' kernels.
"""

import importlib.metadata
import inspect
import subprocess
import sys
from types import ModuleType

import attrs
import pytest
import torch
from torch.nn import functional

from qwenft.backends.eager import EagerAttention
from qwenft.backends.flash import RELEASES, FlashAttention
from qwenft.capabilities import AttentionProblem
from qwenft.errors import BackendUnavailable, SpecError
from qwenft.kernels.layout import SequenceLayout
from qwenft.machine import Machine
from qwenft.recipe import Recipe
from qwenft.specs.model import ModelSpec
from qwenft.testing import check_attention

#: The arguments of each version's flash_attn_varlen_func in their order, those without a default first.
SIGNATURES = {
    # flash_attn/flash_attn_interface.py at v2.8.3
    "2": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    ),
    # hopper/flash_attn_interface.py at 0251105
    "3": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        (
            "seqused_q seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
            "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs"
        ),
    ),
    # The same before ed20940
    "3 before July 2025": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        (
            "seqused_q seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
            "softcap num_splits pack_gqa deterministic sm_margin"
        ),
    ),
    # flash_attn/cute/interface.py at 4.0.0b36
    "4": (
        "q k v",
        (
            "qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q seqused_k gather_kv_indices "
            "page_table softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic "
            "score_mod score_mod_bwd mask_mod block_sparse_tensors aux_tensors aux_scalars return_lse "
            "scheduler_metadata seqlen_k_per_split disable_scheduler_metadata gather_bwd_recompute_p "
            "gather_bwd_token_chunk"
        ),
    ),
}
#: Those that return the log-sum-exp beside the output without being asked.
PAIRS = ("3 before July 2025", "4")


def with_card(name):
    """This machine, if it had such a card: what is installed is looked up."""
    return attrs.evolve(Machine.named(name), libraries=None)


def twin(release):
    """A flash_attn_varlen_func with a release's signature and result, which computes as :func:`attend` does."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    required, optional = (names.split() for names in SIGNATURES[release])
    signature = inspect.Signature(
        [inspect.Parameter(name, kind) for name in required]
        + [inspect.Parameter(name, kind, default=None) for name in optional]
    )

    def flash_attn_varlen_func(*values, **options):
        output = attend(signature.bind(*values, **options).arguments)
        return (output, torch.zeros(output.shape[1], output.shape[0])) if release in PAIRS else output

    return flash_attn_varlen_func


def attend(arguments):
    """What the functions of all versions compute, with what their kernels take for granted.

    Rows that no document covers, or that lie beyond the longest lengths, are never written by a kernel: NaN here.
    """
    q, k, v = arguments.pop("q"), arguments.pop("k"), arguments.pop("v")
    cu_seqlens = [arguments.pop("cu_seqlens_q"), arguments.pop("cu_seqlens_k")]
    longest = [arguments.pop("max_seqlen_q"), arguments.pop("max_seqlen_k")]
    scale, causal = arguments.pop("softmax_scale"), arguments.pop("causal")
    assert arguments.pop("deterministic", False) == torch.are_deterministic_algorithms_enabled()
    assert not arguments
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert all(starts.dtype == torch.int32 and starts.is_contiguous() for starts in cu_seqlens)
    assert all(type(length) is int for length in longest)
    output = torch.full_like(q, float("nan"))
    asked, seen = (starts.tolist() for starts in cu_seqlens)
    for n in range(len(asked) - 1):
        rows = slice(asked[n], min(asked[n + 1], asked[n] + longest[0]))
        keys = slice(seen[n], min(seen[n + 1], seen[n] + longest[1]))
        S, L = rows.stop - rows.start, keys.stop - keys.start
        # "the causal mask is aligned to the bottom right corner": the docstring of flash_attn_varlen_func.
        mask = torch.ones(S, L, dtype=torch.bool).tril(L - S) if causal else None
        document = functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])),
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        output[rows] = document[0].transpose(0, 1)
    return output


def install_twin(monkeypatch, version, function):
    """Give this process the modules of a package, with ``function`` in the place of its own."""
    names = {2: ["flash_attn"], 3: ["flash_attn_interface"], 4: ["flash_attn", "flash_attn.cute"]}[version]
    for name in names:
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    # Version 4 alone makes flash_attn a folder without contents.
    module.flash_attn_varlen_func = function


def install_metadata(monkeypatch, folder, distribution, version):
    """Give this process the metadata of a distribution that is not there."""
    place = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


def inputs(layout, heads=(4, 2), dim=32, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    lengths = (sum(layout.query_lengths), layout.total, layout.total)
    return [
        torch.randn(length, count, dim, generator=generator).to(dtype)
        for length, count in zip(lengths, (heads[0], heads[1], heads[1]), strict=True)
    ]


def problem(head_dim=256, device="cuda", capability=None):
    return AttentionProblem(device, "bfloat16", 8, 2, head_dim, 2048, capability)


without_packages = pytest.mark.skipif(
    not {"flash_attn", "flash_attn_interface"}.isdisjoint(importlib.metadata.packages_distributions()),
    reason="a flash-attention package is installed",
)


@pytest.mark.parametrize("release", SIGNATURES)
def test_the_adapter_conforms_on_a_twin(release, monkeypatch):
    """With each version's signature and result, documents stay apart and outputs and gradients are the reference's."""
    version = int(release[0])
    install_twin(monkeypatch, version, twin(release))
    report = check_attention(FlashAttention(version), dtype="bfloat16")
    assert {row.error for row in report.rows if row.check == "other documents unchanged"} == {0.0}
    checks = {(row.case, row.check) for row in report.rows}
    assert ("last tokens ask", "output") in checks
    assert ("last tokens ask", "gradient of key") in checks


@pytest.mark.parametrize("causal", [True, False])
def test_a_head_dim_of_the_family_in_groups(causal, monkeypatch):
    """Head dim 256 with 8 query heads on 2, causal and not, of documents whose last tokens ask."""
    install_twin(monkeypatch, 2, twin("2"))
    layout = SequenceLayout([5, 1, 7], query_lengths=[2, 1, 7])
    query, key, value = inputs(layout, heads=(8, 2), dim=256)
    result = FlashAttention().attend(query, key, value, layout=layout, scale=0.1, causal=causal)
    expected = EagerAttention().attend(query, key, value, layout=layout, scale=0.1, causal=causal)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, atol=2e-2, rtol=2e-2)


def test_boundaries_are_made_once_for_a_layout(monkeypatch):
    """Each layer is given the same two tensors of boundaries; they are one where every token asks."""
    seen = []

    def recording(*stream, **options):
        seen.append(options)
        return stream[0]

    install_twin(monkeypatch, 2, recording)
    for layout in (SequenceLayout([5, 1, 7], query_lengths=[2, 1, 3]), SequenceLayout([4, 2])):
        for _ in range(2):
            FlashAttention(2).attend(*inputs(layout), layout=layout, scale=0.5)
    first, second, whole, _ = seen
    assert first["cu_seqlens_q"].tolist() == [0, 2, 3, 6]
    assert first["cu_seqlens_k"].tolist() == [0, 5, 6, 13]
    assert (first["max_seqlen_q"], first["max_seqlen_k"]) == (3, 7)
    assert (first["softmax_scale"], first["causal"]) == (0.5, True)
    assert first["cu_seqlens_q"] is second["cu_seqlens_q"]
    assert whole["cu_seqlens_q"] is whole["cu_seqlens_k"]


def test_wrong_shapes_are_named(monkeypatch):
    """A key of another length than the layout's is refused before a kernel reads beyond its end."""
    install_twin(monkeypatch, 2, twin("2"))
    layout = SequenceLayout([3])
    query, key, value = inputs(layout)
    with pytest.raises(ValueError, match=r"key: expected \[T, G, D\] = \[3, 2, 32\], got \[2, 2, 32\]"):
        FlashAttention(2).attend(query, key[:2], value, layout=layout, scale=1.0)


@pytest.mark.parametrize("version", [1, 5, "2", 2.0, True, None])
def test_other_versions_are_refused(version):
    """A version that is none is named, with those there are."""
    with pytest.raises(
        SpecError, match=r"there are versions 2, 3, 4, got .*\n  Fix: FlashAttention\(2\)"
    ) as found:
        FlashAttention(version)
    assert repr(version) in str(found.value)
    assert found.value.expected == (2, 3, 4)


def test_what_each_version_declares():
    """Names say the version; all pack, use the library and compute in 16 bits."""
    backends = [FlashAttention(), FlashAttention(3), FlashAttention(version=4)]
    assert [backend.name for backend in backends] == [f"flash_attention_{version}" for version in (2, 3, 4)]
    for backend in backends:
        assert (backend.supports_packing, backend.uses_flash_lib, backend.needs_half_precision) == (True,) * 3
        assert backend.remote_code is None


def test_versions_compare_and_hash_by_version():
    """Two of one version are equal, of two versions not."""
    assert FlashAttention(3) == FlashAttention(3)
    assert hash(FlashAttention(3)) == hash(FlashAttention(3))
    assert FlashAttention(3) != FlashAttention(4)
    assert repr(FlashAttention(3)) == "FlashAttention(version=3)"


def test_a_recipe_keeps_the_version(tmp_path):
    """A saved recipe is loaded with the same version, without permission for a module."""
    recipe = Recipe(ModelSpec("Qwen3.5-0.8B")).with_attention(full=FlashAttention(3))
    loaded = Recipe.load(recipe.save(tmp_path / "recipe.json"))
    assert loaded.attention.full.version == 3
    assert loaded == recipe


MISSING = [
    (2, "No module named 'flash_attn'", "pip install --no-build-isolation flash-attn"),
    (
        3,
        "No module named 'flash_attn_interface'",
        'pip install --no-build-isolation "git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper"',
    ),
    (4, "No module named 'flash_attn", "pip install flash-attn-4"),
]


@without_packages
@pytest.mark.parametrize(("version", "reason", "fix"), MISSING)
def test_a_missing_package_is_named_when_it_is_called(version, reason, fix):
    """Called without the package, a backend says which line installs it."""
    layout = SequenceLayout([3])
    with pytest.raises(
        BackendUnavailable, match=f"^flash_attention_{version} cannot be loaded: {reason}"
    ) as found:
        FlashAttention(version).attend(*inputs(layout), layout=layout, scale=1.0)
    assert found.value.fix == fix
    assert isinstance(found.value, ImportError)


def test_version_4_is_not_taken_for_version_2(monkeypatch):
    """Both are folders of flash_attn: 2 is not called where 4 alone is installed."""
    install_twin(monkeypatch, 4, twin("4"))
    layout = SequenceLayout([3])
    with pytest.raises(BackendUnavailable, match="flash_attention_2 cannot be loaded: cannot import name"):
        FlashAttention(2).attend(*inputs(layout), layout=layout, scale=1.0)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_no_version_runs_without_a_gpu_of_nvidia(version):
    """On a CPU, a version is not available, and refuses what a layer asks."""
    machine = Machine("a laptop", "cpu", cores=2, host_bytes=2**30)
    found = FlashAttention(version).availability(machine)
    assert (found.usable, found.reason, found.remedy) == (False, "it needs an NVIDIA GPU", "")
    refusal = FlashAttention(version).refuses(problem(device="cpu"))
    assert refusal == "it computes on NVIDIA GPUs only, not on 'cpu'"


@pytest.mark.parametrize(
    ("version", "card", "have"),
    [
        (2, "T4", "8.x, 9.x, 10.x, 12.x, the GPU has 7.5"),
        (3, "A100-80GB", "9.x, the GPU has 8.0"),
        (3, "RTX4090", "9.x, the GPU has 8.9"),
        (3, "B200", "9.x, the GPU has 10.0"),
        (3, "RTX5090", "9.x, the GPU has 12.0"),
        (4, "A100-80GB", "9.x, 10.x, 11.x, 12.x, the GPU has 8.0"),
        (4, "RTX4090", "9.x, 10.x, 11.x, 12.x, the GPU has 8.9"),
    ],
)
def test_other_gpus_are_named(version, card, have, monkeypatch, tmp_path):
    """A GPU that a version has no kernels for is named, installed or not; nothing to install helps."""
    install_metadata(monkeypatch, tmp_path, RELEASES[version].distribution, "9.9")
    found = FlashAttention(version).availability(with_card(card))
    assert found.reason == f"it is for compute capability {have}"
    assert (found.usable, found.remedy) == (False, "")


@without_packages
@pytest.mark.parametrize(("version", "_", "fix"), MISSING)
def test_a_missing_package_is_not_available(version, _, fix):
    """Where a package is not installed, its install line is the remedy."""
    found = FlashAttention(version).availability(with_card("H100-80GB"))
    assert (found.usable, found.remedy) == (False, fix)
    assert found.reason == f"{RELEASES[version].distribution} is not installed"


@pytest.mark.parametrize(
    ("version", "card", "distribution", "release"),
    [
        (2, "A100-80GB", "flash-attn", "2.8.3.post2"),
        (2, "RTX4090", "flash_attn", "2.5.5"),
        (2, "RTX5090", "flash-attn", "2.7.4.post1+nv26.2.44259020"),
        (3, "H100-80GB", "flash_attn_3", "3.0.0b1"),
        (3, "H200", "flash-attn-3", "3.0.0"),
        (4, "H100-80GB", "flash-attn-4", "4.0.0b31"),
        (4, "B200", "flash-attn-4", "4.0.0b20"),
        (4, "B200", "flash-attn-4", "4.0.0"),
    ],
)
def test_installed_packages_are_available(*, version, card, distribution, release, monkeypatch, tmp_path):
    """A package's own metadata tells that it is there, whichever way its name is written."""
    install_metadata(monkeypatch, tmp_path, distribution, release)
    assert FlashAttention(version).availability(with_card(card)).usable


@pytest.mark.parametrize(
    ("version", "card", "release", "since", "remedy"),
    [
        (2, "RTX4090", "2.5.4", "2.5.5", 'pip install --no-build-isolation "flash-attn>=2.5.5"'),
        (2, "RTX5090", "2.7.2.post1", "2.7.3", 'pip install --no-build-isolation "flash-attn>=2.7.3"'),
        (4, "H100-80GB", "4.0.0b30", "4.0.0b31", 'pip install "flash-attn-4>=4.0.0b31"'),
        (4, "B200", "4.0.0b19", "4.0.0b20", 'pip install "flash-attn-4>=4.0.0b20"'),
        (4, "B200", "4.0.0b9", "4.0.0b20", 'pip install "flash-attn-4>=4.0.0b20"'),
    ],
)
def test_releases_that_are_wrong_on_a_gpu_are_named(
    *, version, card, release, since, remedy, monkeypatch, tmp_path
):
    """A release from before a GPU's kernels were right is named, with the one to install."""
    distribution = RELEASES[version].distribution
    install_metadata(monkeypatch, tmp_path, distribution, release)
    found = FlashAttention(version).availability(with_card(card))
    assert found.reason == f"it needs {distribution} {since} or newer on this GPU, found {release}"
    assert (found.usable, found.remedy) == (False, remedy)


@without_packages
def test_availability_imports_nothing(monkeypatch, tmp_path):
    """A package that would fail, or take seconds, when it is imported is asked of its metadata alone."""
    for name in ("flash_attn", "flash_attn_interface"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    install_metadata(monkeypatch, tmp_path, "flash-attn", "2.8.3")
    machine = with_card("H100-80GB")
    assert [FlashAttention(version).availability(machine).usable for version in (2, 3, 4)] == [True, False, False]


REFUSED = [
    (2, 320, None, "head dim 320: it takes multiples of 8 up to 256"),
    (2, 36, None, "head dim 36: it takes multiples of 8 up to 256"),
    (2, 512, (8, 0), "head dim 512: it takes multiples of 8 up to 256 on compute capability 8.0"),
    (3, 512, (9, 0), "head dim 512: it takes multiples of 8 up to 256 on compute capability 9.0"),
    (4, 320, None, "head dim 320: it takes multiples of 32 up to 256"),
    (4, 72, (9, 0), "head dim 72: it takes multiples of 32 up to 256 on compute capability 9.0"),
    (4, 192, (10, 0), "head dim 192: it takes multiples of 32 up to 128, 256 on compute capability 10.0"),
    (4, 256, (12, 0), "head dim 256: it takes multiples of 32 up to 128 on compute capability 12.0"),
    # A GPU that no version of 4 is for is the machine's matter.
    (4, 512, (8, 0), "head dim 512: it takes multiples of 32 up to 256"),
]


@pytest.mark.parametrize(("version", "head_dim", "capability", "message"), REFUSED)
def test_head_dims_without_kernels_are_refused(version, head_dim, capability, message):
    """A head dim that has no kernel, or a wrong one, is named with those that have."""
    assert FlashAttention(version).refuses(problem(head_dim, capability=capability)) == message


@pytest.mark.parametrize(
    ("version", "capabilities"),
    [
        (2, [None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
        (3, [None, (9, 0)]),
        (4, [None, (9, 0), (10, 0), (10, 3)]),
    ],
)
def test_the_head_dim_of_the_family_is_taken(version, capabilities):
    """Head dim 256 is refused on none of the GPUs that have kernels for it."""
    for capability in capabilities:
        assert FlashAttention(version).refuses(problem(256, capability=capability)) is None


def test_asking_about_a_version_loads_no_torch():
    """Recipes and plans make and ask backends, and must stay light."""
    code = (
        "import sys\n"
        "from qwenft.backends.flash import FlashAttention\n"
        "from qwenft.capabilities import AttentionProblem\n"
        "from qwenft.machine import Machine\n"
        "for version in (2, 3, 4):\n"
        "    FlashAttention(version).availability(Machine.named('H100-80GB'))\n"
        "    FlashAttention(version).refuses(AttentionProblem('cuda', 'bfloat16', 8, 2, 256, 64, (9, 0)))\n"
        "assert not {'torch', 'flash_attn', 'flash_attn_interface'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

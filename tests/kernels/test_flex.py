import functools
import types

import attrs
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenft.backends.flex import FlexAttention
from qwenft.capabilities import AttentionProblem
from qwenft.kernels import flex
from qwenft.kernels.attention import eager_attention
from qwenft.kernels.flex import block_mask, flex_attention, not_later
from qwenft.kernels.layout import SequenceLayout
from qwenft.machine import Machine

AWKWARD = (130, 3, 1, 63, 64, 65, 96)
TINY = (2, 1, 3) * 8
# Documents that begin in three windows of 512 tokens, the second of which is begun by none.
LONG = (5, 1100, 1, 128, 300, 2)
# Documents that begin at the last token of a block of 128, and at the first.
ON_EDGES = (127, 65, 64, 300, 84, 128)
LAST_ASK = ((130, 3, 1, 700, 65), (1, 3, 1, 129, 2))


class SlidingWindow(FlexAttention):
    """What a notebook would write."""

    exact = False

    def __init__(self, window):
        self.window = window

    def visible(self, query_position, key_position):
        """The window behind the query."""
        distance = query_position - key_position
        return (distance >= 0) & (distance < self.window)


class EarlierOnly(FlexAttention):
    """The first token of each document sees nothing."""

    def visible(self, query_position, key_position):
        """All that came before."""
        return key_position < query_position


def make_layout(lengths, asked=None):
    return SequenceLayout(lengths, query_lengths=asked)


def make_inputs(layout, *, heads=(4, 2), dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    asked, total = sum(layout.query_lengths), layout.total
    shapes = [(asked, heads[0], dim), (total, heads[1], dim), (total, heads[1], dim)]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def run(attend, inputs, layout, **options):
    """The output, and the gradients of a weighted sum of it."""
    output = attend(*inputs, layout=layout, scale=inputs[0].shape[2] ** -0.5, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


def dense_attention(query, key, value, *, layout, scale, visible):
    """One masked softmax over the whole stream, in which every pair's rule is written out."""
    documents, positions = layout.document_ids, layout.position_ids
    asking = torch.cat(
        [
            torch.arange(end - asked, end)
            for end, asked in zip(layout.starts[1:], layout.query_lengths, strict=True)
        ]
    )
    sees = documents[asking][:, None] == documents
    sees &= visible(positions[asking][:, None], positions[None])
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * scale
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hst,thd->shd", weights, value)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "asked", "heads", "dim"),
    [
        (AWKWARD, None, (4, 2), 64),
        (AWKWARD, None, (8, 2), 256),
        (TINY, None, (4, 2), 256),
        (LONG, None, (2, 2), 64),
        ((1,), None, (4, 2), 64),
        (*LAST_ASK, (8, 2), 64),
        (*LAST_ASK, (4, 2), 256),
        ((5, 2), (1, 1), (2, 1), 64),
    ],
)
def test_it_equals_the_formula(lengths, asked, heads, dim, causal):
    """Output and gradients are those of attention written out, whichever tokens ask and however heads are grouped."""
    layout = make_layout(lengths, asked)
    inputs = make_inputs(layout, heads=heads, dim=dim)
    expected = run(eager_attention, inputs, layout, causal=causal)
    for got, right in zip(run(flex_attention, inputs, layout, causal=causal), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_16_bits_are_rounded_once():
    """In bfloat16 everything between the inputs and the results is float32."""
    layout = make_layout(AWKWARD)
    inputs = make_inputs(layout, dtype=torch.bfloat16)
    expected = run(eager_attention, inputs, layout)
    for got, right in zip(run(flex_attention, inputs, layout), expected, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), right.float(), rtol=2**-7, atol=1e-3)


def test_autocast_does_not_round_it():
    """Under autocast to bfloat16, float32 inputs are computed in float32, forward and backward."""
    layout = make_layout([70, 3])
    inputs = make_inputs(layout)
    expected = run(eager_attention, inputs, layout)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(flex_attention, inputs, layout)
    for x, right in zip(got, expected, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [FlexAttention(), SlidingWindow(40)], ids=repr)
def test_documents_do_not_reach_each_other(backend):
    """With one document changed, output and gradients of all others stay the same to the bit."""
    layout = make_layout((130, 3, 1, 400, 64, 65))
    inputs, other = make_inputs(layout), make_inputs(layout, seed=2)
    before = run(backend.attend, inputs, layout)
    for start, stop in zip(layout.starts, layout.starts[1:], strict=False):
        within = torch.zeros(layout.total, 1, 1, dtype=torch.bool)
        within[start:stop] = True
        changed = [
            torch.where(within, new, x).detach().requires_grad_() for x, new in zip(inputs, other, strict=True)
        ]
        results = run(backend.attend, changed, layout)
        assert not torch.equal(results[0][start:stop], before[0][start:stop])
        for after, x in zip(results, before, strict=True):
            assert torch.equal(after[~within.flatten()], x[~within.flatten()])


@pytest.mark.parametrize(("lengths", "asked"), [(AWKWARD, None), (LONG, None), LAST_ASK])
@pytest.mark.parametrize("window", [1, 100])
def test_a_subclass_says_who_sees_whom(window, lengths, asked):
    """A rule of a notebook's own holds forward and backward, within documents only."""
    layout = make_layout(lengths, asked)
    inputs, backend = make_inputs(layout), SlidingWindow(window)
    expected = run(dense_attention, inputs, layout, visible=backend.visible)
    for got, right in zip(run(backend.attend, inputs, layout), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_both_directions_are_not_asked_for_the_rule():
    """Where causal is False all tokens of a document see each other, whatever the rule."""
    layout = make_layout([7, 60])
    inputs = make_inputs(layout)
    expected = run(eager_attention, inputs, layout, causal=False)
    for got, right in zip(run(SlidingWindow(2).attend, inputs, layout, causal=False), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_a_token_that_sees_nothing_gets_zeros():
    """Rows without a key are zero, and so are their gradients; the others are as ever."""
    layout = make_layout([1, 4, 70])
    inputs = make_inputs(layout)
    output, *grads = run(EarlierOnly().attend, inputs, layout)
    assert (output[[0, 1, 5]] == 0).all()
    assert (grads[0][[0, 1, 5]] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    # The second token of a document sees the first alone.
    torch.testing.assert_close(output[6], inputs[2][5].repeat_interleave(2, dim=0))


def test_last_tokens_get_what_they_get_in_training():
    """A document's last tokens alone get the rows that all tokens together would give them."""
    lengths, asked = LAST_ASK
    inputs = make_inputs(make_layout(lengths))
    backend = SlidingWindow(70)
    whole = backend.attend(*inputs, layout=make_layout(lengths), scale=0.125)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, asked, strict=True)])
    last = backend.attend(inputs[0][rows], *inputs[1:], layout=make_layout(lengths, asked), scale=0.125)
    torch.testing.assert_close(last, whole[rows])


@pytest.mark.parametrize("rule", [not_later, None, SlidingWindow(50).visible, SlidingWindow(300).visible])
@pytest.mark.parametrize(
    ("lengths", "asked"), [(AWKWARD, None), (TINY, None), (LONG, None), (ON_EDGES, None), LAST_ASK]
)
def test_the_block_mask_is_that_of_torch(lengths, asked, rule):
    """The blocks are those that torch finds in the dense mask, in part, as a whole, by rows and by columns."""
    layout = make_layout(lengths, asked)
    mask = block_mask(layout, rule)
    sizes = sum(layout.query_lengths), layout.total
    expected = create_block_mask(mask.mask_mod, None, None, *sizes, device="cpu")
    assert mask.seq_lengths == expected.seq_lengths == sizes
    for kind in ("kv", "full_kv", "q", "full_q"):
        for name in (f"{kind}_num_blocks", f"{kind}_indices"):
            assert torch.equal(getattr(mask, name), getattr(expected, name)), name


@pytest.mark.parametrize(("lengths", "asked"), [(AWKWARD, None), (ON_EDGES, None), LAST_ASK])
def test_only_blocks_that_share_a_document_are_looked_into(lengths, asked):
    """The pairs whose rule is evaluated are those of blocks in which somebody could see somebody."""
    layout = make_layout(lengths, asked)
    sizes = sum(layout.query_lengths), layout.total
    expected = create_block_mask(block_mask(layout, None).mask_mod, None, None, *sizes, device="cpu")
    shared = expected.to_dense()[0, 0].bool()
    assert torch.equal(flex._blocks_that_share(layout), shared)
    assert not shared.all()


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_no_mask_of_all_pairs_is_made():
    """The mask of a long stream is found some blocks at a time, and holds a number for each pair of blocks."""
    layout = make_layout([8000, 192])
    with LargestTensor() as largest:
        mask = block_mask(layout, not_later)
    assert largest.numbers <= flex.BLOCKS_AT_A_TIME * flex.BLOCK**2 < layout.total**2 / 7
    lists = [x for x in mask.as_tuple() if isinstance(x, torch.Tensor)]
    assert len(lists) == 8
    assert max(x.numel() for x in lists) == (8192 // flex.BLOCK) ** 2


def test_the_mask_is_built_once_for_all_layers(monkeypatch):
    """Layers that are handed one layout share its masks; another rule, or another layout, has masks of its own."""
    built = []
    build = BlockMask.from_kv_blocks
    monkeypatch.setattr(BlockMask, "from_kv_blocks", lambda *x, **options: built.append(1) or build(*x, **options))
    layout, backend = make_layout([5, 9]), FlexAttention()
    inputs = make_inputs(layout)
    for _ in range(3):
        run(backend.attend, inputs, layout)
    assert len(built) == 1
    run(SlidingWindow(2).attend, inputs, layout)
    assert len(built) == 2
    run(backend.attend, inputs, layout, causal=False)
    assert len(built) == 3
    run(backend.attend, inputs, make_layout([5, 9]))
    assert len(built) == 4
    assert block_mask(layout, backend.visible) is block_mask(layout, backend.visible)


def test_a_call_holds_some_documents_only():
    """On a CPU neighbouring documents share a call up to a size, so that no scores of a whole stream are made."""
    layout = make_layout([200] * 9 + [1500, 3, 4], [1] * 9 + [700, 3, 1])
    runs = flex._runs(layout, not_later)
    assert [(run.seen.start, run.seen.stop) for run in runs] == [
        (0, 600),
        (600, 1200),
        (1200, 1600),
        (1600, 3300),
        (3300, 3307),
    ]
    assert [(run.asked.start, run.asked.stop) for run in runs] == [(0, 3), (3, 6), (6, 8), (8, 709), (709, 713)]


@pytest.fixture
def traced(monkeypatch):
    """Torch's compiler up to its graphs, which are counted and run as they are: what a GPU's compilation begins with."""
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    flex._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    yield graphs
    flex._compiled.cache_clear()
    torch.compiler.reset()


def fused(inputs, layout, rule=not_later):
    """What a GPU would be given; torch compiles nothing that needs gradients on a CPU."""
    with torch.no_grad():
        return flex._fused(*(x.detach() for x in inputs), block_mask(layout, rule), inputs[0].shape[2] ** -0.5)


def test_new_lengths_are_no_new_compilation(traced):
    """The kernel is compiled for some kinds of streams, not for each length and window, and computes the same."""
    streams = [(200, 300), (1000, 30, 2), (100,) * 3, (64,) * 7, (700,), (3,) * 50, (1030,), (150, 400, 1)]
    for lengths in streams:
        layout = make_layout(lengths)
        inputs = make_inputs(layout)
        torch.testing.assert_close(
            fused(inputs, layout),
            eager_attention(*inputs, layout=layout, scale=0.125).detach(),
            rtol=1e-4,
            atol=1e-5,
        )
    assert 1 <= len(traced) <= 2
    for window in (16, 30, 64, 100):
        fused(inputs, layout, SlidingWindow(window).visible)
    assert len(traced) <= 3
    for lengths in ((1,), (2,), (128,), (129,)):
        layout = make_layout(lengths)
        fused(make_inputs(layout), layout)
    assert len(traced) <= 6


def test_more_variants_than_torch_allows_a_function(traced):
    """Kernels for nine kinds of heads live in one process, where torch gives up on a function after eight."""
    layout = make_layout([300, 5])
    for dim in range(16, 88, 8):
        fused(make_inputs(layout, dim=dim), layout)
    assert len(traced) == 9


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # what Inductor imports
@pytest.mark.parametrize("rule", [not_later, SlidingWindow(100).visible], ids=["causal", "window"])
@pytest.mark.parametrize(("lengths", "asked"), [(AWKWARD, None), LAST_ASK])
def test_a_compiled_kernel_that_skips_blocks_agrees(lengths, asked, rule, monkeypatch):
    """Torch's kernel for CPUs, which like the GPU's reads only the listed blocks, gets the same from them."""
    # Its C++ does not compile for all lengths at once.
    compiled = torch.compile(flex.torch_flex_attention, dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    layout = make_layout(lengths, asked)
    inputs = make_inputs(layout)
    expected = dense_attention(*inputs, layout=layout, scale=0.125, visible=rule)
    torch.testing.assert_close(fused(inputs, layout, rule), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shared_memory", "dim", "dtype", "blocks"),
    [
        (101376, 256, torch.bfloat16, 32),
        (101376, 192, torch.float16, 32),
        (101376, 256, torch.float32, None),
        (101376, 128, torch.bfloat16, None),
        (166912, 256, torch.bfloat16, None),
        (232448, 256, torch.bfloat16, None),
    ],
)
def test_blocks_fit_the_shared_memory(shared_memory, dim, dtype, blocks, monkeypatch):
    """Only where torch's own blocks do not fit is it told smaller ones, for the backward pass."""
    properties = types.SimpleNamespace(shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    options = flex._kernel_options(torch.empty(3, 4, dim, dtype=dtype, device="meta"))
    assert options["BACKEND"] == "TRITON"
    assert {value for name, value in options.items() if "BLOCK" in name} == ({blocks} if blocks else set())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda x: x[:-1]),
        ("query", lambda x: x[:, :3]),
        ("query", lambda x: x.half()),
        ("key", lambda x: x[:-1]),
        ("value", lambda x: x[..., :3]),
        ("value", lambda x: x.long()),
    ],
)
def test_a_wrong_argument_is_named(name, change):
    """A wrong shape, dtype or number of heads is refused by the argument's name."""
    layout = make_layout([5, 3])
    arguments = dict(zip(("query", "key", "value"), make_inputs(layout), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: "):
        flex_attention(**arguments, layout=layout, scale=1.0)


def test_it_says_where_it_runs():
    """It is available on CPUs and on GPUs from Ampere on, there with Triton."""
    backend = FlexAttention()
    old, new = Machine.named("T4"), Machine.named("RTX3090")
    assert backend.availability(new).usable
    assert "8.0 or more, the GPU has 7.5" in backend.availability(old).reason
    assert backend.availability(attrs.evolve(new, libraries=())).remedy == "pip install triton"
    assert backend.availability(attrs.evolve(Machine.detect(), libraries=())).usable


@pytest.mark.parametrize(
    ("device", "dim", "refused"), [("cuda", 8, True), ("cuda", 16, False), ("cuda", 512, True), ("cpu", 8, False)]
)
def test_it_refuses_heads_that_the_kernel_does_not_take(device, dim, refused):
    """Very small and very large heads are refused on a GPU, with their size."""
    problem = AttentionProblem(device, "bfloat16", 4, 2, dim, 100)
    refusal = FlexAttention().refuses(problem)
    assert (refusal is not None) == refused
    assert not refused or refusal.endswith(f"these have {dim}")

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qwenft.kernels import gated_delta_rule as module
from qwenft.kernels.chunks import ChunkPlan, Span
from qwenft.kernels.gated_delta_rule import gated_delta_rule
from qwenft.kernels.layout import SequenceLayout
from qwenft.kernels.reference import gated_delta_rule_reference, l2norm

NAMES = ("output", "query", "key", "value", "log_decay", "beta")
BOUNDARIES = ([0, 15], [0, 256, 500, 1000], [0, 15, 100, 300, 1200, 2000])
AWKWARD = [1, 3, 63, 64, 65, 130]


def make_inputs(tokens, *, heads=(2, 4), dims=(32, 48), decay=1.0, dtype=torch.float32, seed=0):
    """Query, key, value, log_decay between -decay and 0, and beta with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    (K, V), (D, E) = heads, dims
    query = torch.randn(tokens, K, D, generator=generator)
    key = torch.randn(tokens, K, D, generator=generator)
    value = torch.randn(tokens, V, E, generator=generator)
    log_decay = -decay * torch.rand(tokens, V, generator=generator)
    beta = torch.rand(tokens, V, generator=generator)
    beta[::7] = 0
    return [x.to(dtype).requires_grad_() for x in (query, key, value, log_decay, beta)]


def weights_like(output, seed=1):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)


def with_gradients(rule, inputs, **arguments):
    output = rule(*inputs, **arguments)
    return [output.detach(), *torch.autograd.grad(output, inputs, weights_like(output))]


def relative(got, expected):
    assert torch.isfinite(got).all()
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def assert_close(got, expected, limit):
    errors = {name: relative(a, b) for name, a, b in zip(NAMES, got, expected, strict=True)}
    assert max(errors.values()) < limit, errors


def by_document(rule, layout):
    """Another implementation, one document at a time, on the flat stream."""

    def stream(query, key, value, log_decay, beta):
        documents = [
            rule(*(x[None, start:stop] for x in (query, key, value, log_decay, beta)))[0]
            for start, stop in zip(layout.starts, layout.starts[1:], strict=False)
        ]
        return torch.cat(documents)

    return stream


def fla_stream(fla_naive, layout):
    """FLA's naive rule takes normalised q and k, one of each a value head, and scales q itself."""

    def rule(query, key, value, log_decay, beta):
        group = value.shape[2] // key.shape[2]
        query, key = (l2norm(x).repeat_interleave(group, dim=2) for x in (query, key))
        return fla_naive(query, key, value, beta, log_decay)[0]

    return by_document(rule, layout)


def transformers_stream(transformers_rule, layout):
    return by_document(lambda *inputs: transformers_rule(*inputs, use_qk_l2norm_in_kernel=True)[0], layout)


@pytest.mark.parametrize("heads", [(4, 4), (2, 4), (2, 8)])
@pytest.mark.parametrize("dims", [(60, 60), (64, 128), (100, 72), (128, 128)])
@pytest.mark.parametrize("lengths", [[15], [1, 3, 63, 64, 65], [130, 1, 1]])
def test_output_and_gradients_equal_the_naive_rule_of_fla(fla_naive, heads, dims, lengths):
    """Output and all five gradients are FLA's token-by-token ones, for grouped heads and odd head dims."""
    layout = SequenceLayout(lengths)
    inputs = make_inputs(layout.total, heads=heads, dims=dims)
    assert_close(
        with_gradients(gated_delta_rule, inputs, layout=layout),
        with_gradients(fla_stream(fla_naive, layout), inputs),
        1e-5,
    )


@pytest.mark.long
@pytest.mark.parametrize("heads", [(4, 4), (2, 4), (2, 8)])
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_long_documents_equal_the_naive_rule_of_fla(fla_naive, heads, boundaries):
    """Packed documents of up to 900 tokens give FLA's output and gradients."""
    layout = SequenceLayout.from_cu_seqlens(boundaries)
    inputs = make_inputs(layout.total, heads=heads, dims=(64, 64))
    assert_close(
        with_gradients(gated_delta_rule, inputs, layout=layout),
        with_gradients(fla_stream(fla_naive, layout), inputs),
        1e-5,
    )


@pytest.mark.parametrize("heads", [(4, 4), (2, 4), (2, 8)])
@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_output_and_gradients_equal_the_torch_rule_of_transformers(transformers_rule, heads, boundaries):
    """A packed stream gives what transformers gives document by document."""
    layout = SequenceLayout.from_cu_seqlens(boundaries)
    inputs = make_inputs(layout.total, heads=heads, dims=(64, 96))
    assert_close(
        with_gradients(gated_delta_rule, inputs, layout=layout),
        with_gradients(transformers_stream(transformers_rule, layout), inputs),
        1e-5,
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_layouts_equal_the_torch_rule_of_transformers(transformers_rule, seed):
    """Any mixture of lengths gives what transformers gives document by document."""
    draw = random.Random(seed)
    layout = SequenceLayout([draw.choice([1, 2, 5, 40, 64, 100, 128, 191]) for _ in range(draw.randint(1, 12))])
    inputs = make_inputs(layout.total, dims=(60, 68), seed=seed)
    assert_close(
        with_gradients(gated_delta_rule, inputs, layout=layout),
        with_gradients(transformers_stream(transformers_rule, layout), inputs),
        1e-5,
    )


@pytest.mark.parametrize(("decay", "limit"), [(0.01, 1e-5), (1.0, 1e-5), (60.0, 1e-4), (1e4, 1e-4)])
def test_strong_decay_keeps_its_precision(decay, limit):
    """Sums of log_decay in the thousands cost no precision against the token-by-token rule."""
    layout = SequenceLayout(AWKWARD)
    inputs = make_inputs(layout.total, decay=decay)
    assert_close(
        with_gradients(gated_delta_rule, inputs, layout=layout),
        with_gradients(gated_delta_rule_reference, inputs, layout=layout),
        limit,
    )


def test_the_strongest_decay_stays_finite():
    """A log_decay of -1e4 everywhere gives finite numbers, and those of the token-by-token rule."""
    layout = SequenceLayout([130, 3])
    inputs = make_inputs(layout.total)
    inputs[3] = torch.full_like(inputs[3], -1e4).requires_grad_()
    got = with_gradients(gated_delta_rule, inputs, layout=layout)
    expected = with_gradients(gated_delta_rule_reference, inputs, layout=layout)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_zero_beta_is_exact():
    """Where beta is 0 everywhere its gradient is still that of the token-by-token rule."""
    layout = SequenceLayout([70, 5])
    inputs = make_inputs(layout.total)
    inputs[4] = torch.zeros_like(inputs[4]).requires_grad_()
    initial = torch.randn(2, 4, 32, 48, generator=torch.Generator().manual_seed(2))
    got = with_gradients(gated_delta_rule, inputs, layout=layout, initial_state=initial)
    expected = with_gradients(gated_delta_rule_reference, inputs, layout=layout, initial_state=initial)
    assert expected[5].norm() > 1
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("lengths", [AWKWARD, [64, 64], [1, 1, 1], [1, 65, 200]])
def test_initial_and_final_states_carry_gradients(lengths):
    """States go in and come out for each document in its place, and gradients flow through both."""
    layout = SequenceLayout(lengths)
    inputs = make_inputs(layout.total)
    inputs.append(
        torch.randn(len(lengths), 4, 32, 48, generator=torch.Generator().manual_seed(3)).requires_grad_(),
    )

    def run(rule):
        output, state = rule(*inputs[:5], layout=layout, initial_state=inputs[5], return_state=True)
        gradients = torch.autograd.grad((output, state), inputs, (weights_like(output), weights_like(state, 4)))
        return [output.detach(), state.detach(), *gradients]

    for got, expected in zip(run(gated_delta_rule), run(gated_delta_rule_reference), strict=True):
        assert relative(got, expected) < 1e-5


def test_a_document_in_two_halves_equals_the_whole():
    """The state after 70 tokens, handed to the other 30, goes on as if there had been no cut."""
    inputs = [x.detach() for x in make_inputs(100)]
    whole, last = gated_delta_rule(*inputs, layout=SequenceLayout([100]), return_state=True)
    first, rest = [x[:70] for x in inputs], [x[70:] for x in inputs]
    head, state = gated_delta_rule(*first, layout=SequenceLayout([70]), return_state=True)
    tail, end = gated_delta_rule(*rest, layout=SequenceLayout([30]), initial_state=state, return_state=True)
    torch.testing.assert_close(torch.cat([head, tail]), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-6)


def test_another_document_changes_not_a_bit():
    """With one document's inputs and output gradients replaced, all others keep every bit of theirs."""
    layout = SequenceLayout([130, 3, 64, 1, 65])
    inputs = make_inputs(layout.total, decay=0.02)
    weights = weights_like(inputs[2])

    def run(tensors, output_weights):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        output = gated_delta_rule(*leaves, layout=layout)
        return [output.detach(), *torch.autograd.grad(output, leaves, output_weights)]

    before = run(inputs, weights)
    for start, stop in zip(layout.starts, layout.starts[1:], strict=False):
        other = make_inputs(layout.total, decay=2.0, seed=9)
        changed = [torch.cat([x[:start], y[start:stop], x[stop:]]) for x, y in zip(inputs, other, strict=True)]
        other_weights = weights.clone()
        other_weights[start:stop] = -3
        after = run(changed, other_weights)
        assert not torch.equal(after[0][start:stop], before[0][start:stop])
        for got, expected in zip(after, before, strict=True):
            assert torch.equal(got[:start], expected[:start])
            assert torch.equal(got[stop:], expected[stop:])


def test_not_a_number_stays_in_its_document():
    """A document full of NaN leaves its neighbours finite."""
    layout = SequenceLayout([65, 3, 70])
    inputs = [x.detach() for x in make_inputs(layout.total)]
    inputs[2][65:68] = float("nan")
    output = gated_delta_rule(*inputs, layout=layout)
    assert output[65:68].isnan().all()
    assert output[:65].isfinite().all()
    assert output[68:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    """16-bit inputs give the float32 result of the same numbers, rounded, and gradients in their own dtypes."""
    layout = SequenceLayout(AWKWARD)
    inputs = make_inputs(layout.total, dtype=dtype)
    got = with_gradients(gated_delta_rule, inputs, layout=layout)
    singles = [x.detach().float().requires_grad_() for x in inputs]
    expected = with_gradients(gated_delta_rule_reference, singles, layout=layout)
    assert all(x.dtype == dtype for x in got)
    assert_close(got, expected, 1e-2)


def test_mixed_dtypes_keep_their_gradients_dtypes():
    """Each gradient has the dtype of its input, and the output that of value."""
    layout = SequenceLayout([70])
    inputs = make_inputs(70, dtype=torch.bfloat16)
    inputs[3] = inputs[3].detach().float().requires_grad_()
    output, *gradients = with_gradients(gated_delta_rule, inputs, layout=layout)
    assert output.dtype == torch.bfloat16
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]


@pytest.mark.parametrize("lengths", [[70, 3], [1, 1, 1]])
def test_autocast_does_not_round_inside(lengths):
    """Under autocast the rule gives the same bits as without it, in chunks and in a single step."""
    layout = SequenceLayout(lengths)
    inputs = make_inputs(layout.total)
    expected = gated_delta_rule(*inputs, layout=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gated_delta_rule(*inputs, layout=layout)
    assert torch.equal(got, expected)


def test_gradients_are_derivatives():
    """In float64 the backward pass agrees with finite differences, states included."""
    layout = SequenceLayout([66, 1, 3])
    inputs = make_inputs(layout.total, heads=(1, 2), dims=(3, 2), dtype=torch.float64)
    inputs.append(torch.randn(3, 2, 3, 2, dtype=torch.float64, requires_grad=True))

    def rule(*tensors):
        return gated_delta_rule(*tensors[:5], layout=layout, initial_state=tensors[5], return_state=True)

    assert torch.autograd.gradcheck(rule, inputs, fast_mode=True)


def test_backward_keeps_no_more_than_inputs_states_writes_and_inverse():
    """Saved for backward: the inputs, one state a chunk and value head, the writes and the inverse."""
    tokens, (K, V), D = 512, (2, 4), 64
    inputs = make_inputs(tokens, heads=(K, V), dims=(D, D))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_delta_rule(*inputs, layout=SequenceLayout([tokens]))
    chunks = tokens // 64
    most = 4 * (2 * tokens * K * D + tokens * V * (D + 2) + chunks * V * (D * D + 64 * D + 64 * 64))
    assert sum(saved.values()) <= most


def test_it_works_under_activation_checkpointing():
    """Recomputed in the backward pass, it gives the same bits."""
    layout = SequenceLayout([130, 3])
    inputs = make_inputs(layout.total)

    def checkpointed(*tensors):
        return checkpoint(lambda *leaves: gated_delta_rule(*leaves, layout=layout), *tensors, use_reentrant=False)

    got = with_gradients(checkpointed, inputs)
    expected = with_gradients(gated_delta_rule, inputs, layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 8, 20, 10**6])
@pytest.mark.parametrize("with_states", [False, True])
def test_the_size_of_groups_does_not_matter(monkeypatch, rows, with_states):
    """Groups of one chunk, of some and of all chunks give the token-by-token output and gradients."""
    monkeypatch.setattr(module, "GROUP_ROWS", rows)
    layout = SequenceLayout([130, 1, 65, 200, 3, 64, 128])
    inputs = make_inputs(layout.total)
    arguments = {"layout": layout}
    if with_states:
        arguments["initial_state"] = torch.randn(7, 4, 32, 48, generator=torch.Generator().manual_seed(3))
    assert_close(
        with_gradients(gated_delta_rule, inputs, **arguments),
        with_gradients(gated_delta_rule_reference, inputs, **arguments),
        1e-5,
    )


def test_a_loss_of_the_final_state_alone_has_gradients():
    """Where nothing but the final state is used, inputs still get their gradients from it."""
    layout = SequenceLayout([70, 5])
    inputs = make_inputs(layout.total, decay=0.05)
    gradients = []
    for rule in (gated_delta_rule, gated_delta_rule_reference):
        _, state = rule(*inputs, layout=layout, return_state=True)
        gradients.append(torch.autograd.grad(state, inputs[1:], weights_like(state)))
    for got, expected in zip(*gradients, strict=True):
        assert relative(got, expected) < 1e-5


def test_documents_with_most_chunks_come_first():
    """A step holds the next chunk of every document that has one, and documents drop out from the end."""
    layout = SequenceLayout([3, 130, 65])
    plan = ChunkPlan.of(layout, 100, (2,))
    assert plan.order.tolist() == [1, 2, 0]
    (group,) = plan.groups
    assert group.spans == (
        Span(chunk=0, document=0, documents=3, going_on=2, next=3, enters=True),
        Span(3, 0, documents=2, going_on=1, next=5, enters=False),
        Span(5, 0, documents=1, going_on=0, next=None, enters=False),
    )
    assert group.fresh == 3
    assert group.tokens[0, 0, :3].tolist() == [3, 4, 5]
    assert ChunkPlan.of(layout, 100, (2,)) is plan


def test_a_wide_step_is_split_over_groups():
    """More documents than a group holds are taken in several spans of the same step."""
    plan = ChunkPlan.of(SequenceLayout([65, 1, 1]), 2, (2,))
    spans = [group.spans for group in plan.groups]
    assert spans == [
        (Span(0, 0, 2, going_on=1, next=None, enters=True),),
        (Span(0, 2, 1, going_on=0, next=None, enters=True), Span(1, 0, 1, going_on=0, next=None, enters=True)),
    ]
    assert [group.fresh for group in plan.groups] == [2, 1]


@pytest.mark.parametrize("lengths", [[3, 70], [192], [128, 64], [130]])
def test_chunks_pad_with_zeros_and_come_back(lengths):
    """Gathering leaves zeros after a document's end, and scattering undoes it."""
    layout = SequenceLayout(lengths)
    stream = torch.randn(layout.total, 2, 5)
    back = torch.full_like(stream, float("nan"))
    held = 0
    for group in ChunkPlan.of(layout, 2, (2,)).groups:
        chunks = group.gather(stream, torch.float32, zeroed=True)
        assert chunks.shape == (group.chunks, 2, 64, 5)
        held += chunks.ne(0).sum()
        group.scatter(chunks, back)
    assert held == stream.numel()
    assert torch.equal(back, stream)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda x: x[:, :1]),
        ("key", lambda x: x[0]),
        ("value", lambda x: x[:, :3]),
        ("value", lambda x: x[:-1]),
        ("log_decay", lambda x: x[:, :1]),
        ("beta", lambda x: x[1:]),
        ("beta", lambda x: x.long()),
        ("initial_state", lambda x: x[:1]),
        ("query", lambda x: x.to("meta")),
    ],
)
@pytest.mark.parametrize("rule", [gated_delta_rule, gated_delta_rule_reference])
def test_a_wrong_argument_is_named(rule, name, change):
    """A wrong shape, dtype, device or number of heads is refused by the argument's name."""
    layout = SequenceLayout([5, 3])
    names = ("query", "key", "value", "log_decay", "beta")
    arguments = dict(zip(names, make_inputs(8), strict=True)) | {"initial_state": torch.zeros(2, 4, 32, 48)}
    if name == "value":
        arguments |= {other: arguments[other][:, :3] for other in ("log_decay", "beta")}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: "):
        rule(**arguments, layout=layout)

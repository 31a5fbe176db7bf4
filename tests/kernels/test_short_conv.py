import pytest
import torch

from qwenft.kernels.layout import SequenceLayout
from qwenft.kernels.reference import short_conv_reference
from qwenft.kernels.short_conv import short_conv

LAYOUTS = ([1, 3, 63, 64, 65, 130], [200], [1], [2, 1, 3, 1, 1], [5, 300])


def make_inputs(layout, *, channels=24, width=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(layout.total, channels, generator=generator)
    weight = torch.randn(channels, width, generator=generator)
    bias = torch.randn(channels, generator=generator)
    state = torch.randn(len(layout), width - 1, channels, generator=generator)
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias, state)]


def weights_like(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)


def with_gradients(conv, tensors, **arguments):
    """Output, final state, and the gradients of x, weight, and of bias and state where they are given."""
    x, weight, bias, state = tensors
    output, last = conv(x, weight, bias, initial_state=state, return_state=True, **arguments)
    given = [tensor for tensor in tensors if tensor is not None]
    gradients = torch.autograd.grad((output, last), given, (weights_like(output), weights_like(last)))
    return [output.detach(), last.detach(), *gradients]


@pytest.mark.parametrize("lengths", LAYOUTS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(("with_bias", "with_state"), [(False, False), (True, False), (False, True), (True, True)])
def test_it_equals_the_reference_document_by_document(lengths, activation, with_bias, with_state):
    """Output, final state and all gradients are those of the sums written out, one document at a time."""
    layout = SequenceLayout(lengths)
    x, weight, bias, state = make_inputs(layout)
    tensors = (x, weight, bias if with_bias else None, state if with_state else None)
    got = with_gradients(short_conv, tensors, layout=layout, activation=activation)
    expected = with_gradients(short_conv_reference, tensors, layout=layout, activation=activation)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def conv1d_one_by_one(x, weight, bias, *, layout, initial_state, **_):
    """Each document goes through the convolution of torch, one after the other."""
    inputs = [torch.cat([state, rows]) for state, rows in zip(initial_state, x.split(layout.lengths), strict=True)]
    outputs = [torch.conv1d(rows.T[None], weight[:, None], bias, groups=len(weight))[0].T for rows in inputs]
    last = torch.stack([rows[len(rows) - weight.shape[1] + 1 :] for rows in inputs])
    return torch.nn.functional.silu(torch.cat(outputs)), last


@pytest.mark.parametrize("conv", [short_conv, short_conv_reference])
@pytest.mark.parametrize("lengths", LAYOUTS)
def test_it_equals_conv1d_of_torch(conv, lengths):
    """Output, final state and all gradients are those of torch.conv1d on each document, of the reference too."""
    layout = SequenceLayout(lengths)
    tensors = make_inputs(layout)
    got = with_gradients(conv, tensors, layout=layout)
    expected = with_gradients(conv1d_one_by_one, tensors, layout=layout)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_any_number_of_taps(width):
    """One tap, and more taps than a document has tokens, are fine."""
    layout = SequenceLayout([3, 1, 9])
    tensors = make_inputs(layout, width=width)
    got = with_gradients(short_conv, tensors, layout=layout)
    expected = with_gradients(short_conv_reference, tensors, layout=layout)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_another_document_changes_not_a_bit():
    """With one document replaced, output and gradients of all others keep every bit."""
    layout = SequenceLayout([5, 1, 70, 2, 3])
    x, weight, bias, _ = (tensor.detach() for tensor in make_inputs(layout))
    weights = weights_like(x)

    def run(inputs, output_weights):
        leaf = inputs.clone().requires_grad_()
        output = short_conv(leaf, weight, bias, layout=layout)
        return [output.detach(), *torch.autograd.grad(output, leaf, output_weights)]

    before = run(x, weights)
    for start, stop in zip(layout.starts, layout.starts[1:], strict=False):
        changed, other_weights = x.clone(), weights.clone()
        changed[start:stop] = float("nan")
        other_weights[start:stop] = -3
        for got, expected in zip(run(changed, other_weights), before, strict=True):
            assert torch.equal(got[:start], expected[:start])
            assert torch.equal(got[stop:], expected[stop:])


def test_a_document_in_two_halves_equals_the_whole():
    """The state after a first part, handed to the rest, goes on as if there had been no cut."""
    layout = SequenceLayout([20])
    x, weight, bias, _ = (tensor.detach() for tensor in make_inputs(layout))
    whole, last = short_conv(x, weight, bias, layout=layout, return_state=True)
    head, state = short_conv(x[:2], weight, bias, layout=SequenceLayout([2]), return_state=True)
    rest = SequenceLayout([18])
    tail, end = short_conv(x[2:], weight, bias, layout=rest, initial_state=state, return_state=True)
    torch.testing.assert_close(torch.cat([head, tail]), whole)
    assert torch.equal(end, last)


def test_sixteen_bits_are_computed_in_float32():
    """bfloat16 inputs give the float32 result of the same numbers, rounded once, and bfloat16 gradients."""
    layout = SequenceLayout([5, 70])
    tensors = make_inputs(layout, dtype=torch.bfloat16)
    got = with_gradients(short_conv, tensors, layout=layout)
    singles = [tensor.detach().float().requires_grad_() for tensor in tensors]
    exact = short_conv_reference(*singles[:3], layout=layout, initial_state=singles[3])
    assert torch.equal(got[0], exact.bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in got)


def test_autocast_rounds_nothing():
    """Under autocast to 16 bits output and gradients are those without it."""
    layout = SequenceLayout([5, 70])
    tensors = make_inputs(layout)
    expected = with_gradients(short_conv, tensors, layout=layout)
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(short_conv, tensors, layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_stream_may_be_a_view():
    """A stream that is a part of wider rows gives what a copy of it gives."""
    layout = SequenceLayout([5, 70])
    x, weight, bias, state = make_inputs(layout)
    wide = torch.cat([x, x], 1).detach().requires_grad_()
    got = with_gradients(short_conv, (wide[:, 24:], weight, bias, state), layout=layout)
    expected = with_gradients(short_conv, (x, weight, bias, state), layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_weights_may_be_stored_smaller_than_the_inputs():
    """bfloat16 weights and float32 inputs are computed in float32, with the weights' gradient in bfloat16."""
    layout = SequenceLayout([5, 70])
    x, weight, bias, _ = make_inputs(layout)
    small = weight.detach().bfloat16().requires_grad_()
    output = short_conv(x, small, bias, layout=layout)
    assert torch.equal(output, short_conv(x, small.float(), bias, layout=layout))
    assert torch.autograd.grad(output.sum(), small)[0].dtype == torch.bfloat16


def test_gradients_are_derivatives():
    """In float64 the backward pass agrees with finite differences."""
    layout = SequenceLayout([2, 5, 1])
    tensors = make_inputs(layout, channels=3, dtype=torch.float64)

    def conv(x, weight, bias, state):
        return short_conv(x, weight, bias, layout=layout, initial_state=state, return_state=True)

    assert torch.autograd.gradcheck(conv, tensors)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x: x[:-1]),
        ("weight", lambda x: x[0]),
        ("weight", lambda x: x.long()),
        ("bias", lambda x: x[:3]),
        ("initial_state", lambda x: x[:, :1]),
        ("x", lambda x: x.to("meta")),
        ("activation", lambda _: "gelu"),
    ],
)
@pytest.mark.parametrize("conv", [short_conv, short_conv_reference])
def test_a_wrong_argument_is_named(conv, name, change):
    """A wrong shape, dtype, device or activation is refused by the argument's name."""
    layout = SequenceLayout([5, 3])
    names = ("x", "weight", "bias", "initial_state")
    arguments = dict(zip(names, make_inputs(layout), strict=True)) | {"activation": "silu"}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: "):
        conv(**arguments, layout=layout)

import pytest
import torch

from qwenft.kernels.attention import eager_attention, sdpa_attention
from qwenft.kernels.layout import SequenceLayout


def make_inputs(layout, *, heads=(4, 2), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (sum(layout.query_lengths), heads[0], 16),
        (layout.total, heads[1], 16),
        (layout.total, heads[1], 16),
    ]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("attend", [eager_attention, sdpa_attention])
def test_it_is_the_formula(attend):
    """Token by token and head by head, the output is the softmax-weighted mean of the values seen so far."""
    layout = SequenceLayout([3, 5])
    query, key, value = make_inputs(layout)
    output = attend(query, key, value, layout=layout, scale=0.3)
    for token in range(8):
        start = 0 if token < 3 else 3
        for head in range(4):
            scores = key[start : token + 1, head // 2] @ query[token, head] * 0.3
            expected = scores.softmax(0) @ value[start : token + 1, head // 2]
            torch.testing.assert_close(output[token, head], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("asked", [[5, 5, 1, 9], [1, 1, 1, 1], [2, 5, 1, 4]])
def test_the_fused_kernel_equals_the_formula(causal, asked):
    """Fewer queries than keys stand at the document's end, in the fused kernel as in the formula."""
    layout = SequenceLayout([5, 5, 1, 9], query_lengths=asked)
    inputs = make_inputs(layout)
    results = []
    for attend in (sdpa_attention, eager_attention):
        output = attend(*inputs, layout=layout, scale=0.25, causal=causal)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("attend", [eager_attention, sdpa_attention])
def test_last_tokens_get_what_they_get_in_training(attend):
    """A document's last tokens alone get the rows that all tokens together would give them."""
    inputs = make_inputs(SequenceLayout([6, 4]))
    whole = attend(*inputs, layout=SequenceLayout([6, 4]), scale=0.25)
    query = torch.cat([inputs[0][4:6], inputs[0][9:10]])
    last = attend(query, *inputs[1:], layout=SequenceLayout([6, 4], query_lengths=[2, 1]), scale=0.25)
    torch.testing.assert_close(last, torch.cat([whole[4:6], whole[9:10]]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda x: x[:-1]),
        ("query", lambda x: x[:, :3]),
        ("query", lambda x: x.half()),
        ("key", lambda x: x[0]),
        ("key", lambda x: x[:-1]),
        ("value", lambda x: x[..., :3]),
        ("value", lambda x: x.long()),
    ],
)
@pytest.mark.parametrize("attend", [eager_attention, sdpa_attention])
def test_a_wrong_argument_is_named(attend, name, change):
    """A wrong shape, dtype or number of heads is refused by the argument's name."""
    layout = SequenceLayout([5, 3])
    arguments = dict(zip(("query", "key", "value"), make_inputs(layout), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: "):
        attend(**arguments, layout=layout, scale=1.0)

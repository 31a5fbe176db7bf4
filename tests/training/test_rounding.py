import bitsandbytes
import pytest
import torch

from qwenft.training import rounding
from qwenft.training.rounding import StochasticRounding, round_stochastically


def bits(values):
    return values.view(torch.int16).to(torch.int32) & 0xFFFF


@pytest.mark.parametrize("value", [1.0, -1.0, 3.1415926, -2.7182818, 1e-20, -1e30, 0.0, 1e-41])
def test_a_value_goes_to_one_of_its_two_neighbours(value):
    """The result is the value cut to 16 bits or the next one away from zero, and the value itself where it fits."""
    values = torch.full((4096,), value)
    torch.manual_seed(0)
    rounded = round_stochastically(values)
    cut = (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    above = bits(cut) + 1
    assert rounded.dtype == torch.bfloat16
    assert set(bits(rounded).tolist()) <= {bits(cut)[0].item(), above[0].item()}
    if cut[0].float() == value:
        assert torch.equal(rounded, cut)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
def test_the_nearer_neighbour_is_the_likelier(fraction):
    """A value a quarter of the way to the next one goes there a quarter of the time, so that the mean is right."""
    low, step = 0.75, 2.0**-8
    values = torch.full((200_000,), low + fraction * step)
    torch.manual_seed(1)
    share = (round_stochastically(values).float() > low).float().mean().item()
    assert share == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / 200_000) ** 0.5)


def test_the_mean_is_unbiased_for_all_magnitudes():
    """Over many draws, values of any size and sign keep their mean; rounding to the nearest does not."""
    torch.manual_seed(2)
    values = torch.randn(1000) * 10.0 ** torch.linspace(-6, 6, 1000)
    mean = torch.stack([round_stochastically(values).double() for _ in range(4000)]).mean(dim=0)
    deviation = ((mean - values.double()) / values.double()).abs()
    nearest = ((values.bfloat16().double() - values.double()) / values.double()).abs()
    assert deviation.mean() < 5e-5
    assert nearest.mean() > 1e-3


def test_chance_is_torchs_own():
    """The same seed rounds alike, another one otherwise."""
    values = torch.randn(1000)
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(round_stochastically(values))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def pair(size=(64, 80), count=5):
    """bfloat16 parameters, and float32 ones of equal values."""
    torch.manual_seed(0)
    halves = [torch.nn.Parameter(torch.randn(size).bfloat16()) for _ in range(count)]
    return halves, [torch.nn.Parameter(half.detach().float()) for half in halves]


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
}


@pytest.mark.parametrize("at_once", [2**17, 2 * 512 * 600, 2**26])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_update_is_the_float32_one_rounded(name, at_once, monkeypatch):
    """A step moves a weight to a neighbour of where the plain optimizer moves it in float32, with the same state.

    So it does where several weights are updated together, and where one is updated in parts.
    """
    monkeypatch.setattr(rounding, "_AT_ONCE", at_once)
    halves, wholes = pair((512, 600))
    options = [{"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.0}]
    rounded, plain = (
        OPTIMIZERS[name]([{**options[0], "params": ps[:2]}, {**options[1], "params": ps[2:]}])
        for ps in (halves, wholes)
    )
    rounded = StochasticRounding(rounded)
    for _ in range(3):
        for half, whole in zip(halves, wholes, strict=True):
            gradient = torch.randn(half.shape).bfloat16()
            half.grad, whole.grad = gradient, gradient.float()
            whole.data.copy_(half.detach().float())
        storages = [half.data_ptr() for half in halves]
        rounded.step()
        plain.step()
        for half, whole, storage in zip(halves, wholes, storages, strict=True):
            assert half.dtype == torch.bfloat16
            assert half.grad is None
            assert half.data_ptr() == storage
            cut = (whole.detach().view(torch.int32) >> 16).to(torch.int16)
            assert ((bits(half.detach()) - (cut.to(torch.int32) & 0xFFFF)).unique().tolist()) in ([0, 1], [0], [1])
            for key, value in plain.state[whole].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(rounded.state[half][key], value), key


def test_small_updates_are_kept_on_average():
    """10,000 weights of 1 that shrink by 1e-4 a step end near 0.9 after 1,000; rounded to the nearest they stay 1."""
    ends = []
    for wrap in (StochasticRounding, lambda optimizer: optimizer):
        weights = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
        optimizer = wrap(torch.optim.SGD([weights], lr=1e-4))
        torch.manual_seed(0)
        for _ in range(1000):
            weights.grad = torch.ones_like(weights)
            optimizer.step()
        ends.append(weights.detach().float().mean().item())
    assert ends[0] == pytest.approx(0.9, abs=1e-3)
    assert ends[1] == 1.0


def test_float32_parameters_are_left_to_the_optimizer():
    """Beside bfloat16 ones, float32 parameters take the plain step to the bit, and keep their gradients."""
    halves, wholes = pair(count=1)
    twin = torch.nn.Parameter(wholes[0].detach().clone())
    mixed = StochasticRounding(torch.optim.AdamW([*halves, *wholes], fused=True))
    plain = torch.optim.AdamW([twin], fused=True)
    for parameter in (*halves, *wholes, twin):
        parameter.grad = torch.full_like(parameter, 0.5)
    mixed.step()
    plain.step()
    assert torch.equal(wholes[0], twin)
    assert wholes[0].grad is not None


def test_a_schedule_and_hooks_see_one_optimizer():
    """A scheduler sets the rate that the step uses, and a hook is called once a step, whatever the buckets."""
    halves, _ = pair(count=3)
    optimizer = StochasticRounding(torch.optim.SGD(halves, lr=1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    before = halves[0].detach().float()
    for expected in (1.0, 0.5):
        start = halves[0].detach().float()
        for half in halves:
            half.grad = torch.ones_like(half)
        optimizer.step()
        schedule.step()
        assert (start - halves[0].detach().float()).mean().item() == pytest.approx(expected, rel=1e-2)
    assert len(calls) == 2
    assert not torch.equal(before, halves[0].detach().float())

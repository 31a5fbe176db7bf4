import json
import math

import bitsandbytes
import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

from qwenft.specs.training import TrainingSpec
from qwenft.training.optim import (
    build_optimizer,
    build_schedule,
    learning_rate_factor,
    optimizer_state,
    restore_optimizer,
)
from qwenft.training.rounding import StochasticRounding


def factors(steps, **options):
    training = TrainingSpec(**options)
    return [learning_rate_factor(step, training=training, steps=steps) for step in range(steps)]


def run_schedule(optimizer, schedule, steps):
    """The learning rate that each step takes."""
    taken = []
    for _ in range(steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return taken


def role_of(name):
    """The role of the test's own parameters: their first word."""
    return name.partition(".")[0]


def some_parameter():
    return torch.nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("cosine", transformers.get_cosine_schedule_with_warmup),
        ("linear", transformers.get_linear_schedule_with_warmup),
    ],
)
def test_the_course_is_that_of_transformers_one_step_on(schedule, theirs, warmup_ratio, steps):
    """The first step of transformers has a rate of 0 and does nothing; without it, its course is ours."""
    warmup = math.ceil(warmup_ratio * steps)
    optimizer = torch.optim.SGD([some_parameter()], lr=1.0)
    expected = run_schedule(optimizer, theirs(optimizer, warmup + 1, steps + 1), steps + 1)
    assert expected[0] == 0.0
    assert factors(steps, schedule=schedule, warmup_ratio=warmup_ratio) == pytest.approx(expected[1:])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.9])
def test_every_step_moves_and_none_above_the_peak(schedule, warmup_ratio):
    """Each step has a rate above 0, the peak is reached once the warmup ends, and a decay ends near 0."""
    values = factors(50, schedule=schedule, warmup_ratio=warmup_ratio)
    warmup = math.ceil(warmup_ratio * 50)
    assert all(0 < value <= 1 for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup] == 1.0
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if schedule == "constant":
        assert set(values[warmup:]) == {1.0}
    else:
        assert values[-1] < 1.01 / (50 - warmup)


def test_behind_the_last_step_the_rate_stays_at_the_end():
    """A step beyond the planned ones does not climb again."""
    training = TrainingSpec(schedule="cosine")
    assert learning_rate_factor(80, training=training, steps=50) == 0.0


def test_the_schedule_sets_the_rate_of_every_group():
    """The optimizer's groups take the factor times the peak, step by step."""
    training = TrainingSpec(learning_rate=3e-3, warmup_ratio=0.2, weight_decay=0.1)
    parameters = [("a.weight", some_parameter()), ("a.bias", torch.nn.Parameter(torch.ones(2)))]
    optimizer = build_optimizer(parameters, training, role_of)
    schedule = build_schedule(optimizer, training, steps=10)
    taken = []
    for _ in range(10):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert taken == pytest.approx([3e-3 * factor for factor in factors(10, warmup_ratio=0.2)])


def test_only_matrices_decay():
    """Norms, biases, A_log and dt_bias are spared from weight decay, and frozen parameters are left out."""
    names = {
        "mlp.up_proj.weight": torch.ones(2, 2),
        "conv1d.weight": torch.ones(4, 1, 3),
        "q_proj.lora_A.default.weight": torch.ones(1, 2),
        "norm.weight": torch.ones(2),
        "q_proj.bias": torch.ones(2),
        "linear_attn.A_log": torch.ones(2, 1),
        "linear_attn.dt_bias": torch.ones(2, 1),
        "frozen.weight": torch.ones(2, 2),
    }
    parameters = {name: torch.nn.Parameter(value) for name, value in names.items()}
    parameters["frozen.weight"].requires_grad_(False)
    optimizer = build_optimizer(parameters.items(), TrainingSpec(weight_decay=0.1, learning_rate=1e-3), role_of)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay.get(id(parameter)) for name, parameter in parameters.items()} == {
        "mlp.up_proj.weight": 0.1,
        "conv1d.weight": 0.1,
        "q_proj.lora_A.default.weight": 0.1,
        "norm.weight": 0.0,
        "q_proj.bias": 0.0,
        "linear_attn.A_log": 0.0,
        "linear_attn.dt_bias": 0.0,
        "frozen.weight": None,
    }
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_a_group_without_parameters_is_left_out():
    """Where nothing is spared, or all is, there is one group."""
    matrix = build_optimizer([("a.weight", some_parameter())], TrainingSpec(), role_of)
    vector = build_optimizer(
        [("a.bias", torch.nn.Parameter(torch.ones(2)))], TrainingSpec(weight_decay=0.5), role_of
    )
    assert len(matrix.param_groups) == len(vector.param_groups) == 1
    assert vector.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("floor_ratio", [0.0, 0.1])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("decay_ratio", [None, 0.2, 0.5])
def test_warmup_stable_decay_is_that_of_transformers_one_step_on(decay_ratio, warmup_ratio, floor_ratio, steps):
    """Constant after the warmup, then 1 - sqrt down to the floor, as transformers' schedule of that kind."""
    warmup = math.ceil(warmup_ratio * steps)
    decay = min(math.ceil((decay_ratio or 0.1) * steps), steps - warmup)
    optimizer = torch.optim.SGD([some_parameter()], lr=1.0)
    theirs = transformers.get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup + 1,
        num_decay_steps=decay,
        num_training_steps=steps + 1,
        decay_type="1-sqrt",
        min_lr_ratio=floor_ratio,
    )
    expected = run_schedule(optimizer, theirs, steps + 1)[1:]
    if floor_ratio:  # theirs warms up from the floor, ours from 0
        expected[:warmup] = [(step + 1) / (warmup + 1) for step in range(warmup)]
    got = factors(
        steps,
        schedule="warmup_stable_decay",
        warmup_ratio=warmup_ratio,
        decay_ratio=decay_ratio,
        floor_ratio=floor_ratio,
    )
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1])
def test_the_floor_of_the_cosine_is_that_of_transformers(warmup_ratio, steps):
    """The cosine falls to the floor, on the course of transformers' schedule of that kind."""
    warmup = math.ceil(warmup_ratio * steps)
    optimizer = torch.optim.SGD([some_parameter()], lr=1.0)
    theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup + 1, steps + 1, min_lr_rate=0.1
    )
    expected = run_schedule(optimizer, theirs, steps + 1)[1:]
    assert factors(steps, warmup_ratio=warmup_ratio, floor_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup_stable_decay"])
def test_no_step_is_below_the_floor(schedule):
    """After the warmup every rate is at the floor or above, and the last is near it."""
    values = factors(200, schedule=schedule, floor_ratio=0.25)
    assert min(values[6:]) >= 0.25
    assert values[-1] < 0.25 + 0.75 * 0.06


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", torch.optim.AdamW),
        ("adamw_8bit", bitsandbytes.optim.AdamW8bit),
        ("paged_adamw", bitsandbytes.optim.PagedAdamW),
        ("paged_adamw_8bit", bitsandbytes.optim.PagedAdamW8bit),
        ("sgd", torch.optim.SGD),
    ],
)
def test_the_optimizer_is_the_one_that_is_named(name, cls):
    """Each name stands for a class of torch or bitsandbytes, which gets the recipe's numbers."""
    numbers = {"momentum": 0.8} if name == "sgd" else {"betas": (0.8, 0.95), "epsilon": 1e-6}
    training = TrainingSpec(optimizer=name, learning_rate=1e-3, weight_decay=0.1, **numbers)
    optimizer = build_optimizer([("mlp.weight", some_parameter())], training, role_of)
    (group,) = optimizer.param_groups
    assert type(optimizer) is cls
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    if name == "sgd":
        assert group["momentum"] == 0.8
    else:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_roles_have_rates_of_their_own():
    """Parameters of a role that is named take its peak, others the common one, and the schedule scales all."""
    training = TrainingSpec(learning_rate=1e-3, schedule="constant", warmup_ratio=0.5).with_learning_rate(
        embeddings=1e-5, mlp=2e-3
    )
    parameters = {f"{role}.weight": some_parameter() for role in ("embeddings", "mlp", "full_attention")}
    optimizer = build_optimizer(parameters.items(), training, role_of)
    build_schedule(optimizer, training, steps=2)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters.values()] == pytest.approx([5e-6, 1e-3, 5e-4])


def test_lora_plus_groups_are_those_of_peft():
    """B matrices learn at the ratio's multiple, A at the rate itself: peft's own LoRA+ makes the same groups."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0
    )
    ours = build_optimizer(
        model.named_parameters(), TrainingSpec(learning_rate=1e-3, lora_plus_ratio=16.0), role_of
    )
    rates = [{p: group["lr"] for group in o.param_groups for p in group["params"]} for o in (ours, theirs)]
    assert rates[0] == rates[1]
    assert set(rates[0].values()) == {1e-3, 16e-3}


def test_bfloat16_parameters_are_rounded_stochastically():
    """Where a trained parameter is bfloat16 the optimizer is wrapped, and where none is it is not."""
    half = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    mixed = build_optimizer([("mlp.a", half), ("mlp.b", some_parameter())], TrainingSpec(), role_of)
    assert isinstance(mixed, StochasticRounding)
    assert isinstance(mixed.optimizer, torch.optim.AdamW)
    assert not isinstance(
        build_optimizer([("mlp.b", some_parameter())], TrainingSpec(), role_of), StochasticRounding
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adamw_8bit"}])
def test_a_restored_optimizer_goes_on_to_the_bit(options, dtype):
    """With the state of another one, an optimizer takes the steps that the other would take."""
    training = TrainingSpec(**options)

    def made():
        torch.manual_seed(0)
        parameters = {
            f"mlp.{n}": torch.nn.Parameter(torch.randn(size).to(dtype)) for n, size in enumerate([(70, 70), (5,)])
        }
        return parameters, build_optimizer(parameters.items(), training, role_of)

    def step(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    (first, going), (second, restored) = made(), made()
    for seed in (1, 2):
        step(first, going, seed)
    tensors, numbers = optimizer_state(going, first)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    step(second, restored, 9)  # a state of its own, which must be replaced
    with torch.no_grad():
        for name, parameter in second.items():
            parameter.copy_(first[name])
    restore_optimizer(restored, second, {**saved, **numbers})
    for parameters, optimizer in ((first, going), (second, restored)):
        step(parameters, optimizer, 3)
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
    assert json.loads(json.dumps(numbers)) == numbers

import math

import pytest
import torch
import transformers

from qwenft.specs.training import TrainingSpec
from qwenft.training.optim import build_optimizer, build_schedule, learning_rate_factor


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

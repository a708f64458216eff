"""The optimizer: its parameter groups, and the learning rate of every step."""

import math

import pytest
import torch

from infctx.formats.weights import stored_names
from infctx.settings.optimizer import OptimizerSettings
from infctx.train.optimizer import learning_rate, make_optimizer, parameter_groups, set_learning_rate

from tiny_models import random_model

MATRICES = (".att.receptance.", ".att.key.", ".att.value.", ".att.gate.", ".att.output.", ".ffn.")


def settings(**changed):
    return OptimizerSettings(**({"steps": 110, "peak_lr": 1e-3, "warmup_steps": 10} | changed))


def official_rule(name):
    """Returns (learning rate scale, whether there is weight decay) of an official name (RWKV-LM src/model.py)."""
    if name.endswith(("_w1", "_w2")):
        return 1.0, False
    if "time_sta" in name:
        return 1.0, True
    if "time_decay" in name or name.endswith(".w0"):
        return 2.0, False
    if name in ("emb.weight", "head.weight"):
        return 1.0, True
    is_matrix = any(part in name for part in MATRICES) and name.endswith(".weight") and "ln_x" not in name
    return 1.0, is_matrix


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("with_state", [False, True])
def test_every_parameter_is_in_the_official_group_once(version, with_state):
    model = random_model(version, with_state=with_state)
    official = stored_names(model.sizes) | {"initial_wkv": "blocks.0.att.time_state"}
    parameters = dict(model.named_parameters())
    found = []
    for group in parameter_groups(model, weight_decay=0.25):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is parameters[name]
            scale, decays = official_rule(official[name])
            assert (group["lr_scale"], group["weight_decay"]) == (scale, 0.25 if decays else 0.0), name
            found.append(name)
    assert sorted(found) == sorted(parameters)
    kinds = {official_rule(official[name]) for name in found}
    assert kinds == {(1.0, True), (1.0, False), (2.0, False)}


def test_frozen_parameters_are_left_out():
    model = random_model(6, with_state=True).requires_grad_(False)
    model.initial_wkv.requires_grad_()
    groups = parameter_groups(model, weight_decay=0.25)
    assert [group["names"] for group in groups] == [["initial_wkv"]]
    assert groups[0]["weight_decay"] == 0.25


def test_one_step_moves_each_group_at_its_rate():
    model = random_model(6)
    optimizer = make_optimizer(model, settings(weight_decay=0.5, epsilon=1e-12))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    rate = set_learning_rate(optimizer, settings(), 10)
    optimizer.step()  # Adam's first step is as long as the rate
    official = stored_names(model.sizes)
    for name, parameter in model.named_parameters():
        scale, decays = official_rule(official[name])
        wanted = before[name] * (1 - rate * 0.5 * decays) - scale * rate
        assert torch.allclose(parameter, wanted, rtol=1e-6, atol=1e-8), name


def test_settings_reach_adam():
    optimizer = make_optimizer(random_model(5), settings(beta1=0.8, beta2=0.95, epsilon=1e-18))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.95)
        assert group["eps"] == 1e-18


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_is_linear_from_one_percent(schedule):
    for step in range(1, 11):
        assert learning_rate(settings(schedule=schedule), step) == pytest.approx(1e-3 * (0.01 + 0.99 * step / 10))
    assert learning_rate(settings(schedule=schedule), 10) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", {11: 0.2 + 0.4 * (1 + math.cos(math.pi / 100)), 35: 0.2 + 0.4 * (1 + 0.5**0.5), 60: 0.6, 110: 0.2}),
        ("linear", {11: 0.992, 35: 0.8, 60: 0.6, 110: 0.2}),
        ("constant", {11: 1.0, 35: 1.0, 60: 1.0, 110: 1.0}),
    ],
)
def test_schedules(schedule, rates):
    final = {} if schedule == "constant" else {"final_lr": 2e-4}
    for step, rate in rates.items():
        assert learning_rate(settings(schedule=schedule, **final), step) == pytest.approx(1e-3 * rate, rel=1e-12)


def test_the_last_rate_is_a_tenth_unless_given():
    assert learning_rate(settings(), 110) == pytest.approx(1e-4)
    assert learning_rate(settings(final_lr=0.0), 110) == pytest.approx(0, abs=1e-12)
    assert learning_rate(settings(warmup_steps=0, schedule="linear", final_lr=0.0), 1) == pytest.approx(
        1e-3 * 109 / 110
    )


def test_rates_are_set_in_every_group():
    optimizer = make_optimizer(random_model(6), settings())
    assert set_learning_rate(optimizer, settings(), 5) == pytest.approx(1e-3 * 0.505)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * 0.505 * group["lr_scale"])
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 2.0}

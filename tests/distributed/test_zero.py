"""Every strategy trains the same weights: real ranks against one process, with targets spread unevenly over lanes."""

import functools

import pytest
import torch

from infctx.conventions import MASKED
from infctx.settings.load import load_config
from infctx.train.loop import gradients_of_step, train_steps
from infctx.train.start import open_lanes

from ranks import bytes_received, run_ranks
from runs import open_run, write_config, write_store

STRATEGIES = {
    "ddp": {},
    "zero1": {},
    "zero2": {},
    "zero3": {},
    "zero2+offload": {"offload_optimizer": True},
    "zero3+offload": {"offload_optimizer": True, "offload_parameters": True},
}
BY_SEGMENT = ("zero2", "zero3", "zero3+offload")
STEPS = 5


class Masked:
    """Lanes that lose all their targets in some windows: lanes of whole ranks, of half a rank, and once all of them."""

    def __init__(self, lanes, all_lanes):
        self.lanes, self.all_lanes, self.windows = lanes, all_lanes, 0

    def __next__(self):
        (window, position), (whole, _) = next(self.lanes), next(self.all_lanes)
        lost = [(2, 3), (), (0, 1, 3), (0, 1, 2, 3), (1,)][self.windows % 5]
        self.windows += 1
        for row, lane in enumerate(self.lanes.lanes):
            if lane in lost:
                window.targets[row] = MASKED
        whole.targets[list(lost)] = MASKED
        window.num_targets = int((whole.targets != MASKED).sum())
        return window, position


def trained(config_path, overrides):
    """Returns this rank's sum of losses, whole weights and carried states after the steps of a run."""
    config = load_config(config_path, overrides)
    run = open_run(config)
    lanes = tuple(run.lanes.lanes)
    run.lanes = Masked(run.lanes, open_lanes(config, run.model.sizes.vocab_size))
    received, begin_step = [], run.engine.begin_step

    def counting(*step):
        received.append(bytes_received())
        begin_step(*step)

    run.engine.begin_step = counting
    assert train_steps(run)
    weights = {name: run.engine.whole(parameter).clone() for name, parameter in run.model.named_parameters()}
    return {
        "weights": weights,
        "carry": tuple(run.carry),
        "lanes": lanes,
        "step_bytes": (received[-1] - received[0]) / (STEPS - 1),
    }


def trained_on_ranks(config_path, cases):
    return {name: trained(config_path, overrides) for name, overrides in cases.items()}


def groups_without_moments(config_path, overrides):
    """Returns whether DeepSpeed can find each parameter group's moments by itself after a step."""
    run = open_run(load_config(config_path, overrides))
    run.engine.begin_step(1, 1, run.plan.config.rank_backwards)
    gradients_of_step(run, next(run.lanes)[0])
    run.engine.step()
    groups = run.engine.zero.bit16_groups
    return [all(p._hp_mapping is None or not p._hp_mapping.optim_fragment for p in group) for group in groups]


def overrides_of(folder, ranks, strategy, recompute, reduction="step"):
    name, *_ = strategy.split("+")
    settings = STRATEGIES[strategy] | {"strategy": name, "devices": ranks, "gradient_reduction": reduction}
    chosen = [f"distributed.{key}={str(value).lower()}" for key, value in settings.items()]
    place = folder / f"{strategy}-{ranks}-{recompute}-{reduction}"
    return [*chosen, f"model.recompute_blocks={str(recompute).lower()}", f"run.folder={place}"]


@pytest.fixture(scope="module", params=[6, pytest.param(7, marks=pytest.mark.slow)])
def config_path(request, tmp_path_factory):
    """Four lanes of very different documents: in some windows lanes have a target or two, or none but padding."""
    folder = tmp_path_factory.mktemp("sharded")
    write_store(folder / "train", lengths=[2, 700, 3, 2, 900, 18, 2, 333, 2, 2, 2, 40], seed=2)
    changes = {"window__lanes": 4, "window__window_tokens": 64, "optimizer__steps": STEPS, "model__width": 48}
    changes |= {"run__save_every_steps": STEPS, "model__version": request.param}
    return write_config(folder, **changes)


@pytest.fixture(scope="module")
def alone(config_path):
    folder = config_path.parent
    return trained(config_path, [f"run.folder={folder / 'alone'}"])


CASES = {
    2: [(strategy, recompute, "step") for strategy in STRATEGIES for recompute in (False, True)]
    + [(strategy, False, "segment") for strategy in BY_SEGMENT],
    4: [(strategy, number % 2 == 0, "step") for number, strategy in enumerate(STRATEGIES)],
}


@pytest.fixture(scope="module")
def found(config_path, tmp_path_factory):
    """found(count, slow): results of each of `count` ranks, by case."""

    @functools.cache
    def on_ranks(count, slow):
        chosen = [case for case in CASES[count] if is_slow(count, case) == slow]
        cases = {case: overrides_of(config_path.parent, count, *case) for case in chosen}
        return run_ranks(count, trained_on_ranks, config_path, cases, folder=tmp_path_factory.mktemp("ranks"))

    return on_ranks


QUICK = (("ddp", False, "step"), ("zero3", False, "step"), ("zero3", False, "segment"))


def is_slow(count, case):
    """Compares four ranks, and on two ranks all but the least and the most sharded strategy."""
    return count > 2 or case not in QUICK


@pytest.mark.parametrize(
    ("count", "case"),
    [
        pytest.param(count, case, marks=[pytest.mark.slow] * is_slow(count, case))
        for count, cases in CASES.items()
        for case in cases
    ],
)
def test_weights_are_those_of_one_process(found, alone, count, case):
    for rank in found(count, is_slow(count, case)):
        for name, weight in rank[case]["weights"].items():
            difference = (weight - alone["weights"][name]).abs().max().item()
            assert difference <= 1e-6, (name, difference)
        for part, whole in zip(rank[case]["carry"], alone["carry"], strict=True):
            assert torch.allclose(part, whole[:, list(rank[case]["lanes"])], rtol=1e-4, atol=1e-5)


# Bytes per parameter that a rank of two receives in a step of two segments: gradients are all-reduced (4; gloo also
# turns zero3's reduce-scatter into one), weights are gathered after the step (2), or for zero3 when they are needed.
WIRE = {
    ("ddp", "step"): 4,
    ("zero1", "step"): 4 + 2,
    ("zero2", "step"): 4 + 2,
    ("zero2", "segment"): 2 * 4 + 2,
}


@pytest.mark.parametrize(
    ("strategy", "reduction"),
    [
        pytest.param(strategy, reduction, marks=[pytest.mark.slow] * is_slow(2, (strategy, False, reduction)))
        for strategy, reduction in WIRE
    ],
)
def test_gradients_are_reduced_once_a_step_or_by_segment(found, strategy, reduction):
    case = found(2, is_slow(2, (strategy, False, reduction)))[0][strategy, False, reduction]
    parameters = sum(weight.numel() for weight in case["weights"].values())
    assert case["step_bytes"] / parameters == pytest.approx(WIRE[strategy, reduction], rel=0.1)


def test_deepspeed_still_loses_the_moments_of_all_groups_but_the_first(config_path, tmp_path):
    """If this fails, `ZeroEngine._link_moments` is no longer needed: remove it."""
    overrides = overrides_of(tmp_path, 2, "zero1", False)
    for found in run_ranks(2, groups_without_moments, config_path, overrides, folder=tmp_path):
        assert found == [False, True, True]


def test_zero3_gathers_weights_for_every_pass_and_reduces_gradients_once(found):
    by_step, by_segment = (found(2, False)[0]["zero3", False, reduction] for reduction in ("step", "segment"))
    parameters = sum(weight.numel() for weight in by_step["weights"].values())
    assert by_step["step_bytes"] / parameters > 4 + 2 * 2
    assert (by_segment["step_bytes"] - by_step["step_bytes"]) / parameters == pytest.approx(4, rel=0.1)

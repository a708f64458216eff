"""Every strategy trains the same weights: real ranks against one process, with targets spread unevenly over lanes."""

import pytest

from infctx.config import load_config
from infctx.train.loop import open_run, train_steps

from ranks import run_ranks
from runs import write_config, write_store

STRATEGIES = {
    "ddp": {},
    "zero1": {},
    "zero2": {},
    "zero3": {},
    "zero2+offload": {"offload_optimizer": True},
    "zero3+offload": {"offload_optimizer": True, "offload_parameters": True},
}
STEPS = 5


def trained(config_path, overrides):
    """Losses' sum, whole weights and carried states behind the steps of a run, on this rank."""
    config = load_config(config_path, overrides)
    run = open_run(config)
    assert train_steps(run)
    weights = {name: run.engine.whole(parameter).clone() for name, parameter in run.model.named_parameters()}
    return {"weights": weights, "carry": tuple(run.carry), "lanes": tuple(run.lanes.lanes)}


def trained_on_ranks(config_path, cases):
    return {name: trained(config_path, overrides) for name, overrides in cases.items()}


def overrides_of(folder, strategy, ranks, recompute, **more):
    name, *_ = strategy.split("+")
    settings = STRATEGIES[strategy] | {"strategy": name, "devices": ranks}
    chosen = [f"distributed.{key}={str(value).lower()}" for key, value in settings.items()]
    chosen += [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    place = folder / f"{strategy}-{ranks}-{recompute}".replace("+", "-")
    return [*chosen, f"model.recompute_blocks={str(recompute).lower()}", f"run.folder={place}"]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    """Four lanes of very different documents: in some windows lanes have a target or two, or none but padding."""
    folder = tmp_path_factory.mktemp("sharded")
    write_store(folder / "train", lengths=[2, 700, 3, 2, 900, 18, 2, 333, 2, 2, 2, 40], seed=2)
    changes = {"window__lanes": 4, "window__window_tokens": 64, "optimizer__steps": STEPS, "model__width": 48}
    return write_config(folder, **changes)


@pytest.fixture(scope="module")
def alone(config_path):
    folder = config_path.parent
    return trained(config_path, [f"run.folder={folder / 'alone'}"])


@pytest.fixture(scope="module", params=[2, 4])
def found(request, config_path, tmp_path_factory):
    cases = {
        (strategy, recompute): overrides_of(config_path.parent, strategy, request.param, recompute)
        for strategy in STRATEGIES
        for recompute in (False, True)
    }
    return run_ranks(request.param, trained_on_ranks, config_path, cases, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_those_of_one_process(found, alone, strategy, recompute):
    for rank in found:
        for name, weight in rank[strategy, recompute]["weights"].items():
            difference = (weight - alone["weights"][name]).abs().max().item()
            assert difference <= 1e-6, (name, difference)

"""Runs on many ranks equal the run on one: time over ranks, state tuning, and resuming on other numbers of ranks."""

import functools
from dataclasses import replace

import pytest
import torch

import infctx
from infctx.formats.checkpoint_folder import checkpoints
from infctx.report.step_log import read_step_log
from infctx.settings.load import load_config
from infctx.train import start
from infctx.train.loop import train_steps

from ranks import run_ranks
from runs import open_run, write_config, write_store
from tiny_models import random_model

STEPS = 20
TIME = {
    # name: (ranks, overrides), against one process
    "2 time ranks": (2, ["distributed.time_ranks=2"]),
    "2 time ranks, zero2": (2, ["distributed.time_ranks=2", "distributed.strategy=zero2"]),
    "2 time ranks, zero3, recomputed": (
        2,
        ["distributed.time_ranks=2", "distributed.strategy=zero3", "model.recompute_blocks=true"],
    ),
    "2 time ranks, lanes one by one": (2, ["distributed.time_ranks=2", "window.lanes_per_pass=1"]),
    "4 time ranks": (4, ["distributed.time_ranks=4", "model.recompute_blocks=true"]),
    "4 time ranks, zero2": (4, ["distributed.time_ranks=4", "distributed.strategy=zero2"]),
    "2 time ranks of 4, zero2": (4, ["distributed.time_ranks=2", "distributed.strategy=zero2"]),
}
QUICK = ("2 time ranks",)
TOO = "rank: 4, dropout: 0.2, train_too: [norms, decays], initial_state: true, state_lr: 0.01"
DORA, LORA = f"{{form: dora, where: [all, head], {TOO}}}", f"{{form: lora, where: [all, head, emb], {TOO}}}"
LEARN = {
    "initial_state": ["model.learn=initial_state"],
    "initial_state_and_shifts": ["model.learn=initial_state_and_shifts"],
    "state over nf4": ["model.learn=initial_state", "model.frozen_dtype=nf4"],
    "adapter": ["model.learn=adapter", f"model.adapter={DORA}"],
    "adapter in float64": ["model.learn=adapter", f"model.adapter={DORA}"],  # DeepSpeed has no float64
    "adapter over nf4 in float64": ["model.learn=adapter", f"model.adapter={LORA}", "model.frozen_dtype=nf4"],
}
TUNING = {
    f"{strategy}, {learn}": (2, [f"distributed.strategy={strategy}", "distributed.time_ranks=2", *overrides])
    for strategy in ("ddp", "zero1", "zero2", "zero3")
    for learn, overrides in LEARN.items()
    # What ZeRO shares out is in the cases beside it; ddp's in float64 says more than one in fp32.
    if learn not in (("adapter",) if strategy == "ddp" else ("adapter in float64", "adapter over nf4 in float64"))
} | {"ddp, adapter in float64, lanes": (2, ["distributed.strategy=ddp", *LEARN["adapter in float64"]])}
QUICK_TUNING = [case for case in TUNING if case.startswith(("ddp", "zero3"))]


class Recorded:
    """Lanes that record the documents they returned."""

    def __init__(self, lanes):
        self.lanes, self.documents = lanes, []

    def __next__(self):
        window, position = next(self.lanes)
        self.documents.append(window.documents)
        return window, position


def finished(config_path, overrides, in_float64=False):
    """Returns a run's results after its steps, on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        if in_float64:
            patch.setattr(start, "make_model", functools.partial(double_model, start.make_model))
        run = open_run(load_config(config_path, overrides))
    lanes = run.lanes.lanes
    run.lanes = Recorded(run.lanes)
    first_carry = tuple(run.carry)
    assert train_steps(run)
    learning = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    return {
        "weights": {name: run.engine.whole(parameter).clone() for name, parameter in run.model.named_parameters()},
        "moments": {name: run.engine.whole_moments(parameter)["exp_avg"].clone() for name, parameter in learning},
        "first_carry": first_carry,
        "carry": tuple(run.carry),
        "documents": dict(zip(lanes, zip(*run.lanes.documents, strict=True), strict=True)),
        "time_rank": run.engine.ranks.time_rank,
        "losses": [entry["loss"] for entry in read_step_log(run.plan.config.run.folder)]
        if run.engine.ranks.is_first
        else [],
    }


def double_model(make_model, *arguments):
    model = make_model(*arguments).double()
    model.compute = replace(model.compute, dtype=torch.float64)
    return model


def all_finished(config_path, cases):
    return {name: finished(config_path, overrides, "float64" in name) for name, overrides in cases.items()}


def on_ranks(count, config_path, cases, folder):
    """Runs the cases for this number of ranks, each in a separate folder; returns every rank's results."""
    cases = {
        name: [*overrides, f"distributed.devices={count}", f"run.folder={folder / str(number)}"]
        for number, (name, (ranks, overrides)) in enumerate(cases.items())
        if ranks == count
    }
    return run_ranks(count, all_finished, config_path, cases, folder=folder)


def assert_close(found, truth, bar, name):
    scale = truth.abs().max().clamp_min(1e-30)
    difference = ((found - truth).abs().max() / scale).item()
    assert difference <= bar, (name, difference)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("time")
    write_store(folder / "train", lengths=[700, 40, 333, 1500, 90, 17, 2, 2, 600], seed=2)
    window = {"window__segment_tokens": 64, "window__window_tokens": 192, "window__lanes": 2}
    return write_config(folder, optimizer__steps=STEPS, run__save_every_steps=STEPS, **window)


@pytest.fixture(scope="module")
def alone(config_path):
    return finished(config_path, [f"run.folder={config_path.parent / 'alone'}"])


@pytest.fixture(scope="module")
def over_time(config_path, tmp_path_factory):
    """over_time(case): each rank's results."""

    @functools.cache
    def of_case(case):
        count = TIME[case][0]
        ranks = on_ranks(count, config_path, {case: TIME[case]}, tmp_path_factory.mktemp(f"time_{count}"))
        return [rank[case] for rank in ranks]

    return of_case


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in TIME]
)
def test_time_over_ranks_trains_the_same_model(over_time, alone, case):
    ranks = over_time(case)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for rank in ranks:
        for name, weight in rank["weights"].items():
            assert (weight - alone["weights"][name]).abs().max().item() <= 2e-5, name
        lanes = list(rank["documents"])
        for part, whole in zip(rank["carry"], alone["carry"], strict=True):
            assert_close(part, whole[:, lanes], 1e-4, "carry")
        assert rank["documents"] == {lane: alone["documents"][lane] for lane in lanes}


@pytest.fixture(scope="module")
def tune_path(tmp_path_factory):
    """Tunes a frozen model on documents that start in both slices of segments."""
    folder = tmp_path_factory.mktemp("tune")
    sizes = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}
    infctx.save_weights(random_model(6, noise=0.05, **sizes), folder / "base.pth")
    write_store(folder / "train", lengths=[40, 100, 60, 300, 90, 17, 33, 55, 70] * 4, seed=2)
    changes = {"window__segment_tokens": 64, "window__window_tokens": 192, "optimizer__steps": 3}
    changes |= {"model": {"weights": str(folder / "base.pth"), "learn": "initial_state"}}
    # With a tiny epsilon, Adam makes steps of one length from gradients that are nothing but rounding.
    changes |= {"optimizer__warmup_steps": 0, "optimizer__peak_lr": 0.01, "optimizer__epsilon": 1e-3}
    return write_config(folder, **changes)


@pytest.fixture(scope="module")
def tuned(tune_path, tmp_path_factory):
    """tuned(case): what one process finds, and each rank's results."""
    folder = tmp_path_factory.mktemp("tuned")

    @functools.cache
    def alone(learn):
        return finished(tune_path, [*LEARN[learn], f"run.folder={folder / learn}"], "float64" in learn)

    @functools.cache
    def together(is_quick):
        cases = {case: TUNING[case] for case in TUNING if (case in QUICK_TUNING) == is_quick}
        (folder / f"quick {is_quick}").mkdir()
        return on_ranks(2, tune_path, cases, folder / f"quick {is_quick}")

    return lambda case: (alone(case.split(", ")[1]), together(case in QUICK_TUNING))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK_TUNING else [pytest.mark.slow]) for case in TUNING]
)
def test_tuning_over_ranks_finds_the_gradient_of_one(tuned, case):
    truth, ranks = tuned(case)
    assert ranks[0][case]["losses"] == pytest.approx(truth["losses"], rel=1e-6)
    most = 1e-9 if "float64" in case else 2e-5  # of fp32's own rounding
    if "float64" in case:
        assert ranks[0][case]["moments"]["head.adapter.up"].dtype == torch.float64
    for rank in ranks:
        assert rank[case]["moments"].keys() == truth["moments"].keys()
        for name, moment in truth["moments"].items():
            assert moment.any()
            assert_close(rank[case]["moments"][name], moment, most, name)
            assert_close(rank[case]["weights"][name], truth["weights"][name], most, name)
        for name, weight in truth["weights"].items():
            assert name in truth["moments"] or torch.equal(rank[case]["weights"][name], weight), name


@pytest.mark.parametrize(
    "strategies", [("zero2", "ddp", "zero3"), pytest.param(("zero3", "zero1", "ddp"), marks=pytest.mark.slow)]
)
def test_resuming_on_two_one_and_four_ranks_is_one_run(tmp_path, strategies):
    """Expects the same documents, losses and carried states when ranks, strategy and time ranks change."""
    write_store(tmp_path / "train", lengths=[700, 40, 333, 1500, 90, 17, 2, 2, 600], seed=2)
    path = write_config(tmp_path, window__lanes=4, window__segment_tokens=64, optimizer__schedule="constant")
    alone = finished(path, ["optimizer.steps=9", f"run.folder={tmp_path / 'alone'}"])
    documents = {lane: () for lane in range(4)}
    for steps, count, strategy, time_ranks in zip((3, 6, 9), (2, 1, 4), strategies, (1, 1, 2), strict=True):
        settings = {"strategy": strategy, "devices": count, "time_ranks": time_ranks}
        overrides = [f"distributed.{name}={value}" for name, value in settings.items()]
        overrides += [f"optimizer.steps={steps}", f"run.folder={tmp_path / 'run'}"]
        (tmp_path / str(steps)).mkdir()
        found = run_ranks(count, finished, path, overrides, folder=tmp_path / str(steps))
        for rank in found:
            for lane, numbers in rank["documents"].items():
                documents[lane] += numbers if rank["time_rank"] == 0 else ()
    assert documents == alone["documents"]
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for rank in found:
        for part, whole in zip(rank["carry"], alone["carry"], strict=True):
            assert_close(part, whole[:, list(rank["documents"])], 1e-4, "carry")
    kept = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert len(list(kept.glob("model-*-of-00004.safetensors"))) == 4
    assert len(list(kept.glob("carry-*-of-00002.safetensors"))) == 2
    model = infctx.load_model(kept)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[0]["weights"][name]), name

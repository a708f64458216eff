"""The held-out loss between steps: on all ranks together it is that of one process, and training does not notice."""

import functools
from dataclasses import replace

import pytest
import torch

import infctx
from infctx.data.token_store import TokenStore
from infctx.evaluate import together
from infctx.evaluate.held_out import evaluation_of
from infctx.evaluate.loss_by_position import (
    Reading,
    choose_documents,
    evaluate_reading,
    evaluate_store,
    merge,
    total,
)
from infctx.evaluate.record import held_out_loss, of_same_documents, read_record, write_record
from infctx.evaluate.together import _deal, evaluate_together
from infctx.report.evaluations import held_out_scalars, line_of
from infctx.settings.load import load_config
from infctx.train.loop import train_steps

from ranks import run_ranks
from runs import losses_of, open_run, write_config, write_store
from tiny_models import random_model

STEPS = 3
ALONE = {
    "weights": [],
    "lanes": ["window.lanes=4", "window.lanes_per_pass=2", "data.document_tokens=90", "model.recompute_blocks=true"],
    "tuned": [],
}
TOGETHER = {
    "ddp": [],
    "time": ["distributed.time_ranks=2"],
    "zero2": ["distributed.strategy=zero2"],
    "zero3": ["distributed.strategy=zero3"],
    "zero3 by segment": ["distributed.strategy=zero3", "distributed.gradient_reduction=segment"],
    "zero3 tuned": ["distributed.strategy=zero3", "distributed.time_ranks=2"],
}
FAST = ("ddp",)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The configurations of a run that trains weights and of one that tunes a state; documents of odd lengths."""
    found = {}
    for name in ("trained", "tuned"):
        folder = tmp_path_factory.mktemp(name)
        write_store(folder / "held_out", lengths=(700, 40, 2, 333, 1, 900, 90, 65), seed=5)
        model = {"version": 6, "num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}
        if name == "tuned":
            base = random_model(6, noise=0.05, **{key: value for key, value in model.items() if key != "version"})
            infctx.save_weights(base, folder / "base.pth")
            model = {"weights": str(folder / "base.pth"), "learn": "initial_state_and_shifts"}
        changes = {"optimizer__steps": STEPS, "optimizer__warmup_steps": 0, "optimizer__peak_lr": 0.01}
        found[name] = write_config(folder, model=model, **changes)
    return found


def trained(configs, name, overrides, every):
    """Returns everything that training changes, for this rank; its evaluations after the last step, if it makes any."""
    path = configs["tuned" if "tuned" in name else "trained"]
    folder = path.parent / f"{name} {every}"
    config = load_config(path, [*overrides, f"run.evaluate_every_steps={every or 'null'}", f"run.folder={folder}"])
    run = open_run(config)
    assert train_steps(run)
    values = run.carry._asdict() | {"random": torch.get_rng_state(), "losses": torch.tensor(losses_of(folder))}
    for name, parameter in run.model.named_parameters():
        values[name] = run.engine.whole(parameter).clone()
        moments = run.engine.whole_moments(parameter)
        values |= {f"{name} {key}": torch.as_tensor(part).clone() for key, part in moments.items()}
    again = evaluate_together(run.engine, run.held_out) if every else None
    return values, run.progress, run.measured, again


def with_and_without(configs, cases):
    """Trains each case with an evaluation at every step that draws random numbers, and without any."""
    found, measure = {}, together.measure_documents

    def and_draw(*arguments):
        torch.rand(3)
        return measure(*arguments)

    for name, overrides in cases.items():
        together.measure_documents = and_draw
        measured = trained(configs, name, overrides, 1)
        together.measure_documents = measure
        found[name] = measured, trained(configs, name, overrides, None)
    return found


def on_two_ranks(configs, cases):
    settings = ["distributed.devices=2"]
    return with_and_without(configs, {name: [*settings, *overrides] for name, overrides in cases.items()})


def check(found):
    (values, progress, measured, _), (others, other_progress, nothing, _) = found
    assert values.keys() == others.keys() and len(values) > 10
    assert [name for name in values if not torch.equal(values[name], others[name])] == []
    assert progress == other_progress and progress.step == STEPS
    assert measured.step == STEPS and nothing is None


@pytest.mark.parametrize("name", ALONE)
def test_evaluation_at_every_step_changes_no_bit(configs, name):
    check(with_and_without(configs, {name: ALONE[name]})[name])


@pytest.fixture(scope="module")
def ranks(configs, tmp_path_factory):
    """ranks(name): what each of two ranks found in a case; the fast cases run together, and so do the others."""

    @functools.cache
    def run(are_fast):
        cases = {name: overrides for name, overrides in TOGETHER.items() if (name in FAST) == are_fast}
        return run_ranks(2, on_two_ranks, configs, cases, folder=tmp_path_factory.mktemp("two"))

    return lambda name: [rank[name] for rank in run(name in FAST)]


NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in TOGETHER]


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_on_two_ranks_changes_no_bit(ranks, name):
    for rank in ranks(name):
        check(rank)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_measure_what_one_process_does(configs, ranks, name):
    results = [rank[0] for rank in ranks(name)]
    folder = configs["tuned" if "tuned" in name else "trained"].parent
    model = infctx.load_model(folder / f"{name} 1" / "checkpoints" / "step-000003")
    reading = choose_documents(TokenStore(folder / "held_out"), 257, 32, 262144)
    alone = evaluate_reading(model, reading)
    assert results[0][2:] == results[1][2:]  # the same bits on every rank
    _, _, measured, again = results[0]
    for one, other in zip(again["held_out"], alone, strict=True):
        assert [count for count, _ in one.pieces] == [count for count, _ in other.pieces]
        assert [nats for _, nats in one.pieces] == pytest.approx([nats for _, nats in other.pieces], rel=1e-5)
    for one, other in zip(measured.buckets, evaluate_store(model, reading.store, 32, 262144), strict=True):
        assert replace(one, nats=other.nats) == other
        assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_several_sources_are_measured_each_and_together(tmp_path):
    """Each gives its documents to both ranks' shares; the whole is the sum of the sources."""
    stores = {name: write_store(tmp_path / name, lengths=lengths) for name, lengths in SOURCES.items()}
    run = open_run(load_config(write_config(tmp_path)))
    readings = {name: choose_documents(TokenStore(path), 257, 32, 1000) for name, path in stores.items()}
    evaluation = evaluation_of(run.model, 5, evaluate_together(run.engine, readings))
    for name, path in stores.items():
        assert evaluation.sources[name] == evaluate_store(run.model, TokenStore(path), 32, 1000)
    assert evaluation.buckets == merge(evaluation.sources.values())
    write_record(tmp_path / "record.json", "both", 2000, [evaluation])
    (again,) = read_record(tmp_path / "record.json", "both", 2000)
    assert again.sources.keys() == SOURCES.keys() and of_same_documents(again, evaluation)
    names = held_out_scalars(evaluation, run.plan.config)
    assert {"held_out_of_code/bits_per_byte", "held_out_of_books_by_position/nats_per_token_0-255"} <= names.keys()
    assert names["held_out/nats_per_token"] == held_out_loss(evaluation)
    books, code = (total(evaluation.sources[name]).bits_per_byte for name in ("books", "code"))
    assert line_of(evaluation, []).endswith(f" bits per byte, books {books:.3f}, code {code:.3f}")


SOURCES = {"books": (300, 700), "code": (40, 50, 900)}


def test_every_document_goes_to_one_rank():
    readings = {name: Reading(None, dict(enumerate(lengths)), 32, 257) for name, lengths in SOURCES.items()}
    shares = [_deal(readings, rank, 3) for rank in range(3)]
    assert sorted(place for mine, _ in shares for place in mine) == [
        (name, number) for name, lengths in SOURCES.items() for number in range(len(lengths))
    ]
    loads = [sum(readings[name].num_segments(number) for name, number in mine) for mine, _ in shares]
    assert {most for _, most in shares} == {max(loads)}

"""Runs on a mixture of sources: their losses in the logs, on any ranks, and what names them."""

import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infctx.data.token_store import TokenStore
from infctx.plan.missing import missing_files
from infctx.report.step_log import read_step_log
from infctx.settings.load import load_config
from infctx.train.loop import gradients_of_step, train

from runs import infctx_command, infctx_here, losses_of, open_run, write_config, write_store


def write_mixture(folder, **changes):
    """Writes a configuration with two sources, talk three times as much as books."""
    sources = []
    for name, lengths, weight in (("books", (700, 900), 1), ("talk", (40, 60, 33, 90, 20), 3)):
        (folder / name).mkdir()
        write_store(folder / name / "train", lengths=lengths, seed=len(name))
        sources.append({"store": str(folder / name / "train"), "weight": weight, "name": name})
    data = {"sources": sources, "held_out": [{"store": str(folder / "held_out"), "name": "all"}]}
    return write_config(folder, data=data, optimizer__steps=4, run__save_every_steps=2, **changes)


def by_source(entry):
    """Returns the losses of sources in an entry of the step log."""
    return {name: loss for name, loss in entry.items() if name.startswith("loss_by_source/")}


def test_the_loss_of_each_source(tmp_path):
    config = load_config(write_mixture(tmp_path))
    run = open_run(config)
    window, _ = next(run.lanes)
    run.engine.begin_step(1, window.num_targets, config.rank_backwards)
    losses, _ = gradients_of_step(run, window)
    train(config)
    log = read_step_log(tmp_path / "run")
    means = [loss / count for loss, count in zip(losses.tolist(), window.source_targets, strict=True)]
    assert [log[0][f"loss_by_source/{name}"] for name in ("books", "talk")] == pytest.approx(means, rel=1e-6)
    weighted = sum(mean * count for mean, count in zip(means, window.source_targets, strict=True))
    assert log[0]["loss"] == pytest.approx(weighted / window.num_targets, rel=1e-6)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("books", "talk"):
        found = [(event.step, event.value) for event in events.Scalars(f"loss_by_source/{name}")]
        name = f"loss_by_source/{name}"
        wanted = [(entry["step"], entry[name]) for entry in log if name in entry]
        assert found == [(step, pytest.approx(loss)) for step, loss in wanted]
    train(load_config(write_config(tmp_path, optimizer__steps=3, run__folder=str(tmp_path / "one"))))
    assert not by_source(read_step_log(tmp_path / "one")[0])


@pytest.mark.slow
def test_two_ranks_log_what_one_does_and_one_resumes(tmp_path):
    path = write_mixture(tmp_path)
    code, _, errors = infctx_command("train", path, "distributed.devices=2", f"run.folder={tmp_path}/two")
    assert code == 0, errors
    assert "sources: 25% books, 75% talk" in errors
    train(load_config(path))
    one, two = read_step_log(tmp_path / "run"), read_step_log(tmp_path / "two")
    for mine, other in zip(one, two, strict=True):
        assert by_source(mine) == pytest.approx(by_source(other), rel=1e-4)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000004")
    train(load_config(path, [f"run.folder={tmp_path}/two"]))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "run"), rel=1e-4)


def test_what_names_a_source(tmp_path):
    path = write_mixture(tmp_path)
    config = load_config(path)
    window, _ = next(open_run(config).lanes)
    names = {name.split()[0] for names in window.documents for name in names}
    assert names == {"books", "talk"}
    code, _, errors = infctx_here("train", path, "model.vocab_size=100", "data.held_out=null")
    assert code == 2 and "/train.bin: token " in errors and "the model's vocabulary has 100 ids" in errors
    for suffix in ("idx", "bin"):
        (tmp_path / "talk" / f"train.{suffix}").unlink()
        (tmp_path / f"held_out.{suffix}").unlink()
    assert [line.split(": ")[0] for line in missing_files(config)] == [
        "data.sources[1].store",
        "data.held_out[0].store",
    ]


@pytest.mark.parametrize("here", [True, False])
def test_a_rehearsal_keeps_the_mixture(tmp_path, here):
    lengths = {"min_tokens": 30, "curriculum": {"from_tokens": 32, "to_tokens": 128, "steps": 100}}
    path = write_mixture(tmp_path, window__carry="lane")
    overrides = ["data.min_tokens=30", "data.curriculum={from_tokens: 32, to_tokens: 128, steps: 100}"]
    if not here:
        (tmp_path / "talk" / "train.idx").unlink()
    code, output, errors = infctx_here("train", path, "--rehearse", *overrides)
    assert code == 0, errors
    small = load_config(tmp_path / "run-rehearsal" / "rehearsal.yaml")
    assert [(each.called, each.weight) for each in small.data.sources] == [("books", 1), ("talk", 3)]
    assert small.data.curriculum.model_dump() == lengths["curriculum"] | {"steps": 2}
    assert small.data.min_tokens == (30 if here else None) and small.window.carry == "lane"
    stores = [each.store for each in small.data.sources]
    assert (stores == [each.store for each in load_config(path).data.sources]) == here
    assert len({TokenStore(store).fingerprint for store in stores}) == 2
    assert [name for name, _ in small.data.held_out_stores] == ["all"]
    assert len(by_source(read_step_log(tmp_path / "run-rehearsal")[3])) == 2

"""The held-out loss while a run trains: recorded, resumed, and the best checkpoint kept and found."""

import csv
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import infctx
from infctx.data.store_writer import TokenStoreWriter
from infctx.evaluate import together
from infctx.formats.checkpoint_folder import checkpoints, find_damage, newest_checkpoint
from infctx.formats.model_files import find_model, find_state
from infctx.report.step_log import read_step_log
from infctx.settings.load import load_config
from infctx.train.loop import train

from runs import infctx_here, losses_of, write_config
from tiny_models import random_model

EVERY_2 = ["run.evaluate_every_steps=2", "run.loggers=[csv]"]


def evaluations(run):
    content = json.loads((run / "held_out.json").read_text())
    return {entry["step"]: entry["buckets"] for entry in content["evaluations"]}


def rows_of(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def best_of(run):
    return os.readlink(run / "checkpoints" / "best")


def write_other_documents(path):
    """Writes documents of ids that those of write_store hardly have: the more a model learns there, the worse it is."""
    random = np.random.default_rng(0)
    with TokenStoreWriter(path) as writer:
        for length in (300, 250, 350, 270, 310, 90):
            writer.extend((256 - 255 * random.random(length) ** 3).astype(np.uint16))
            writer.end_document()


def test_a_run_that_was_killed_and_resumed_has_the_same_records(tmp_path):
    config = write_config(tmp_path, optimizer__steps=7, run__save_every_steps=4, run__keep_checkpoints=9)
    train(load_config(config, [*EVERY_2, f"run.folder={tmp_path / 'whole'}"]))
    train(load_config(config, EVERY_2))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert list(evaluations(run)) == [2, 4, 6, 7]
    for step in (6, 7):  # as if killed before it saved step 6
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    (run / "model.pth").unlink()
    with (run / "metrics.csv").open("a") as file:
        file.write("8,1,2")  # cut off
    code, output, errors = infctx_here("train", config, *EVERY_2)
    assert code == 0, errors
    assert "resuming after step 4 of 7" in errors
    found = re.findall(r"step (\d)/7  held-out loss ([\d.]+) bits per byte( \(.*\))?", errors)
    assert [step for step, _, _ in found] == ["6", "7"] and found[0][2] == " (best so far)"
    assert losses_of(run) == losses_of(whole)
    assert evaluations(run) == evaluations(whole)
    assert best_of(run) == best_of(whole)
    for mine, its, entry in zip(rows_of(run), rows_of(whole), read_step_log(run), strict=True):
        assert list(mine) == list(its) and list(mine)[: len(entry)] == list(entry)
        held_out = [name for name in mine if name.startswith("held_out")]
        for name in ("step", "tokens", "loss", "learning_rate", "gradient_norm", *held_out):
            assert mine[name] == its[name]
        assert {name: float(mine[name]) for name in entry} == pytest.approx(entry)
        assert bool(mine["held_out/nats_per_token"]) == (entry["step"] in (2, 4, 6, 7))
    (last,) = [row for row in rows_of(run) if row["step"] == "7"]
    assert float(last["held_out_by_position/bits_per_byte_256-1023"]) == evaluations(run)[7][1]["bits_per_byte"]
    assert "the last is worse" not in output


def test_the_best_is_kept_and_found_by_every_command(tmp_path):
    write_other_documents(tmp_path / "held_out")
    changes = {"optimizer__steps": 6, "optimizer__peak_lr": 2e-2, "optimizer__schedule": "constant"}
    changes |= {"run__keep_checkpoints": 2, "run__save_every_steps": 2, "run__loggers": []}
    config, run = write_config(tmp_path, **changes), tmp_path / "run"
    code, output, errors = infctx_here("train", config, "run.evaluate_every_steps=1")
    assert code == 0, errors
    best = min(evaluations(run), key=lambda step: sum(b["nats_per_token"] for b in evaluations(run)[step]))
    assert best < 4, "these documents should get worse"
    kept = [f"step-{best:06d}", "step-000004", "step-000006"]
    assert names(run) == ["best", *kept]
    assert not {"tensorboard", "metrics.csv"} & {path.name for path in run.iterdir()}
    assert best_of(run) == kept[0]
    assert re.search(
        rf"checkpoints/best +the best by held-out loss: step {best}, [\d.]+ bits per byte; the last is worse, ", output
    )
    assert f"export {run}/checkpoints/best {run}/best.pth" in output
    assert re.search(rf"held-out loss [\d.]+ bits per byte \(best: [\d.]+ at step {best}\)", errors)
    assert errors.count("held-out loss: has risen 3 times in a row") == 1
    named = run / "checkpoints" / "best"
    for command in (["generate", named, "--tokens", 3], ["export", named, tmp_path / "best.pth", "--dtype", "fp32"]):
        code, _, errors = infctx_here(*command)
        assert code == 0, errors
    code, table, _ = infctx_here("evaluate", named, tmp_path / "held_out", "--segment-tokens", 32)
    assert code == 0
    value = sum(b["nats_per_token"] * b["num_tokens"] for b in evaluations(run)[best]) / sum(
        b["num_tokens"] for b in evaluations(run)[best]
    )
    assert f"{value:.4f}" in next(line for line in table.splitlines() if " all " in line)
    stored = load_file(run / "checkpoints" / kept[0] / "model.safetensors")
    assert torch.equal(infctx.load_model(tmp_path / "best.pth").head.weight, stored["head.weight"])
    moved = tmp_path / "moved"
    shutil.copytree(named, moved)  # like scp: a link becomes what it leads to
    assert find_damage(moved) is None
    shutil.copytree(run / "checkpoints", tmp_path / "all", symlinks=True)
    assert newest_checkpoint(tmp_path / "all").name == "step-000006"
    assert find_model(tmp_path / "all" / "best").weights.resolve() == tmp_path / "all" / kept[0]

    code, _, errors = infctx_here("train", config, "optimizer.steps=10", "run.evaluate_every_steps=5")
    assert code == 0, errors
    assert names(run) == ["best", kept[0], "step-000008", "step-000010"]


def test_a_file_system_without_links_costs_only_the_link(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    config = write_config(tmp_path, optimizer__steps=3, run__save_every_steps=9)
    code, _, errors = infctx_here("train", config, "run.evaluate_every_steps=2")
    assert code == 0, errors
    assert "checkpoints/best: cannot become a link to step-000002, the best (Operation not permitted)" in errors
    assert names(tmp_path / "run") == ["step-000002", "step-000003"]


def test_without_keep_best_no_checkpoint_is_saved_for_it(tmp_path):
    config = write_config(tmp_path, optimizer__steps=4, run__save_every_steps=3, run__keep_best=False)
    train(load_config(config, ["run.evaluate_every_steps=1"]))
    assert list(evaluations(tmp_path / "run")) == [1, 2, 3, 4]
    assert names(tmp_path / "run") == ["step-000003", "step-000004"]


def test_the_best_of_a_tuned_state(tmp_path):
    sizes = {"num_layers": 1, "width": 16, "head_size": 8, "vocab_size": 257}
    infctx.save_weights(random_model(6, noise=0.05, **sizes), tmp_path / "base.pth")
    model = {"weights": str(tmp_path / "base.pth")}
    config = write_config(tmp_path, model=model, optimizer__steps=3, optimizer__peak_lr=0.3, run__loggers=["csv"])
    code, output, errors = infctx_here("tune", config, "run.evaluate_every_steps=1")
    assert code == 0, errors
    assert "without state   with the state" in output
    found = find_state(tmp_path / "run" / "checkpoints" / "best")
    assert found.resolve().parent.name == best_of(tmp_path / "run")
    *_, last = rows_of(tmp_path / "run")
    assert (
        last["step"] == "3" and last["held_out/nats_per_token"] != last["held_out_without_state/nats_per_token"] != ""
    )


def test_documents_that_disappear_are_a_warning_and_training_continues(tmp_path, monkeypatch):
    measure, calls = together.measure_documents, []

    def cut_short(reading, *arguments):
        calls.append(reading)
        if len(calls) == 2:
            (tmp_path / "held_out.bin").write_bytes((tmp_path / "held_out.bin").read_bytes()[:100])
        return measure(reading, *arguments)

    monkeypatch.setattr(together, "measure_documents", cut_short)
    config = write_config(tmp_path, optimizer__steps=3)
    code, _, errors = infctx_here("train", config, "run.evaluate_every_steps=1")
    assert code == 0, errors
    assert len(losses_of(tmp_path / "run")) == 3 and list(evaluations(tmp_path / "run")) == [1]
    assert errors.count("the held-out loss could not be measured: ") == 3  # steps 2 and 3, and the end
    assert f"step 2: the held-out loss could not be measured: {tmp_path / 'held_out'}" in errors


def test_a_new_run_after_one_without_checkpoints_names_no_best(tmp_path):
    config = write_config(tmp_path, optimizer__steps=1, optimizer__warmup_steps=0, run__evaluate_tokens=0)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best").symlink_to("step-000009")
    train(load_config(config))
    assert names(tmp_path / "run") == ["step-000001"]
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1

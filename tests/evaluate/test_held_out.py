"""The held-out loss of a run: before and after, in its folder and TensorBoard, without any effect on training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import infctx
from infctx.data.token_store import TokenStore
from infctx.distributed.beats import Beat
from infctx.evaluate import held_out
from infctx.evaluate.held_out import measure_before
from infctx.evaluate.loss_by_position import evaluate_reading, evaluate_store
from infctx.formats.checkpoint_folder import checkpoints
from infctx.settings.load import load_config
from infctx.train.loop import train

from runs import infctx_here, losses_of, open_run, plan_of, write_config
from tiny_models import random_model

SIZES = {"num_layers": 1, "width": 16, "head_size": 8, "vocab_size": 257}


@pytest.fixture
def weights(tmp_path):
    infctx.save_weights(random_model(6, noise=0.05, **SIZES), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def fine_tune_config(folder, weights, **changes):
    settings = {"optimizer__steps": 3, "optimizer__schedule": "constant", "model": {"weights": str(weights)}}
    return write_config(folder, **(settings | changes))


def evaluations(run):
    content = json.loads((run / "held_out.json").read_text())
    return [(entry["step"], entry["with_state"], entry["buckets"]) for entry in content["evaluations"]]


def test_fine_tuning_shows_before_and_after_and_measures_before_once(tmp_path, weights):
    config, run = fine_tune_config(tmp_path, weights), tmp_path / "run"
    code, output, errors = infctx_here("train", config)
    assert code == 0, errors
    assert "held-out loss before training: reading up to 262,144 tokens; run.evaluate_tokens=0 skips it" in errors
    assert "before training   after training      change" in output
    (begin, _, first), (end, _, last) = evaluations(run)
    assert (begin, end) == (0, 3)
    store = TokenStore(tmp_path / "held_out")
    for model, table in ((weights, first), (run / "model.pth", last)):
        for bucket, entry in zip(evaluate_store(infctx.load_model(model), store, 32, 262144), table, strict=True):
            assert (bucket.begin, bucket.end, bucket.num_tokens) == (entry["begin"], entry["end"], entry["num_tokens"])
            assert bucket.nats_per_token == pytest.approx(entry["nats_per_token"], rel=1e-9)
            assert bucket.bits_per_byte == pytest.approx(entry["bits_per_byte"], rel=1e-9)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("held_out/nats_per_token")] == [0, 3]
    (_, shown) = events.Scalars("held_out_by_position/bits_per_byte_256-1023")
    assert shown.value == pytest.approx(last[1]["bits_per_byte"])

    code, output, errors = infctx_here("train", config, "optimizer.steps=4")
    assert code == 0, errors
    assert "before training" not in errors and "before training" in output
    assert [step for step, _, _ in evaluations(run)] == [0, 3, 4]
    for content, warning in (("{", "held_out.json: is damaged"), (None, "")):
        (run / "held_out.json").unlink() if content is None else (run / "held_out.json").write_text(content)
        code, output, errors = infctx_here("train", config, "optimizer.steps=4")
        assert code == 0, errors
        assert warning in errors
        assert "before training" not in output and "held-out loss by position" in output
        assert [step for step, _, _ in evaluations(run)] == [4]


def test_tuning_keeps_both_tables(tmp_path, weights):
    config = fine_tune_config(tmp_path, weights, optimizer__peak_lr=0.5)
    assert infctx_here("tune", config)[0] == 0
    (*before, first), (*after, last) = evaluations(tmp_path / "run")
    assert (before, after) == ([3, False], [3, True])
    assert first != last
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"held_out/nats_per_token", "held_out_without_state/nats_per_token"} <= set(events.Tags()["scalars"])


def test_measuring_does_not_affect_training(tmp_path, weights, monkeypatch):
    def and_draw(*arguments):
        torch.rand(3)
        return evaluate_reading(*arguments)

    monkeypatch.setattr(held_out, "evaluate_reading", and_draw)
    runs = []
    for name, tokens in (("with", 1000), ("without", 0)):
        config = load_config(fine_tune_config(tmp_path, weights, run__folder=str(tmp_path / name)))
        train(config.model_copy(update={"run": config.run.model_copy(update={"evaluate_tokens": tokens})}))
        (newest,) = checkpoints(config.run.checkpoints)
        carry = load_file(newest / "carry.safetensors")
        runs.append((losses_of(tmp_path / name), (tmp_path / name / "model.pth").read_bytes(), carry))
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(tensor, runs[1][2][name]) for name, tensor in runs[0][2].items())
    assert not (tmp_path / "without" / "held_out.json").exists()


def test_a_new_run_starts_a_new_record(tmp_path, weights):
    """It does not use the record of a run that never reached a checkpoint."""
    (tmp_path / "run").mkdir()
    stale = {"store": str(tmp_path / "held_out"), "tokens": 262144, "evaluations": [{"step": 0}]}
    (tmp_path / "run" / "held_out.json").write_text(json.dumps(stale))
    open_run(load_config(fine_tune_config(tmp_path, weights), ["run.evaluate_tokens=0"]))
    assert not (tmp_path / "run" / "held_out.json").exists()


def test_waiting_ranks_see_progress(tmp_path, weights):
    config = load_config(fine_tune_config(tmp_path, weights), ["run.evaluate_tokens=100"])
    marks = []

    class Watch:
        def mark(self, *place):
            marks.append(place)

    measure_before(plan_of(config), infctx.load_model(weights), torch.device("cpu"), Watch())
    assert len(marks) >= 100 // 32 and set(marks) == {(0, None, "held-out loss")}
    assert Beat(step=0, doing="held-out loss").place == "before its first step (held-out loss)"


def test_the_first_step_explains_damaged_weights(tmp_path, weights):
    model = infctx.load_model(weights)
    with torch.no_grad():
        model.head.weight[3, 4] = float("nan")
    infctx.save_weights(model, weights)
    code, _, errors = infctx_here("train", fine_tune_config(tmp_path, weights))
    assert code == 1
    assert "held-out loss before training: not measured, " in errors
    assert "first in the head" in errors

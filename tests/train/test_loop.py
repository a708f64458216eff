"""Training as a user starts it: the loss falls, and is the same however a run is cut, stopped, killed or resumed."""

import json
import math
import random
import re
import shutil
import signal
import time

import pytest
import torch

import infctx
from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.data.token_store import TokenStore
from infctx.errors import TrainingFailed
from infctx.formats.checkpoint_folder import checkpoints
from infctx.settings.load import load_config
from infctx.train.checkpoint import lock_folder
from infctx.train.failure import find_failure
from infctx.train.loop import train, train_steps
from infctx.train.optimizer import make_optimizer, set_learning_rate

from runs import infctx_command, infctx_here, losses_of, open_run, start, wait_for_steps, write_config, write_store


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Trains without a stop, in a separate process; returns losses, weights and output."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output, errors = infctx_command("train", write_config(folder))
    assert code == 0, errors
    return losses_of(folder / "run"), (folder / "run" / "model.pth"), output, errors


WEIGHTS_ARE = "the weights, in fp32: generate, evaluate, export"


def test_it_learns_and_reports(uninterrupted):
    losses, weights, output, errors = uninterrupted
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 0.1
    lines = output.splitlines()
    assert lines[0].startswith("trained 40 steps, 10,240 tokens, in ")
    assert lines[1] == f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token"
    assert lines[2] == "files" and lines[3].split() == [str(weights), *WEIGHTS_ARE.split()]
    assert lines.index("next") > lines.index(f"held-out loss by position in {weights.parents[1]}/held_out") > 6
    assert "step 40/40  loss " in errors
    assert infctx.load_model(weights).sizes.width == 32


def test_a_step_equals_plain_torch_over_whole_documents(tmp_path):
    """The judge cuts no segments: it uses one graph over each lane's whole window."""
    config = load_config(write_config(tmp_path), ["optimizer.steps=4", "run.evaluate_tokens=0"])
    train(config)
    model = infctx.build_model(**config.model.sizes, seed=3)
    optimizer = make_optimizer(model, config.optimizer)
    lanes = Lanes(
        [Source("one", TokenStore(tmp_path / "train"))], num_lanes=2, window_tokens=128, seed=3, vocab_size=257
    )
    state, expected = None, []
    for step in range(1, 5):
        window, _ = next(lanes)
        set_learning_rate(optimizer, config.optimizer, step)
        hidden, state = model(window.tokens, state, window.starts)
        loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), window.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state = state.detach()
        expected.append(loss.item())
    assert losses_of(tmp_path / "run") == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("change", [{"window__lanes_per_pass": 1}, {"window__segment_tokens": 64}])
def test_saving_memory_does_not_change_the_losses(uninterrupted, tmp_path, change):
    train(load_config(write_config(tmp_path, **change), ["run.evaluate_tokens=0"]))
    assert losses_of(tmp_path / "run") == pytest.approx(uninterrupted[0], rel=1e-4)


def test_kill_at_a_random_moment_then_resume_bit_for_bit(uninterrupted, tmp_path):
    config = write_config(tmp_path)
    chance = random.Random()
    kills = 0
    for _ in range(20):
        process = start("train", config)
        wait_for_steps(tmp_path / "run", at_least=chance.randint(1, 30), process=process)
        time.sleep(chance.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if process.returncode == 0:  # it finished before the kill: try again
            shutil.rmtree(tmp_path / "run")
            continue
        assert process.returncode == -signal.SIGKILL, errors
        if kills == 2:
            code, _, errors = infctx_command("train", config)
            assert code == 0, errors
            break
    assert kills > 0
    assert losses_of(tmp_path / "run") == uninterrupted[0]
    assert same_weights(tmp_path / "run" / "model.pth", uninterrupted[1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_sigterm_finishes_the_step_saves_and_exits(uninterrupted, tmp_path):
    config = write_config(tmp_path, run__save_every_steps=1000)
    process = start("train", config)
    wait_for_steps(tmp_path / "run", at_least=2, process=process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done = len(losses_of(tmp_path / "run"))
    assert f"SIGTERM: stopped after step {done}" in errors
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{done:06d}"]
    code, _, errors = infctx_command("train", config)
    assert code == 0, errors
    assert losses_of(tmp_path / "run") == uninterrupted[0]


def test_torn_checkpoints_are_skipped_with_one_line(uninterrupted, tmp_path):
    config = write_config(tmp_path)
    assert infctx_here("train", config, "optimizer.steps=7", "optimizer.final_lr=1.0e-4")[0] == 0
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder / "step-000007")
    newest = folder / "step-000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    code, _, errors = infctx_here("train", config)
    assert code == 0, errors
    warnings = [line for line in errors.splitlines() if "is torn" in line]
    assert len(warnings) == 1
    assert "step-000006" in warnings[0]
    assert "optimizer.safetensors has" in warnings[0]
    assert "step-000003" in errors


def test_a_finished_run_ends_quickly_and_more_steps_resume_it(tmp_path):
    config = write_config(tmp_path, optimizer__steps=3)
    train(load_config(config))
    before = (tmp_path / "run" / "model.pth").read_bytes()
    code, output, _ = infctx_command("train", config)
    assert code == 0
    assert "trained 3 steps" in output
    assert (tmp_path / "run" / "model.pth").read_bytes() == before
    train(load_config(config, ["optimizer.steps=5"]))
    assert len(losses_of(tmp_path / "run")) == 5


@pytest.mark.parametrize("place", ["weights", "learning_rate"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, place):
    if place == "weights":
        model = infctx.build_model(version=6, num_layers=3, width=32, head_size=16, vocab_size=257)
        with torch.no_grad():
            model.blocks[1].time_mix.key.weight[3, 4] = math.inf
        infctx.save_weights(model, tmp_path / "bad.pth")
        config = write_config(tmp_path)
        content = config.read_text().replace("model:", "model:\n  weights: " + str(tmp_path / "bad.pth"))
        config.write_text("\n".join(x for x in content.splitlines() if x.split(":")[0].strip() not in SIZES))
        overrides = []
    else:
        config = write_config(tmp_path, run__save_every_steps=1)
        overrides = ["optimizer.peak_lr=1.0e+30", "optimizer.clip_norm=null"]
    code, _, errors = infctx_here("train", config, *overrides)
    assert code == 1
    message = errors[errors.index("infctx: step ") :]
    assert "Traceback" not in errors
    assert "documents of the step: lane 0: " in message
    if place == "weights":
        assert "first in layer 1, segment 0; lower" in message  # the states of a new window are zero
        assert "there is no checkpoint yet" in message
    else:
        assert re.search(r"\n  the states before that segment had entries of up to \S+ in size\n", message)
        kept = checkpoints(tmp_path / "run" / "checkpoints")
        assert f"{kept[-1]}, is untouched" in message
        weights = infctx.load_model(kept[-1])
        assert all(p.isfinite().all() for p in weights.parameters())


SIZES = ("version", "num_layers", "width", "head_size", "vocab_size")


def test_changes_since_a_checkpoint_are_logged(tmp_path):
    config = write_config(tmp_path, optimizer__steps=3, run__evaluate_tokens=0)
    train(load_config(config))
    code, _, errors = infctx_here("train", config, "optimizer.steps=5", "window.window_tokens=256")
    assert code == 0
    assert "optimizer.steps 3 -> 5" in errors
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert json.loads((newest / "progress.json").read_text())["num_tokens"] == 3 * 256 + 2 * 512


def test_two_runs_do_not_share_a_folder(tmp_path):
    config = write_config(tmp_path)
    lock = lock_folder(tmp_path / "run")
    code, _, errors = infctx_here("train", config)
    lock.close()
    assert code == 2
    assert "another run is training there" in errors


class BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def test_a_gradient_that_is_not_finite_names_its_layer(tmp_path):
    run = open_run(load_config(write_config(tmp_path, model__num_layers=4)))
    run.model.blocks[1].time_mix.value.register_forward_hook(
        lambda module, inputs, output: BrokenBackward.apply(output)
    )
    with pytest.raises(TrainingFailed, match="step 1: the gradient is not finite, first in layer 1;"):
        train_steps(run)


@pytest.mark.parametrize("lanes_per_pass", [None, 1])
def test_a_loss_that_is_not_finite_names_its_first_layer_and_documents(tmp_path, lanes_per_pass):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").unlink(missing_ok=True)
    write_store(tmp_path / "train", lengths=[50] * 40)
    changes = {"model__num_layers": 3, "window__window_tokens": 512, "window__lanes_per_pass": lanes_per_pass}
    run = open_run(load_config(write_config(tmp_path, **changes)))
    window, _ = next(run.lanes)
    poisoned = window.tokens[1, 3].item()
    window.tokens[0][window.tokens[0] == poisoned] = 1
    with torch.no_grad():
        run.model.embedding.weight[poisoned] = math.inf
    came_in = run.carry._replace(wkv=torch.full_like(run.carry.wkv, -4.25e13))
    where = find_failure(run.engine, window, came_in, run.plan.config)
    assert where.place == "layer 0, segment 0"
    assert where.entry == pytest.approx(4.25e13)
    assert where.documents == "lane 1: " + ", ".join(window.documents[1][:8]) + (
        f" and {len(window.documents[1]) - 8} more" if len(window.documents[1]) > 8 else ""
    )


def test_tensorboard_has_every_scalar(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(load_config(write_config(tmp_path, optimizer__steps=3), ["run.evaluate_tokens=0"]))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {"tokens", "seconds", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_gb"}
    assert set(events.Tags()["scalars"]) == names | {f"carried_state_rms/layer_{layer}" for layer in range(2)}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses_of(tmp_path / "run"))


def test_memory_does_not_grow_with_the_store(tmp_path):
    """With 100 times the documents, peak memory is the same, in fresh processes."""
    peaks = []
    for name, copies in (("small", 1), ("large", 100)):
        folder = tmp_path / name
        folder.mkdir()
        write_store(folder / "train", lengths=[40_000] * (5 * copies))
        config = write_config(folder, optimizer__steps=3, run__evaluate_tokens=0)
        assert infctx_command("train", config)[0] == 0
        log = (folder / "run" / "steps.jsonl").read_text().splitlines()
        peaks.append(json.loads(log[-1])["peak_memory_gb"])
    assert peaks[1] < peaks[0] * 1.05


def same_weights(path, other):
    tensors, others = (torch.load(file, weights_only=True) for file in (path, other))
    return all(torch.equal(tensors[name], others[name]) for name in others)

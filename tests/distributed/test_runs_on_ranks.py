"""Runs on many ranks as a user starts them: by the command itself or torchrun; stopped, killed, failed, resumed."""

import os
import re
import signal
import sys
import time

import psutil
import pytest
import torch

import infctx
from infctx.formats.checkpoint_folder import checkpoints
from infctx.report.step_log import read_step_log

from ranks import free_port
from runs import infctx_command, losses_of, start, wait_for_steps, write_config
from tiny_models import random_model

GONE = re.compile(
    r"infctx: rank 1 \(.*\) is gone: last seen in step (\d+), segment (\d+) \((forward|backward|checkpoint)\)\. (.*)"
)


def ranks_of(process):
    """Returns rank -> process, for the children of `process`."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "LOCAL_RANK" in child.environ():
            found[int(child.environ()["RANK"])] = child
    return found


@pytest.mark.parametrize("how", ["launcher", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_and_one_rank_resumes(tmp_path, how):
    config = write_config(tmp_path, optimizer__schedule="constant", run__evaluate_tokens=0)
    settings = ["optimizer.steps=1000", "distributed.devices=2", "distributed.strategy=zero2"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    program = {"program": (sys.executable, *torchrun, "-m", "infctx")} if how == "torchrun" else {}
    process = start("train", config, *settings, **program)
    wait_for_steps(tmp_path / "run", 5, process)
    assert process.poll() is None, process.communicate()
    time.sleep(2.5)  # ranks exchange their places once a second
    killed_at = time.monotonic()
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert time.monotonic() - killed_at < 60
    assert process.returncode == 1
    (said,) = [line for line in errors.splitlines() if line.startswith("infctx: ")]
    found = GONE.fullmatch(said)
    assert found, said
    step, segment, _, remedy = found.groups()
    assert 1 <= int(step) <= len(losses_of(tmp_path / "run")) + 1
    assert 0 <= int(segment) < 4
    kept = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert remedy.startswith(f"The last checkpoint, {kept}, is complete; run the same command again")
    if how == "launcher":
        assert "Traceback" not in errors
        steps = int(kept.name[5:]) + 4
        code, _, errors = infctx_command("train", config, f"optimizer.steps={steps}")
        assert code == 0, errors
        assert f"resuming after step {steps - 4}" in errors
        assert "distributed.devices 2 -> 1" in errors
        alone = [f"optimizer.steps={steps}", f"run.folder={tmp_path / 'alone'}"]
        assert infctx_command("train", config, *alone)[0] == 0
        assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-6)


def test_sigterm_finishes_the_step_on_all_ranks_and_saves(tmp_path):
    config = write_config(tmp_path, run__save_every_steps=1000, run__evaluate_tokens=0)
    process = start("train", config, "distributed.devices=2", "optimizer.steps=1000")
    wait_for_steps(tmp_path / "run", 2, process)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done = len(losses_of(tmp_path / "run"))
    assert f"SIGTERM: stopped after step {done}" in errors
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{done:06d}"]


@pytest.mark.parametrize("strategy", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_from_start_to_export(tmp_path, strategy):
    """Checks everything that a user reads and gets, and that every other command accepts it."""
    sizes = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}
    infctx.save_weights(random_model(6, noise=0.05, **sizes), tmp_path / "base.pth")
    config = write_config(tmp_path, model={"weights": str(tmp_path / "base.pth")}, optimizer__steps=5)
    settings = [f"distributed.strategy={strategy}", "distributed.devices=2", "distributed.time_ranks=2"]
    code, output, errors = infctx_command("train", config, *settings)
    assert code == 0, errors
    assert f"2 ranks on cpu, {strategy}, each document's time over 2" in errors
    lines = [line for line in errors.splitlines() if not line.startswith("step ")]
    assert len(lines) == 5, errors  # the model, the ranks, the WKV backend, the loss before (2): logged once
    assert sum(line.startswith("held-out loss before training") for line in lines) == 2
    assert "held-out loss by position" in output and "before training   after training" in output
    assert "trained 5 steps, 1,280 tokens, in 0:" in output
    log = read_step_log(tmp_path / "run")
    assert all(entry["slowest_rank"] in (0, 1) and entry["slowest_rank_lag"] >= 0 for entry in log)
    kept = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    exported = tmp_path / "exported.safetensors"
    assert infctx_command("export", kept, exported, "--dtype", "fp32")[0] == 0
    models = [infctx.load_model(path) for path in (tmp_path / "run" / "model.pth", kept, exported)]
    for name, parameter in models[0].named_parameters():
        assert all(torch.equal(model.get_parameter(name), parameter) for model in models[1:])
    code, _, errors = infctx_command("train", config, *settings, "optimizer.steps=7")
    assert code == 0, errors
    assert "resuming after step 5 of 7" in errors
    assert len(losses_of(tmp_path / "run")) == 7


@pytest.mark.slow
def test_tuning_a_state_on_two_ranks_from_start_to_export(tmp_path):
    sizes = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}
    infctx.save_weights(random_model(6, noise=0.05, **sizes), tmp_path / "base.pth", torch.bfloat16)
    config = write_config(tmp_path, model={"weights": str(tmp_path / "base.pth")}, optimizer__steps=4)
    settings = ["distributed.strategy=zero3", "distributed.devices=2", "distributed.time_ranks=2"]
    code, output, errors = infctx_command("tune", config, *settings, "optimizer.peak_lr=0.05", "run.precision=bf16")
    assert code == 0, errors
    assert "--- with the state" in output
    run = tmp_path / "run"
    assert {"state.pth", "state.st", "state.safetensors"} <= {path.name for path in run.iterdir()}
    state = infctx.load_state(run / "state.pth", infctx.load_model(tmp_path / "base.pth"))
    assert state.wkv.any()


@pytest.mark.slow
def test_a_users_mistake_is_one_line_whoever_meets_it(tmp_path):
    config = write_config(tmp_path, optimizer__steps=3)
    code, _, errors = infctx_command("train", config, "distributed.devices=2", "model.vocab_size=200")
    assert code == 2
    (line,) = errors.splitlines()
    assert "has token" in line


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_loss_that_is_not_finite_is_reported_once_with_its_documents(tmp_path, strategy):
    config = write_config(tmp_path, run__save_every_steps=1)
    settings = [f"distributed.strategy={strategy}", "distributed.devices=2"]
    broken = ["optimizer.peak_lr=1.0e+30", "optimizer.clip_norm=null"]
    code, _, errors = infctx_command("train", config, *settings, *broken)
    assert code == 1
    assert errors.count("infctx: ") == 1
    for part in ("first in layer", "lane 0: ", "lane 1: ", "is untouched"):
        assert errors.count(part) == 1
    kept = infctx.load_model(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_ranks_that_are_not_those_of_the_configuration_are_refused(tmp_path, monkeypatch):
    config = write_config(tmp_path, optimizer__steps=3)
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    code, _, errors = infctx_command("train", config, "distributed.devices=2")
    assert code == 2
    assert "2 ranks, and 4 were started; set them to what was started" in errors


def test_nodes_that_were_started_with_other_settings_are_refused(tmp_path):
    config = write_config(tmp_path)
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = [
        start(
            "train",
            config,
            "distributed.devices=2",
            f"optimizer.steps={20 + rank}",
            env=os.environ | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert (
        "rank 1 was started with different settings than rank 0: steps: 21, not steps: 20; start every node" in said[0]
    )

"""Reports of a run while it trains: the step log across resumes, the progress line, TensorBoard."""

import fcntl
import json
import os
import signal
import struct
import sys
import termios
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from infctx.evaluate.loss_by_position import Bucket, DocumentLoss
from infctx.evaluate.record import Evaluation
from infctx.model.state import State
from infctx.report import metrics
from infctx.report.metrics import Metrics, Step
from infctx.report.step_log import read_step_log
from infctx.settings.load import load_config
from infctx.train.loop import train, train_steps

from runs import open_run, write_config


@contextmanager
def a_reader(monkeypatch, columns=140):
    """A context in which standard error is a terminal or a pipe; afterward the list has everything shown there."""
    reading, writing = os.openpty() if columns else os.pipe()
    if columns:
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    shown = []

    def read():
        with suppress(OSError):  # a terminal raises it once nobody writes to it
            while data := os.read(reading, 4096):
                shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with open(writing, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        yield shown
    reader.join()
    os.close(reading)
    shown[:] = b"".join(shown).decode().replace("\n", "\r").split("\r")


STATE = State(torch.ones(2, 1, 2, 4, 4), torch.ones(2, 1, 8), torch.ones(2, 1, 8))


def test_tokens_and_seconds_continue_over_resumes(tmp_path):
    config = write_config(tmp_path, optimizer__schedule="constant", run__evaluate_tokens=0)
    train(load_config(config, ["optimizer.steps=3"]))
    log = tmp_path / "run" / "steps.jsonl"
    first = read_step_log(tmp_path / "run")
    assert 0 < first[0]["seconds"] < first[1]["seconds"] < first[2]["seconds"] < 100
    late = [json.dumps(entry | {"seconds": 1000.0 + entry["step"]}) for entry in (*first, first[-1] | {"step": 4})]
    log.write_text("\n".join(late) + "\n")  # the last was written after the checkpoint
    train(load_config(config, ["optimizer.steps=5"]))
    entries = read_step_log(tmp_path / "run")
    assert [entry["tokens"] for entry in entries] == [256, 512, 768, 1024, 1280]
    seconds = [entry["seconds"] for entry in entries]
    assert seconds[:3] == [1001, 1002, 1003] and 1003 < seconds[3] < seconds[4] < 1100
    older = [{name: value for name, value in entry.items() if name not in ("tokens", "seconds")} for entry in entries]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in older))
    train(load_config(config, ["optimizer.steps=6"]))
    assert 0 < read_step_log(tmp_path / "run")[-1]["seconds"] < 100


@pytest.mark.parametrize("columns", [140, 80, 40, None])
def test_the_progress_line_fits(tmp_path, monkeypatch, columns):
    """In the terminal, and in 100 columns; the time left and the losses stay longest."""
    with a_reader(monkeypatch, columns) as shown:
        monkeypatch.setattr(metrics, "peak_memory", lambda _device: 139_990_000_000)
        config = load_config(write_config(tmp_path), ["optimizer.steps=200000"])
        with Metrics(config, 100_000) as reports:
            reports.began = time.perf_counter() - 1.5
            reports.before = reports.began + 1.4999
            reports.evaluations = [Evaluation(99_000, False, [Bucket(0, 256, 10, 19.32)])]
            time.sleep(0.11)
            reports.report(Step(100_000, 1, 10.0, 1e-3, 1.0, STATE, None), torch.tensor([1.0, 1.0, 9.0]))
    (line,) = {line for line in shown if line.strip()}
    assert "step 100000/200000  loss 10.0000" in line
    assert ("held-out 1.932" in line and " left" in line) == (columns != 40)
    assert ("slowest rank 2" in line) == (columns != 40)
    assert len(line) == min(columns, 100) if columns else 80 < len(line) <= 100


def test_the_time_left_and_the_speed(tmp_path, monkeypatch):
    """Half an hour for 100 steps leaves half an hour for 100 more; the time of an evaluation is not in the speed."""
    config = load_config(write_config(tmp_path), ["optimizer.steps=200"])
    with a_reader(monkeypatch, None) as shown, Metrics(config, 1) as reports:
        reports.began -= 1800
        reports.before -= 1000  # as if an evaluation had taken that long
        evaluation = Evaluation(99, False, [Bucket(0, 256, 10, 19.32, 20)])
        reports.report_held_out(evaluation, [DocumentLoss(evaluation.buckets, [(10, 19.32)])])
        time.sleep(0.02)
        reports.report(Step(100, 1, 2.0, 1e-3, 1.0, STATE, None, {"loss_of/books": 1.5}), torch.ones(1))
    first, second = [line for line in shown if line.strip()]
    assert first == "step 99/200  held-out loss 1.394 bits per byte"
    assert "held-out 1.394" in second and "30:00 left" in second
    (entry,) = read_step_log(tmp_path / "run")
    assert 1000 < entry["tokens_per_second"] < 256 / 0.02
    assert entry["loss_of/books"] == 1.5


def test_after_ctrl_c_the_message_is_the_last_line(tmp_path, monkeypatch):
    run = open_run(load_config(write_config(tmp_path)))
    lanes = run.lanes

    def some():
        for number in range(4):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.11)
            yield next(lanes)

    run.lanes = some()
    with a_reader(monkeypatch) as shown:
        assert not train_steps(run)
    *_, progress, message = [line for line in shown if line.strip()]
    assert "step 4/40  loss" in progress
    assert message.startswith("SIGINT: stopped after step 4, saved in ")
    assert message.endswith("run the same command to resume")


def test_tensorboard_has_the_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(write_config(tmp_path, optimizer__steps=3, optimizer__peak_lr=0.0123, run__evaluate_tokens=0))
    train(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("settings/text_summary")
    assert "    optimizer:\n      steps: 3\n      peak_lr: 0.0123\n" in event.tensor_proto.string_val[0].decode()

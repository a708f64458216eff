"""Small real runs for tests: a store of random documents, a configuration, and the command line in a second process."""

import io
import logging
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch
import yaml
from lightning.fabric import Fabric

from infctx.__main__ import main
from infctx.data.store_writer import TokenStoreWriter
from infctx.distributed.devices import Devices, open_devices
from infctx.distributed.engine import Engine
from infctx.distributed.ranks import Ranks
from infctx.formats.weights import fingerprint
from infctx.model.loss import SegmentLoss
from infctx.plan.plan import Plan, make_plan
from infctx.report.step_log import read_step_log
from infctx.train.run import Run
from infctx.train.start import open_run as open_run_on

from forked import Forked, run_infctx
from places import ROOT

COMMAND = (sys.executable, "-m", "infctx")


def write_store(path, lengths=(700, 40, 333, 1500, 90), seed=0, vocab_size=257):
    """Writes a token store of documents of random ids; a model can only learn their frequencies."""
    random = np.random.default_rng(seed)
    with TokenStoreWriter(path) as writer:
        for length in lengths:
            ids = 1 + (random.random(length - 1) ** 3 * (vocab_size - 1)).astype(np.uint16)
            writer.extend(ids.astype(np.uint16))
            writer.end_document()
    return path


def write_config(folder, **changes):
    """Writes a configuration of a tiny Finch to `folder`; changes are section__setting=value, or section=..."""
    content = {
        "model": {"version": 6, "num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257},
        "data": {"store": str(folder / "train"), "held_out": str(folder / "held_out")},
        "window": {"segment_tokens": 32, "window_tokens": 128, "lanes": 2},
        "optimizer": {"steps": 40, "peak_lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
        "run": {"folder": str(folder / "run"), "threads": 1, "save_every_steps": 3, "seed": 3, "device": "cpu"},
    }
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        if setting:
            content.setdefault(section, {})[setting] = value
        else:
            content[section] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    for store in ("train", "held_out"):
        if not (folder / f"{store}.idx").exists():
            write_store(folder / store, seed=len(store))
    return path


def open_run(config):
    """Opens the run of a configuration, in this process or as this rank."""
    return open_run_on(open_devices(make_plan(config)))


def run_of(model, optimizer, config, carry, progress):
    """Makes a run on one CPU that is already training, without documents."""
    engine = plain_engine(model, optimizer)
    tuned_over = fingerprint(model) if config.model.freezes_weights else None
    return Run(plan_of(config), model, engine, None, carry, progress, tuned_over, None)


def plain_engine(model, optimizer):
    """Makes the engine of one CPU for a model and its optimizer."""
    devices = Devices(Fabric(accelerator="cpu", devices=1), Ranks(), plan_of(None))
    return Engine(devices, SegmentLoss(model), optimizer, None)


def plan_of(config):
    """Makes the plan of a run on one CPU without checking anything."""
    return Plan(config, torch.device("cpu"), None, None, "ddp", "step")


def start(*arguments, program=COMMAND, **options):
    """Starts the command line in a separate process and collects its output; forks if there are no special options."""
    if program == COMMAND and not options:
        return Forked(run_infctx, [str(argument) for argument in arguments], cwd=ROOT)
    command = [*program, *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **({"cwd": ROOT, "text": True} | pipes | options))


def infctx_command(*arguments, **options):
    """Runs the command line to its end: (exit code, standard output, standard error)."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def infctx_here(*arguments):
    """The same in this process, which is seconds faster."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    root, ours, handle = logging.getLogger(), logging.getLogger("infctx"), signal.getsignal(signal.SIGTERM)
    handlers, root.handlers = root.handlers, []  # the command sets up its own
    levels = root.level, ours.level
    try:
        with redirect_stdout(output), redirect_stderr(errors), warnings.catch_warnings():
            code = main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code
    finally:
        root.handlers = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        signal.signal(signal.SIGTERM, handle)
    return code, *(stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in (output, errors))


def losses_of(folder):
    """Returns the losses of all steps of a run, from the first without a gap."""
    log = read_step_log(folder)
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
    return [entry["loss"] for entry in log]


def wait_for_steps(folder, at_least, process):
    """Waits until the step log has this many lines, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        path = folder / "steps.jsonl"
        if path.exists() and path.read_text().count("\n") >= at_least:
            return
        time.sleep(0.005)

"""Loggers: the same numbers everywhere, continued on resume; one that fails costs a line, never the run."""

import csv
import json
import logging
import os
import re
import signal
import struct
import sys

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infctx.errors import InputError
from infctx.plan import missing
from infctx.plan.plan import make_plan
from infctx.report.csv_log import CsvLog
from infctx.report.loggers import Loggers
from infctx.report.step_log import read_step_log
from infctx.settings.load import load_config

from runs import infctx_command, losses_of, start, wait_for_steps, write_config

BLOCK = 32768


def wandb_records(file):
    """Yields the records of an offline run: after a header of 7 bytes, a log in the format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_runs(run):
    """Returns for each start of a run: its id at wandb, its settings, and its numbers as (step, name) -> value."""
    found = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        numbers, config, name = {}, {}, None
        for record in wandb_records(file):
            if record.HasField("run"):
                name = record.run.run_id
            for update in [*record.run.config.update, *record.config.update]:
                config[update.key or update.nested_key[0]] = json.loads(update.value_json)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            numbers |= {(row["step"], key): value for key, value in row.items() if key != "step" and key[0] != "_"}
        found.append((name, config, numbers))
    return found


@pytest.mark.slow
def test_wandb_offline_has_what_tensorboard_and_csv_have_and_continues_one_run(tmp_path, monkeypatch):
    config, run = write_config(tmp_path, optimizer__steps=3, optimizer__schedule="constant"), tmp_path / "run"
    settings = ["run.loggers=[tensorboard, csv, wandb]", "run.evaluate_every_steps=2"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (3, 4):
        code, _, errors = infctx_command("train", config, *settings, f"optimizer.steps={steps}")
        assert code == 0, errors
        assert "wandb: offline; `wandb sync" in errors and "gets no more" not in errors
    (name, content, numbers), (same, _, more) = wandb_runs(run)
    assert name == same == (run / "run_id").read_text().strip()
    assert content["optimizer"]["peak_lr"] == 1e-3
    assert {step for step, _ in numbers} == {1, 2, 3} and {step for step, _ in more} == {4}
    numbers |= more
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {(event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert shown == {place: pytest.approx(value, rel=1e-6) for place, value in numbers.items()}
    with (run / "metrics.csv").open() as file:
        cells = [(int(row["step"]), *cell) for row in csv.DictReader(file) for cell in row.items()]
    rows = {(step, name): float(cell) for step, name, cell in cells if cell}
    expected = {place for place in numbers if "_rms/" not in place[1]}
    assert rows.keys() == expected | {(step, "step") for step in range(1, 5)}
    assert all(rows[place] == value for place, value in numbers.items() if place in rows)
    for entry in read_step_log(run):
        assert entry == {key: rows[entry["step"], key] for key in entry}


@pytest.mark.slow
def test_a_logger_that_dies_costs_one_line(tmp_path, monkeypatch):
    """The process that sends wandb's numbers is killed while the run trains.  wandb's own last words may follow."""
    config = write_config(tmp_path, run__evaluate_tokens=0, run__save_every_steps=1000)
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start("train", config, "run.loggers=[wandb]", "optimizer.steps=30")
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGSTOP)
    (service,) = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "wandb-core" in child.name()
    ]
    service.kill()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert len(losses_of(tmp_path / "run")) == 30
    said = re.findall(r"^wandb: gets no more numbers of this run \(.*\); training continues, .*$", errors, re.M)
    assert len(said) == 1, errors


def test_a_logger_that_cannot_open_costs_one_line(tmp_path):
    config = load_config(write_config(tmp_path, run__loggers=["csv", "tensorboard"]))
    (tmp_path / "run" / "metrics.csv").mkdir(parents=True)
    lines = []
    with Loggers(config, 1, lines.append) as loggers:
        loggers.log({"loss": 2.0}, 1)
        assert list(loggers.open) == ["tensorboard"]
    (line,) = lines
    assert line.startswith("csv: gets no more numbers of this run (") and "Is a directory" in line


def test_a_logger_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(missing, "find_spec", lambda name: None)
    config = load_config(write_config(tmp_path, run__loggers=["wandb", "csv", "trackio"]))
    with pytest.raises(InputError) as refused:
        make_plan(config)
    assert refused.value.args[1:3] == tuple(
        f"run.loggers: {name} is not installed; pip install 'infctx[{name}]', or remove it from the list"
        for name in ("wandb", "trackio")
    )
    assert not (tmp_path / "run").exists()


def test_trackio_continues_one_run(tmp_path):
    trackio = pytest.importorskip("trackio")
    config = write_config(tmp_path, optimizer__schedule="constant", run__loggers=["trackio"])
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "TRACKIO_PROJECT": "books"}
    for steps in (3, 4):
        arguments = ["train", config, f"optimizer.steps={steps}"]
        code, _, errors = infctx_command(*arguments, program=(sys.executable, "-m", "infctx"), env=environment)
        assert code == 0, errors
    os.environ |= environment
    (run,) = trackio.Api().runs("books")
    assert run.name == f"run-{(tmp_path / 'run' / 'run_id').read_text().strip()}"


def test_a_csv_log_is_resumed_whatever_is_in_it(tmp_path):
    path = tmp_path / "metrics.csv"
    log = CsvLog(path, 1)
    for step in (1, 2, 3):
        log.log({"loss": step / 3}, step)
        log.log({'of "a, b"': 1.5, "late": float("nan")} if step == 2 else {}, step)
    log.close()
    whole = path.read_text()
    assert whole == 'step,loss,"of ""a, b""",late\n1,0.3333333333333333,,\n2,0.6666666666666666,1.5,nan\n3,1.0,,\n'
    CsvLog(path, 3).close()
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    for content, kept in {
        whole[:-5]: whole.splitlines(keepends=True)[:3],  # a row that was cut off
        "": ["step\n"],
        "\0\0\0": ["step\n"],
        "loss,step\n1,2\n": ["step\n"],
        "step,loss\n-1,2\nx,3\n2,4\n" + "9" * 5000 + ",1\n²,1\n": ["step,loss\n", "2,4\n"],
    }.items():
        path.write_text(content)
        CsvLog(path, 4).close()
        assert path.read_text() == "".join(kept)


@pytest.fixture(autouse=True)
def _quiet_wandb():
    yield
    logging.getLogger("wandb").handlers.clear()

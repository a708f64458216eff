"""The end of a run as a user sees it: short lines, commands that work, and nothing lost if something is missing."""

import os
import shlex
import shutil

import pytest

import infctx
from infctx.settings.load import load_config
from infctx.train.finish import finish
from infctx.train.loop import train_steps

from runs import infctx_here, open_run, write_config, write_store
from tiny_models import random_model

SIZES = {"num_layers": 1, "width": 16, "head_size": 8, "vocab_size": 257}
SHORT = {"optimizer__steps": 3, "run__folder": "my run"}


def run_next(output):
    """Runs the commands that a run printed at its end, in the same folder; returns their output."""
    lines = output.splitlines()
    outputs = []
    for line in lines[lines.index("next") + 1 :]:
        program, *words = shlex.split(line)
        assert os.access(program, os.X_OK), line
        if program.endswith("/tensorboard"):
            assert words[0] == "--logdir" and any(name.startswith("events.out") for name in os.listdir(words[1]))
        else:
            code, output, errors = infctx_here(*words)
            assert code == 0, errors
            outputs.append((words[0], output))
    return outputs


@pytest.mark.parametrize("command", ["train", "tune"])
def test_every_printed_command_works_and_lines_are_short(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    infctx.save_weights(random_model(6, noise=0.05, **SIZES), "base.pth")
    model = {"weights": "base.pth"} if command == "tune" else {"version": 6, **SIZES}
    data = {"store": "train", "held_out": "held_out"}
    config = write_config(tmp_path, model=model, data=data, **SHORT)
    code, output, errors = infctx_here(command, config)
    assert code == 0, errors
    assert [name for name, _ in run_next(output)] == {"train": ["generate"], "tune": ["generate", "export"]}[command]
    if command == "tune":
        assert infctx.load_model("my run/merged.pth").initial_wkv is not None
    sample = output.splitlines()
    begin, end = sample.index("files"), sample.index("saved to my run/held_out.json")
    assert all(len(line) <= 100 for line in [*sample[: end + 1], *sample[sample.index("next") :]])
    for line in sample[begin + 1 : sample.index("held-out loss by position in held_out" + COMPARED[command])]:
        path, _, what = line.strip().partition("  ")
        assert os.path.exists(path) and what


COMPARED = {"train": "", "tune": ", bits per byte"}


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_held_out_store_that_disappears_is_a_warning(tmp_path, monkeypatch, capsys, caplog, damage):
    monkeypatch.chdir(tmp_path)
    run = open_run(load_config(write_config(tmp_path, **SHORT)))
    assert train_steps(run)
    for suffix in (".bin", ".idx"):
        file = tmp_path / f"held_out{suffix}"
        file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-8])
    finish(run)
    output = capsys.readouterr().out
    assert infctx.load_model("my run/model.pth").sizes.width == 32
    assert "my run/model.pth  " in output
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("the held-out loss could not be measured: ") and f"{tmp_path}/held_out" in warning
    for suffix in (".bin", ".idx"):
        (tmp_path / f"held_out{suffix}").unlink(missing_ok=True)
    write_store(tmp_path / "held_out", seed=len("held_out"))
    assert ("evaluate", "held-out loss by position") in [(name, text[:25]) for name, text in run_next(output)]


def test_a_table_that_cannot_be_saved_is_shown(tmp_path, capsys):
    run = open_run(load_config(write_config(tmp_path, **(SHORT | {"run__folder": str(tmp_path / "run")}))))
    assert train_steps(run)
    (tmp_path / "run" / "held_out.json").mkdir()
    finish(run)
    output = capsys.readouterr().out
    assert "held-out loss by position" in output and "\nnext\n" in output
    assert f"not saved to {tmp_path}/run/held_out.json: Is a directory" in output


def test_results_of_an_earlier_run_are_not_replaced(tmp_path, monkeypatch):
    """Its checkpoints are gone but its model is not: no new run replaces the model, and the model still works."""
    config = write_config(tmp_path, optimizer__steps=3, run__evaluate_tokens=0)
    assert infctx_here("train", config)[0] == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    code, output, errors = infctx_here("train", config)
    assert (code, output) == (2, "")
    assert errors == (
        f"infctx: {run}/model.pth: is of a run whose checkpoints are gone, and would be replaced; "
        "move it away, or choose another run.folder\n"
    )
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    texts = [infctx_here("generate", model, "--prompt", "a", "--tokens", 9) for model in (run, run / "model.pth")]
    assert texts[0] == texts[1] and texts[0][0] == 0
    (run / "model.pth").rename(run / "state.st")
    assert "state.st: is of a run whose checkpoints are gone" in infctx_here("train", config)[2]
    (run / "state.st").unlink()  # like a run interrupted before its first checkpoint
    assert infctx_here("train", config)[0] == 0

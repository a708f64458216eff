"""The command line: what takes more than a row of tests/test_wrong_inputs.py, where each mistake has one."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import infctx
from infctx.__main__ import main

from places import ROOT
from runs import infctx_command, write_config, write_store


def refused(capfd, *arguments):
    """Runs a command that must fail; returns its message, usually one line."""
    code = main([str(argument) for argument in arguments])
    output, errors = capfd.readouterr()
    assert code == 2, errors
    assert output == ""
    assert len([line for line in errors.splitlines() if line.startswith("infctx: ")]) == 1
    assert "Traceback" not in errors
    first, *details = errors[errors.index("infctx: ") :].splitlines()
    assert all(line.startswith("  ") for line in details)
    return "\n".join([first, *details])


@pytest.fixture
def tiny_weights(tmp_path):
    path = tmp_path / "tiny.pth"
    infctx.save_weights(infctx.build_model(version=6, num_layers=2, width=32, head_size=16, vocab_size=257), path)
    return path


@pytest.mark.parametrize("damage", ["magic", "offsets"])
def test_stores(capfd, tmp_path, damage):
    config = write_config(tmp_path)
    index = bytearray((tmp_path / "train.idx").read_bytes())
    if damage == "magic":
        index[0] ^= 1
        (tmp_path / "train.idx").write_bytes(index)
    else:
        count = int(np.frombuffer(index, "<u8", 1, 18)[0])
        place = 34 + 4 * count + 8 * (count - 1)
        index[place : place + 8] = np.int64(1 << 40).tobytes()
        (tmp_path / "train.idx").write_bytes(index)
    assert "train.idx" in refused(capfd, "train", config)


def test_a_pickle_with_code_in_it_is_not_run(capfd, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "planted"),)

    torch.save({"emb.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        assert name in refused(capfd, "generate", tmp_path / name)
    assert not (tmp_path / "planted").exists()


def test_disk_full_while_writing_a_checkpoint(tmp_path):
    config = write_config(tmp_path, optimizer__steps=4, run__save_every_steps=1)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    code, _, errors = infctx_command("train", config, preexec_fn=limit)
    assert code == 2
    last = errors.strip().splitlines()[-1]
    assert last.startswith("infctx: ")
    assert "too large" in last or "No space" in last
    assert "Traceback" not in errors
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_disk_full_while_exporting(tmp_path, tiny_weights):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    for name in ("out.pth", "out.safetensors"):
        code, _, errors = infctx_command("export", tiny_weights, tmp_path / name, preexec_fn=limit)
        assert code == 2, errors
        assert len(errors.strip().splitlines()) == 1, errors
        assert name in errors
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.pth"]


def test_everything_missing_is_reported_together(capfd):
    line = refused(capfd, "train", ROOT / "configs" / "finch-3b-64k.yaml")
    for thing in ("data.store: there is no ", "data.held_out: there is no ", "finds no GPU here", "GB"):
        assert thing in line


def test_generate_evaluate_and_export(capfd, tmp_path, tiny_weights):
    assert main(["generate", str(tiny_weights), "--prompt", "abc", "--tokens", "5", "--seed", "1"]) == 0
    first = capfd.readouterr().out
    assert first.startswith("abc")
    assert main(["generate", str(tiny_weights), "--prompt", "abc", "--tokens", "5", "--seed", "1"]) == 0
    assert capfd.readouterr().out == first
    write_store(tmp_path / "held_out")
    assert main(["evaluate", str(tiny_weights), str(tmp_path / "held_out"), "--max-tokens", "500"]) == 0
    assert "held-out loss by position" in capfd.readouterr().out
    assert main(["export", str(tiny_weights), str(tmp_path / "half.safetensors")]) == 0
    assert "tensors in bf16" in capfd.readouterr().out
    assert "exists; choose another name" in refused(capfd, "export", tiny_weights, tmp_path / "half.safetensors")


def test_a_terminal_sees_at_once_that_torch_is_loading(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for command, arguments in (("generate", ["gone.pth"]), ("train", [str(tmp_path / "gone.yaml")])):
        assert main([command, *arguments]) == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"infctx {infctx.__version__} {command}: loading torch ..."
        assert "gone." in second
    assert main(["prepare", "gone.txt", "--output", str(tmp_path / "out")]) == 2
    assert "loading" not in capsys.readouterr().err


def test_standard_input(tmp_path):
    code, output, errors = infctx_command(
        "prepare", "-", "--format", "text", "--tokenizer", "bytes", "--output", tmp_path / "out"
    )
    assert code == 2, output
    assert errors.startswith("infctx: ")
    with open(ROOT / "README.md", encoding="utf-8") as text:
        code, output, errors = infctx_command(
            "prepare", "-", "--format", "text", "--tokenizer", "bytes", "--output", tmp_path / "out", stdin=text
        )
    assert code == 0, errors
    assert "1 document," in output


def test_weights_that_are_damaged_are_not_evaluated(capfd, tmp_path, tiny_weights):
    store = write_store(tmp_path / "held_out")
    model = infctx.load_model(tiny_weights)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    infctx.save_weights(model, tmp_path / "nan.pth")
    assert "the weights are damaged" in refused(capfd, "evaluate", tmp_path / "nan.pth", store)


def test_a_reader_that_goes_away_is_no_error(tiny_weights):
    command = f"{sys.executable} -m infctx generate {tiny_weights} --prompt abc --tokens 200 | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b""  # not even a log line, which would land inside the text


PLANNED = ["distributed.devices=2", "window.lanes=4", "distributed.strategy=zero3"]


@pytest.mark.parametrize("place", range(len(PLANNED) + 1))
def test_plan_takes_settings_before_its_option_and_after_it(capfd, place):
    words = [*PLANNED[:place], "--device-gb", "80", *PLANNED[place:]]
    assert main(["plan", str(ROOT / "configs" / "finch-3b-64k.yaml"), *words]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert "ranks     2 on 1 node\n" in output
    assert "lanes     4 in all, 2 per rank" in output
    assert "of the 80.0 GB of a GPU" in output
    assert [line.split("  ")[0] for line in output.splitlines() if "this run" in line] == ["zero3"]


def test_what_is_missing_for_many_ranks_is_reported_once(tmp_path):
    words = ["distributed.devices=2", "data.store=gone", "data.held_out=gone_too"]
    code, output, errors = infctx_command("train", write_config(tmp_path), *words)
    assert (code, output) == (2, "")
    assert errors.count("infctx: ") == 1 and len(errors.splitlines()) == 4, errors
    assert "data.store: there is no gone.idx" in errors
    assert "data.held_out: there is no gone_too.idx" in errors
    assert not (tmp_path / "run").exists()


def test_the_command_starts_its_ranks_with_its_own_words(tmp_path):
    config = write_config(tmp_path)
    started = tmp_path / "started"
    started.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "if 'RANK' in os.environ:\n"
        f"    words = Path('/proc/self/cmdline').read_text().split(chr(0))\n"
        f"    Path({str(started)!r}, os.environ['RANK']).write_text(repr(words[1:-1]))\n"
        "    os._exit(5)\n"
    )
    words = ["train", str(config), "distributed.devices=2", "optimizer.steps=5"]
    code, output, errors = infctx_command(*words, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (code, output, errors) == (5, "", "")
    assert [(started / rank).read_text() for rank in "01"] == [repr(["-m", "infctx", *words])] * 2


def test_later_ranks_speak_later_and_say_who_they_are(tmp_path):
    began = time.monotonic()
    code, _, errors = infctx_command("train", tmp_path / "gone.yaml", env=os.environ | {"RANK": "3", "LOCAL_RANK": "1"})
    assert code == 2
    assert errors.startswith(f"infctx: rank 3: {tmp_path / 'gone.yaml'}: no such file")
    assert time.monotonic() - began > 2


def test_help_lists_every_command_and_loads_no_torch():
    program = "import sys, infctx.__main__ as m\ntry:\n m.main(['--help'])\nfinally:\n print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("prepare", "train", "tune", "plan", "evaluate", "generate", "export"):
        assert f"  {command}" in done.stdout

"""Wrong inputs at the command line: each is a short message that names the place and the remedy, and changes nothing.

The rows are in tests/support/wrong_inputs.py.  They run in one folder of tiny models, stores and runs, whose files must
be as they were afterwards.
"""

import gzip
import io
import os
import re
import shlex
import shutil

import pytest
import torch
import yaml
from wrong_inputs import ROWS as INPUT_ROWS
from wrong_records import RECORD_FILES
from wrong_records import ROWS as RECORD_ROWS

import infctx
from infctx.hub.published import PUBLISHED_FILES
from infctx.model.state import State

from runs import infctx_here, write_store
from tiny_models import random_model

ROWS = [*INPUT_ROWS, *RECORD_ROWS]
COLUMNS = 120
PATH = re.compile(r"[\w.*~-]*(?:/|\.(?:bin|gz|idx|jsonl?|md|pdf|png|pth|safetensors|st|txt|yaml)\b)[\w./*~-]*")
SEE_HELP = r"(.*; see infctx( \w+)? --help)?"
NAME = PUBLISHED_FILES[0].name
HALF = f"models/{NAME}"
VARIABLES = {"a rehearsal under torchrun": {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}}
BEGUN = {"tokens beyond the vocabulary": 2, "a training that fails": 1}
"""Runs that have begun, in the folder `new`, when they end so; and their exit codes."""
SIZES = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}
SETTINGS = {
    "model": {"version": 6, **SIZES},
    "data": {"store": "books/train", "held_out": "books/held_out"},
    "window": {"segment_tokens": 16, "window_tokens": 32, "lanes": 2},
    "optimizer": {"steps": 2, "peak_lr": 1e-3},
    "run": {"folder": "new", "threads": 1, "device": "cpu", "evaluate_tokens": 100},
}


def settings(**changes):
    """The text of a configuration; changes are section__setting=value."""
    content = {section: dict(values) for section, values in SETTINGS.items()}
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        content.setdefault(section, {})[setting] = value
    return yaml.safe_dump(content, sort_keys=False)


def weights_file(*names):
    file = io.BytesIO()
    torch.save({name: torch.zeros(4, 8) for name in names}, file)
    return file.getvalue()


WRONG_FILES = {
    "README.md": "# A project\n\nWords.\n",
    "letter.pdf": b"%PDF-1.7\n\x80\x81\x00",
    "image.png": b"\x89PNG\0",
    "configs/eagle-tiny.yaml": settings(),
    "used-rehearsal/notes.txt": "x",
    "empty.yaml": "",
    "list.yaml": "- a\n- b\n",
    "utf16.yaml": settings().encode("utf-16"),
    "zeros.yaml": b"\0" * 40,
    "tab.yaml": "model:\n\tversion: 6\n",
    "twice.yaml": "run:\n  seed: 1\n  seed: 2\n",
    "short.yaml": "model:\n  size: finch-3b\n",
    "hollow.yaml": settings().replace("window:\n", "window:\nwindows:\n"),
    "sede.yaml": settings(run__sede=3),
    "empty.txt": "",
    "latin.txt": "caf\xe9".encode("latin-1"),
    "broken.jsonl": '{"text": "a"}\n{"text": \n',
    "other.jsonl": '{"body": "a"}\n',
    "cut.txt.gz": gzip.compress(b"hello " * 1000, mtime=0)[:-9],
    "hollow.pth": "",
    "silent/config.yaml": settings(),
    "hurt/evaluation.json": '{"models": [{"name": "run", "recall": [{"gap_tokens": 3}]}]}',
    "cut-run/held_out.json": '{"store": "books/held_out", "tokens": 10, "evalu',
    "page.html": "<!DOCTYPE html><title>Mine</title>",
    HALF: b"PK\x03\x04 and no more",
    "bad.idx": b"abc" * 9,
    "bad.bin": b"abc",
    **RECORD_FILES,
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with one of everything: stores, models, states, runs."""
    folder = tmp_path_factory.mktemp("desk")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for number in range(4):
            write_text(f"texts/{number}.txt", f"document {number} " * 20)
        for name in ("bytes", "world"):
            output = {"bytes": "books", "world": "world-books"}[name]
            words = ["texts", "--tokenizer", name, "--output", output, "--held-out", "0.25"]
            assert infctx_here("prepare", *words)[0] == 0
        os.mkdir("beyond")
        write_store(folder / "beyond" / "train", vocab_size=5000)
        for name, more in (("finch", {}), ("deeper", {"num_layers": 3}), ("odd", {"vocab_size": 100})):
            model = random_model(6, **(SIZES | more))
            infctx.save_weights(model, f"{name}.pth")
            infctx.save_state(State.zeros(model.sizes, 1, torch.float32, "cpu"), f"{name}-state.pth")
        infctx.save_weights(random_model(5, **SIZES), "eagle.pth")
        infctx.save_weights(random_model(6, seed=5, **SIZES), "other.pth")
        infctx.save_weights(random_model(5, **(SIZES | {"vocab_size": 65536})), "world.pth", torch.bfloat16)
        write_text("config.yaml", settings())
        write_text("tune.yaml", tuning())
        for command, name in (("train", "run"), ("tune", "tuned")):
            config = {"train": "config.yaml", "tune": "tune.yaml"}[command]
            assert infctx_here(command, config, f"run.folder={name}")[0] == 0
        for run, emptied in (("run", "emptied"), ("tuned", "emptied-tuned")):
            shutil.copytree(run, emptied, ignore=lambda *_: {"checkpoints"})
        os.mkdir("empty")
        for path, content in WRONG_FILES.items():
            write_text(path, content)
        write_text("cut.pth", (folder / "finch.pth").read_bytes()[:9000])
        write_text("seven.pth", weights_file("emb.weight", "blocks.0.ffn.s_emb.weight"))
        write_text("four.pth", weights_file("emb.weight", "blocks.0.att.time_first"))
    finally:
        os.chdir(before)
    return folder


def tuning():
    content = yaml.safe_load(settings())
    content["model"] = {"weights": "finch.pth"}
    return yaml.safe_dump(content, sort_keys=False)


def write_text(path, content):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("wrong", ROWS, ids=[row.name for row in ROWS])
def test_a_wrong_input_is_a_short_message_and_changes_nothing(monkeypatch, desk, wrong):
    monkeypatch.chdir(desk)
    for name, value in VARIABLES.get(wrong.name, {}).items():
        monkeypatch.setenv(name, value)
    before, there = files_of(desk), os.listdir()
    try:
        words = [word.replace("HALF", HALF) for word in shlex.split(wrong.command)]
        code, output, errors = infctx_here(*words)
        after = files_of(desk)
    finally:
        for path in set(os.listdir()) - set(there):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    has_begun = wrong.name in BEGUN
    assert (code, output) == (BEGUN.get(wrong.name, 2), ""), errors
    begin = errors.index("infctx: ")
    assert begin == 0 or has_begun, errors
    lines = errors[begin:].splitlines()
    assert len(lines) == len(wrong.message), errors
    for number, (line, expected) in enumerate(zip(lines, wrong.message, strict=True)):
        wanted = ("  " if number else "infctx: ") + expected.replace("HALF", HALF).replace("NAME", NAME)
        assert re.fullmatch(re.escape(wanted).replace(r"\ \.\.\.\ ", " .*") + SEE_HELP, line), f"{line}\n{wanted}"
        assert line.isprintable()
        assert len(line) <= COLUMNS + sum(map(len, PATH.findall(line))), len(line)
    if has_begun:
        after = {path: kind for path, kind in after.items() if path.split("/")[0] != "new"}
    assert after == before


def test_there_is_a_row_for_every_command():
    assert len(ROWS) == len({row.name for row in ROWS}) >= 80
    for command in (
        "prepare",
        "train",
        "tune",
        "plan",
        "evaluate",
        "report",
        "compare",
        "generate",
        "chat",
        "export",
        "train config.yaml --rehearse",
    ):
        assert any(row.command.startswith(f" {command} ") or row.command == f" {command}" for row in ROWS), command


def files_of(folder):
    """Path -> size and time of change; of a folder None."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(folder))] = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found

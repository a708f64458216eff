"""The README is true: its commands run, its links work, its Python works, its block is real output."""

import io
import os
import re
import shlex
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

import readme_blocks
from pages import (
    NEEDS_GPU,
    PAGES,
    Newcomer,
    check_download,
    check_started_elsewhere,
    check_tool,
    commands,
    snippets,
)
from places import ROOT
from window_picture import PICTURE, draw

README = (ROOT / "README.md").read_text(encoding="utf-8")

HANDED_ON = {
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "ARGS",
    "CONFIG",
    "GPUS",
    "MODEL",
    "STORE",
    "PROMPT",
    "OUTPUT",
    "STATE",
    "RUNS",
}


def make(*arguments, cwd=ROOT):
    """Runs a make target with this environment as its .venv."""
    stamps = [f"--assume-old={sys.prefix}/{name}" for name in ("installed", "installed-test")]
    command = ["make", *stamps, *arguments, f"VENV={sys.prefix}"]
    # `make test` would pass its variables and options on to these commands.
    environment = {name: value for name, value in os.environ.items() if name not in HANDED_ON}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False, env=environment)


def test_the_first_screen_says_what_for_whom_how_long_and_what_is_proven():
    first_screen = README.splitlines()[: README[: README.index("```text")].count("\n")]
    text = "\n".join(first_screen)
    assert len(first_screen) <= 30
    assert commands("README.md")[:2] == ["make train", "make test"]
    for word in ("RWKV-5 (Eagle)", "RWKV-6 (Finch)", "**Proven:**", "**Not proven yet:**", "GPU", "minutes"):
        assert word in text


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """Runs `make train` as in the README, with fewer steps, into the test's folder."""
    folder = tmp_path_factory.mktemp("demonstration") / "run"
    done = make("train", f"ARGS=optimizer.steps=6 run.threads=1 run.folder={folder} run.evaluate_tokens=20000")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_make_train(demonstration):
    folder, done = demonstration
    assert "step 6/6  loss " in done.stderr
    assert "held-out loss by position in data/python/held_out" in done.stdout
    assert (folder / "model.pth").is_file()
    assert (ROOT / "data" / "python" / "store.json").is_file()


def test_the_block_of_make_train_is_what_it_prints(demonstration):
    """But for numbers, paths, and rows of the table that a shorter evaluation does not reach."""
    folder, done = demonstration

    def lines_of(text):
        text = text.replace(str(folder), "runs/finch-tiny").replace(os.path.relpath(sys.prefix), ".venv")
        masked = (re.sub(r"[\d,.:]*\d", "#", line) for line in text.splitlines())
        return list(dict.fromkeys(" ".join(line.split()) for line in masked))

    shown = readme_blocks.block(README)
    end = done.stdout[done.stdout.index("trained ") :]  # before it, the documents may have been prepared
    assert lines_of(shown)[1:] == lines_of(end)
    assert shown.startswith("step 240/240  loss ")
    assert max(map(len, shown.splitlines())) <= 100


def test_make_test():
    done = make("test", "ARGS=-n 0 -p no:cacheprovider tests/model/test_sizes.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


def test_make_tune(demonstration, tmp_path):
    """Runs `make tune` with the documents that the Makefile prepares, the demonstration's model and fewer steps."""
    folder, _ = demonstration
    settings = f"model.weights={folder} optimizer.steps=2 optimizer.warmup_steps=0 run.evaluate_tokens=4000"
    settings += " window.lanes=1 window.window_tokens=2048 data.document_tokens=2048"
    done = make("tune", "--assume-old=runs/finch-tiny/model.pth", f"RUNS={tmp_path}", f"ARGS={settings}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 2/2  loss ") == 3
    states = {"state.pth", "state.st", "state.safetensors"}
    for name, files in (("state", states), ("adapter", set()), ("both", states)):
        has = {path.name for path in (tmp_path / f"finch-tiny-tune-{name}").iterdir()}
        assert has & (states | {"adapter.safetensors"}) == files | (
            {"adapter.safetensors"} if name != "state" else set()
        )
    shown = done.stdout[done.stdout.index("held-out loss in bits per byte, by position") :].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in shown[2:]}
    assert list(rows) == ["before", "state", "adapter", "both"]
    assert int(rows["both"][0].replace(",", "")) > int(rows["adapter"][0].replace(",", "")) > 0
    assert {len(row) for row in rows.values()} == {len(rows["state"]), len(rows["state"]) - 2}
    assert all(rows[name][-1] != rows["before"][-1] for name in ("adapter", "both"))


SLOW = {command for page in PAGES for command in commands(page) if "GPUS=8" in command and "--rehearse" in command}
"""Commands of many processes: for `make test-slow`."""
MISSING = {
    "infctx tune configs/finch-3b-tune-state.yaml data.store=data/world-chats/train data.held_out=null "
    "run.folder=runs/ferry": "finds no GPU here; the run needs one",
    "infctx train configs/finch-3b-64k.yaml": "finds no GPU here; the run needs one",
    "make train CONFIG=configs/finch-3b-64k.yaml": "finds no GPU here; the run needs one",
    "make train CONFIG=configs/finch-3b-64k.yaml GPUS=8 ARGS=window.lanes=8": "finds no GPU here; the run needs 8",
}
"""Commands for a machine with GPUs, and what they say on one without."""
ELSEWHERE = {
    # run by test_make_train and test_make_test above
    "make train",
    "make test",
    # what a shell does
    "source .venv/bin/activate",
    # its file is in the page: tests/tools/test_pages.py
    "infctx train books.yaml optimizer.steps=1000 run.folder=runs/books-longer data.held_out=null",
}


def follow(newcomer, command):
    """Types a command; it must behave as on the page."""
    words = shlex.split(command)
    if words[:2] == ["hf", "download"]:
        check_download(words)
    elif words[0] in ("srun", ".venv/bin/torchrun"):
        check_started_elsewhere(words)
    elif words[0] == "python":
        check_tool(words)
    elif command not in ELSEWHERE:
        code, printed = newcomer.type(command)
        said = MISSING.get(command)
        assert code == (2 if said else 0), (command, printed)
        assert said is None or (NEEDS_GPU in printed and said in printed)


@pytest.mark.parametrize("pages", [PAGES[:1], pytest.param(PAGES, marks=pytest.mark.slow)], ids=["README", "all"])
def test_every_command_and_snippet_in_order(tmp_path, monkeypatch, hub, pages):
    """Types everything in the README, then in the pages of docs/, into a fresh copy after `make train`."""
    newcomer = Newcomer(tmp_path)
    books = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["A long book. " * 50] * 60}), books)
    hub.add("emozilla/pg19", "data/train-00000-of-00001.parquet", books.getvalue(), "datasets")
    monkeypatch.chdir(newcomer.place)
    newcomer.run(["train", "configs/finch-tiny.yaml"])
    followed = set()
    for page in pages:
        newcomer.write(page)
        for command in commands(page):
            if command not in SLOW | followed:
                follow(newcomer, command)
                followed.add(command)
        for snippet in snippets(page) if page.startswith(("README", "docs")) else ():
            exec(compile(snippet, page, "exec"), {})
    programs = {"make", "infctx"} if pages == PAGES[:1] else {"hf", "python", "srun", ".venv/bin/torchrun"}
    assert programs <= {line.split()[0] for line in followed}


@pytest.mark.slow
def test_every_rehearsal_of_many_ranks(tmp_path, monkeypatch):
    newcomer = Newcomer(tmp_path)
    monkeypatch.chdir(newcomer.place)
    for command in sorted(SLOW):
        follow(newcomer, command)


def test_links_lead_somewhere():
    """To a file, and to a heading in it."""
    for page in PAGES:
        document = ROOT / page
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            if target.startswith("https:"):
                continue
            name, _, heading = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), (page, target)
            if heading:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
                assert heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, target


def test_the_picture_is_what_its_tool_draws():
    assert PICTURE.read_text(encoding="utf-8") == draw()


def test_lines_of_pages_are_short():
    for page in [page for page in PAGES if not page.startswith("infctx")]:
        for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
            assert len(line) <= 120 or line.startswith("|"), (page, number)


def test_make_help_lists_every_target():
    done = make("help")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} >= set(targets) - {"help"}

"""The README and the pages of docs/, as typed in by a newcomer.

`commands` are the lines of a page's sh blocks, `snippets` its Python blocks, `files` the blocks with a file's name.
`Newcomer` runs commands in a copy of the repository, in order and in this process; for a `make` target it first gets
the target's commands.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import islice

import pytest

from infctx.documents.example_documents import cpp_documents, python_documents
from infctx.hub.published import PUBLISHED_FILES, PUBLISHED_FOLDERS
from infctx.prepare.prepare import prepare
from infctx.settings.load import load_config

from places import ROOT
from runs import infctx_here

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES += ["docs/benchmarks/README.md", "CONTRIBUTING.md", "infctx/cuda/README.md"]
COPIED = [
    "configs",
    "docs",
    "tools",
    "examples",
    "infctx",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "constraints.txt",
]

SMALLER = {
    # What would take minutes: text in the shipped configurations, and words of commands.
    "steps: 240": "steps: 4",
    "steps: 40": "steps: 2",
    "warmup_steps: 5": "warmup_steps: 1",
    "window_tokens: 16384          #": "window_tokens: 1024           #",
    "window_tokens: 16384\n  lanes: 1\n": "window_tokens: 1024\n  lanes: 1\n",
    "segment_tokens: 1024          #": "segment_tokens: 256            #",
    "optimizer.steps=120": "optimizer.steps=2",
    "optimizer.steps=60": "optimizer.steps=4",
    "optimizer.steps=50": "optimizer.steps=3",
}
ASSUMED = ("data/python/store.json", "data/cpp/store.json", "data/pg19/store.json", "runs/finch-tiny/model.pth")
MESSAGE = "When do you cross?\n"
"""What a newcomer types into a chat."""
NEEDS_GPU = "this machine does not have everything the run needs"


def commands(page):
    """Returns every command of a page's sh blocks, without comments, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [command for line in lines if (command := " ".join(re.sub(r"(^|\s)#.*", "", line).split()))]


def snippets(page):
    """Returns the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def files(page):
    """Returns (name, content) of each block of a page that is a file: its first line names it, as in ```json a.json."""
    return re.findall(r"^```\w+ (\S+)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


class Newcomer:
    """A user in a fresh copy of the repository after `make train`, with smaller settings."""

    def __init__(self, folder):
        self.place = folder / "infctx"
        self.place.mkdir(parents=True)
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.place / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
        for path in (self.place / "configs").glob("*-tiny*.yaml"):
            path.write_text(_smaller(path.read_text(encoding="utf-8")), encoding="utf-8")
        self._prepare_documents()
        self._stand_in = _recording_venv(folder)

    def _prepare_documents(self):
        """Makes a few of the documents that the Makefile would make for the small configurations."""
        for name, documents in (("python", python_documents()), ("cpp", cpp_documents())):
            texts = self.place.parent / name
            texts.mkdir()
            for number, (_, text) in enumerate(islice(documents, 3)):
                (texts / f"{number}.txt").write_text(text, encoding="utf-8")
            prepare([str(texts)], self.place / "data" / name, tokenizer="bytes", held_out=0.5, progress=False)

    def write(self, page):
        """Writes the files of a page."""
        for name, content in files(page):
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")

    def type(self, command):
        """Runs a command to its end; returns (exit code, output)."""
        words = shlex.split(_smaller(command))
        if words[0] == "make":
            done = [self.run(arguments) for arguments in self._commands_of_make(words)]
            return max(code for code, _ in done), "".join(text for _, text in done)
        return self.run(words[1:]) if words[0] in ("infctx", ".venv/bin/infctx") else (None, words)

    def run(self, arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(MESSAGE))
            code, output, errors = infctx_here(*arguments)
        return code, output + errors

    def _commands_of_make(self, words):
        """Returns the arguments of each infctx command that a target would run, as make and the shell build them."""
        record = self._stand_in / "record"
        record.write_text("")
        stamps = [f"--assume-old={name}" for name in ASSUMED]
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        made = subprocess.run(
            [words[0], *stamps, f"VENV={self._stand_in}", *words[1:]],
            cwd=self.place,
            env=kept | {"RECORD": str(record)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        return [line.split("\x1f")[:-1] for line in record.read_text().split("\x1e")[:-1]]


def _smaller(text):
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    return text


def _recording_venv(folder):
    """Makes a .venv whose infctx records its arguments."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    for stamp in ("installed", "installed-test"):
        (venv / stamp).touch()
    script = venv / "bin" / "infctx"
    script.write_text(
        '#!/bin/sh\nfor word in "$@"; do printf "%s\\037" "$word"; done >>"$RECORD"\nprintf "\\036" >>"$RECORD"\n'
    )
    script.chmod(0o755)
    python = venv / "bin" / "python"  # the runs to compare come after the recording
    python.write_text(f'#!/bin/sh\n[ "$1" = tools/compare_tuning.py ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return venv


def check_download(words):
    """Checks that `hf download REPOSITORY [FILE] ...` names a published file."""
    known = {(file.repository, file.name) for file in PUBLISHED_FILES}
    named = words[2], words[3]
    assert named in known or words[2] in PUBLISHED_FOLDERS, words


def check_started_elsewhere(words):
    """Checks that torchrun and srun start a configuration that loads, with enough lanes for many ranks."""
    begin = words.index("infctx") if "infctx" in words else words.index(".venv/bin/infctx")
    command, config, *overrides = words[begin + 1 :]
    assert (command, config) == ("train", "CONFIG")
    load_config(ROOT / "configs" / "finch-3b-64k.yaml", [*overrides, "window.lanes=16"])


def check_tool(words):
    """Checks that `python tools/NAME.py ...` exists; each tool has its test elsewhere."""
    assert (ROOT / words[1]).is_file(), words

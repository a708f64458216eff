"""The README is true: its commands run, its links lead somewhere, its Python works, its figures name their command."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import infctx

from places import ROOT
from runs import infctx_here, write_store

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
SHELL = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
TABLE = re.findall(r"^\| `(infctx [^`]+)`", README, re.M)

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
}


def make(*arguments, cwd=ROOT):
    """A make target with this environment as its .venv, taken as set up."""
    stamps = [f"--assume-old={sys.prefix}/{name}" for name in ("installed", "installed-test")]
    command = ["make", *stamps, *arguments, f"VENV={sys.prefix}"]
    # `make test` hands its own variables and options on; these are commands of their own.
    environment = {name: value for name, value in os.environ.items() if name not in HANDED_ON}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False, env=environment)


def test_the_first_screen_has_the_two_commands_and_one_table():
    first_screen = README[: README.index("## ")]
    assert SHELL[:2] == ["make train", "make test"]
    assert "tokens in the window | peak memory | tokens/s" in first_screen
    assert "tools/bench_memory.py" in first_screen


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """`make train` as the README has it, with fewer steps, into a folder of the test's own."""
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


def test_make_test():
    done = make("test", "ARGS=-n 0 -p no:cacheprovider tests/model/test_sizes.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


def test_make_prepare_and_the_big_configuration(tmp_path):
    prepare, train = SHELL[2:4]
    (tmp_path / "books").mkdir()
    for number in range(3):
        (tmp_path / "books" / f"{number}.txt").write_text(f"The {number}th book.\n" * 50)
    prepare = prepare.replace("=books/", f"={tmp_path / 'books'}").replace("=data/books", f"={tmp_path / 'store'}")
    done = make(*shlex.split(prepare)[1:])
    assert done.returncode == 0, done.stderr
    assert {"train.bin", "held_out.bin"} <= {path.name for path in (tmp_path / "store").iterdir()}
    done = make(*shlex.split(train)[1:])
    assert done.returncode == 2
    assert "this machine lacks what the run needs: model.weights: there is no models/rwkv6-3b.pth" in done.stderr


def test_make_tune(demonstration, tmp_path):
    """`make tune` as the README has it, with the model of the demonstration and fewer steps."""
    folder, _ = demonstration
    settings = f"model.weights={folder} run.folder={tmp_path / 'run'} optimizer.steps=6 run.evaluate_tokens=4000"
    done = make("tune", "--assume-old=runs/finch-tiny/model.pth", f"ARGS={settings}")
    assert done.returncode == 0, done.stderr
    assert "step 6/6  loss " in done.stderr
    assert "held-out loss by position in data/cpp/held_out, bits a byte" in done.stdout
    assert "--- with the state\n" in done.stdout
    assert {"state.pth", "state.st", "state.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    state = f"STATE={tmp_path / 'run' / 'state.pth'}"
    done = make("generate", f"MODEL={folder}", state, "PROMPT=User: ", "ARGS=--tokens 5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("User: ")
    done = make("tune", "CONFIG=configs/finch-3b-tune-state.yaml")
    assert done.returncode == 2
    assert "this machine lacks what the run needs: model.weights: there is no models/rwkv6-3b.pth" in done.stderr


def test_every_command_of_the_table(demonstration, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder, _ = demonstration
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("One.\n")
    (tmp_path / "books" / "b.txt").write_text("Two.\n")
    (tmp_path / "notes.jsonl.zst").write_bytes(__import__("zstandard").compress(b'{"text": "Three."}\n'))
    (tmp_path / "tune").mkdir()
    tuned = tmp_path / "tune"
    store = write_store(tmp_path / "cpp")
    changed = {
        "runs/finch-tiny-tune-state": str(tuned),
        "state.st": str(tmp_path / "state.st"),
        "RUN": str(tuned),
        "merged.pth": str(tmp_path / "merged.pth"),
        "books/": str(tmp_path / "books"),
        "notes.jsonl.zst": str(tmp_path / "notes.jsonl.zst"),
        "data/books": str(tmp_path / "store"),
        "runs/finch-tiny": str(folder),
        "finch-tiny.pth": str(tmp_path / "finch-tiny.pth"),
        "optimizer.steps=50": "optimizer.steps=6",
    }
    assert len(TABLE) == 9
    for command in sorted(TABLE, key=lambda command: "RUN" in command):
        words = [changed.get(word, word) for word in shlex.split(command)][1:]
        more = {
            "train": [f"run.folder={folder}", "run.evaluate_tokens=0"],
            "tune": [f"run.folder={tuned}", "run.evaluate_tokens=0", "optimizer.steps=6"],
            "evaluate": ["--max-tokens", "5000"],
        }
        more["tune"] += [f"model.weights={folder}", f"data.store={store}", "data.held_out=null"]
        words += more.get(words[0], [])
        code, _, errors = infctx_here(*words)
        assert code == 0, (command, errors)


def test_make_with_many_gpus():
    """The two targets of the section, by what they say: `make train` asks for as many GPUs as are named."""
    (train,) = [line for line in SHELL if "GPUS=8" in line and line.startswith("make train")]
    done = make(*shlex.split(train)[1:])
    assert done.returncode == 2
    assert "run.device: cuda, and torch" in done.stderr
    assert "finds no GPU here; the run needs 8 of them with" in done.stderr
    done = make("plan", *shlex.split(train)[2:-1], "ARGS=window.lanes=8 --device-gb 80")
    assert done.returncode == 0, done.stderr
    assert "ranks     8 on 1 node\n" in done.stdout
    assert "of the 80.0 GB of a GPU" in done.stdout


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), (document, target)


def test_the_python_example(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    infctx.save_weights(infctx.build_model(version=6, num_layers=2, width=128, vocab_size=257), tmp_path / "model.pth")
    for name, here in (("rwkv6-1b6.pth", "model.pth"), ("out.pth", "out.pth")):
        example = example.replace(name, str(tmp_path / here))
    infctx.save_state(infctx.load_model(tmp_path / "model.pth").initial_state(1), tmp_path / "state.pth")
    example = example.replace('"state.', f'"{tmp_path}/state.')
    names = {"tokens": torch.randint(257, (2, 40)), "targets": torch.randint(257, (2, 40)), "batch_size": 3}
    names |= {name: torch.randn(1, 5, 2, 16) for name in "rkv"}
    names |= {"w": -torch.rand(1, 5, 2, 16), "u": torch.randn(2, 16)}
    exec(example.replace("w, u, state)", "w, u, torch.zeros(1, 2, 16, 16))"), names)
    assert infctx.load_model(tmp_path / "out.pth").sizes.width == 128


def test_the_python_example_of_state_tuning(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "state-tuning.md").read_text(), re.S)
    model = infctx.build_model(version=6, num_layers=2, width=128, vocab_size=257)
    infctx.save_weights(model, tmp_path / "rwkv6-3b.pth")
    torch.nn.init.normal_(model.add_initial_state().wkv)
    infctx.save_state(model.initial_state(1), tmp_path / "state.pth")
    for name in ("rwkv6-3b.pth", "state.pth", "state.st"):
        example = example.replace(f'"{name}"', repr(str(tmp_path / name)))
    names = {"tokens": torch.randint(257, (1, 20))}
    exec(example, names)
    assert torch.equal(names["model"].initial_wkv, model.initial_wkv)
    assert (tmp_path / "state.st").is_file()


def test_make_help_lists_every_target():
    done = make("help")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} >= set(targets) - {"help"}

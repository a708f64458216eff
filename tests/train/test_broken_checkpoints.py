"""A checkpoint with one wrong file whose hash agrees: every command prints one line and no traceback."""

import json
import shutil

import pytest
import torch

from broken import changed, rewritten
from places import FIXTURES
from runs import infctx_here

OLDER = FIXTURES / "runs-of-0.1.0"
STEP = "checkpoints/step-000004"
COMMANDS = {
    "evaluate": ["evaluate", "{checkpoint}", "held_out", "--max-tokens=64", "--segment-tokens=32"],
    "export": ["export", "{checkpoint}", "out.safetensors"],
    "plan": ["plan", "tuned.yaml", "model.weights={checkpoint}"],
    "resume": ["{train}", "{name}.yaml", "optimizer.steps=5", "run.evaluate_tokens=0"],
}
ALONE = ["distributed.devices=1", "distributed.strategy=auto"]


def index(**weight_map):
    return json.dumps({"weight_map": weight_map})


BROKEN = [  # run, file, its content, commands that refuse it; the others do not read it
    ("trained", "model.safetensors", changed(**{"emb.weight": torch.ones(33, 16).int()}), "evaluate export resume"),
    ("trained", "model.safetensors", changed(**{"emb.weight": torch.ones(33, 15)}), "evaluate export plan resume"),
    ("trained", "model.safetensors", changed(**{"emb.weight": None}), "evaluate export plan resume"),
    ("trained", "model.safetensors", changed(**{"a\x1b[31m": torch.ones(3)}), "evaluate export plan resume"),
    ("trained", "model.safetensors", changed(deep=torch.ones([1] * 500)), "evaluate export plan resume"),
    ("trained", "model.safetensors", "text", "evaluate export plan resume"),
    ("trained", "carry.safetensors", changed(wkv=torch.ones(2, 2, 2, 8, 8, dtype=torch.uint8)), "resume"),
    ("trained", "optimizer.safetensors", changed(**{"embedding.weight__exp_avg": torch.ones(33, 16).half()}), "resume"),
    ("trained", "progress.json", '{"step": 4, "position": {"next": "\\u001b[31m"}, "num_tokens": 1024}', "resume"),
    ("trained", "config.yaml", "- a", "resume"),
    ("tuned", "state.safetensors", changed(wkv=torch.ones(2, 2, 8, 7)), "evaluate export resume"),
    ("tuned", "state.safetensors", changed(wkv=torch.ones(2, 2, 8, 8, dtype=torch.int8)), "evaluate export resume"),
    ("tuned", "carry.safetensors", changed(unit_wkv=None), "resume"),
    ("tuned", "config.yaml", 'model: {weights: "\\e[31mred"}', "evaluate plan"),
    ("tuned", "config.yaml", "model: {weights: " + "a/" * 5000 + "}", "evaluate plan"),
    ("tuned", "config.yaml", f"model: {{weights: tuned/{STEP}}}", "evaluate plan"),
    ("two-ranks", "model.safetensors.index.json", index(a="\x1b[31m"), "evaluate export plan resume"),
    ("two-ranks", "model.safetensors.index.json", index(a=3), "evaluate export plan resume"),
    ("two-ranks", "model.safetensors.index.json", index(a=".."), "evaluate export plan resume"),
]


@pytest.mark.parametrize(("name", "file", "content", "refuse"), BROKEN)
def test_every_command_prints_one_line(tmp_path, monkeypatch, name, file, content, refuse):
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    checkpoint = tmp_path / "older" / name / STEP
    rewritten(checkpoint, file, content)
    words = {"checkpoint": f"{name}/{STEP}", "name": name, "train": "tune" if name == "tuned" else "train"}
    for command, arguments in COMMANDS.items():
        alone = ALONE if (name, command) == ("two-ranks", "resume") else []
        code, _, errors = infctx_here(*(argument.format(**words) for argument in arguments), *alone)
        line = errors.splitlines()[-1] if errors else ""
        assert code == (2 if command in refuse.split() else 0), (command, errors)
        assert code == 0 or (line.startswith("infctx: ") and line.isprintable() and len(line) < 500)

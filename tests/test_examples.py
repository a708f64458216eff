"""The examples run as they are, with the public names of infctx alone."""

import ast
import re
import runpy
import sys

import pytest
import torch

import infctx

from places import ROOT
from tiny_models import random_model

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TEXT = "The rain in Spain stays mainly in the plain. " * 30


@pytest.fixture
def tuned(tmp_path, monkeypatch, capsys):
    """What examples/tune_state.py prints for a tiny random model, and the state that it writes."""
    infctx.save_weights(random_model(6, vocab_size=257), tmp_path / "model.pth")
    (tmp_path / "book.txt").write_text(TEXT)
    options = "book.txt --model model.pth --output state.pth --steps 20 --learning-rate 1 --window-tokens 300"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune_state.py", *options.split()])
    runpy.run_path(str(ROOT / "examples" / "tune_state.py"), run_name="__main__")
    return capsys.readouterr().out, tmp_path / "state.pth"


def test_tuning_a_state(tuned):
    output, path = tuned
    before, after = (float(re.search(rf"loss {when}: +([0-9.]+)", output)[1]) for when in ("before", "after"))
    assert after < before - 0.1
    model = infctx.load_model(path.with_name("model.pth"))
    state = infctx.load_state(path, model)
    ids = torch.tensor(infctx.tokenizer("bytes").encode(TEXT[:300]).astype("int64"))[None]
    losses = []
    for start in (None, state):
        hidden, _ = model(ids[:, :-1], start)
        losses.append(torch.nn.functional.cross_entropy(model.logits(hidden)[0, 16:], ids[0, 17:]).item())
    assert losses[1] < losses[0] - 0.1  # from the file, as in the program
    tensors = torch.load(path, weights_only=True)  # what other programs read: the state of each layer, nothing else
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"blocks.{layer}.att.time_state": (3, 8, 8) for layer in range(2)
    }


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_use_public_names_alone(example):
    tree = ast.parse(example.read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert "infctx" in imported and not [name for name in imported if name.startswith("infctx.")]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "infctx"
    }
    assert used and used <= set(infctx.__all__)

"""The start of a run: what is read, and how often."""

from collections import Counter

import pytest

from infctx.config import load_config
from infctx.distributed import launch
from infctx.formats import checkpoint_folder
from infctx.formats.checkpoint_folder import checkpoints
from infctx.train.loop import train

from runs import write_config


@pytest.fixture
def hashed(monkeypatch):
    """How often each file was read for its hash."""
    counts, read = Counter(), checkpoint_folder.size_and_hash

    def counting(file):
        counts[file] += 1
        return read(file)

    monkeypatch.setattr(checkpoint_folder, "size_and_hash", counting)
    return counts


@pytest.mark.parametrize("learn", ["weights", "initial_state"])
def test_a_checkpoint_is_read_for_its_hash_once_a_start(tmp_path, hashed, learn):
    short = {"optimizer__steps": 2, "optimizer__warmup_steps": 1}
    train(load_config(write_config(tmp_path, **short)))
    (source,) = checkpoints(tmp_path / "run" / "checkpoints")
    model = {"weights": str(tmp_path / "run"), "learn": learn}
    config = load_config(write_config(tmp_path, **short, model=model, run__folder=str(tmp_path / "next")))
    assert not hashed

    launch._refuse(config)  # in the launcher of many ranks, whose rank 0 reads it then
    assert not hashed
    train(config)
    files = {file for file in source.iterdir() if file.name != "manifest.json"}
    assert hashed == dict.fromkeys(files, 1)

    hashed.clear()
    (own,) = checkpoints(config.run.checkpoints)
    config = load_config(tmp_path / "config.yaml", ["optimizer.steps=3"])
    train(config)  # goes on, and needs the source's weights where they stay as they are
    read = {file for file in own.iterdir() if file.name != "manifest.json"} | (files if learn != "weights" else set())
    assert hashed == dict.fromkeys(read, 1)

"""The start of a run: which files are read, and how often."""

import json
from collections import Counter

import pytest

import infctx
from infctx.distributed import launch
from infctx.errors import InputError
from infctx.formats import checkpoint_folder
from infctx.formats.checkpoint_folder import checkpoints
from infctx.settings.load import load_config
from infctx.train.loop import train

from runs import infctx_here, write_config, write_store
from tiny_models import random_model


@pytest.fixture
def hashed(monkeypatch):
    """Counts how often each file is read for its hash."""
    counts, read = Counter(), checkpoint_folder.size_and_hash

    def counting(file):
        counts[file] += 1
        return read(file)

    monkeypatch.setattr(checkpoint_folder, "size_and_hash", counting)
    return counts


@pytest.mark.parametrize("learn", ["weights", "initial_state"])
def test_each_start_hashes_a_checkpoint_once(tmp_path, hashed, learn):
    short = {"optimizer__steps": 2, "optimizer__warmup_steps": 1}
    train(load_config(write_config(tmp_path, **short)))
    (source,) = checkpoints(tmp_path / "run" / "checkpoints")
    model = {"weights": str(tmp_path / "run"), "learn": learn}
    config = load_config(write_config(tmp_path, **short, model=model, run__folder=str(tmp_path / "next")))
    assert not hashed

    launch._refuse(config)  # the launcher of several ranks; rank 0 reads it later
    assert not hashed
    train(config)
    files = {file for file in source.iterdir() if file.name != "manifest.json"}
    assert hashed == dict.fromkeys(files, 1)

    hashed.clear()
    (own,) = checkpoints(config.run.checkpoints)
    config = load_config(tmp_path / "config.yaml", ["optimizer.steps=3"])
    train(config)  # resumes, and needs the source's weights only if they are frozen
    read = {file for file in own.iterdir() if file.name != "manifest.json"} | (files if learn != "weights" else set())
    assert hashed == dict.fromkeys(read, 1)


def made_with(folder, tokenizer, splits=("train", "held_out")):
    """Writes the file that `infctx prepare` writes next to the stores."""
    content = {"tokenizer": tokenizer, "vocab_size": 257, "splits": dict.fromkeys(splits, {})}
    (folder / "store.json").write_text(json.dumps(content))


@pytest.mark.parametrize("command", ["train", "tune", "evaluate"])
def test_a_store_of_another_tokenizer_is_refused(tmp_path, command):
    """A model of the World tokenizer would learn bytes, or be evaluated on them, without a warning."""
    weights = tmp_path / "world.pth"
    infctx.save_weights(random_model(6, num_layers=1, width=16, vocab_size=65536), weights)
    learn = {"learn": "initial_state"} if command == "tune" else {}
    config = write_config(tmp_path, model={"weights": str(weights)} | learn)
    arguments = ("evaluate", weights, tmp_path / "held_out") if command == "evaluate" else (command, config)
    made_with(tmp_path, "bytes")
    code, _, errors = infctx_here(*arguments)
    assert code == 2 and sum(line.startswith("infctx: ") for line in errors.splitlines()) == 1
    assert "its tokenizer is bytes, and the model's is world" in errors
    assert "prepare it with --tokenizer world, or name another model" in errors
    for tokenizer, splits in (("world", ("train", "held_out")), ("bytes", ("other",))):
        made_with(tmp_path, tokenizer, splits)
        few = ["optimizer.steps=1", "optimizer.warmup_steps=0", "run.evaluate_tokens=0"]
        few += [f"run.folder={tmp_path / tokenizer}"]
        assert infctx_here(*arguments, *(few if command != "evaluate" else []))[0] == 0


@pytest.mark.parametrize("content", ["", "[]", "3", "[" * 100_000, '{"splits": 3}'])
def test_a_damaged_summary_is_one_line(tmp_path, content):
    config = write_config(tmp_path)
    (tmp_path / "store.json").write_text(content)
    code, _, errors = infctx_here("train", config)
    assert code == 2 and "store.json: not what `infctx prepare` writes; make the store again, or remove it" in errors


def test_a_store_that_was_replaced_by_one_of_the_same_sizes_is_noticed(tmp_path):
    config = load_config(write_config(tmp_path, optimizer__steps=3))
    train(config)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").unlink()
    write_store(tmp_path / "train", seed=99)
    longer = load_config(tmp_path / "config.yaml", ["optimizer.steps=4"])
    with pytest.raises(
        InputError, match="data.store: .*train holds other documents than when the checkpoint was saved"
    ):
        train(longer)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"train{suffix}").unlink()
    write_store(tmp_path / "train", seed=len("train"))
    train(longer)


def test_the_folder_has_every_setting_of_the_last_start(tmp_path, caplog):
    changes = {"optimizer__steps": 2, "optimizer__warmup_steps": 0, "run__evaluate_tokens": 0}
    path, kept = write_config(tmp_path, **changes), tmp_path / "run" / "config.yaml"
    train(load_config(path))
    assert load_config(kept) == load_config(path)
    train(load_config(path, ["optimizer.steps=3"]))
    assert load_config(kept) == load_config(path, ["optimizer.steps=3"])
    with pytest.raises(InputError):  # a refused start changes nothing
        train(load_config(path, ["optimizer.steps=4", "window.lanes=4"]))
    assert load_config(kept).optimizer.steps == 3
    train(load_config(kept, ["optimizer.steps=4"]))  # it is a configuration like any other
    assert load_config(kept).optimizer.steps == 4
    mine = "# mine\n" + path.read_text()
    kept.write_text(mine)
    train(load_config(path, ["optimizer.steps=5"]))
    assert kept.read_text() == mine
    assert (
        "config.yaml: was not written by infctx, so it stays; the checkpoints have this run's settings" in caplog.text
    )

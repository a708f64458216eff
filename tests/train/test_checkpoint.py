"""Checkpoints: whole or not there, damage found, everything that a run needs inside."""

import json

import pytest
import torch

import infctx
from infctx.config import OptimizerSettings, load_config
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import checkpoints, find_damage, newest_checkpoint, remove_leftovers
from infctx.formats.model_files import find_model
from infctx.model.state import State
from infctx.train import checkpoint as checkpoint_module
from infctx.train.checkpoint import load_progress, save_checkpoint
from infctx.train.optimizer import make_optimizer
from infctx.train.run import Progress

from runs import plain_engine, run_of, write_config


def trained(seed=0):
    """A model, its optimizer behind two steps, and a carried state."""
    model = infctx.build_model(version=6, num_layers=2, width=32, head_size=16, vocab_size=64, seed=seed)
    model.add_initial_state()
    optimizer = make_optimizer(model, OptimizerSettings(steps=20, peak_lr=1e-2))
    tokens = torch.randint(64, (2, 40))
    for _ in range(2):
        _, carry = infctx.window_backward(model, tokens, tokens, 16)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, carry


@pytest.fixture
def config(tmp_path):
    return load_config(write_config(tmp_path))


def save(config, step, seed=0):
    model, optimizer, carry = trained(seed)
    return save_checkpoint(run_of(model, optimizer, config, carry, Progress(step, {"next": step}, 7 * step)))


def test_everything_comes_back(config):
    model, optimizer, carry = trained()
    torch.manual_seed(5)
    progress = Progress(4, {"next": 9, "begins": [0, 3]}, 28)
    path = save_checkpoint(run_of(model, optimizer, config, carry, progress))
    drawn = torch.rand(3)
    back = infctx.load_model(path)
    other = make_optimizer(back, OptimizerSettings(steps=20, peak_lr=1e-2))
    torch.manual_seed(6)
    state, progress = load_progress(path, plain_engine(back, other))
    assert torch.equal(torch.rand(3), drawn)
    assert progress == Progress(4, {"next": 9, "begins": [0, 3]}, 28)
    assert all(torch.equal(a, b) for a, b in zip(state, carry, strict=True))
    theirs = dict(model.named_parameters())
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, theirs[name])
        for key, value in optimizer.state[theirs[name]].items():
            assert torch.equal(other.state[parameter][key], value), (name, key)
    assert (path / "config.yaml").read_text().startswith("model:")


def test_only_the_last_are_kept(config):
    for step in range(1, 6):
        save(config, step)
    assert [path.name for path in checkpoints(config.run.checkpoints)] == ["step-000003", "step-000004", "step-000005"]
    assert not list(config.run.checkpoints.glob(".step*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "carry.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damage_is_found_and_the_one_before_is_used(config, caplog, name, damage):
    before, torn = save(config, 1), save(config, 2)
    file = torn / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert name in find_damage(torn)
    assert newest_checkpoint(config.run.checkpoints) == before
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert f"{torn} is torn ({name}" in caplog.records[0].message


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]", '{"model.safetensors": 3}'])
def test_a_manifest_that_is_not_whole(config, content):
    path = save(config, 1)
    (path / "manifest.json").unlink() if content is None else (path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="no whole checkpoint is left"):
        newest_checkpoint(config.run.checkpoints)


def test_a_save_that_fails_leaves_the_last_one_alone(config, monkeypatch):
    kept = save(config, 1)

    def full(*_):
        raise OSError(28, "No space left on device", "optimizer.safetensors")

    monkeypatch.setattr(checkpoint_module, "write_moments", full)
    with pytest.raises(OSError, match="No space left"):
        save(config, 2)
    assert sorted(config.run.checkpoints.glob(".*")) == []
    assert newest_checkpoint(config.run.checkpoints) == kept


def test_leftovers_of_a_killed_run_are_removed(config):
    kept = save(config, 1)
    (config.run.checkpoints / ".step-000002.99.tmp").mkdir()
    (config.run.checkpoints / ".step-000002.99.tmp" / "model.safetensors").write_bytes(b"half")
    remove_leftovers(config.run.checkpoints)
    assert list(config.run.checkpoints.glob(".*")) == []
    assert newest_checkpoint(config.run.checkpoints) == kept


def test_no_checkpoint_is_no_error_but_no_model_is(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        find_model(tmp_path)


def test_a_model_is_found_in_a_run_a_checkpoint_and_a_file(tmp_path, config):
    path = save(config, 1)
    assert find_model(tmp_path / "run") == (path, None)
    assert find_model(path) == (path, None)
    assert find_model(tmp_path / "other.pth") == (tmp_path / "other.pth", None)


def test_the_manifest_names_every_file(config):
    path = save(config, 1)
    listed = json.loads((path / "manifest.json").read_text())
    assert set(listed) | {"manifest.json"} == {file.name for file in path.iterdir()}


def test_states_of_several_lanes(config):
    model, optimizer, _ = trained()
    carry = State(*(torch.randn_like(part) for part in model.initial_state(5).detach()))
    path = save_checkpoint(run_of(model, optimizer, config, carry, Progress(1, None, 0)))
    state, progress = load_progress(path, plain_engine(model, optimizer))
    assert progress.position is None
    assert all(torch.equal(a, b) for a, b in zip(state, carry, strict=True))

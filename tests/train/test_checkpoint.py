"""Checkpoints: complete or absent, with everything a run needs, and damage is found."""

import json
import shutil

import pytest
import torch

import infctx
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import (
    checkpoints,
    find_damage,
    newest_checkpoint,
    remove_leftovers,
    saved_settings,
)
from infctx.formats.model_files import find_model
from infctx.model.state import State
from infctx.settings.load import load_config
from infctx.settings.optimizer import OptimizerSettings
from infctx.train import checkpoint as checkpoint_module
from infctx.train.checkpoint import load_progress, load_units, save_checkpoint
from infctx.train.optimizer import make_optimizer
from infctx.train.run import Progress

from broken import changed, rewritten
from places import FIXTURES
from runs import plain_engine, run_of, write_config
from tiny_models import random_model


def trained(seed=0):
    """Returns a model, its optimizer after two steps, and a carried state."""
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


def test_everything_is_restored(config):
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


def test_only_the_newest_are_kept(config):
    for step in range(1, 6):
        save(config, step)
    assert [path.name for path in checkpoints(config.run.checkpoints)] == ["step-000003", "step-000004", "step-000005"]
    assert not list(config.run.checkpoints.glob(".step*"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "carry.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damage_is_found_and_the_previous_checkpoint_is_used(config, caplog, name, damage):
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
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "\n" not in warning and f"{torn} is torn ({name}" in warning


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]", '{"model.safetensors": 3}'])
def test_a_damaged_manifest(config, content):
    path = save(config, 1)
    (path / "manifest.json").unlink() if content is None else (path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="no whole checkpoint is left"):
        newest_checkpoint(config.run.checkpoints)


def test_a_failed_save_leaves_the_previous_checkpoint_alone(config, monkeypatch):
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


def test_no_checkpoint_is_fine_but_no_model_is_an_error(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        find_model(tmp_path)


def test_a_model_is_found_in_a_run_a_checkpoint_and_a_file(tmp_path, config):
    path = save(config, 1)
    assert find_model(tmp_path / "run") == (path, None, ())
    assert find_model(path) == (path, None, ())
    assert find_model(tmp_path / "other.pth") == (tmp_path / "other.pth", None, ())


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


def test_files_that_the_manifest_does_not_list_are_ignored(config):
    """Stray files with plausible names."""
    model, optimizer, carry = trained()
    path = save_checkpoint(run_of(model, optimizer, config, carry, Progress(1, None, 0)))
    other = save(config, 2, seed=7)
    for file, stray in (
        ("carry", "carry-old"),
        ("carry", "carry-00001-of-00001"),
        ("optimizer", "optimizer_old"),
        ("optimizer", "optimizer-00001-of-00001"),
    ):
        shutil.copy(other / f"{file}.safetensors", path / f"{stray}.safetensors")
    assert find_damage(path) is None
    back = infctx.load_model(path)
    theirs = make_optimizer(back, OptimizerSettings(steps=20, peak_lr=1e-2))
    state, progress = load_progress(path, plain_engine(back, theirs))
    assert progress.step == 1 and all(torch.equal(a, b) for a, b in zip(state, carry, strict=True))
    for mine, its in zip(model.parameters(), back.parameters(), strict=True):
        assert torch.equal(theirs.state[its]["exp_avg"], optimizer.state[mine]["exp_avg"])


def test_a_stray_model_next_to_shares_is_ignored(tmp_path):
    shutil.copytree(FIXTURES / "runs-of-0.1.0" / "two-ranks" / "checkpoints" / "step-000004", tmp_path / "step-000004")
    truth = infctx.load_model(tmp_path / "step-000004")
    infctx.save_weights(random_model(6), tmp_path / "step-000004" / "model.safetensors")
    found = infctx.load_model(tmp_path / "step-000004")
    assert all(torch.equal(*pair) for pair in zip(found.parameters(), truth.parameters(), strict=True))


@pytest.mark.parametrize("lost", ["optimizer.safetensors", "carry.safetensors", "progress.json", "config.yaml"])
def test_a_manifest_that_lists_too_little_is_damage(config, lost):
    path = save(config, 1)
    entries = json.loads((path / "manifest.json").read_text())
    del entries[lost]
    (path / lost).unlink()
    (path / "manifest.json").write_text(json.dumps(entries))
    assert lost.partition(".")[0] in find_damage(path)


DEEP = "[" * 100_000
DAMAGES = [
    ("progress.json", content)
    for content in ("", "[]", "3", "{}", DEEP, '{"step": "1", "position": null, "num_tokens": 2}')
] + [
    ("progress.json", '{"step": -1, "position": null, "num_tokens": 2}'),
    ("progress.json", '{"step": true, "position": null, "num_tokens": 2}'),
    ("progress.json", '{"step": 1, "position": [1], "num_tokens": 2}'),
    ("carry.safetensors", changed(wkv=None)),
    ("carry.safetensors", changed(wkv=torch.zeros(3))),
    ("carry.safetensors", changed(time_shift=torch.zeros(2, 2, 5))),
    ("carry.safetensors", changed(wkv=torch.zeros(2, 2, 2, 16, 16, dtype=torch.int32))),
    ("carry.safetensors", changed(time_shift=torch.zeros(2, 2, 32, dtype=torch.float64))),
    ("carry.safetensors", lambda file: file.write_bytes(bytes(40))),
    ("progress.json", '{"step": 1, "position": {"num_lanes": 3}, "num_tokens": 2}'),
    ("progress.json", '{"step": 1, "position": {"next": 1.5}, "num_tokens": 2}'),
    ("progress.json", '{"step": 1e99, "position": null, "num_tokens": 2}'),
    ("progress.json", '{"step": 1, "position": null, "num_tokens": ' + "9" * 5000 + "}"),
    ("progress.json", '{"step": NaN, "position": null, "num_tokens": 2}'),
    ("progress.json", '{"step": "' + "x" * 10_000_000 + '", "position": null, "num_tokens": 2}'),
    ("carry.safetensors", changed(random_cpu=None)),
    ("carry.safetensors", changed(random_cpu=torch.zeros(4))),
    ("carry.safetensors", changed(random_cpu=torch.zeros(4, dtype=torch.uint8))),
    ("optimizer.safetensors", changed(**{"embedding.weight__exp_avg": None})),
    ("optimizer.safetensors", changed(**{"embedding.weight__step": None})),
    ("optimizer.safetensors", changed(**{"embedding.weight__exp_avg": torch.zeros(3)})),
    ("optimizer.safetensors", changed(**{"embedding.weight__exp_avg": torch.zeros(64, 32, dtype=torch.int32)})),
    ("optimizer.safetensors", changed(**{"embedding.weight__exp_avg": torch.zeros(64, 32, dtype=torch.float64)})),
    ("optimizer.safetensors", changed(**{"embedding.weight__step": torch.tensor(-3.0)})),
    ("optimizer.safetensors", changed(**{"embedding.weight__step": torch.tensor(float("nan"))})),
]


@pytest.mark.parametrize(("name", "content"), DAMAGES)
def test_wrong_content_with_the_right_hash_is_one_line(config, name, content):
    path = save(config, 1)
    rewritten(path, name, content)
    assert find_damage(path) is None
    back = infctx.load_model(path)
    other = make_optimizer(back, OptimizerSettings(steps=20, peak_lr=1e-2))
    remedy = "copy it again|remove this checkpoint to resume from the one before"
    with pytest.raises(InputError, match=rf"step-000001[^\n]*; ({remedy})$") as refused:
        load_progress(path, plain_engine(back, other))
    assert len(str(refused.value)) < 300 + len(str(path))


@pytest.mark.parametrize("part", ["unit_wkv", "unit_time_shift"])
@pytest.mark.parametrize(
    "unit", [None, torch.ones(3), torch.ones(()), torch.ones(2, 1, dtype=torch.int32), -torch.ones(2, 1)]
)
def test_units_of_a_state_that_do_not_fit_its_carry(tmp_path, part, unit):
    path = tmp_path / "step-000004"
    shutil.copytree(FIXTURES / "runs-of-0.1.0" / "tuned" / "checkpoints" / "step-000004", path)
    assert load_units(path) is not None
    rewritten(path, "carry.safetensors", changed(**{part: unit}))
    with pytest.raises(InputError, match=r"step-000004: the units of its state do not fit its carry; remove"):
        load_units(path)


@pytest.mark.parametrize("content", ["", "- a\n", "model: 3\n", "a: &a [*a]\n", "x" * 2_000_000])
def test_damaged_settings_are_one_line(config, content):
    path = save(config, 1)
    rewritten(path, "config.yaml", content)
    with pytest.raises(InputError, match=r"step-000001.config.yaml") as refused:
        saved_settings(path)
    assert len(str(refused.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    "content", [DEEP, '{"../x": [1, "a"]}', '{"/etc/passwd": [1, "a"]}', '{"a": [true, "a"]}', '{"a\\n": [1, "a"]}']
)
def test_a_manifest_with_wrong_content_is_not_readable(config, content):
    path = save(config, 1)
    (path / "manifest.json").write_text(content)
    assert find_damage(path) == "manifest.json is not readable"
    with pytest.raises(InputError, match=r"manifest.json: is not readable \(.*\); copy the checkpoint again$"):
        infctx.load_model(path)

"""Runs of an older infctx resume, and their files can be read."""

import json
import shutil

import pytest

import infctx
from infctx.formats.checkpoint_folder import find_damage
from infctx.settings.load import load_config
from infctx.train.checkpoint import changed_settings
from infctx.train.loop import train

from places import FIXTURES
from runs import losses_of

OLDER = FIXTURES / "runs-of-0.1.0"
RUNS = ("trained", "eagle", "tuned", "tuned-matrices", "two-ranks")


@pytest.fixture
def older(tmp_path, monkeypatch):
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    return tmp_path / "older"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_from_its_checkpoint(older, name):
    lines = (older / name / "steps.jsonl").read_text().splitlines()
    truth = [json.loads(line)["loss"] for line in lines]
    assert find_damage(older / name / "checkpoints" / "step-000004") is None
    alone = ["distributed.devices=1", "distributed.strategy=auto"] if name == "two-ranks" else []
    config = load_config(older / f"{name}.yaml", alone)
    if not alone:  # settings that 0.1.0 did not know are at their defaults
        changed = changed_settings(older / name / "checkpoints" / "step-000004", config)
        assert [line for line in changed if not line.startswith("model.weights ")] == []  # they moved with the folder
    train(config)
    found = losses_of(older / name)
    assert found[:4] == truth[:4] and found[4:] == pytest.approx(truth[4:], rel=1e-6)


def test_files_of_weights_and_states_are_read(older):
    model = infctx.load_model(older / "trained" / "model.pth")
    assert infctx.load_model(older / "two-ranks" / "checkpoints" / "step-000004").sizes == model.sizes
    states = [infctx.load_state(older / "tuned-matrices" / f"state.{form}", model) for form in ("safetensors", "pth")]
    assert states[0].wkv.any() and all((one == other).all() for one, other in zip(*states, strict=True))
    halves = infctx.load_state(older / "tuned-matrices" / "state.st", model)
    assert (halves.wkv - states[0].wkv).abs().max() <= 1e-3 * states[0].wkv.abs().max()
    shifted = infctx.load_state(older / "tuned" / "state.safetensors", model)
    assert shifted.wkv.any() and shifted.time_shift.any() and shifted.channel_shift.any()

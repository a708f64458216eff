"""Runs whose weights are named on the hub: planned, rehearsed, trained, resumed without a network."""

import shutil

import pytest
import torch
import yaml
from huggingface_hub import constants

import infctx
from infctx.errors import InputError
from infctx.plan.plan import make_plan
from infctx.settings.load import load_config

from forked import Forked, run_infctx
from hub_server import environment
from runs import infctx_here, losses_of, write_config
from tiny_models import random_model

NAME = "some/finch:finch.pth"


@pytest.fixture
def config(hub, tmp_path):
    """A run of two steps, with its weights on the hub."""
    model = random_model(6, num_layers=2, width=32, head_size=16, vocab_size=257, noise=0.05)
    infctx.save_weights(model, tmp_path / "finch.pth", torch.bfloat16)
    hub.add("some/finch", "finch.pth", (tmp_path / "finch.pth").read_bytes())
    small = {"optimizer__steps": 2, "optimizer__warmup_steps": 1, "run__save_every_steps": 2, "run__evaluate_tokens": 0}
    path = write_config(tmp_path, **small)
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(content | {"model": {"weights": NAME}}))
    return path


@pytest.fixture
def cache(hub):
    return constants.HF_HUB_CACHE


def test_two_steps_then_on_without_network_or_cache(hub, config, cache, tmp_path, monkeypatch):
    code, _, errors = infctx_here("train", config)
    assert code == 0, errors
    assert hub.downloads() == {"finch.pth": 1}
    assert f"{NAME}, Finch, " in errors
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(cache)
    code, _, errors = infctx_here("train", config, "optimizer.steps=3")
    assert code == 0, errors
    assert len(losses_of(tmp_path / "run")) == 3
    code, _, errors = infctx_here("train", config, f"run.folder={tmp_path}/other")
    assert code == 2 and errors.startswith(f"infctx: {NAME}: is not in the cache ({cache}), and HF_HUB_OFFLINE is set;")


def test_a_tuned_state_finds_its_weights_again(hub, config, tmp_path, monkeypatch):
    code, _, errors = infctx_here("tune", config)
    assert code == 0, errors
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    code, _, errors = infctx_here("tune", config, "optimizer.steps=3")
    assert code == 0 and "changed since: optimizer.steps 2 -> 3\n" in errors
    assert infctx.load_model(tmp_path / "run").learned_state() is not None  # the checkpoint says NAME
    assert len(hub.requests) == asked


def test_a_tuned_state_from_the_hub_to_start_from(hub, config, tmp_path):
    assert infctx_here("tune", config)[0] == 0
    hub.add("some/states", "chat.safetensors", (tmp_path / "run" / "state.safetensors").read_bytes())
    again = ("model.initial_state=some/states:chat.safetensors", f"run.folder={tmp_path}/again")
    code, _, errors = infctx_here("tune", config, *again)
    assert code == 0, errors
    assert hub.downloads()["chat.safetensors"] == 1


def test_a_plan_downloads_nothing(hub, config):
    code, _, errors = infctx_here("plan", config)
    assert code == 2
    assert errors == (
        f"infctx: model.weights: {NAME} is not downloaded yet, so its sizes are unknown; set model.size, such as "
        "finch-3b (docs/models.md)\n"
    )
    code, output, _ = infctx_here("plan", config, "model.size=finch-3b", "run.device=cuda", "--device-gb", "80")
    assert code == 0 and "32 layers of width 2560" in output
    assert hub.requests == []


def test_a_rehearsal_downloads_nothing(hub, config, tmp_path):
    code, output, errors = infctx_here("train", config, "--rehearse")
    assert code == 0, errors
    assert f"Not here yet:\n  {NAME}: from the hub, downloaded when the run starts\n" in output
    assert hub.requests == []


def test_nothing_is_downloaded_for_a_run_without_its_documents(hub, config, tmp_path):
    with pytest.raises(InputError, match="data.store: there is no"):
        make_plan(load_config(config, [f"data.store={tmp_path}/gone"]))
    assert hub.requests == []


def test_ranks_find_what_the_launcher_downloaded(hub, config):
    settings = load_config(config)
    make_plan(settings)
    hub.requests.clear()
    plan = make_plan(settings, refuse=False)
    assert plan.weights.weights.read_bytes() == hub.files["models", "some/finch", "finch.pth"][0]
    assert hub.requests == []


@pytest.mark.slow
def test_two_ranks_download_once(hub, config, tmp_path):
    arguments = ["train", str(config), "distributed.devices=2"]
    process = Forked(run_infctx, arguments, env=environment(hub, tmp_path / "home"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert hub.downloads() == {"finch.pth": 1}

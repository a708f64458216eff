"""Runs that train an adapter: only that learns, and its files work elsewhere."""

import json

import pytest
import torch
import yaml

import infctx
from infctx.adapters.install import learned_names
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import checkpoints
from infctx.formats.model_files import open_model
from infctx.formats.tensor_file import read_tensors
from infctx.settings.load import load_config
from infctx.train.loop import train, train_steps

from runs import infctx_here, losses_of, open_run, write_config
from tiny_models import random_model

BYTES = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}
ALL = ["norms", "mixes", "decays", "bonus"]
PLAIN = {"form": "lora", "rank": 4, "dropout": 0.1}
FULL = {"form": "dora", "rank": 4, "alpha": 8.0, "train_too": ALL, "initial_state": True, "where": "attention"}


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a small Goose on bytes, in bf16 like published ones."""
    infctx.save_weights(random_model(7, noise=0.05, **BYTES), tmp_path / "base.pth", torch.bfloat16)
    return tmp_path / "base.pth"


def adapter_config(folder, weights, adapter, **changes):
    """Writes and loads a run that trains an adapter."""
    model = {"weights": str(weights), "learn": "adapter", "adapter": adapter}
    settings = {"model": model, "optimizer__peak_lr": 0.01, "run__evaluate_tokens": 0} | changes
    return load_config(write_config(folder, **settings))


@pytest.mark.parametrize(("adapter", "precision"), [(PLAIN, "fp32"), (FULL, "bf16")])
def test_frozen_means_frozen(tmp_path, weights, adapter, precision):
    before = weights.read_bytes()
    config = adapter_config(tmp_path, weights, adapter, run__precision=precision, optimizer__steps=12)
    run = open_run(config)
    at_first = {name: part.detach().clone() for name, part in run.model.named_parameters()}
    assert train_steps(run)
    learned = set(learned_names(run.model)) | ({"initial_wkv"} if adapter is FULL else set())
    for name, part in run.model.named_parameters():
        assert torch.equal(part, at_first[name]) == (name not in learned), name
        is_low = precision == "bf16" and name not in learned
        assert part.dtype == (torch.bfloat16 if is_low else torch.float32), name
        assert name in learned or part.grad is None
    assert weights.read_bytes() == before
    assert sum(losses_of(tmp_path / "run")[-4:]) < sum(losses_of(tmp_path / "run")[:4])
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert not (newest / "model.safetensors").exists()
    moments = read_tensors(newest / "optimizer.safetensors")  # the next process has only these
    assert {name.rpartition("/")[0] for name in moments} == learned
    assert len(read_tensors(newest / "adapter.safetensors")) == len(learned) - (adapter is FULL)
    assert (newest / "state.safetensors").exists() == (adapter is FULL)
    groups = {group["lr_scale"]: group["names"] for group in run.engine.optimizer.param_groups}
    if adapter is FULL:
        assert groups[0.1 / 0.01] == ["initial_wkv"]


@pytest.mark.parametrize("adapter", [PLAIN, FULL], ids=["plain", "full"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, weights, adapter):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = adapter_config(tmp_path / "whole", weights, adapter, optimizer__steps=8, optimizer__schedule="constant")
    train(whole)
    cut = adapter_config(tmp_path / "cut", weights, adapter, optimizer__steps=5, optimizer__schedule="constant")
    assert train_steps(open_run(cut))
    train(load_config(tmp_path / "cut" / "config.yaml", ["optimizer.steps=8"]))
    assert losses_of(tmp_path / "cut" / "run") == losses_of(tmp_path / "whole" / "run")
    for file in ("adapter.safetensors", *(["state.safetensors"] if adapter is FULL else [])):
        one, other = (read_tensors(tmp_path / name / "run" / file) for name in ("whole", "cut"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_from_the_configuration_to_the_files(tmp_path, weights):
    """Runs `infctx tune` like a user, then uses the files that it wrote."""
    adapter = {"form": "miss", "rank": 5, "train_too": ["norms"], "initial_state": True}
    model = {"weights": str(weights), "adapter": adapter}
    config = write_config(tmp_path, model=model, optimizer__steps=6, optimizer__peak_lr=0.01)
    code, output, errors = infctx_here("tune", config, "run.evaluate_tokens=2000", "model.adapter.rank=6")
    assert code == 0, errors
    assert "before training   after training" in output
    run = tmp_path / "run"
    assert f"  {run}/adapter.safetensors " in output and f"  {run}/state.pth " in output
    exports = []
    for name, arguments in (
        ("run", (run,)),
        ("adapter", (weights, "--adapter", run)),
        ("file", (weights, "--adapter", run / "adapter.safetensors", "--state", run / "state.pth")),
        ("without", (weights,)),
    ):
        code, output, errors = infctx_here("generate", *arguments, "--prompt", "ab", "--tokens", 40)
        assert (code, errors) == (0, ""), name
        exports.append(output)
    assert exports[0] == exports[1] == exports[2] != exports[3]
    code, output, errors = infctx_here("evaluate", weights, tmp_path / "held_out", "--adapter", run)
    assert code == 0 and errors == ""
    record = json.loads((run / "held_out.json").read_text())["evaluations"]
    assert [entry["step"] for entry in record] == [0, 6]
    assert f"{record[1]['buckets'][0]['nats_per_token']:.3f}" in output

    again = {"weights": str(run), "learn": "weights"}  # merged, then trained on
    (tmp_path / "on").mkdir()
    more = load_config(write_config(tmp_path / "on", model=again, optimizer__steps=3, run__evaluate_tokens=0))
    opened = open_run(more)
    merged = open_model(run)
    for name, part in opened.model.named_parameters():
        assert torch.equal(part, merged.get_parameter(name)), name
    assert not torch.equal(merged.head.weight, merged.blocks[0].channel_mix.key.weight)
    assert train_steps(opened)


def test_a_folder_of_another_run(tmp_path, weights):
    adapter_config(tmp_path, weights, PLAIN, optimizer__steps=3)
    path = tmp_path / "config.yaml"
    train(load_config(path))
    for override, said in (
        ("model={weights: %s, learn: weights}", "another model.learn"),
        ("model={weights: %s, learn: initial_state}", "another model.learn"),
        ("model={weights: %s, learn: adapter, adapter: {rank: 5}}", "adapter.safetensors: is of a run with another"),
    ):
        content = yaml.safe_load(path.read_text())
        content |= yaml.safe_load(override.replace("=", ": ") % weights)
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(InputError, match=said):
            train(load_config(tmp_path / "other.yaml", ["optimizer.steps=4"]))
    infctx.save_weights(random_model(7, noise=0.05, seed=5, **BYTES), weights)
    with pytest.raises(InputError, match="adapter.safetensors: was trained over other weights; name those weights"):
        open_run(load_config(path, ["optimizer.steps=4"]))
    weights.unlink()
    with pytest.raises(InputError, match=r"holds an adapter tuned over .*base.pth, and that is not there"):
        open_model(tmp_path / "run")

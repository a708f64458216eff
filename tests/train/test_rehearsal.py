"""Rehearsals: every shipped configuration, made small, trains here to its end, and each replaced setting is named."""

import os

import pytest
import yaml

import infctx
from infctx.settings.load import load_config

from places import CONFIGS
from runs import infctx_command, infctx_here, write_config, write_store

MAY_CHANGE = {
    "model": {"weights", "size", "initial_state", "version", "num_layers", "width", "vocab_size", "head_size"},
    "data": {"store", "held_out", "document_tokens"},
    "window": {"segment_tokens", "window_tokens", "lanes", "lanes_per_pass", "gradient_segments"},
    "optimizer": {"steps", "warmup_steps"},
    "run": {"folder", "device", "threads", "save_every_steps", "log_every_steps", "evaluate_tokens"}
    | {"loggers", "evaluate_every_steps"},
    "distributed": {"devices", "nodes", "time_ranks", "strategy", "gradient_reduction"},
}


def rehearse(path, *overrides, run=infctx_here):
    """Rehearses a configuration to its end; returns the real configuration, the small one, and the output."""
    command = "tune" if "tune" in path.name else "train"
    code, output, errors = run(command, path, "--rehearse", *overrides)
    assert code == 0, errors
    real = load_config(path, overrides)
    folder = real.run.folder.with_name(f"{real.run.folder.name}-rehearsal")
    return real, load_config(folder / "rehearsal.yaml"), output


def check(real, small, output):
    """Checks which settings stay, which are replaced and listed, and the output at the end."""
    for section, before in real.model_dump(mode="json").items():
        now = small.model_dump(mode="json")[section]
        changed = {name for name in before if before[name] != now[name]}
        assert changed <= MAY_CHANGE[section], (section, changed)
        listed = {name for name in before if f"\n  {section}.{name}: " in output}
        assert listed == changed
    assert small.window.window_segments == min(real.window.window_segments, 32)
    assert (small.rank_lanes > small.pass_lanes) == (real.rank_lanes > real.pass_lanes)
    assert small.step_tokens <= 4096 and small.optimizer.steps == 4
    assert {small.run.folder / "checkpoints" / "step-000004"} <= set((small.run.folder / "checkpoints").iterdir())
    end = output[output.index("What would run on the real machine:\n  infctx ") :]
    assert "--rehearse" not in end
    assert max(map(len, end.splitlines()[2:])) <= 120


QUICK = ("finch-3b-64k", "finch-1b6-full-24gb", "goose-2.9b-lora-32k", "goose-2.9b-state-nf4")
"""All weights, all in little memory, an adapter, a state; what the others do is among what these do."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in QUICK else [pytest.mark.slow], id=path.stem)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_every_shipped_configuration_is_rehearsed(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)  # a folder without weights and documents
    real, small, output = rehearse(path)
    check(real, small, output)
    end = output[output.index("What would run on the real machine:") :]
    assert f"data.store: there is no {real.data.store}.idx" in end
    if not path.stem.startswith(("finch-tiny-tune-", "length-tiny-longer")):  # another run makes their weights
        assert "tokens per step\n" in end and "strategy  " in end
        assert infctx.load_model(small.model.weights or small.run.folder / "model.pth").sizes.version in (5, 6, 7)
    assert not real.run.folder.exists()


def test_existing_files_are_used(tmp_path):
    """A rehearsal uses the run's documents and version if its files exist."""
    model = infctx.build_model(version=5, num_layers=3, width=128, head_size=64, vocab_size=257)
    infctx.save_weights(model, tmp_path / "five.pth")
    config = write_config(tmp_path, model={"weights": str(tmp_path / "five.pth")}, optimizer={"steps": 3, "peak_lr": 1})
    _, small, output = rehearse(config)
    assert small.data.store == tmp_path / "train"
    assert "documents" not in output
    sizes = infctx.load_model(small.model.weights).sizes
    assert (sizes.version, sizes.num_layers, sizes.width, sizes.num_heads, sizes.vocab_size) == (5, 2, 64, 2, 257)
    code, *_ = infctx_here("train", config, "--rehearse")  # replaces the first one
    assert code == 0


def test_refusals(tmp_path):
    config = write_config(tmp_path)
    (tmp_path / "run-rehearsal").mkdir()
    (tmp_path / "run-rehearsal" / "precious.txt").write_text("mine")
    code, _, errors = infctx_here("train", config, "--rehearse")
    assert code == 2 and "run-rehearsal: is no rehearsal" in errors
    assert (tmp_path / "run-rehearsal" / "precious.txt").read_text() == "mine"
    code, _, errors = infctx_here("train", config, "--rehearse", "data.stor=x")
    assert code == 2 and "did you mean store?" in errors
    write_store(tmp_path / "beyond", vocab_size=5000)
    code, _, errors = infctx_here(
        "train", config, "--rehearse", f"data.store={tmp_path}/beyond", f"run.folder={tmp_path}/other"
    )
    assert code == 2 and "the model's vocabulary has 257 ids" in errors
    environment = os.environ | {"LOCAL_RANK": "0", "RANK": "0"}
    code, _, errors = infctx_command("train", config, "--rehearse", env=environment)
    assert code == 2 and "run it by itself" in errors


@pytest.mark.slow
def test_a_job_for_a_cluster_is_rehearsed_by_four_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["distributed.nodes=2", "distributed.devices=8", "distributed.time_ranks=4", "window.lanes=32"]
    real, small, output = rehearse(
        CONFIGS / "finch-3b-64k.yaml", *words, run=lambda *a: infctx_command(*a, cwd=tmp_path)
    )
    check(real, small, output)
    assert (small.distributed.world_size, small.distributed.time_ranks) == (4, 2)
    assert (
        small.distributed.strategy
        == yaml.safe_load((small.run.folder / "rehearsal.yaml").read_text())["distributed"]["strategy"]
    )
    assert "16 on 2 nodes; 4 share a document's time" in output

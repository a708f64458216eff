"""Missing or half-downloaded weights are reported; the shipped files state the planned memory."""

import pytest

from infctx.errors import InputError
from infctx.model.sizes import published_sizes
from infctx.plan.missing import missing_files
from infctx.plan.plan import make_plan
from infctx.settings.load import load_config

from places import CONFIGS
from plans import planned_bytes


def test_a_download_that_stopped_is_reported_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = load_config(CONFIGS / "finch-3b-64k.yaml").model.weights.name.partition(":")[2]
    config = load_config(CONFIGS / "finch-3b-64k.yaml", [f"model.weights=models/{name}"])
    weights = config.model.weights
    assert any(
        line.startswith(f"model.weights: there is no {weights} (6.2 GB); name it") for line in missing_files(config)
    )
    weights.parent.mkdir()
    weights.write_bytes(b"PK and no more")
    with pytest.raises(InputError, match=f"^{weights}: has 14 bytes, the published file 6,199,859,158; "):
        make_plan(config)
    (tmp_path / config.run.checkpoints / "step-000100").mkdir(parents=True)  # it resumes, and reads no weights
    assert not any("model.weights" in line for line in missing_files(config))


def test_a_frozen_model_is_read_by_a_resumed_run_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / "eagle-1b5-tune-state.yaml", ["model.weights=models/gone.pth"])
    (tmp_path / config.run.checkpoints / "step-000100").mkdir(parents=True)
    assert any(line.startswith("model.weights: there is no ") for line in missing_files(config))


@pytest.mark.parametrize("name", ["eagle-1b5-tune-state", "finch-3b-tune-state"])
def test_a_shipped_file_states_the_planned_memory(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    planned = planned_bytes(config, published_sizes(config.model.size), "cuda").device
    assert f"({planned / 1e9:.1f} GB planned)" in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")

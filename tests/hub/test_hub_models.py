"""Models and states by their names on the hub, through everything that reads a model."""

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save

import infctx
from infctx.errors import InputError
from infctx.formats.export import export
from infctx.formats.hub_folder import write_hub_folder
from infctx.formats.model_files import find_model, open_model
from infctx.formats.weights import open_weights
from infctx.hub.models import cached_model, fetch_model, to_download

from tiny_models import random_model

REPOSITORY = "some/finch"


@pytest.fixture
def model(hub, tmp_path):
    """A small Finch: finch.pth and a tuned state on the hub, and a copy of it in Hugging Face's layout."""
    model = random_model(6, num_layers=2, width=64, mix_rank=32, decay_rank=64, vocab_size=257)
    infctx.save_weights(model, tmp_path / "finch.pth")
    hub.add(REPOSITORY, "finch.pth", (tmp_path / "finch.pth").read_bytes())
    write_hub_folder(open_weights(tmp_path / "finch.pth"), tmp_path / "layout", torch.float32, "huggingface")
    for path in (tmp_path / "layout").iterdir():
        hub.add("some/finch-hf", path.name, path.read_bytes(), lfs=path.suffix == ".safetensors")
    tuned = random_model(6, num_layers=2, width=64, mix_rank=32, decay_rank=64, vocab_size=257, with_state=True)
    infctx.save_state(tuned.learned_state(), tmp_path / "state.safetensors")
    hub.add(REPOSITORY, "states/chat.safetensors", (tmp_path / "state.safetensors").read_bytes())
    return model


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [REPOSITORY, f"{REPOSITORY}:finch.pth", "some/finch-hf", "hf:some/finch@v1"])
def test_a_model_by_its_name(hub, model, name, monkeypatch):
    assert same(infctx.load_model(name), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(infctx.load_model(name), model)


def test_a_folder_of_goose_whose_blends_are_one_tensor(hub, tmp_path):
    """As in fla's first files."""
    model = random_model(7, num_layers=2, width=64, head_size=64, vocab_size=257)
    infctx.save_weights(model, tmp_path / "goose.pth")
    write_hub_folder(open_weights(tmp_path / "goose.pth"), tmp_path / "layout", torch.float32, "fla")
    tensors = load_file(tmp_path / "layout" / "model.safetensors")
    for layer in range(2):
        blends = [tensors.pop(f"model.layers.{layer}.attn.x_{letter}")[0] for letter in "rwkvag"]
        tensors[f"model.layers.{layer}.attn.x_x"] = torch.cat(blends)  # (6, D)
    hub.add("some/goose", "config.json", (tmp_path / "layout" / "config.json").read_bytes())
    hub.add("some/goose", "model.safetensors", save(tensors, {"format": "pt"}), lfs=True)
    assert same(infctx.load_model("some/goose"), model)


def test_a_state_by_its_name(hub, model, tmp_path):
    state = infctx.load_state(f"{REPOSITORY}:states/chat.safetensors", model)
    opened = open_model(fetch_model_path(), fetch_model_path("states/chat.safetensors"))
    assert torch.equal(state.wkv, opened.learned_state().wkv) and state.wkv.abs().sum() > 0


def fetch_model_path(file="finch.pth"):
    from pathlib import Path

    return Path(f"{REPOSITORY}:{file}")


def test_an_export_by_its_name(hub, model, tmp_path):
    said = export(fetch_model_path(), tmp_path / "out.pth", dtype="fp32")
    assert "tensors in fp32 under official names" in said
    assert same(infctx.load_model(tmp_path / "out.pth"), model)


def test_nothing_is_asked_before_something_is_read(hub, model):
    name = fetch_model_path()
    assert cached_model(name) == name and to_download(name)
    assert hub.requests == []
    assert fetch_model(name) == cached_model(name) == find_model(name).weights != name
    assert not to_download(name)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("BlinkDL/rwkv7-g1:rwkv7a-g1b-0.1b.pth", "RWKV-7a or 7b (DeepEmbed)"),
        ("BlinkDL/rwkv-5-world:RWKV-5-World-0.1B-v1-20230803-ctx4096.pth", "RWKV-5.0 or 5.1"),
        ("BlinkDL/rwkv-4-pile-1b5", "RWKV-4"),
    ],
)
def test_other_architectures_are_refused_by_their_names(hub, name, version):
    with pytest.raises(InputError) as refused:
        infctx.load_model(name)
    assert str(refused.value) == f"{name}: is {version} by its name; infctx reads the files in docs/models.md"
    assert hub.requests == []

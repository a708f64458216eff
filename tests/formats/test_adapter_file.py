"""Adapters on disk: our form and RWKV-PEFT's, merged weights for other programs, and refusals in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import infctx
from infctx.adapters.install import adapters_of, add_adapters, learned_names
from infctx.adapters.stored import Header
from infctx.errors import InputError
from infctx.formats.adapter_file import read_adapter, write_adapter
from infctx.formats.export import export
from infctx.formats.model_files import ModelFiles, open_model, with_adapter
from infctx.formats.weights import fingerprint
from infctx.settings.adapter import AdapterSettings

from tiny_models import random_model, random_tokens

ALL = ["norms", "mixes", "decays", "bonus"]


def written(folder, version, settings, **options):
    """Writes base.pth and adapter.safetensors of a model with an adapter of random numbers; returns the model."""
    base = random_model(version, **options)
    infctx.save_weights(base, folder / "base.pth")
    mark = fingerprint(base)
    add_adapters(base, settings, seed=1)
    with torch.no_grad():
        for name in learned_names(base):
            base.get_parameter(name).add_(torch.randn(base.get_parameter(name).shape), alpha=0.2)
    learned = {name: base.get_parameter(name).detach() for name in learned_names(base)}
    write_adapter(learned, folder / "adapter.safetensors", Header.of(settings, mark), base.sizes)
    return base


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the class for RWKV-7 uses it
@pytest.mark.parametrize(("version", "form", "package"), [(6, "dora", "rwkv_package"), (7, "miss", "rwkv_7_package")])
@torch.no_grad()
def test_the_rwkv_package_runs_merged_weights(tmp_path, request, version, form, package):
    settings = AdapterSettings(form=form, rank=5, alpha=None if form == "miss" else 3.0, train_too=ALL)
    model = written(tmp_path, version, settings, noise=0.1, width=128, head_size=64, backend="chunked")
    tokens = random_tokens(1, 20)
    wanted = model.logits(model(tokens)[0])[0]
    adapter = tmp_path / "adapter.safetensors"
    said = export(tmp_path / "base.pth", tmp_path / "merged.pth", dtype="fp32", adapter=adapter)
    assert f"merged with {adapter}" in said
    judge = request.getfixturevalue(package)(str(tmp_path / "merged"), "cpu fp32")
    found = judge.forward(tokens[0].tolist(), None, full_output=True)[0]
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    base = infctx.load_model(tmp_path / "base.pth", backend="chunked")
    assert (base.logits(base(tokens)[0])[0] - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("form", ["lora", "dora", "miss"])
def test_merging_is_exact_to_the_rounding_of_the_dtype(tmp_path, form):
    where = ["all", "head"] + ["emb"] * (form == "lora")
    settings = AdapterSettings(form=form, rank=5, where=where, train_too=["norms"])
    model = written(tmp_path, 6, settings)
    assert "head" in adapters_of(model)
    files = with_adapter(ModelFiles(tmp_path / "base.pth", None), tmp_path / "adapter.safetensors")
    merged, low = open_model(files), open_model(files, dtype=torch.bfloat16)
    for name, adapter in adapters_of(model).items():
        weight, parts = model.get_submodule(name).weight.detach().double().numpy(), dict(adapter.named_parameters())
        parts = {part: tensor.detach().double().numpy() for part, tensor in parts.items()}
        weight = weight.T if name == "embedding" else weight
        if form == "miss":
            tiled = np.tile(parts["block"].T, -(-weight.shape[1] // 5))[:, : weight.shape[1]]
            exact = weight + tiled
        else:
            exact = weight + parts["up"] @ parts["down"]
        if form == "dora":
            exact *= (parts["magnitude"] / np.linalg.norm(exact, axis=1))[:, None]
        for found, bits in ((merged, 24), (low, 8)):
            mine = found.get_parameter(f"{name}.weight").detach().double().numpy()
            mine = mine.T if name == "embedding" else mine
            assert (np.abs(mine - exact) <= np.abs(exact) * 2.0**-bits * 1.01 + 1e-30).all(), (name, bits)
    for name in learned_names(model):
        if ".adapter." not in name:
            assert torch.equal(merged.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize(("form", "alpha"), [("lora", 12.0), ("dora", 3.0), ("miss", None)])
def test_rwkv_pefts_form_and_back(tmp_path, form, alpha):
    """The names and keys that peft's save_pretrained writes, from which RWKV-PEFT continues."""
    ends = ["head"] + ["emb"] * (form == "lora")
    where = ["att.key", "ffn.value", *ends]
    settings = AdapterSettings(form=form, rank=6, alpha=alpha, dropout=0.1, where=where)
    model = written(tmp_path, 7, settings)
    said = export(tmp_path / "adapter.safetensors", tmp_path / "alone", form="adapter")
    assert said.startswith(f"{tmp_path / 'alone'}: an adapter of ") and "without" not in said
    tensors = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    suffixes = {
        "lora": {"lora_A.weight": (6, None), "lora_B.weight": (None, 6)},
        "dora": {"lora_A.weight": (6, None), "lora_B.weight": (None, 6), "lora_magnitude_vector": (None,)},
        "miss": {"miss_block": (6, None)},
    }[form]
    assert tensors.keys() == {
        f"base_model.model.blocks.{layer}.{name}.{suffix}"
        for layer in range(2)
        for name in ("att.key", "ffn.value")
        for suffix in suffixes
    } | {f"base_model.model.head.{suffix}" for suffix in suffixes} | {
        f"base_model.model.emb.lora_embedding_{letter}" for letter in "AB" if form == "lora"
    }
    shapes = {"lora_embedding_A": (6, 19), "lora_embedding_B": (24, 6)}  # the vocabulary; the width
    for name, tensor in tensors.items():
        shape = next(shape for suffix, shape in (suffixes | shapes).items() if name.endswith(suffix))
        assert all(wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True))
    config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("MISS" if form == "miss" else "LORA", 6)
    assert config["target_modules"] == sorted(where)
    assert form == "miss" or (config["lora_alpha"], config["use_dora"]) == (alpha, form == "dora")
    (tmp_path / "adapter.safetensors").unlink()
    for path in (tmp_path / "alone", tmp_path / "alone" / "adapter_model.safetensors"):
        back = read_adapter(path, model.sizes)
        assert back.kind == (form, settings.scale)
        assert back.tensors.keys() == set(learned_names(model))
        assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in back.tensors.items())
    opened = open_model(with_adapter(ModelFiles(tmp_path / "base.pth", None), tmp_path / "alone"))
    tokens = random_tokens(1, 20)
    assert torch.allclose(opened(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["lora", "miss"])
def test_rwkv_pefts_old_files(tmp_path, form):
    """Of LoraLinear and BoneLinear: one .pth with the parameters of layers, and other weights that it trained."""
    settings = AdapterSettings(form=form, rank=6, alpha=12.0 if form == "lora" else None, where=["att.key"])
    model = written(tmp_path, 6, settings.model_copy(update={"train_too": ["norms"]}))
    names = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "miss_block": "disha"}
    tensors = {}
    for name, tensor in load_file(tmp_path / "adapter.safetensors").items():
        for new, old in names.items():
            name = name.removeprefix("base_model.model.").replace(new, old)
        tensors[name] = tensor[None, None] if name == "ln_out.weight" else tensor
    path = tmp_path / "rwkv-0.pth"
    torch.save(tensors, path)
    files = ModelFiles(tmp_path / "base.pth", None)
    with pytest.raises(InputError, match="rwkv-0.pth: is an adapter, not a model"):
        open_model(path)
    if form == "lora":
        with pytest.raises(InputError, match='adapter_config.json beside it: {"peft_type": "LORA", "r": 6, "lora_al'):
            open_model(with_adapter(files, path))
        config = {"peft_type": "LORA", "r": 6, "lora_alpha": 12}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tokens = random_tokens(1, 20)
    opened = open_model(with_adapter(files, path))
    assert torch.allclose(opened(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)
    torch.save(tensors | {"blocks.0.att.key.disha": torch.zeros(4, 6, 6)}, path)  # BatLinear
    with pytest.raises(InputError, match="which is no (lora|miss) for a matrix of 24 x 24"):
        open_model(with_adapter(files, path))


def test_an_export_names_what_a_folder_leaves_out(tmp_path):
    written(tmp_path, 6, AdapterSettings(rank=3, train_too=["bonus"]))
    said = export(tmp_path / "adapter.safetensors", tmp_path / "alone", form="adapter")
    assert said.endswith("without the 2 weights that learned with it: it is only whole merged")
    export(tmp_path / "adapter.safetensors", tmp_path / "copy.safetensors", form="adapter")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()


def test_adapters_that_cannot_be_read(tmp_path, caplog):
    settings = AdapterSettings(rank=3, where="attention")
    written(tmp_path, 6, settings)
    base, adapter = tmp_path / "base.pth", tmp_path / "adapter.safetensors"
    files, tensors = ModelFiles(base, None), load_file(adapter)
    first = next(iter(tensors))

    def refused(changed, said, config=None):
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "adapter_model.safetensors")
        whole = {"peft_type": "LORA", "r": 3, "lora_alpha": 3} if config is None else config
        (folder / "adapter_config.json").write_text(json.dumps(whole))
        with pytest.raises(InputError, match=said) as error:
            open_model(with_adapter(files, folder))
        assert len(error.value.args) == 1 and "\n" not in str(error.value)

    open_model(with_adapter(files, adapter))
    refused(tensors | {"base_model.model.blocks.9.att.key.lora_A.weight": torch.ones(3, 24)}, "is of no adapter for")
    refused(tensors | {first: tensors[first][:2]}, "is no lora for a matrix of 24 x 24")
    refused({name: tensor for name, tensor in tensors.items() if name != first}, "is no lora for a matrix of 24 x 24")
    refused(tensors | {first: tensors[first] * torch.nan}, "has values that are not finite")
    refused(tensors, "use_rslora|rslora", {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "use_rslora": True})
    refused(tensors, "peft_type", {"peft_type": "IA3", "r": 3})
    refused(tensors, "is no lora|no dora", {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "use_dora": True})
    with pytest.raises(InputError, match="is an adapter, not a model; name the model, and give this file with --ad"):
        open_model(adapter)
    with pytest.raises(InputError, match="base.pth: is no adapter that says what it computes; keep adapter_config"):
        open_model(with_adapter(files, base))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no adapter; name a file"):
        with_adapter(files, tmp_path / "empty")
    infctx.save_weights(random_model(6, seed=4), base)
    open_model(with_adapter(files, adapter))
    assert "adapter.safetensors: was trained over other weights than" in caplog.text

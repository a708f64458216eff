"""Folders in Hugging Face's layout: their content, reading them back, and no loss of other files."""

import json

import pytest
import torch

import infctx
from infctx.errors import InputError
from infctx.formats.export import export
from infctx.formats.hub_folder import CONFIG, WEIGHTS
from infctx.formats.other_names import from_official, naming_of
from infctx.formats.tensor_file import read_tensors
from infctx.formats.weights import stored_tensors
from infctx.hub.published import PUBLISHED_FOLDERS

from runs import infctx_here
from tiny_models import random_model

RANKS = {"mix_rank": 32, "decay_rank": 64}
"""The ranks in Hugging Face's code at this width."""


def small_model(version, **sizes):
    return random_model(version, width=32, head_size=16, **(RANKS if version == 6 else {}) | sizes)


@pytest.mark.parametrize(("version", "names"), [(5, "huggingface"), (6, "huggingface"), (6, "fla"), (7, "fla")])
def test_a_folder_and_back(tmp_path, version, names):
    model = small_model(version, with_state=True)
    infctx.save_weights(model, tmp_path / "in.pth")
    code, output, errors = infctx_here(
        "export", tmp_path / "in.pth", f"{tmp_path}/out.v1/", "--names", names, "--dtype", "fp32"
    )
    folder = tmp_path / "out.v1"
    assert (code, errors) == (0, "")
    assert output.startswith(f"{folder}: ") and "\n  without the initial state of " in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.v1"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, WEIGHTS])
    found = read_tensors(folder / WEIGHTS)
    weights = {name: tensor for name, tensor in stored_tensors(model).items() if not name.endswith("time_state")}
    expected = from_official(weights, names, "in")
    assert naming_of(found) == names and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    export(folder, tmp_path / "back.pth", dtype="fp32")
    back = read_tensors(tmp_path / "back.pth")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    again = infctx.load_model(folder)
    assert again.sizes == model.sizes
    assert torch.equal(again.blocks[1].channel_mix.value.weight, model.blocks[1].channel_mix.value.weight)


@pytest.mark.parametrize(("version", "repository"), [(5, "RWKV/rwkv-5-world-1b5"), (6, "RWKV/v6-Finch-1B6-HF")])
def test_the_configuration_for_the_remote_code(tmp_path, version, repository):
    infctx.save_weights(small_model(version, num_layers=3, vocab_size=65536), tmp_path / "in.pth")
    line = export(tmp_path / "in.pth", tmp_path / "out", names="huggingface")
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == {
        "architectures": [f"Rwkv{version}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_rwkv{version}.Rwkv{version}Config",
            "AutoModelForCausalLM": f"modeling_rwkv{version}.Rwkv{version}ForCausalLM",
        },
        "model_type": f"rwkv{version}",
        "attention_hidden_size": 32,
        "head_size": 16,
        "head_size_divisor": 8,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6,
        "vocab_size": 65536,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    assert repository in PUBLISHED_FOLDERS
    assert line.endswith(
        f"\n  add the model's .py files and the tokenizer from {repository} on the hub (docs/models.md)"
    )


def test_the_configuration_for_fla(tmp_path):
    infctx.save_weights(random_model(6, ffn_width=40), tmp_path / "in.pth")
    line = export(tmp_path / "in.pth", tmp_path / "out", names="fla", dtype="fp16")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["architectures"] == ["RWKV6ForCausalLM"] and config["model_type"] == "rwkv6"
    sizes = ("hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "vocab_size")
    assert [config[name] for name in sizes] == [24, 2, 3, 40, 19]
    assert (config["proj_low_rank_dim"], config["gate_low_rank_dim"]) == (3, 5)
    assert (config["expand_k"], config["expand_v"], config["hidden_act"]) == (1.0, 1.0, "sqrelu")
    assert (config["norm_eps"], config["norm_bias"], config["norm_first"]) == (1e-5, True, True)
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (0, 0, "float16")
    assert line.endswith(
        "\n  it has no tokenizer\n  once fla has loaded it, set g_norm.eps = 64e-5 in each layer's attn"
    )


def test_the_configuration_of_goose_for_fla(tmp_path):
    infctx.save_weights(random_model(7, width=64, head_size=64, vocab_size=65536), tmp_path / "in.pth")
    line = export(tmp_path / "in.pth", tmp_path / "out", names="fla")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["architectures"] == ["RWKV7ForCausalLM"] and config["model_type"] == "rwkv7"
    sizes = ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "vocab_size")
    assert [config[name] for name in sizes] == [64, 2, 64, 256, 65536]
    assert [config[f"{letter}_low_rank_dim"] for letter in ("decay", "a", "v", "gate")] == [5, 3, 2, 4]
    assert line.endswith("\n  add the tokenizer from RWKV/v6-Finch-1B6-HF on the hub (docs/models.md)")


def test_models_that_cannot_be_a_folder_are_refused(tmp_path):
    infctx.save_weights(random_model(5), tmp_path / "eagle.pth")
    infctx.save_weights(random_model(7), tmp_path / "goose.pth")
    for name, sizes in [("ranks", {}), ("mix", {"mix_rank": 32}), ("width", RANKS | {"ffn_width": 40})]:
        infctx.save_weights(random_model(6, **sizes), tmp_path / f"{name}.pth")
    large = small_model(6)
    with torch.no_grad():
        large.head.weight[0, 0] = 1e6
    infctx.save_weights(large, tmp_path / "large.pth")
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    code = f"{out}: with width 24, Hugging Face's code has"
    for source, options, problem in [
        ("eagle", {"names": "fla"}, f"{out}/model.safetensors: RWKV-5 has no fla names; choose one of"),
        ("goose", {}, f"{out}: Hugging Face's repositories have no code for RWKV-7; give --names fla"),
        ("width", {}, f"{code} ffn_width 64, and this model has 40; export a file"),
        ("ranks", {}, f"{code} mix_rank 32, and this model has 3; export a file"),
        ("mix", {}, f"{code} decay_rank 64, and this model has 5; export a file"),
        ("large", {"dtype": "fp16"}, f"{out}/model.safetensors: head.weight[0, 0] is 1e+06, beyond the 65504"),
        ("large", {"names": "official"}, f"{out}: weights are written as .pth or .safetensors"),
    ]:
        with pytest.raises(InputError) as refused:
            export(tmp_path / f"{source}.pth", out, **({"names": "huggingface"} | options))
        assert str(refused.value).startswith(problem)
        assert sorted(tmp_path.iterdir()) == before


def test_existing_files_are_kept(tmp_path):
    infctx.save_weights(small_model(6), tmp_path / "in.pth")
    infctx.save_weights(small_model(6, seed=1), tmp_path / "other.pth")
    out = tmp_path / "out"
    export(tmp_path / "in.pth", out, names="huggingface")
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match=f"^{out}: exists; choose another name, or give --overwrite$"):
        export(tmp_path / "other.pth", out, names="huggingface")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=f"^{out}: also holds notes.txt, which is not part of an export; choose"):
        export(tmp_path / "other.pth", out, names="huggingface", overwrite=True)
    assert (out / WEIGHTS).read_bytes() == before and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(out)
    export(tmp_path / "other.pth", f"{tmp_path}/link/", names="huggingface", overwrite=True)
    assert torch.equal(infctx.load_model(out).head.weight, small_model(6, seed=1).head.weight.bfloat16().float())
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "link", "other.pth", "out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: is a file; choose another name for the folder"):
        export(tmp_path / "other.pth", tmp_path / "file", names="fla", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"

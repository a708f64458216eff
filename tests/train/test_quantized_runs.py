"""Runs over quantized weights: only the state learns, a file is the same bits again, and the state goes with it."""

import logging
from itertools import islice

import pytest
import torch

import infctx
from infctx.data.token_store import TokenStore
from infctx.errors import InputError
from infctx.evaluate.loss_by_position import choose_documents, evaluate_reading, merge, total
from infctx.formats.model_files import open_model
from infctx.formats.tensor_file import read_metadata, read_tensors
from infctx.formats.weights import fingerprint
from infctx.model.quantized import QuantizedLinear
from infctx.model.rwkv import Compute
from infctx.settings.load import load_config
from infctx.train.loop import train, train_steps

from ranks import run_ranks
from runs import infctx_here, losses_of, open_run, write_config, write_store
from tiny_models import random_model

BYTES = {"num_layers": 2, "width": 32, "head_size": 16, "vocab_size": 257}


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a small Goose on bytes, in bf16 like published ones."""
    infctx.save_weights(random_model(7, noise=0.05, **BYTES), tmp_path / "base.pth", torch.bfloat16)
    return tmp_path / "base.pth"


def tune_config(folder, weights, frozen_dtype="nf4", **changes):
    folder.mkdir(exist_ok=True)
    model = {"weights": str(weights), "learn": "initial_state", "frozen_dtype": frozen_dtype}
    return load_config(write_config(folder, model=model, optimizer__peak_lr=0.2, **changes))


def values(model):
    return {name: part.detach().clone() for name, part in model.named_parameters()}


def in_nf4(path):
    return values(infctx.load_model(path, "nf4"))


@pytest.mark.parametrize(("frozen_dtype", "precision"), [("nf4", "fp32"), ("int8", "bf16"), ("bf16", "fp32")])
def test_frozen_means_frozen(tmp_path, weights, frozen_dtype, precision):
    """Matrices as the setting says; embedding and head in bf16; all else as run.precision says."""
    write_store(tmp_path / "train", lengths=(33,) * 64)  # many starts
    run = open_run(tune_config(tmp_path, weights, frozen_dtype, run__precision=precision, optimizer__steps=12))
    before = values(run.model)
    assert train_steps(run)
    kinds = {"embedding.weight": torch.bfloat16, "head.weight": torch.bfloat16, "initial_wkv": torch.float32}
    for name, part in run.model.named_parameters():
        assert torch.equal(part, before[name]) == (name != "initial_wkv")
        assert part.grad is None or name == "initial_wkv"
        if ".key." in name:
            kept = {"codes": {"nf4": torch.uint8, "int8": torch.int8}.get(frozen_dtype)}
            assert part.dtype == kept.get(name.rpartition(".")[2], torch.bfloat16)
        elif ".norm" in name or "_down" in name:
            assert part.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        elif name in kinds:
            assert part.dtype == kinds[name]
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_state_is_of_the_weights_in_the_file(tmp_path, weights, caplog):
    """A stopped run resumes bit for bit, and its state goes with the weights however they are kept."""
    whole = tune_config(tmp_path / "whole", weights, optimizer__steps=6, run__evaluate_tokens=0)
    train(whole)
    cut = tune_config(tmp_path / "cut", weights, optimizer__steps=6, run__evaluate_tokens=0)
    run = open_run(cut)
    run.lanes = islice(run.lanes, 4)
    with pytest.raises(StopIteration):
        train_steps(run)
    train(cut)  # from step 3
    assert losses_of(tmp_path / "cut" / "run") == losses_of(tmp_path / "whole" / "run")
    states = [tmp_path / name / "run" / "state.safetensors" for name in ("whole", "cut")]
    assert torch.equal(*(read_tensors(state)["wkv"] for state in states))
    plain = infctx.load_model(weights)
    assert read_metadata(states[0])["weights"] == fingerprint(plain)
    caplog.clear()
    for dtype in (torch.float32, "int8"):
        open_model(weights, states[0], dtype)
    open_model(tmp_path / "cut" / "run", dtype="nf4")
    assert "other weights" not in caplog.text
    infctx.save_weights(random_model(7, noise=0.05, seed=5, **BYTES), weights)
    open_model(weights, states[0], "nf4")
    assert "other weights" in caplog.text
    with pytest.raises(InputError, match="was tuned over other weights"):
        open_run(cut)


def test_a_file_gives_the_same_bits_again(tmp_path, weights):
    here = [in_nf4(weights) for _ in range(2)]
    (there,) = run_ranks(1, in_nf4, weights, folder=tmp_path)  # in another process
    assert here[0].keys() == here[1].keys() == there.keys()
    for name, part in here[0].items():
        assert torch.equal(part, here[1][name]) and torch.equal(part, there[name])


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_loss_is_compared_with_bf16(tmp_path, weights, form, caplog):
    """Before the first step, and by `infctx evaluate`; the judge has the stored weights in memory."""
    caplog.set_level(logging.INFO, logger="infctx")
    config = tune_config(tmp_path, weights, form)
    open_run(config)
    (line,) = [record.getMessage() for record in caplog.records if f"{form} weights" in record.getMessage()]
    store = TokenStore(tmp_path / "held_out")
    reading = choose_documents(store, 257, 32, 10**6)
    first = reading._replace(tokens={0: 8 * 32 + 1})
    found = {}
    for dtype in (form, torch.bfloat16):
        model = open_model(weights, None, dtype, compute=Compute(torch.float32))
        found[dtype] = total(merge([each.buckets for each in evaluate_reading(model, first)])).bits_per_byte
    change = found[form] / found[torch.bfloat16] - 1
    assert line == (
        f"{form} weights: loss {found[form]:.3f} bits per byte, with bf16 {found[torch.bfloat16]:.3f} "
        f"({change:+.1%}), on 256 held-out tokens"
    )
    assert change != 0
    code, output, errors = infctx_here(
        *("evaluate", weights, store.path, "--dtype", form, "--segment-tokens", "32", "--device", "cpu")
    )
    assert (code, errors) == (0, "")
    assert output.splitlines()[-1] == line


def test_a_damaged_file_is_named(tmp_path):
    model = random_model(7, **BYTES)
    model.blocks[1].channel_mix.key.weight.data[3, 4] = torch.nan
    infctx.save_weights(model, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad.pth: tensor blocks.1.ffn.key.weight has values that are not finite"):
        infctx.load_model(tmp_path / "bad.pth", "int8")


def test_quantized_weights_are_not_saved_as_if_they_were_the_files(tmp_path, weights):
    model = infctx.load_model(weights, "nf4")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    with pytest.raises(InputError, match="its matrices are quantized"):
        infctx.save_weights(model, tmp_path / "out.pth")

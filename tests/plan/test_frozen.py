"""Frozen weights in fewer bits: the plan has the bytes that a model really holds, and what is made of them."""

import pytest
import torch

import infctx
from infctx.formats.weights import open_weights, read_model
from infctx.model.rwkv import Compute
from infctx.model.sizes import published_sizes
from infctx.plan.memory import GB, rank_memory, weight_bytes
from infctx.plan.report import plan_report
from infctx.settings.load import load_config

from places import CONFIGS
from plans import many
from tiny_models import random_model

GOOSE = published_sizes("goose-2.9b")


def frozen(form, **changes):
    return many(1, model__weights="none.pth", model__learn="initial_state", model__frozen_dtype=form, **changes)


@pytest.mark.parametrize("form", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_weights_take_what_the_plan_says(tmp_path, version, form):
    infctx.save_weights(random_model(version, width=64, head_size=16, num_layers=3), tmp_path / "model.pth")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = read_model(open_weights(tmp_path / "model.pth"), form, "cpu", Compute(dtype))
        held = sum(part.nbytes for part in model.parameters())
        assert held == weight_bytes(frozen(form, run__precision=precision), model.sizes)


def test_a_matrix_and_no_more_is_made_at_a_time():
    """On a CPU, which makes nothing else on the way; in fp32 the head, kept in bf16, is larger than a matrix."""
    config = {form: frozen(form, run__device="cpu", run__precision="bf16") for form in (None, "int8", "nf4")}
    taken = {form: rank_memory(each, GOOSE, "cpu").device for form, each in config.items()}
    held = {form: weight_bytes(each, GOOSE) for form, each in config.items()}
    for form in ("int8", "nf4"):
        assert taken[form] - taken[None] == held[form] - held[None] + 2 * 2560 * 10240
    assert held["nf4"] < 0.38 * held[None] and held["int8"] < 0.6 * held[None]
    exact = frozen("nf4", run__device="cpu", run__precision="fp32")
    plain = frozen(None, run__device="cpu", run__precision="fp32")
    made = rank_memory(exact, GOOSE, "cpu").device - rank_memory(plain, GOOSE, "cpu").device
    assert made == weight_bytes(exact, GOOSE) - weight_bytes(plain, GOOSE) + 4 * 2560 * 65536


def test_the_shipped_file_fits_into_8_gb():
    config = load_config(CONFIGS / "goose-2.9b-state-nf4.yaml")
    report = plan_report(config, 8)
    assert report.fits
    amount = weight_bytes(config, GOOSE) / GB
    assert f"frozen    in nf4, {amount:.1f} GB" in report.text

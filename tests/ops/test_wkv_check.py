"""The check of the CUDA kernels before they are trusted, with right and with broken kernels in the emulator."""

import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from infctx.ops import wkv_check
from infctx.ops.wkv_check import find_disagreement

from wkv_emulated import SOURCES, emulated


@pytest.mark.parametrize("op, channels", [("wkv", 64), ("wkv", 80), ("wkv7", 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_that_are_right_agree(dtype, op, channels):
    with emulated(processors=40) as launched:
        assert find_disagreement("cpu", dtype, channels, op) is None
    if channels == 64:  # few enough heads that time is cut into spans
        assert f"{op}_sum_spans" in launched and f"{op}_sum_span_gradients" in launched


@pytest.mark.parametrize(
    ("file", "right", "wrong", "said", "op"),
    [
        (
            "wkv_gradients.cuh",
            "dw.x[channel][group][0] += paths.read(channel, group, 1);",
            "",
            "the gradient of w",
            "wkv",
        ),
        (
            "wkv_decays.cuh",
            "decays.first[channel][group] = exp2_approximate(first);",
            "decays.first[channel][group] = 1;",
            "y",
            "wkv",
        ),
        ("wkv_spans.cuh", "if (begins && backward) {", "if (false) {", "the gradient of", "wkv"),
        ("wkv7_gradients.cuh", "+= r * late;", "+= r * decay;", "the gradient of w", "wkv7"),
    ],
)
def test_kernels_that_are_wrong_do_not(tmp_path, file, right, wrong, said, op):
    shutil.copytree(SOURCES, tmp_path / "cuda")
    source = tmp_path / "cuda" / file
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    with emulated(processors=40, source_folder=tmp_path / "cuda"):
        found = find_disagreement("cpu", torch.float32, 64, op)
    assert found is not None and found.startswith(said)


def test_random_numbers_of_the_user_stay_as_they_were():
    before = torch.random.get_rng_state()
    with emulated():
        find_disagreement("cpu", torch.bfloat16, 16)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_callers_modes_have_no_effect(dtype, monkeypatch):
    """Models TF32, which affects only products in fp32: 13 bits less of every operand."""

    def chunked_in_tf32(r, k, v, w, u, state, starts, initial):
        if state.dtype == torch.float32:
            r, k, v, w, u = ((x.float().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (r, k, v, w, u))
        return chunked(r, k, v, w, u, state, starts, initial)

    chunked = wkv_check.wkv_chunked
    monkeypatch.setattr(wkv_check, "wkv_chunked", chunked_in_tf32)
    with emulated(), torch.autocast("cpu", torch.bfloat16):
        assert find_disagreement("cpu", dtype, 32) is None
    with emulated(), torch.inference_mode():
        assert find_disagreement("cpu", dtype, 32) is None
    with emulated(), torch.no_grad():
        assert find_disagreement("cpu", dtype, 32) is None


def test_a_recomputed_block_may_be_the_first_to_check():
    """Models recompute_blocks on a GPU, in a window of one segment: the check runs once, in the first pass."""
    answers = []

    def block(x):
        if not answers:
            answers.append(find_disagreement("cpu", torch.float32, 16))
        return x * x

    x = torch.randn(3, requires_grad=True)
    with emulated():
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert answers == [None] and torch.equal(x.grad, 2 * x.detach())

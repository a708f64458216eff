"""The check of the CUDA kernels before they are trusted, with right and with broken kernels in the emulator."""

import shutil

import pytest
import torch

from infctx.model.wkv_check import find_disagreement

from wkv_emulated import SOURCES, emulated


@pytest.mark.parametrize("channels", [64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_that_are_right_agree(dtype, channels):
    with emulated(processors=40) as launched:
        assert find_disagreement("cpu", dtype, channels) is None
    if channels == 64:  # and not so many pieces that time is not cut
        assert "wkv_sum_spans" in launched and "wkv_sum_span_gradients" in launched


@pytest.mark.parametrize(
    ("file", "right", "wrong", "said"),
    [
        ("wkv_gradients.cuh", "d.w.x[channel][group][0] += reads[1];", "", "the gradient of w"),
        ("wkv_decays.cuh", "decays.first[channel][group] = decay_of(first);", "decays.first[channel][group] = 1;", "y"),
        ("wkv_spans.cuh", "if (begins && backward) state.clear();", "", "the gradient of"),
    ],
)
def test_kernels_that_are_wrong_do_not(tmp_path, file, right, wrong, said):
    shutil.copytree(SOURCES, tmp_path / "cuda")
    source = tmp_path / "cuda" / file
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    with emulated(processors=40, source_folder=tmp_path / "cuda"):
        found = find_disagreement("cpu", torch.float32, 64)
    assert found is not None and found.startswith(said)


def test_random_numbers_of_the_user_stay_as_they_were():
    before = torch.random.get_rng_state()
    with emulated():
        find_disagreement("cpu", torch.bfloat16, 16)
    assert torch.equal(torch.random.get_rng_state(), before)

"""The plan counts what a pass over a window needs at its peak, beside weights and seams."""

import pytest
import torch

import infctx
from infctx.model.rwkv import Compute
from infctx.plan.memory import PASSING_STATES, activation_bytes, state_bytes
from infctx.settings.load import load_config
from infctx.train.learn import freeze_weights

from allocated import Allocated
from runs import write_config

NUM_TOKENS = 496


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_peak_of_a_window_is_what_the_plan_counts(tmp_path, version, precision, recompute):
    model = {"learn": "initial_state", "weights": str(tmp_path / "none.pth"), "recompute_blocks": recompute}
    config = load_config(write_config(tmp_path, model=model, run__precision=precision))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = infctx.build_model(version=version, num_layers=5, width=192, vocab_size=16)
    freeze_weights(model.to(dtype))
    model.compute = Compute(dtype, recompute)
    tokens = torch.randint(16, (1, NUM_TOKENS + 1))
    for _ in range(2):  # the first makes the gradients, and loads what is compiled
        with Allocated(model.parameters()) as measured:
            infctx.window_backward(model, tokens[:, :-1], tokens[:, 1:], NUM_TOKENS)
    said = NUM_TOKENS * activation_bytes(config, model.sizes) + (1 + PASSING_STATES) * state_bytes(model.sizes)
    assert measured.most == pytest.approx(said, rel=0.1)

"""The plan counts what an adapter makes autograd keep."""

import pytest

from infctx.model.sizes import make_sizes
from infctx.plan.memory import activation_bytes
from infctx.settings.adapter import AdapterSettings
from infctx.settings.load import load_config

from plans import saved_bytes
from runs import write_config


@pytest.mark.parametrize("form", ["lora", "dora", "miss"])
@pytest.mark.parametrize("kind", [(5, True, True), (6, False, True), (7, True, False), (7, False, True)], ids=str)
def test_activations_beside_an_adapter(tmp_path, kind, form):
    version, low, kernels = kind
    adapter = AdapterSettings(form=form, rank=24, dropout=0.1, train_too=["mixes"])
    model = {"weights": str(tmp_path / "none.pth"), "learn": "adapter", "adapter": adapter.model_dump()}
    changes = {"model": model | {"backend": "compiled" if kernels else "chunked"}}
    config = load_config(write_config(tmp_path, **changes, run__precision="bf16" if low else "fp32"))
    two, three = (
        activation_bytes(config, make_sizes(version=version, num_layers=layers, width=256, vocab_size=16))
        for layers in (2, 3)
    )
    said = (three - two) / 256
    found = saved_bytes(version, low, "compiled" if kernels else "chunked", adapter, width=256, num_tokens=512 - 16)
    assert found == pytest.approx(said, rel=0.1)

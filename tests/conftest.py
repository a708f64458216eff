"""Settings for all tests: threads pinned, so that numbers and times do not depend on the machine's load; the judge."""

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def rwkv_package(monkeypatch):
    """The judge: RWKV of the rwkv package, for the CPU and without its own compilation."""
    for name, value in (("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RWKV_V7_ON", raising=False)
    monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
    from rwkv.model import RWKV

    return RWKV

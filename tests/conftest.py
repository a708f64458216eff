"""Settings for all tests: threads pinned, so that numbers and times do not depend on the machine's load; the judge."""

import sys

import pytest
import torch

torch.set_num_threads(1)

MADE_ONCE = {
    "test_distributed.py",
    "test_loop.py",
    "test_readme.py",
    "test_recall.py",
    "test_time_parallel.py",
    "test_zero.py",
}
"""Files whose fixtures take long: each stays in one worker, so that they are made once."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files of MADE_ONCE first, then the other tests one by one, to whichever worker is free.

    xdist's own marks for this (--dist loadgroup) are without effect in pytest 9: it writes into an id that pytest no
    longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.rpartition("/")[2] in MADE_ONCE else nodeid

    return Scheduling(config, log)


@pytest.fixture
def rwkv_package(monkeypatch):
    """The judge: RWKV of the rwkv package, for the CPU and without its own compilation."""
    for name, value in (("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RWKV_V7_ON", raising=False)
    monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
    from rwkv.model import RWKV

    return RWKV

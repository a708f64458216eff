"""Settings for all tests: pinned threads, so that numbers and times do not depend on load, and the rwkv package."""

import os
import sys
import warnings

import pytest
import torch

from hub_server import running_hub

torch.set_num_threads(1)
# Read when huggingface_hub is imported: a test without a hub meets an empty cache and no network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}

MADE_ONCE = {
    "test_distributed.py",
    "test_loop.py",
    "test_readme.py",
    "test_recall.py",
    "test_time_parallel.py",
    "test_wrong_inputs.py",
    "test_zero.py",
}
"""Files whose fixtures take long: each stays in one worker, so that they are made once."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Schedules whole files of MADE_ONCE first, then the other tests one by one, on any free worker.

    xdist's marks for this (--dist loadgroup) have no effect in pytest 9: xdist writes to an id that pytest no longer
    reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.rpartition("/")[2] in MADE_ONCE else nodeid

    return Scheduling(config, log)


@pytest.fixture
def rwkv_package(monkeypatch):
    """RWKV of the rwkv package, the judge: for the CPU, without compiling its kernels."""
    return _import_rwkv(monkeypatch, "0")


@pytest.fixture
def rwkv_7_package(monkeypatch):
    """The same for RWKV-7, for which the package has another class."""
    return _import_rwkv(monkeypatch, "1")


def _import_rwkv(monkeypatch, version_7):
    for name, value in (("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0"), ("RWKV_V7_ON", version_7)):
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "rwkv.model", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its class for RWKV-7 always uses torch's old compiler
        from rwkv.model import RWKV

    return RWKV


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of the tests' own, which huggingface_hub takes for the real one; its cache is in tmp_path / "hub"."""
    from huggingface_hub import constants

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub

"""Memory: a longer window costs its seams and nothing else, measured in fresh processes."""

import importlib.util
import sys

import pytest

from places import ROOT


def tool(name):
    """A program of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_longer_window_costs_its_seams():
    bench = tool("bench_memory")
    short, long = (bench.run_apart(window, threads=1) for window in (8192, 65536))
    assert short["seams"] == 16 * 4 * 66 * 256 * 4  # segments, layers, (N + 2) D, fp32
    assert long["seams"] == 8 * short["seams"]
    grown = long["peak"] - short["peak"]
    assert grown <= long["seams"] - short["seams"] + 0.05 * short["peak"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_tuning_in_a_longer_window_costs_its_seams():
    """Eight layers of width 512, frozen; tools/bench_memory.py --tune measures windows up to 65,536 tokens.

    A process of 1.1 GB differs from the next by up to 3 % with the same window: what is beyond that has grown.
    """
    bench = tool("bench_memory")
    short, long = (bench.run_apart(window, threads=1, tune=True) for window in (4096, 16384))
    assert short["seams"] == 8 * 8 * 66 * 512 * 4  # segments, layers, (N + 2) D, fp32
    assert long["seams"] == 4 * short["seams"]
    grown = long["peak"] - short["peak"]
    assert grown <= long["seams"] - short["seams"] + 0.05 * short["peak"]

"""Memory: a longer window costs only its seams, measured in fresh processes."""

import sys

import pytest

import bench_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("shorter", [1024, 8192])
@pytest.mark.slow
def test_a_longer_window_costs_its_seams(shorter):
    short, long = (bench_memory.run_apart(window, threads=1) for window in (shorter, 8 * shorter))
    assert short["seams"] == shorter / 512 * 4 * 66 * 256 * 4  # segments, layers, (N + 2) D, fp32
    assert long["seams"] == 8 * short["seams"]
    grown = long["peak"] - short["peak"]
    assert grown <= long["seams"] - short["seams"] + 0.05 * short["peak"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.slow
def test_tuning_in_a_longer_window_costs_its_seams():
    """Eight layers of width 512, frozen; tools/bench_memory.py --tune measures windows up to 65,536 tokens.

    With the same window, processes of 1.1 GB differ by up to 3 %; only more than that is growth.
    """
    short, long = (bench_memory.run_apart(window, threads=1, tune=True) for window in (4096, 16384))
    assert short["seams"] == 8 * 8 * 66 * 512 * 4  # segments, layers, (N + 2) D, fp32
    assert long["seams"] == 4 * short["seams"]
    grown = long["peak"] - short["peak"]
    assert grown <= long["seams"] - short["seams"] + 0.05 * short["peak"]

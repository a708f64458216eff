"""The benchmark of the kernels without a GPU: the emulator computes, memory and times are faked."""

import re

import pytest
import torch

from infctx.cuda.wkv_cuda import wkv_cuda
from infctx.cuda.wkv_time import Processors

import bench_wkv
import wkv_table
from wkv_emulated import emulated
from wkv_table import Report, Row

FACTS = {"device": "NVIDIA H100", "driver": "580", "torch": "2.11", "date": "2026-01-31", "commit": "0123abc-dirty"}


class PretendedTimer:
    """A fake timer: a call takes as many us as there were calls."""

    def __init__(self, device=None):
        self.calls = 0

    def synchronize(self):
        pass

    def wait(self, seconds):
        assert 0 <= seconds <= 0.05

    def mark(self):
        return self.calls

    def us_between(self, begin, end):
        return float(end - begin)


def test_the_median_of_what_is_timed():
    timer, prepared = PretendedTimer(), []

    def prepare(number):
        prepared.append(number)

        def work():
            timer.calls += 10 if number == 4 else 7

        return work

    assert bench_wkv.median_us(prepare, timer, seconds=1e9) == 7.0
    assert prepared == [0, 1, *range(50)]
    prepared.clear()
    assert bench_wkv.median_us(prepare, timer, seconds=0, least=3) == 7.0
    assert prepared == [0, 1, 0, 1, 2]


@pytest.fixture
def bench(monkeypatch):
    """A bench on the CPU with the emulator, heads of 16; memory and times are faked."""
    monkeypatch.setattr(bench_wkv, "HEAD_SIZE", 16)
    monkeypatch.setattr(bench_wkv, "CudaTimer", PretendedTimer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    properties = type("Properties", (), {"L2_cache_size": 10**5})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # Three measurements are enough.
    monkeypatch.setattr(bench_wkv, "median_us", lambda prepare, timer, **_: [prepare(n)() for n in range(3)] and 5.0)
    report = Report(FACTS, 3e12, Processors(132), [])
    with emulated(8):
        yield bench_wkv.Bench(torch.device("cpu"), bench_wkv.Deadline(1e6), report)


def test_a_row_is_filled(bench):
    row = Row(1, 64, 2)
    bench.fill(row)
    assert (row.forward, row.training, row.backward, row.chunked, row.fla) == (5.0, 5.0, 5.0, 10.0, "-")
    assert 0 < row.y_error < 3e-3 and 0 < row.dr_error < 3e-3
    assert len(bench.draw_sets(row)) == 16 and len(bench.draw_sets(Row(1, 1024, 4))) == 2
    assert all("failed" not in note for note in bench.report.notes)


def test_rows_without_time_or_memory(bench, monkeypatch):
    bench.deadline.end = 0
    row = Row(1, 64, 2)
    bench.fill(row)
    assert (row.forward, row.backward, row.chunked, row.fla, row.dr_error) == (*["not run"] * 3, "-", "not run")
    bench.deadline.end = 1e12
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30_000, 30_000))
    bench.fill(row)
    assert (row.forward, row.training, row.backward, row.chunked) == ("-",) * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000, 50_000))
    bench.fill(row)
    assert (row.forward, row.training, row.backward, row.chunked) == (5.0, 5.0, 5.0, "-")
    assert len(bench.draw_sets(row)) == 1
    bench.timer.synchronize = broken_device
    bench_wkv.fill_or_stop(bench, bench.fill, row)
    bench_wkv.fill_or_stop(bench, bench.fill, Row(1, 32, 2))
    assert (
        bench.report.notes[-1] == "nothing was run after B=1 T=64 H=2: CUDA error: gone" and bench.deadline.left() <= 0
    )


def broken_device():
    raise RuntimeError("CUDA error: gone\nand more")


def test_fla_is_timed_if_it_is_right(bench):
    row = Row(1, 64, 2)
    bench.fla = lambda starts=None, initial=None, **inputs: bench_wkv.wkv_chunked(**inputs, starts=None, initial=None)
    bench.fill_fla(row)
    assert row.fla == 10.0
    bench.fla = lambda **inputs: wkv_cuda(**{**inputs, "w": 2 * inputs["w"]})
    bench.fill_fla(row)
    assert row.fla == "failed" and "fla at B=1 T=64 H=2 failed: its results differ" in bench.report.notes[-1]
    bench.fla_was_called, bench.deadline.end = False, bench.deadline.clock() + 60
    bench.fill_fla(row)
    assert row.fla == "not run"


def test_the_table():
    rows = [
        Row(1, 4096, 40, 100.0, 110.0, 301.0, 20_000.0, 1644.0, 1.7e-3, 1.8e-3),
        Row(8, 65536, 64, 25_000.0, "-", "failed", "-", "-", "-", "-"),
        Row(8, 65536, 32),
    ]
    report = Report(FACTS, 3e12, Processors(132, 233_472), rows, ["fla 0.5"])
    lines = wkv_table.markdown(report).splitlines()
    assert lines[0] == "# WKV kernels on NVIDIA H100" and "| commit | 0123abc-dirty |" in lines
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.count("|") > 10]
    assert len({len(cells) for cells in table}) == 1 and len(table) == 5
    # bytes per token and head times 163,840, at 3 TB/s
    forward, backward = (wkv_table.layout_of(rows[0], report, direction) for direction in ("forward", "backward"))
    roofline = forward.forward_bytes(keep=False) * 163_840 / 3e6, backward.backward_bytes() * 163_840 / 3e6
    assert table[2][:6] == ["1", "4096", "40", "100.0", "110.0", "301.0"]
    assert table[2][6] == f"{roofline[0] / 100:.0%}, {roofline[1] / 301:.0%}"
    assert table[2][7:10] == ["20,000", "1,644", "4.0"] and table[2][11:] == ["1.7e-03", "1.8e-03"]
    assert table[3][4:10] == ["-", "failed", table[3][6], "-", "-", "-"] and table[3][6].endswith(", failed")
    assert table[4][3:10] == ["not run"] * 3 + ["not run, not run", "not run", "not run", "-"]
    assert [line.rpartition(": ")[2] for line in lines[-4:-1]] == ["100.0, met", "301.0, missed", "4.0, met"]
    assert lines[-1] == "- fla 0.5"
    report.rows = []
    assert all(line.endswith("not measured") for line in wkv_table.bars(report))


def test_the_heading_does_without_git(monkeypatch, tmp_path):
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}(-dirty)?", wkv_table.find_commit())
    monkeypatch.setattr(wkv_table, "__file__", str(tmp_path / "wkv_table.py"))
    assert wkv_table.find_commit() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert wkv_table.find_commit() == "unknown" and wkv_table.find_driver() == "unknown"
    assert bench_wkv.default_output("NVIDIA H100 80GB HBM3").name == "wkv-nvidia-h100-80gb-hbm3.md"

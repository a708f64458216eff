"""The programs that print the tables of infctx/cuda/README.md, and its commands for machine code."""

import re

import pytest

import machine_code
import wkv_errors
from places import ROOT

PAGE = (ROOT / "infctx" / "cuda" / "README.md").read_text(encoding="utf-8")


def test_the_table_of_errors_has_the_rows_and_sizes_of_the_page(capsys):
    """One seed is a few tenths off the mean of two; rows of 1,024 tokens would take too long here."""
    wkv_errors.main(["--tokens", "256", "--seeds", "1"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 8 and f"{head}\n{rule}\n" in PAGE
    for row in rows:
        name = row.split(" | ")[0]
        (shown,) = [line for line in PAGE.splitlines() if line.startswith(f"{name} | ")]
        found, said = (numbers(line.partition(", T 256 | ")[2]) for line in (row, shown))
        assert len(found) == len(said) == 12
        assert found == pytest.approx(said, rel=0.6)


def numbers(line):
    return [float(word) for word in re.findall(r"\d\.\de-\d+", line)]


def test_machine_code_is_written_and_its_resources_are_printed(tmp_path, capsys):
    assert machine_code.main(["wkv_forward.cu", "--head-size", "16", "--output", str(tmp_path / "out.cubin")]) == 0
    said = capsys.readouterr().out
    assert {line.split()[0] for line in said.splitlines()[:3]} == {"wkv_sum_spans", "wkv_join_spans", "wkv_forward"}
    assert re.search(r"wkv_forward +\d+ registers, 0 bytes of stack, 0 bytes spilled", said)
    assert (tmp_path / "out.cubin").read_bytes().startswith(b"\x7fELF")
    assert machine_code.main(["wkv_forward.cu", "--arch", "sm_999"]) == 2
    assert re.fullmatch(r"machine_code: NVRTC .* cannot compile for sm_999, .*\n", capsys.readouterr().err)


def test_the_page_names_these_programs():
    assert "python tools/wkv_errors.py" in PAGE
    assert "python tools/machine_code.py wkv_backward.cu" in PAGE

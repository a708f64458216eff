"""The tables of docs/distributed.md are those that the tool prints, and a cell of each kind is checked by hand."""

import subprocess
import sys

from places import ROOT
from plan_tables import choice_table, time_table
from plans import bytes_of, many

GB = 1e9


def test_the_tables_of_the_page_are_what_its_command_prints():
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert "python tools/plan_tables.py" in page
    command = [sys.executable, "tools/plan_tables.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == f"{choice_table()}\n\n{time_table()}\n"
    for table in printed.strip().split("\n\n"):
        assert f"\n\n{table}\n\n" in page


def test_the_table_of_choices_by_hand():
    """Checks a cell of each kind."""
    rows = {tuple(line.split(" | ")[:2]): line.strip(" |").split(" | ")[2:] for line in choice_table().splitlines()[2:]}
    cells = rows["| finch-3b", "40 GB"]
    assert cells[3] == f"zero1 {bytes_of(many(8), 'zero1').device / GB:.1f}"
    assert bytes_of(many(8), "ddp").device > 36 * GB
    assert cells[2] == f"zero2* {bytes_of(many(4), 'zero2').device / GB:.1f}"
    assert cells[0] == f"ddp host {bytes_of(many(1), 'ddp', True, reduction='step').device / GB:.1f}"
    assert cells[1] == f"zero2 host {bytes_of(many(2), 'zero2', True, reduction='step').device / GB:.1f}"
    cells = rows["| finch-3b", "24 GB"]
    assert cells[1] == f"zero2 host* {bytes_of(many(2), 'zero2', True).device / GB:.1f}"
    assert rows["| finch-3b", "80 GB"] == [f"ddp {bytes_of(many(8), 'ddp').device / GB:.1f}"] * 4
    for line in [*choice_table().splitlines(), *time_table().splitlines()]:
        assert len(line) <= 100

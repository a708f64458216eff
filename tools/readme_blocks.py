"""Runs `make train` as a newcomer would, and puts the end of its output into README.md, between the marks.

    python tools/readme_blocks.py

This takes a few minutes. Remove runs/finch-tiny first: an existing run would only resume.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RUN = ROOT / "runs" / "finch-tiny"
COMMAND = "make train"
FROM = "step 240/240"
"""How the first line that is shown begins."""


def main() -> int:
    """Returns the exit code."""
    if RUN.exists():
        print(f"{RUN}: is there already; move it away, so that `{COMMAND}` begins at its first step", file=sys.stderr)
        return 2
    began = time.monotonic()
    done = subprocess.run(
        COMMAND.split(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    README.write_text(with_block(README.read_text(encoding="utf-8"), last_lines(done.stdout)), encoding="utf-8")
    print(f"{COMMAND} took {time.monotonic() - began:.0f} s; its last lines are in {README}")
    return 0


def last_lines(output: str) -> str:
    """Returns the part of the output to show: from the last step."""
    lines = output.splitlines()
    begin = max(number for number, line in enumerate(lines) if line.startswith(FROM))
    return "\n".join(line.rstrip() for line in lines[begin:])


def block(readme: str) -> str:
    """Returns the README's current block."""
    return _find(readme)[2]


def with_block(readme: str, lines: str) -> str:
    """Returns the README with these lines in its block."""
    before, after, _ = _find(readme)
    return f"{before}{lines}\n{after}"


def _find(readme: str) -> tuple[str, str, str]:
    mark = f"<!-- made by tools/readme_blocks.py: {COMMAND} -->\n```text\n"
    found = re.search(f"{re.escape(mark)}(.*?)(```\n<!-- end -->)", readme, re.S)
    assert found, "README.md has lost the marks of its block"
    return readme[: found.start(1)], readme[found.start(2) :], found[1]


if __name__ == "__main__":
    sys.exit(main())

"""Reports files and functions that are too long to keep in mind: 400 lines per file, 60 lines and 6 parameters per
function.

More parameters need a comment above the function that explains why.  Private functions may have any number, and so may
the numerics of kernels (ops/, recurrence/, cuda/, cpu/).

python tools/check_size.py          exits with 1 if there is one
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 6
NUMERICS = {"ops", "recurrence", "cuda", "cpu"}
CHECKED_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    files = [Path(name) for name in listed.stdout.splitlines() if name.endswith(CHECKED_SUFFIXES)]
    problems = [problem for file in files if file.is_file() for problem in too_long(file)]
    print("\n".join(problems) or f"sizes: {len(files)} files, none above {MOST_FILE_LINES} lines")
    return 1 if problems else 0


def too_long(file: Path) -> Iterator[str]:
    """Yields a line if the file is too long, and for each of its functions that is."""
    text = file.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    if num_lines > MOST_FILE_LINES:
        yield f"{file}: {num_lines} lines, {MOST_FILE_LINES} at most; move half of it to another file"
    if file.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text, str(file))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None  # parsed nodes have one
            length = node.end_lineno - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                yield f"{file}:{node.lineno}: {node.name} has {length} lines, {MOST_FUNCTION_LINES} at most"
            yield from too_many_parameters(file, node, text.splitlines())


def too_many_parameters(file: Path, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Iterator[str]:
    """Yields a line for a public function with too many parameters and no comment above it."""
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = sum(argument.arg not in ("self", "cls", "ctx") for argument in given)
    private = node.name.startswith("_") and node.name != "__init__"
    if count <= MOST_PARAMETERS or private or "infctx" not in file.parts or NUMERICS & set(file.parts):
        return
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if not lines[first - 2].strip().startswith("#"):
        yield f"{file}:{node.lineno}: {node.name} has {count} parameters, {MOST_PARAMETERS} at most, or a comment why"


if __name__ == "__main__":
    sys.exit(main())

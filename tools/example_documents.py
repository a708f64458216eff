"""Prints documents that every machine with infctx has, as jsonl with the key `text`.

    python    the standard library's long source files, tests left out; first of them `pydoc_data/topics.py` (the
              language reference, about 0.7 MB in one document)
    cpp       the long C++ headers that come with torch

For example:

    python tools/example_documents.py python | infctx prepare - --format jsonl --tokenizer bytes --output data/python
"""

import argparse
import importlib.util
import json
import os
import sys
import sysconfig
from io import TextIOWrapper
from pathlib import Path
from typing import cast

LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FIRST = "pydoc_data/topics.py"
MAX_HEADER_BYTES = 200_000  # longer ones are lists that a program wrote


def main() -> None:
    """Write the documents to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("python", "cpp"))
    parser.add_argument(
        "--min-bytes", type=int, default=20_000, help="leave out files below this (default: %(default)s)"
    )
    arguments = parser.parse_args()
    folder, paths = {"python": python_sources, "cpp": cpp_headers}[arguments.kind](arguments.min_bytes)
    cast(TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8", newline="\n")
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        print(json.dumps({"text": text, "source": path.relative_to(folder).as_posix()}, ensure_ascii=False))


def python_sources(min_bytes: int) -> tuple[Path, list[Path]]:
    """The standard library's folder, and its long sources in a stable order: the language reference, then by name."""
    # A venv has no standard library of its own: sysconfig gives that of the Python it was made with.
    folder = Path(sysconfig.get_path("stdlib"))
    paths = _files(folder, ".py", min_bytes)
    return folder, sorted(paths, key=lambda path: path.relative_to(folder).as_posix() != FIRST)


def cpp_headers(min_bytes: int) -> tuple[Path, list[Path]]:
    """The folder of torch's headers, and the long ones by name."""
    # Its folder, without importing it.
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    folder = Path(torch.origin).parent / "include"
    return folder, [path for path in _files(folder, ".h", min_bytes) if path.stat().st_size <= MAX_HEADER_BYTES]


def _files(folder: Path, suffix: str, min_bytes: int) -> list[Path]:
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        found += [Path(place, name) for name in names if name.endswith(suffix)]
    found = [path for path in found if path.stat().st_size >= min_bytes]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


if __name__ == "__main__":
    main()

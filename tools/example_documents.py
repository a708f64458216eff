"""Prints documents that every machine with Python has, as jsonl with the key `text`.

The first is `pydoc_data/topics.py` (the language reference, about 0.7 MB in one document), the others are the long
source files of the standard library, tests and site-packages left out:

    python tools/python_documents.py | infctx prepare - --format jsonl --tokenizer bytes --output data/python
"""

import argparse
import json
import os
import sys
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FIRST = Path("pydoc_data", "topics.py")


def main() -> None:
    """Write the documents to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--min-bytes", type=int, default=20_000, help="leave out source files below this size (default: %(default)s)"
    )
    arguments = parser.parse_args()
    # A venv has no standard library of its own: sysconfig gives that of the Python it was made with.
    library = Path(sysconfig.get_path("stdlib"))
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    for path in python_documents(library, arguments.min_bytes):
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        print(json.dumps({"text": text, "source": path.relative_to(library).as_posix()}, ensure_ascii=False))


def python_documents(library: Path, min_bytes: int) -> list[Path]:
    """Source files of at least `min_bytes` in a stable order: the language reference, then by name."""
    found = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    found = [path for path in found if path.stat().st_size >= min_bytes]
    return sorted(found, key=lambda path: (path.relative_to(library) != FIRST, path.relative_to(library).as_posix()))


if __name__ == "__main__":
    main()

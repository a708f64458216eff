"""Documents that every machine with infctx has: names of long files out, in an order that does not change.

They are the standard library's sources, first of them `pydoc_data/topics.py` (the language reference, about 0.7 MB in
one document), and the C++ headers that come with torch.
"""

import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FIRST = "pydoc_data/topics.py"
MIN_BYTES = 20_000
MAX_HEADER_BYTES = 200_000  # longer ones are lists that a program wrote


def python_documents(min_bytes: int = MIN_BYTES) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the standard library's long sources: the language reference, then the others by name."""
    # A venv has no standard library: sysconfig finds that of the Python it was made with.
    folder = Path(sysconfig.get_path("stdlib"))
    paths = _files(folder, ".py", min_bytes)
    return _texts(folder, sorted(paths, key=lambda path: path.relative_to(folder).as_posix() != FIRST))


def cpp_documents(min_bytes: int = MIN_BYTES) -> Iterator[tuple[str, str]]:
    """Yields the same for torch's long C++ headers, by name."""
    torch = importlib.util.find_spec("torch")  # finds its folder without importing it
    assert torch is not None and torch.origin is not None
    folder = Path(torch.origin).parent / "include"
    return _texts(folder, [path for path in _files(folder, ".h", min_bytes) if path.stat().st_size <= MAX_HEADER_BYTES])


def _texts(folder: Path, paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield path.relative_to(folder).as_posix(), text


def _files(folder: Path, suffix: str, min_bytes: int) -> list[Path]:
    found = []
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        found += [Path(place, name) for name in names if name.endswith(suffix)]
    found = [path for path in found if path.stat().st_size >= min_bytes]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())

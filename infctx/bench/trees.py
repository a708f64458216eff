"""The infctx of another commit, unpacked into a temporary folder, to measure it next to this one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infctx.errors import InputError

HERE = Path(__file__).resolve().parents[2]
"""The folder of the infctx that runs."""


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """Unpacks a commit's package; gives its folder.  Raises InputError if there is no such commit, or no git."""
    if commit.startswith("-"):
        raise InputError(f"bench --against {commit}: is no commit; name one, such as HEAD~1")
    archive = _archive(commit)
    if archive is None:
        raise InputError(
            f"bench --against {commit}: git finds no such commit in {HERE}; use a clone, and name one of its commits"
        )
    with tempfile.TemporaryDirectory(prefix="infctx-bench-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def _archive(commit: str) -> bytes | None:
    """Returns the package at a commit as a tar; None without git, outside a clone, or if there is no such commit."""
    command = ["git", "-C", str(HERE), "archive", "--format=tar", commit, "infctx"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None

"""Names on the hub: a setting or an argument in; repository, revision and file out.  Nothing here uses the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PREFIX = "hf:"
"""Marks a name as one on the hub; needed for data, and for weights only where a name could be a path."""
FOLDERS = ("checkpoints", "configs", "data", "models", "runs", "weights")
"""What people call their folders: `runs/books` is no repository."""
FILES = (".bin", ".gguf", ".json", ".pt", ".pth", ".safetensors", ".st", ".state", ".txt", ".yaml")
"""Suffixes of files: `mine/x.pth` is no repository."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[-.](?![-.])){0,95}(?<![-.])"
_NAME = re.compile(
    rf"(?P<prefix>{PREFIX})?(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?"
)


class HubName(NamedTuple):
    """A repository on the hub, and one of its files if the name says which."""

    repository: str
    revision: str
    """A branch, a tag or a commit."""
    file: str | None

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repository}{at}{f':{self.file}' if self.file else ''}"


def hub_name(path: str | Path) -> HubName | None:
    """Reads OWNER/REPO:FILE, OWNER/REPO@REVISION:FILE or OWNER/REPO; None for what is, or must be, a path.

    A path that exists always is one.  OWNER/REPO alone could be a path that is missing: it is taken for one if OWNER is
    a folder here or one of FOLDERS, or if it ends like a file.  `hf:` before the name rules that out.
    """
    text = str(path)
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists():
        return None
    repository, file = found["repository"], found["file"]
    if file is not None and (file.startswith("/") or ".." in file.split("/")):
        return None
    if file is None and not found["prefix"] and not found["revision"]:
        owner, _, name = repository.partition("/")
        if owner in FOLDERS or Path(owner).is_dir() or Path(name).suffix.lower() in FILES:
            return None
    return HubName(repository, found["revision"] or "main", file)

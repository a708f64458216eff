"""The published weights files: their names, repositories and sizes.

In: the path of a weights file; out: the published file of that name, and messages.  Nothing here uses the network.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from infctx.errors import InputError
from infctx.hub.names import HubName

GOOSE, FINCH, EAGLE = "BlinkDL/rwkv7-g1", "BlinkDL/rwkv-6-world", "BlinkDL/rwkv-5-world"
"""Repositories on the Hugging Face hub."""


class PublishedFile(NamedTuple):
    """A weights file as its authors published it."""

    repository: str
    name: str
    num_bytes: int
    size: str
    """The name of its sizes in `infctx.model.sizes.PUBLISHED_SIZES`."""

    @property
    def gigabytes(self) -> str:
        """Formats the size for people: 6.2 GB, with a GB of 1e9 bytes."""
        return f"{self.num_bytes / 1e9:.1f} GB"

    @property
    def hub_name(self) -> str:
        """Returns the name for model.weights."""
        return f"{self.repository}:{self.name}"

    def download_command(self, folder: Path) -> str:
        """Returns the shell command that downloads the file into a folder."""
        return f"hf download {self.repository} {self.name} --local-dir {shlex.quote(str(folder))}"


PUBLISHED_FILES = (
    PublishedFile(FINCH, "RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", 3_199_845_663, "finch-1.6b"),
    PublishedFile(FINCH, "RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth", 6_199_859_158, "finch-3b"),
    PublishedFile(FINCH, "RWKV-x060-World-7B-v3-20241112-ctx4096.pth", 15_271_627_549, "finch-7b"),
    PublishedFile(FINCH, "RWKV-x060-World-14B-v2.1-20240719-ctx4096.pth", 28_138_429_796, "finch-14b"),
    PublishedFile(EAGLE, "RWKV-5-World-0.4B-v2-20231113-ctx4096.pth", 923_523_954, "eagle-0.4b"),
    PublishedFile(EAGLE, "RWKV-5-World-1B5-v2-20231025-ctx4096.pth", 3_155_590_194, "eagle-1.5b"),
    PublishedFile(EAGLE, "RWKV-5-World-3B-v2-20231113-ctx4096.pth", 6_126_106_674, "eagle-3b"),
    PublishedFile(EAGLE, "RWKV-5-World-3B-v2-20231118-ctx16k.pth", 6_126_106_467, "eagle-3b"),
    PublishedFile(EAGLE, "RWKV-5-World-7B-v2-20240128-ctx4096.pth", 15_036_197_526, "eagle-7b"),
    PublishedFile(GOOSE, "rwkv7-g1d-0.4b-20260210-ctx8192.pth", 901_776_749, "goose-0.4b"),
    PublishedFile(GOOSE, "rwkv7-g1i-1.5b-20260805-ctx16384.pth", 3_055_444_605, "goose-1.5b"),
    PublishedFile(GOOSE, "rwkv7-g1j-2.9b-20260831-ctx16384.pth", 5_896_273_469, "goose-2.9b"),
    PublishedFile(GOOSE, "rwkv7-g1i-7.2b-20260805-ctx16384.pth", 14_400_007_869, "goose-7.2b"),
)
"""All are bf16, under Apache-2.0.  Repositories hold many other files, so each entry names its file."""

PUBLISHED_FOLDERS = (
    "RWKV/v6-Finch-1B6-HF",
    "RWKV/v6-Finch-3B-HF",
    "RWKV/v6-Finch-7B-HF",
    "RWKV/v6-Finch-14B-HF",
    "RWKV/rwkv-6-world-1b6",
    "RWKV/rwkv-6-world-3b",
    "RWKV/rwkv-6-world-7b",
    "RWKV/v5-Eagle-7B-HF",
    "RWKV/rwkv-5-world-1b5",
    "RWKV/rwkv-5-world-3b",
)
"""Repositories in Hugging Face's layout, with its tensor names; they are read as folders."""

FLA_FOLDERS = {
    "fla-hub/rwkv7-0.1B-g1": "goose-0.1b",
    "fla-hub/rwkv7-0.1B-world": "goose-0.1b",
    "fla-hub/rwkv7-0.4B-g1": "goose-0.4b",
    "fla-hub/rwkv7-0.4B-world": "goose-0.4b",
    "fla-hub/rwkv7-1.5B-g1": "goose-1.5b",
    "fla-hub/rwkv7-1.5B-world": "goose-1.5b",
    "fla-hub/rwkv7-2.9B-g1": "goose-2.9b",
    "fla-hub/rwkv7-2.9B-world": "goose-2.9b",
}
"""Repositories of Goose in the same layout, with the tensor names of flash-linear-attention: each with its size."""

_OTHER_VERSIONS = (
    (r"RWKV-5-World-.*-v1-.*\.pth", "RWKV-5.0 or 5.1"),
    (r"(?i)rwkv-?7[ab]-.*", "RWKV-7a or 7b (DeepEmbed)"),
    (r"(?i)rwkv-?4-.*", "RWKV-4"),
)
"""Name patterns of published files of other architectures, and the architecture."""


def published_file(path: Path) -> PublishedFile | None:
    """Returns the published file of this name, in whatever folder or repository."""
    return next((file for file in PUBLISHED_FILES if file.name == path.name.rpartition(":")[2]), None)


def missing_weights(path: Path) -> str:
    """Returns a message that this file or folder does not exist, and how to get it if it is published."""
    file = published_file(path)
    if file is not None:
        return f"there is no {path} ({file.gigabytes}); name it on the hub, {file.hub_name}, and it is downloaded once"
    version = _other_version(path.name)
    if version is not None:
        return f"there is no {path}, and by its name it is {version}; infctx reads the files in docs/models.md"
    return f"there is no {path}; train it, download it (docs/models.md), or name another file"


def refuse_other_version(name: HubName) -> None:
    """Raises InputError for weights on the hub that are of another architecture by their name, before a download."""
    version = _other_version(Path(name.file or name.repository).name)
    if version is not None:
        raise InputError(f"{name}: is {version} by its name; infctx reads the files in docs/models.md")


def _other_version(name: str) -> str | None:
    return next((version for pattern, version in _OTHER_VERSIONS if re.fullmatch(pattern, name)), None)


def refuse_stopped_download(path: Path) -> None:
    """Raises InputError for published weights whose file does not have the published size: the download stopped short,
    and a reader could report only damage."""
    file = published_file(path)
    if file is None or not path.is_file() or path.stat().st_size == file.num_bytes:
        return
    raise InputError(
        f"{path}: has {path.stat().st_size:,} bytes, the published file {file.num_bytes:,}; get it again, or, if it is "
        "a file of your own, rename it",
        file.download_command(path.parent),
    )

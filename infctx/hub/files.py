"""One file of a repository: its place in huggingface_hub's cache, where it is downloaded to once.

huggingface_hub finds the file, sends the token and knows the cache.  Since its version 1.18 an interrupted process
loses what it has of a file, so here the beginning is kept beside the finished files, and the next try continues from
there.  The hash that the hub names a file by is compared before the file takes its place.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import HfFileMetadata, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from infctx.errors import InputError
from infctx.hub.failures import AGAIN, Unreachable, explained, not_the_hub

HASHED_AT_ONCE = 1 << 22
RETRIED = (408, 429, 500, 502, 503, 504)
"""Statuses that a second request may not get."""

log = logging.getLogger(__name__)


class HubFile(NamedTuple):
    """A file of a repository."""

    repository: str
    path: str
    kind: str = "model"
    """Of the repository: "model" or "dataset"."""
    revision: str = "main"
    num_bytes: int | None = None
    """None if it was never asked for."""

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repository}{at}:{self.path}"


def cached(file: HubFile) -> Path | None:
    """Returns where the file is in the cache; None if it is not there."""
    found = try_to_load_from_cache(file.repository, file.path, revision=file.revision, repo_type=file.kind)
    return Path(found) if isinstance(found, str) else None


def download(file: HubFile) -> Path:
    """Returns the file in the cache; downloads it first if it is not there, one process for all that ask.

    What is in the cache is taken as it is, without asking the hub.  Raises InputError.
    """
    found = cached(file)
    if found is not None:
        return found
    with explained(str(file), file.repository):
        metadata = _metadata(file)
        if not metadata.commit_hash or not metadata.etag:
            raise not_the_hub(str(file))
        cache = Path(constants.HF_HUB_CACHE)
        folder = repo_folder_name(repo_id=file.repository, repo_type=file.kind)
        blob, lock = cache / folder / "blobs" / metadata.etag, cache / ".locks" / folder / f"{metadata.etag}.lock"
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                _fetch(file, metadata, blob)
        # This finds the finished file by its hash, and gives it its name.
        return Path(hf_hub_download(file.repository, file.path, repo_type=file.kind, revision=file.revision))


def _metadata(file: HubFile) -> HfFileMetadata:
    """Asks for hash, size and commit.  A busy hub is asked again, for half a minute; a missing network is not."""
    url = hf_hub_url(file.repository, file.path, repo_type=file.kind, revision=file.revision)
    try:
        return get_hf_file_metadata(url)
    except HfHubHTTPError as error:
        if error.response.status_code not in RETRIED:
            raise
        return get_hf_file_metadata(url, retry_on_errors=True)


def _fetch(file: HubFile, metadata: HfFileMetadata, blob: Path) -> None:
    """Downloads to a file beside `blob`, from where it ends on, checks it and renames it to `blob`."""
    beginning = blob.with_name(f"{blob.name}.infctx.incomplete")
    size = metadata.size
    if size is None or _length(beginning) > size:
        beginning.unlink(missing_ok=True)
    if size is not None:
        _refuse_full_disk(file, size - _length(beginning))
        log.info("%s: downloading %s, once", file, describe_bytes(size))
    url = hf_hub_url(file.repository, file.path, repo_type=file.kind, revision=metadata.commit_hash)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    while True:
        before = _length(beginning)
        try:
            with beginning.open("ab") as end:
                http_get(
                    url,
                    end,
                    resume_size=before,
                    headers=headers,
                    expected_size=size,
                    displayed_filename=file.path.rpartition("/")[2],
                )
            break
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            have = _length(beginning)
            if have > before:  # it moves: try again, as huggingface_hub does for some errors
                continue
            of = f" of {describe_bytes(size)}" if size is not None else ""
            reason = str(error) or type(error).__name__
            raise Unreachable(
                f"{file}: the connection broke after {describe_bytes(have)}{of} ({reason}); {AGAIN}"
            ) from None
    _refuse_damaged(file, beginning, blob.name)
    os.replace(beginning, blob)


def _refuse_full_disk(file: HubFile, needed: int) -> None:
    free = shutil.disk_usage(constants.HF_HUB_CACHE).free
    if needed > free:
        raise InputError(
            f"{file}: needs {describe_bytes(needed)} on the disk of {constants.HF_HUB_CACHE}, and "
            f"{describe_bytes(free)} is free; make room, or set HF_HOME to a folder elsewhere"
        )


def _refuse_damaged(file: HubFile, path: Path, etag: str) -> None:
    """Removes a file that does not have the hash that the hub names it by; raises InputError."""
    if len(etag) == 64:
        name, digest = "SHA-256", hashlib.sha256()
    elif len(etag) == 40:  # git's own, for small files
        name, digest = "SHA-1", hashlib.sha1(b"blob %d\0" % _length(path))
    else:  # a mirror's own
        return
    with path.open("rb") as content:
        while block := content.read(HASHED_AT_ONCE):
            digest.update(block)
    if digest.hexdigest() != etag:
        path.unlink()
        raise InputError(
            f"{file}: was damaged on the way, so it is removed: its {name} is {digest.hexdigest()[:12]}..., and the "
            f"hub says {etag[:12]}...; run the same command again"
        )


def describe_bytes(number: int) -> str:
    """Formats a size for people, with a GB of 1e9 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,} bytes"


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

"""What can go wrong between here and the hub: an exception of huggingface_hub in, one line for the user out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # the base class of every error of the HTTP client, which differs between versions
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from infctx.errors import InputError
from infctx.hub.retries import say_retries_once
from infctx.small_texts import counted, quoted

TOKEN = "`hf auth login`, or HF_TOKEN"
AGAIN = "run the same command again: it continues from there"


class Unreachable(InputError):
    """The hub cannot be asked, so only the cache can answer."""


class NoSuchFile(InputError):
    """The repository is there, and has no such file."""


@contextmanager
def explained(name: str, repository: str) -> Iterator[None]:
    """Turns what huggingface_hub raises inside into an InputError of one line.

    name: what was asked for, as the user wrote it
    """
    say_retries_once()
    try:
        yield
    except InputError:
        raise
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        raise _explained(name, repository, cause if isinstance(cause, Exception) else error) from None
    except (HTTPError, OSError, ValueError) as error:
        raise _explained(name, repository, error) from None


def not_the_hub(name: str) -> InputError:
    return InputError(f"{name}: {constants.ENDPOINT} answers, but not as the hub does; check HF_ENDPOINT")


def _explained(name: str, repository: str, error: Exception) -> InputError:
    if isinstance(error, OfflineModeIsEnabled):
        cache = constants.HF_HUB_CACHE
        return Unreachable(
            f"{name}: is not in the cache ({cache}), and HF_HUB_OFFLINE is set; unset it, or copy that cache here"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return NoSuchFile(f"{name}: {repository} has no such file; check the name")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{name}: {repository} has no such revision; check what follows @, or leave it out")
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{name}: {repository} has conditions of use; accept them on its page on the hub, then give your token: "
            f"{TOKEN}"
        )
    if isinstance(error, HfHubHTTPError):
        return _refused(name, repository, error)
    if isinstance(error, FileMetadataError | json.JSONDecodeError):
        return not_the_hub(name)
    if isinstance(error, HTTPError):
        where = "HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else "the network"
        return Unreachable(
            f"{name}: no connection to {constants.ENDPOINT} ({_short(error)}); check {where}, or name a file here"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError(
            f"{name}: the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HOME to a folder elsewhere"
        )
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # a file here: run_command says which
    return InputError(f"{name}: {_short(error)}; {AGAIN}")


def _refused(name: str, repository: str, error: HfHubHTTPError) -> InputError:
    """Explains a status that the hub answered with."""
    status, said = error.response.status_code, error.response.headers.get("X-Error-Message", "")
    if status == 401 and "credentials" in said:
        return InputError(f"{name}: the hub does not know the token; give another: {TOKEN}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return InputError(
            f"{name}: the hub has no {repository} that you may read; check the name, or if it is private give a token: "
            f"{TOKEN}"
        )
    if status == 403:
        return InputError(
            f"{name}: the hub refuses access ({quoted(said) or 'status 403'}); give another token: {TOKEN}"
        )
    if status == 429:
        seconds = error.response.headers.get("Retry-After", "")
        when = f"in {counted(int(seconds), 'second')}" if seconds.isdecimal() else "in a few minutes"
        return Unreachable(
            f"{name}: the hub has had too many requests from here; try again {when}, or give a token, which may ask "
            f"more often: {TOKEN}"
        )
    if status >= 500:
        return Unreachable(f"{name}: the hub answers with error {status}; try again in a few minutes")
    return InputError(f"{name}: the hub answers with error {status} ({quoted(said) or _short(error)}); check the name")


def _short(error: Exception) -> str:
    """Returns the first line of an error's message, or its kind if it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return quoted(lines[0].rstrip("."), 160) if lines else type(error).__name__

"""Models and states that are named on the hub: a path or a name in, a path on this machine out.

A path comes back as it is, so whatever reads a model passes its path through here first.
"""

from __future__ import annotations

from pathlib import Path

from infctx.hub.names import hub_name
from infctx.hub.published import refuse_other_version


def fetch_model(path: Path) -> Path:
    """Returns where a model or a state is on this machine; one on the hub is downloaded, unless it is in the cache.

    Raises InputError for a name that the hub does not have, and for what infctx would not read, before any download.
    """
    name = hub_name(path)
    if name is None:
        return path
    refuse_other_version(name)
    from infctx.hub.repository import download_model  # it loads huggingface_hub

    return download_model(name)


def cached_model(path: Path) -> Path:
    """The same without the network: a name that is not in the cache comes back as it is, a path that is not there."""
    name = hub_name(path)
    if name is None:
        return path
    refuse_other_version(name)
    from infctx.hub import repository

    return repository.cached_model(name) or path


def to_download(path: Path) -> bool:
    """Returns whether this is the name of something on the hub that is not in the cache yet."""
    return hub_name(path) is not None and not cached_model(path).exists()

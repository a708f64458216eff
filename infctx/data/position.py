"""The position of a run in its documents, as checkpoints keep it: read, and refused if it is of another order.

A position is a dictionary.  What the order depends on (`identity` in data/lanes) must be the same now.  The rest says
where the order stands: for each source its next stream index and the tokens taken; for each lane its open document.
"""

from typing import Any

from infctx.errors import InputError
from infctx.small_texts import counted, quoted

SETTINGS = {
    "num_lanes": "window.lanes",
    "document_tokens": "data.document_tokens",
    "min_tokens": "data.min_tokens",
    "max_tokens": "data.max_tokens",
    "seed": "run.seed",
    "shuffle": "data.shuffle",
}
"""Key that a position must agree on -> its setting."""
NEW_RUN = "a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER"


def read_position(saved: dict[str, Any], identity: dict[str, Any], paths: list[Any]) -> dict[str, Any]:
    """Returns a saved position in today's form; raises InputError, naming the setting, if it is of another order.

    paths: of the stores, for messages
    """
    position = saved if "stores" in saved else _of_one_store(saved, identity)
    for name, setting in SETTINGS.items():
        before, now = position.get(name), identity[name]
        if before != now:
            raise _changed(setting, _shown(name, before), _shown(name, now))
    stores = position["stores"]
    if not isinstance(stores, list) or len(stores) != len(paths):
        count = len(stores) if isinstance(stores, list) else 0
        raise _changed("data.sources", counted(count, "source"), counted(len(paths), "source"))
    for place, path in enumerate(paths):
        for name in ("num_documents", "num_tokens", "stores"):
            values = position.get(name)
            if not isinstance(values, list) or values[place : place + 1] != identity[name][place : place + 1]:
                setting = "data.store" if len(paths) == 1 else f"data.sources[{place}].store"
                raise InputError(
                    f"{setting}: {path} holds other documents than when the checkpoint was saved; put those back, "
                    "or begin a new run",
                    NEW_RUN,
                )
    if position.get("shares") != identity["shares"]:
        raise _changed("data.sources", *(_shares(shares) for shares in (position.get("shares"), identity["shares"])))
    return position


def whole_numbers(position: dict[str, Any], name: str, count: int) -> list[int]:
    """Returns a list of the position; InputError if it is no list of `count` whole numbers."""
    values = position.get(name)
    if not isinstance(values, list) or len(values) != count or not all(type(value) is int for value in values):
        raise damaged(f"holds {quoted(repr(values))}, not {count} whole numbers")
    return list(values)


def damaged(problem: str) -> InputError:
    """Returns the error for a position that no run would save."""
    return InputError(f"the saved position {problem}; the checkpoint is damaged, resume from an earlier one")


def _of_one_store(saved: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """Returns the position of a run that could only have one store; 0.1.0 did not keep its fingerprint."""
    lanes = identity["num_lanes"]
    return saved | {
        "stores": [saved.get("store", identity["stores"][0])],
        "num_documents": [saved.get("num_documents")],
        "num_tokens": [saved.get("num_tokens")],
        "shares": ["1"],
        "next": [saved.get("next")],
        "taken": [0],
        "sources": [0] * lanes,
        "cuts": [-1] * lanes,
        "windows": [0],
    }


def _changed(setting: str, before: str, now: str) -> InputError:
    return InputError(
        f"{setting}: {before} when the checkpoint was saved, {now} now; set it back, or begin a new run", NEW_RUN
    )


def _shown(name: str, value: Any) -> str:
    """Returns a setting as it is written in a configuration."""
    return "null" if value is None else str(bool(value)).lower() if name == "shuffle" else quoted(str(value))


def _shares(values: Any) -> str:
    shown = " and ".join(map(str, values)) if isinstance(values, list) else repr(values)
    return f"shares of {quoted(shown)}"

"""Configurations: a YAML file and `key=value` overrides in, a checked `Config` (infctx.settings) out.

Unknown settings, wrong types and values that do not fit together are refused in one line that names the file, the
line, the setting, the value and what would do.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from infctx.errors import InputError
from infctx.settings import (
    Config,
    DataSettings,
    DistributedSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    WindowSettings,
)
from infctx.small_texts import quoted, read_yaml

__all__ = [
    "Config",
    "DataSettings",
    "DistributedSettings",
    "ModelSettings",
    "OptimizerSettings",
    "RunSettings",
    "WindowSettings",
    "dump_config",
    "load_config",
]


def load_config(path: str | Path, overrides: Sequence[str] = (), learn: str | None = None) -> Config:
    """Reads a YAML file and applies overrides such as `optimizer.peak_lr=1.0e-4`; raises InputError in one line.

    learn: what model.learn is where nothing says it; then "weights" is refused.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the shipped configurations are in configs/") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    content, lines = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: no sections in it; it needs {', '.join(Config.model_fields)}")
    if learn and isinstance(content.get("model"), dict):
        content["model"].setdefault("learn", learn)
    for override in overrides:
        _apply_override(content, lines, override)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise InputError(_one_line(error, path, content, lines)) from None
    if learn and not config.model.freezes_weights:
        place = lines.get(("model", "learn"), path)
        raise InputError(f"{place}: model.learn: weights is for `infctx train`; `infctx tune` takes {learn}")
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, every setting written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(content: dict[str, Any], places: dict[tuple[str, ...], str], override: str) -> None:
    name, equals, text = override.partition("=")
    path = tuple(name.split("."))
    if not equals or len(path) != 2 or not all(path):
        raise InputError(f"{quoted(override)}: an override is section.setting=value, such as optimizer.peak_lr=1.0e-4")
    value, _ = read_yaml(text, quoted(override))
    section = content.setdefault(path[0], {})
    if not isinstance(section, dict):
        raise InputError(f"{places[path[:1]]}: {path[0]}: is a section and needs settings below it")
    section[path[1]] = value
    places[path] = "command line"


def _one_line(error: ValidationError, path: Path, content: Any, places: dict[tuple[str, ...], str]) -> str:
    """The first problem of a validation, with its place and remedy; how many more there are."""
    # A name that is not known explains the one that is missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    where = tuple(str(part) for part in first["loc"])
    remedy = _remedy(first, where)
    setting, _, rest = remedy.partition(": ")
    if first["type"] == "value_error" and not where:  # two sections that do not fit together
        where, remedy = tuple(setting.split(".")), rest
    elif first["type"] == "value_error" and setting in _settings_of(where[0]):
        where, remedy = (*where, setting), rest
    place = next((places[where[:n]] for n in range(len(where), -1, -1) if where[:n] in places), str(path))
    message = f"{place}: {quoted('.'.join(where))}: {remedy}"
    more = len(problems) - 1
    return message + (f" (and {more} more problem{'s'[: more > 1]})" if more else "")


def _remedy(problem: ErrorDetails, where: tuple[str, ...]) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = Config.model_fields if len(where) == 1 else _settings_of(where[0])
        close = difflib.get_close_matches(where[-1], known, n=1)
        return "unknown setting; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")
    if kind == "missing":
        return "is missing; give it in the file or as an override"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if isinstance(value, bool):
        return f"{str(value).lower()} does not fit ({problem['msg']}); YAML reads yes, no, on and off so: quote text"
    if kind == "model_type" or value is None:
        expected = problem["msg"] if len(where) > 1 else "the section is empty" if value is None else "it is a section"
        return f"{quoted(repr(value))} does not fit; {expected}"
    return f"{quoted(repr(value))} does not fit: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _settings_of(section: str) -> Mapping[str, FieldInfo]:
    kind = Config.model_fields[section].annotation
    assert isinstance(kind, type) and issubclass(kind, BaseModel)
    return kind.model_fields

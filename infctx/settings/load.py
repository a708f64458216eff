"""Configurations: a YAML file and `key=value` overrides in, a checked `Config` (settings/config) out.

Unknown settings, wrong types and values that do not fit together are all reported together, one line each: the file,
the line, the setting, the value and what would work.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from infctx.errors import InputError
from infctx.settings.adapter import WHERE_FORMS
from infctx.settings.config import Config
from infctx.settings.data import FORMS
from infctx.small_texts import quoted, read_yaml

COMMAND_LINE = "command line"
"""The place of an override."""


def load_config(path: str | Path, overrides: Sequence[str] = (), learn: str | None = None) -> Config:
    """Reads a YAML file and applies overrides such as `optimizer.peak_lr=1.0e-4`; raises InputError.

    learn: the value of model.learn if neither sets it, unless there is an adapter; "weights" is then an error.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a YAML file, such as configs/finch-tiny.yaml") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the shipped configurations are in configs/") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is no text in UTF-8 (byte {error.start}); name a YAML file, or save this one as UTF-8"
        ) from None
    content, lines = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: no sections in it; it needs {', '.join(Config.model_fields)}")
    if learn and isinstance(content.get("model"), dict):
        content["model"].setdefault("learn", "adapter" if content["model"].get("adapter") else learn)
    for override in overrides:
        _apply_override(content, lines, override)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise _explained(error, path, content, lines) from None
    if learn and not config.model.freezes_weights:
        place = lines.get(("model", "learn"), path)
        raise InputError(f"{place}: model.learn: weights is for `infctx train`; `infctx tune` takes {learn} or adapter")
    return config


def dump_config(config: Config) -> str:
    """Returns the configuration as YAML, with every setting written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(content: dict[str, Any], places: dict[tuple[str, ...], str], override: str) -> None:
    name, equals, text = override.partition("=")
    path = tuple(name.split("."))
    if not equals or len(path) not in (2, 3) or not all(path):
        raise InputError(f"{quoted(override)}: an override is section.setting=value, such as optimizer.peak_lr=1.0e-4")
    value, _ = read_yaml(text, quoted(override))
    if path[0] not in content:
        places[path[:1]] = COMMAND_LINE
    section = content
    for depth, part in enumerate(path[:-1], start=1):
        if depth > 1 and section.get(part) is None:
            section[part], places[path[:depth]] = {}, COMMAND_LINE
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            here = ".".join(path[:depth])
            raise InputError(f"{places.get(path[:depth], COMMAND_LINE)}: {here}: is a section; put settings below it")
    section[path[-1]] = value
    for place in [place for place in places if _without_item(place[: len(path)]) == path]:  # the file's, and inside it
        del places[place]
    places[path] = COMMAND_LINE


def _explained(error: ValidationError, path: Path, content: Any, places: dict[tuple[str, ...], str]) -> InputError:
    """Returns one error with all problems of a validation, each with its place and remedy."""
    problems = error.errors()
    unknown = [_where(problem) for problem in problems if problem["type"] == "extra_forbidden"]
    # A misspelled setting is also missing under its right name: report it once.
    explained = [(*where[:-1], _nearest(where)) for where in unknown]
    problems = [problem for problem in problems if problem["type"] != "missing" or _where(problem) not in explained]
    lines = [line for problem in problems for line in _describe(problem, path, places)]
    if len(lines) == 1:
        return InputError(lines[0])
    place = COMMAND_LINE if all(line.startswith(COMMAND_LINE) for line in lines) else path
    return InputError(f"{place}: {len(lines)} problems", *lines)


def _describe(problem: ErrorDetails, path: Path, places: dict[tuple[str, ...], str]) -> list[str]:
    """Returns a line for a problem, or one for each setting when several do not fit together."""
    where = _where(problem)
    if problem["type"] != "value_error":
        return [_line(where, _remedy(problem, where), path, places)]
    lines = []
    for text in str(problem["ctx"]["error"]).splitlines():
        setting, _, rest = text.partition(": ")
        if not where:  # two sections that do not fit together
            lines.append(_line(tuple(setting.split(".")), rest, path, places))
        elif re.split(r"[.\[]", setting)[0] in _settings_of(where):
            lines.append(_line((*where, *setting.split(".")), rest, path, places))
        else:
            lines.append(_line(where, text, path, places))
    return lines


def _where(problem: ErrorDetails) -> tuple[str, ...]:
    """Returns the path of a setting, without the forms that it could have: data, sources[1], weight."""
    path: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int) and path:
            path[-1] += f"[{part}]"
        elif part not in (*FORMS, *WHERE_FORMS):
            path.append(str(part))
    return tuple(path)


def _line(where: tuple[str, ...], remedy: str, path: Path, places: dict[tuple[str, ...], str]) -> str:
    outward = [where[:n] for n in range(len(where), -1, -1)]
    found = [places.get(each) or places.get(_without_item(each)) for each in outward]
    return f"{next(filter(None, found), path)}: {quoted('.'.join(where))}: {remedy}"


def _without_item(where: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path of the list that an item is in: data, sources for data, sources[1]."""
    return (*where[:-1], where[-1].partition("[")[0]) if where else where


WANTED = {
    "int_type": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "finite_number": "give a finite number",
    "bool_type": "give true or false",
    "string_type": "give text; quote what is text",
    "path_type": "give a file or folder",
    "list_type": "give a list",
    "too_short": "give at least {min_length}",
    "string_too_short": "give a short word",
    "string_too_long": "give at most {max_length} letters",
    "string_pattern_mismatch": "give a word without a slash",
    "literal_error": "choose {expected}",
    "greater_than_equal": "give at least {ge}",
    "greater_than": "give more than {gt}",
    "less_than": "give less than {lt}",
    "less_than_equal": "give at most {le}",
}
"""The remedy for each kind of error that pydantic reports."""


def _remedy(problem: ErrorDetails, where: tuple[str, ...]) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        close = _nearest(where)
        return "unknown setting; " + (f"did you mean {close}?" if close else f"known: {', '.join(_known(where))}")
    if kind == "missing":
        return "is missing; set it in the file or as an override"
    if kind == "model_type":
        return "the section is empty; remove it, or put settings below it" if value is None else _no_section(value)
    wanted = WANTED[kind].format(**problem.get("ctx", {})) if kind in WANTED else problem["msg"]
    if value is None:
        return f"is empty; {wanted}"
    if isinstance(value, bool):
        same = "yes and on are true" if value else "no and off are false"
        text = ", or quote it" if kind == "path_type" else ""
        return f"{str(value).lower()} does not fit (YAML's {same}); {wanted}{text}"
    return f"{quoted(repr(value))} does not fit; {wanted}"


def _nearest(where: tuple[str, ...]) -> str | None:
    """Returns the known name most like this one; None if there is none."""
    return next(iter(difflib.get_close_matches(where[-1], _known(where), n=1)), None)


def _known(where: tuple[str, ...]) -> Mapping[str, FieldInfo]:
    return _settings_of(where[:-1])


def _no_section(value: object) -> str:
    return f"{quoted(repr(value))} is not a section; put settings below the name, indented"


def _settings_of(where: tuple[str, ...]) -> Mapping[str, FieldInfo]:
    """Returns the settings of a section, or of one inside it."""
    section: type[BaseModel] = Config
    for name in where:
        section = next(_sections_in(section.model_fields[name.partition("[")[0]].annotation))
    return section.model_fields


def _sections_in(kind: Any) -> Iterator[type[BaseModel]]:
    """Yields the sections that a type has in it: for list[SourceSettings] | None, SourceSettings."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _sections_in(inner)

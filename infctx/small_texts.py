"""Small texts from outside: YAML settings and JSON files in; plain dicts, lists, strings and numbers out.

Size, depth and types are checked before use.  Messages quote text from outside through `quoted`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from infctx.errors import InputError

MOST_YAML_BYTES = 1 << 20
"""Limit for a configuration; the shipped ones have about 2 kB."""
MOST_JSON_BYTES = 1 << 26
"""Limit for a manifest or an index; an index of 100,000 tensors has 10 MB."""
MOST_DIGITS = 40
MOST_DEPTH = 3  # of settings: data, sources[1], weight
MOST_QUOTED = 80

Schema = TypeVar("Schema", bound=BaseModel)


def counted(number: int, thing: str) -> str:
    """Returns a count in words: 1 step, 2,000 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]], alignments: str) -> list[str]:
    """Returns the lines of a table; alignments: < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [f"{cell:{alignment}{width}}" for cell, alignment, width in zip(row, alignments, widths, strict=True)]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in cells]


def quoted(text: str, most: int = MOST_QUOTED) -> str:
    """Returns a text that a message can show: control characters escaped, cut if it is too long to read."""
    letters = text[: most + 1]
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in letters)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_yaml(text: str, source: str) -> tuple[Any, dict[tuple[str, ...], str]]:
    """Returns the content, and for each setting the file and line that messages name.

    YAML 1.1 without its traps: no octal or base-60 integers, duplicate keys, aliases, merges or tags, and 1e-3 is a
    number.  Raises InputError with source and line.
    """
    if len(text) > MOST_YAML_BYTES:
        raise InputError(f"{source}: {len(text):,} characters are no configuration; name a file of settings")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        problem = quoted(error.problem or "not YAML", 200)
        remedy = "" if ";" in problem else "; indent with spaces" if "\\t" in problem else "; correct this line"
        raise InputError(f"{source}{line}: {problem}{remedy}") from None
    except yaml.YAMLError as error:
        problem = quoted(str(error).splitlines()[0], 200)
        raise InputError(f"{source}: not YAML ({problem}); name a file of settings") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply; no setting is") from None
    except ValueError as error:  # an impossible date
        raise InputError(f"{source}: {quoted(str(error))}; quote what is text") from None
    finally:
        if loader is not None:
            loader.dispose()
    places: dict[tuple[str, ...], str] = {(): source}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode) and len(path) < MOST_DEPTH:
            for key, value in node.value:
                place = (*path, key.value)
                places[place] = f"{source}:{key.start_mark.line + 1}"
                walk(value, place)
        elif isinstance(node, yaml.SequenceNode) and 0 < len(path) < MOST_DEPTH:
            for number, item in enumerate(node.value):
                place = (*path[:-1], f"{path[-1]}[{number}]")
                places[place] = f"{source}:{item.start_mark.line + 1}"
                walk(item, place)

    walk(node, ())
    return content, places


def read_json_as(schema: type[Schema], file: Path, most_bytes: int = MOST_JSON_BYTES) -> Schema:
    """Reads a JSON file that fits a schema; raises ValueError for any other, with a few words that name the place.

    Types are not converted: neither "1" nor 1.0 nor true is the number 1.
    """
    size = file.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{size:,} bytes, {most_bytes:,} at most")
    try:
        return schema.model_validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        problem = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ValueError(f"{quoted(where)}: {quoted(problem, 120)}" if where else quoted(problem, 120)) from None


def read_json(file: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Reads a JSON file, ours or another program's; raises ValueError, in a few words, if it is not JSON."""
    size = file.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{size:,} bytes, {most_bytes:,} at most")
    return parse_json(file.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Parses JSON like json.loads, but every failure is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML as `read_yaml` accepts it."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error(event, "aliases (*name) are not read; write the value out")
        if getattr(event, "tag", None) is not None:
            raise _error(event, f"tags ({event.tag}) are not read; write the value without it")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        if len(text) > MOST_DIGITS:
            raise _error(node, f"a number of {len(text)} digits; no setting is that large")
        if re.fullmatch(r"[-+]?0[0-9]+|[-+]?[0-9]+(:[0-9]+)+", text):
            value = super().construct_yaml_int(node)
            remedy = "quote it" if ":" in text else f"write {int(text)} for decimal, or quote it"
            raise _error(node, f"YAML reads {node.value} as {value}; {remedy}")
        return super().construct_yaml_int(node)

    def construct_power_of_ten(self, node: yaml.ScalarNode) -> int | float:
        """Reads 1e-3, 6E4, 1.5e3; an int if the value is a whole number."""
        value = float(node.value)
        return int(value) if value.is_integer() and abs(value) < 1e15 else value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(key, "a setting's name is plain text")
            if key.tag == "tag:yaml.org,2002:merge":
                raise _error(key, "merges (<<) are not read; write the settings out")
            if key.value in seen:
                raise _error(key, f"{key.value} is given twice; remove one of the two")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_POWER_OF_TEN = "tag:infctx,2026:power-of-ten"
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor(_POWER_OF_TEN, _Loader.construct_power_of_ten)
# YAML 1.1 requires a dot and a sign in these; everyone else reads them as numbers.
_WRITTEN = re.compile(r"[-+]?\d{1,40}(\.\d*)?[eE][-+]?\d{1,4}$")
_Loader.yaml_implicit_resolvers = {
    first: [(_POWER_OF_TEN, _WRITTEN), *others] if first in "-+0123456789" else others
    for first, others in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _error(where: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast(yaml.Mark | None, where.start_mark))

"""Records: an object of a jsonl file or a row of a table in; a document out.

A record is a text, a prompt with its completion, an instruction with its output, or a chat (`messages`, or ShareGPT's
`conversations`). Chats and instructions become text by a template; a prompt and its completion stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from infctx.documents.document import Document, Part, Reading
from infctx.documents.forms import (
    COLUMNS,
    COMPLETIONS,
    INPUTS,
    OUTPUTS,
    TEXT_COLUMN,
    form_of,
    learned_roles,
    listed,
    no_text,
)
from infctx.documents.templates import DEFAULT, Template, Turn, get_template
from infctx.errors import InputError
from infctx.small_texts import quoted

PIECE_CHARS = 1 << 20
SAME_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
FIX = "fix it, or add --skip-bad"


class _Said(NamedTuple):
    """What one role says."""

    role: str
    content: str
    reasoning: str = ""
    can_be_learned: bool = True


def document_of(record: Mapping[str, Any], place: str, reading: Reading) -> Document:
    """Returns the document that a record holds.

    place: its file and line or row, for messages
    Raises InputError for a record that holds none.
    """
    form = form_of(record, place, reading)
    if form == "text":
        column = reading.text_column or TEXT_COLUMN
        if column not in record:
            raise no_text(record, place, column)
        return Document(place, iter([Part(_pieces(checked_text(record[column], place, column)))]))
    if form == "prompt":
        said = [
            _Said("user", _text_at(record, "prompt", place)),
            _Said("assistant", _answer(record, place, COMPLETIONS)),
        ]
    elif form == "instruction":
        said = _instruction(record, place)
    else:
        said = _chat(record, form, place)
    learned = learned_roles(reading)
    if form == "prompt" and not reading.template:
        turns = [Turn("", one.content) for one in said]
    else:
        turns = _turns(said, place, reading.template or DEFAULT)
    are_learned = [learned is None or (one.role in learned and one.can_be_learned) for one in said]
    parts = []
    for turn, is_learned in zip(turns, are_learned, strict=True):
        if turn.heading:
            parts.append(Part((turn.heading,), learned is None))
        if turn.body:
            parts.append(Part(_pieces(turn.body), is_learned))
    return Document(place, iter(parts), are_learned[-1], form, tuple(one.role for one in said))


def needed_columns(columns: Sequence[str], place: str, reading: Reading) -> Sequence[str]:
    """Returns those columns of a table that `document_of` needs; raises InputError if a record of them holds none.

    place: its file, for messages
    """
    form = form_of(dict.fromkeys(columns, ""), place, reading)
    text = reading.text_column or TEXT_COLUMN
    needed = (text,) if form == "text" else COLUMNS[form]
    if needed[0] not in columns:
        if form == "text":
            raise no_text(columns, place, text)
        raise InputError(f"{place}: no key `{needed[0]}` (keys: {listed(columns)}); name another --form, or none")
    found = [column for column in columns if column in needed]
    twice = next((column for column in needed if found.count(column) > 1), None)
    if twice is not None:
        raise InputError(f"{place}: two columns are named {quoted(twice)}; rename one of them")
    return found


def checked_text(value: Any, place: str, key: str) -> str:
    """Returns a value that is text; raises InputError for any other, and for text that UTF-8 cannot hold."""
    if not isinstance(value, str):
        raise InputError(
            f"{place}: `{quoted(key)}` is {_kind(value)}, not a string; correct or remove this record, or add "
            "--skip-bad"
        )
    try:
        _ = value.isascii() or value.encode()
    except UnicodeEncodeError as error:  # a JSON escape can give half of a surrogate pair
        character = f"U+{ord(value[error.start]):04X}"
        raise InputError(
            f"{place}: `{quoted(key)}` holds a lone surrogate, {character}; remove it, it is no text, or add --skip-bad"
        ) from None
    return value


def _kind(value: Any) -> str:
    """Returns what messages call a value of another type than it should have."""
    return "null" if value is None else type(value).__name__


def _pieces(text: str) -> tuple[str, ...] | Iterator[str]:
    if len(text) <= PIECE_CHARS:
        return (text,)
    return (text[begin : begin + PIECE_CHARS] for begin in range(0, len(text), PIECE_CHARS))


def _text_at(record: Mapping[str, Any], key: str, place: str) -> str:
    if key not in record:
        raise InputError(f"{place}: no key `{quoted(key)}` (keys: {listed(record)}); {FIX}")
    return checked_text(record[key], place, key)


def _answer(record: Mapping[str, Any], place: str, keys: tuple[str, ...]) -> str:
    key = next((key for key in keys if key in record), keys[0])
    answer = _text_at(record, key, place)
    if not answer.strip():
        raise InputError(f"{place}: `{key}` is empty, so there is nothing to learn; {FIX}")
    return answer


def _instruction(record: Mapping[str, Any], place: str) -> list[_Said]:
    if record.get("history"):
        raise InputError(f"{place}: `history` is not read; write the record as `messages`, or {FIX}")
    said = [*_system(record, place), _Said("instruction", _text_at(record, "instruction", place))]
    inputs = [key for key in INPUTS if record.get(key)]
    if len(inputs) > 1:
        raise InputError(f"{place}: has both `{inputs[0]}` and `{inputs[1]}`; {FIX}")
    said += [_Said("input", checked_text(record[key], place, key)) for key in inputs]
    return [*said, _Said("response", _answer(record, place, OUTPUTS))]


def _system(record: Mapping[str, Any], place: str) -> list[_Said]:
    """Returns the turn that a record may have beside its list or instruction."""
    return [_Said("system", checked_text(record["system"], place, "system"))] if record.get("system") else []


def _chat(record: Mapping[str, Any], key: str, place: str) -> list[_Said]:
    items = record.get(key)
    if not isinstance(items, list):
        kind = f"is {_kind(items)}, not a list of turns"
        kind = kind if key in record else f"is not there (keys: {listed(record)})"
        raise InputError(f"{place}: `{key}` {kind}; {FIX}")
    if not items:
        raise InputError(f"{place}: `{key}` is empty; {FIX}")
    said = _system(record, place)
    last = ""  # of all but system: user and assistant take turns, and others, such as a tool, may come between them
    for number, item in enumerate(items, start=1):
        one = _message(item, f"{place}: turn {number}")
        if one.role in ("user", "assistant") and one.role == last:
            raise InputError(f"{place}: turn {number}: two turns of {last} in a row; join them, or {FIX}")
        if not last and one.role == "assistant":
            raise InputError(f"{place}: turn {number}: is an answer, and nobody has asked; {FIX}")
        last = last if one.role == "system" else one.role
        said.append(one)
    return said


def _message(item: Any, where: str) -> _Said:
    if not isinstance(item, Mapping):
        raise InputError(f"{where}: is {_kind(item)}, not an object with role and content; {FIX}")
    role_key, content_key = ("role", "content") if "role" in item else ("from", "value")
    if role_key not in item or content_key not in item:
        missing = "`role`" if role_key not in item else f"`{content_key}`"
        raise InputError(f"{where}: no {missing} (keys: {listed(item)}); {FIX}")
    role = item[role_key]
    if not isinstance(role, str) or not role:
        shown = "null" if role is None else quoted(repr(role), 40)
        raise InputError(f"{where}: `{role_key}` is {shown}, no name of a role; {FIX}")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise InputError(f"{where}: has `{key}`, and calls are not read; write them as text, or {FIX}")
    content = item[content_key]
    content = content if isinstance(content, str) else _joined(content, where, content_key)
    reasoning = item.get("reasoning_content") or item.get("reasoning") or ""
    return _Said(
        SAME_ROLES.get(role, role),
        checked_text(content, where, content_key),
        reasoning and checked_text(reasoning, where, "reasoning"),
        item.get("weight") != 0,  # as in the chats that OpenAI's fine-tuning takes
    )


def _joined(content: Any, where: str, key: str) -> str:
    """Joins content that comes as a list of parts."""
    if not isinstance(content, list):
        raise InputError(f"{where}: `{key}` is {_kind(content)}, not a string; {FIX}")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: holds a part of type {quoted(str(kind), 40)}, and only text is read; {FIX}")
        texts.append(part["text"])
    return "".join(texts)


def _turns(said: list[_Said], place: str, name: str) -> list[Turn]:
    template = get_template(name)
    turns = []
    for number, one in enumerate(said, start=1):
        if one.role not in template.roles:
            roles = ", ".join(template.roles)
            raise InputError(
                f"{place}: turn {number}: role {quoted(repr(one.role), 20)}, not {roles}; use --template or --skip-bad"
            )
        content, reasoning = _thought(one, template)
        if reasoning and template.roles[one.role].reasoning is None:
            raise InputError(
                f"{place}: turn {number}: has reasoning, for which template {name} has no place; remove it, or add "
                "--template g1"
            )
        turns.append(template.turn(one.role, content, reasoning))
    return turns


def _thought(one: _Said, template: Template) -> tuple[str, str]:
    """Returns content and reasoning; for a template with a place for it, what is in <think>...</think> is reasoning."""
    content = one.content.lstrip()
    if one.reasoning or template.roles[one.role].reasoning is None or not content.startswith("<think>"):
        return one.content, one.reasoning
    reasoning, closed, answer = content.removeprefix("<think>").partition("</think>")
    return (answer, reasoning) if closed else (one.content, "")

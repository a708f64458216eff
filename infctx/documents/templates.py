"""Templates: how a chat becomes text. The name of a template or a file of one in; headings, bodies and ends out.

A turn is a heading, a body and an end, such as `User:`, ` Hello` and two newlines. A model never learns a heading: at
inference it is given. Body and end are what someone says. A chat is tokenized heading by heading and body by body, each
body with its end, in training and at inference alike.

A file of one is YAML, and looks like those below.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from infctx.errors import InputError
from infctx.small_texts import quoted, read_yaml

CONTENT, REASONING = "{content}", "{reasoning}"

WORLD = r"""
collapse_newlines: true
roles:
  system:      {heading: "System:",      body: " {content}", end: "\n\n"}
  user:        {heading: "User:",        body: " {content}", end: "\n\n"}
  assistant:   {heading: "Assistant:",   body: " {content}", end: "\n\n"}
  instruction: {heading: "Instruction:", body: " {content}", end: "\n\n"}
  input:       {heading: "Input:",       body: " {content}", end: "\n\n"}
  response:    {heading: "Response:",    body: " {content}", end: "\n\n"}
"""
"""What RWKV's World models were trained on."""

# The headings of an answer are those that RWKV7-G1's own prompts end with: one to answer at once, one to think first.
G1 = WORLD.replace(
    r"""{heading: "Assistant:",   body: " {content}", end: "\n\n"}""",
    r"""
    heading: "Assistant: <think>\n</think"
    body: ">\n{content}"
    empty_body: ">"
    end: "\n\n"
    reasoning: {heading: "Assistant: <think", body: ">{reasoning}</think>\n{content}"}""",
)

PLAIN = r"""
strip: false
roles:
  system:      {body: "{content}"}
  user:        {body: "{content}"}
  assistant:   {body: "{content}"}
  instruction: {body: "{content}"}
  input:       {body: "{content}"}
  response:    {body: "{content}"}
"""

BUILT_IN = {"world": WORLD, "g1": G1, "plain": PLAIN}
DEFAULT = "world"
HELP = (
    "how a chat becomes text: world (User: ... Assistant: ..., the default), g1 (the same with <think>), plain (only "
    "what they say), or a file of your own, such as my.yaml"
)

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class Turn(NamedTuple):
    """A turn as text: its heading, and its body with the end."""

    heading: str
    body: str


class ReasoningForm(BaseModel):
    """Heading and body of a turn that comes with reasoning."""

    model_config = _STRICT
    heading: str = ""
    body: str

    @field_validator("body")
    @classmethod
    def _has_both(cls, body: str) -> str:
        return _with_each_once(body, CONTENT, REASONING)


class TurnForm(BaseModel):
    """The turn of one role."""

    model_config = _STRICT
    heading: str = ""
    body: str
    empty_body: str = ""
    """The body of a turn without content."""
    end: str = ""
    reasoning: ReasoningForm | None = None
    """Heading and body where there is reasoning; without this, reasoning is refused."""

    @field_validator("body")
    @classmethod
    def _has_content(cls, body: str) -> str:
        return _with_each_once(body, CONTENT)


class Template(BaseModel):
    """How a chat becomes text."""

    model_config = _STRICT
    strip: bool = True
    """Removes white space around what someone says."""
    collapse_newlines: bool = False
    r"""Turns \r\n into \n, and several newlines in a turn into one: where two end a turn, none may come inside it."""
    roles: dict[str, TurnForm] = Field(min_length=1)

    def turn(self, role: str, content: str, reasoning: str = "") -> Turn:
        """Returns the turn of a role of this template."""
        form = self.roles[role]
        content, reasoning = self._tidied(content), self._tidied(reasoning)
        if reasoning and form.reasoning:
            return Turn(form.reasoning.heading, _filled(form.reasoning.body, content, reasoning) + form.end)
        return Turn(form.heading, (_filled(form.body, content, "") if content else form.empty_body) + form.end)

    def answer_heading(self, role: str, thinks: bool = False) -> str:
        """Returns the heading after which a model answers; thinks: with reasoning first."""
        form = self.roles[role]
        return form.reasoning.heading if thinks and form.reasoning else form.heading

    def answer_lead(self, role: str, thinks: bool = False) -> str:
        """Returns what the body has before content or reasoning, such as a space."""
        form = self.roles[role]
        body = form.reasoning.body if thinks and form.reasoning else form.body
        return re.split(f"{re.escape(CONTENT)}|{re.escape(REASONING)}", body, maxsplit=1)[0]

    def reasoning_mark(self, role: str) -> str:
        """Returns the word that reasoning begins with, such as <think>; it is there before a model continues."""
        words = (self.answer_heading(role, True) + self.answer_lead(role, True)).split()
        return words[-1] if words else ""

    def _tidied(self, text: str) -> str:
        if self.collapse_newlines:
            if "\r\n" in text:
                text = text.replace("\r\n", "\n")
            if "\n\n" in text:
                text = re.sub("\n{2,}", "\n", text)
        return text.strip() if self.strip else text


@lru_cache(maxsize=8)
def get_template(name: str) -> Template:
    """Returns a template of infctx (world, g1, plain), or the one in a YAML file.

    Raises InputError, naming file and key.
    """
    if name in BUILT_IN:
        return Template.model_validate(read_yaml(BUILT_IN[name], name)[0])
    path, known = Path(name), ", ".join(BUILT_IN)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--template: {quoted(name)} is not known; choose {known}, or name a .yaml file of your own")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; choose {known}, or name a .yaml file of your own") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    content, places = read_yaml(text, name)
    if not isinstance(content, dict):
        raise InputError(f"{name}: no template in it; it needs the key roles (docs/data.md shows one)")
    try:
        return Template.model_validate(content)
    except ValidationError as error:
        lines = [_line(problem["loc"], _remedy(problem), name, places) for problem in error.errors()]
        raise (
            InputError(lines[0]) if len(lines) == 1 else InputError(f"{name}: {len(lines)} problems", *lines)
        ) from None


def _with_each_once(body: str, *names: str) -> str:
    for name in names:
        if body.count(name) != 1:
            raise ValueError(f"{quoted(repr(body), 40)} has {name} {body.count(name)} times; write it once")
    return body


def _filled(body: str, content: str, reasoning: str) -> str:
    before, _, after = body.partition(CONTENT)
    return before.replace(REASONING, reasoning) + content + after.replace(REASONING, reasoning)


def _line(where: tuple[int | str, ...], remedy: str, name: str, places: dict[tuple[str, ...], str]) -> str:
    keys = tuple(str(part) for part in where if part != "[key]")
    place = next((places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in places), name)
    return f"{place}: {quoted('.'.join(keys))}: {remedy}"


def _remedy(problem: Any) -> str:
    kind = problem["type"]
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "extra_forbidden":
        forms: dict[int, type[BaseModel]] = {1: Template, 4: ReasoningForm}
        known = forms.get(len(problem["loc"]), TurnForm).model_fields
        return f"no template has this key; known: {', '.join(known)}"
    if kind == "missing":
        return "is missing; write it"
    value = quoted(repr(problem["input"]), 40)
    if kind == "string_type":
        return f"{value} does not fit; give text in quotes"
    if kind == "bool_type":
        return f"{value} does not fit; give true or false"
    if kind == "too_short":
        return "has no role; give at least user and assistant"
    return f'{value} does not fit; write keys below it, such as user: {{heading: "User:", body: " {CONTENT}"}}'

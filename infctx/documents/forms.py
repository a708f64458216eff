"""Forms: which keys of a record hold its document, and a count of what was read in which form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from infctx.documents.document import Document, Reading
from infctx.documents.templates import DEFAULT, get_template
from infctx.errors import InputError
from infctx.small_texts import counted, quoted

TEXT_COLUMN = "text"
INPUTS, OUTPUTS, COMPLETIONS = ("input", "context"), ("output", "response"), ("completion", "response")
COLUMNS = {
    "prompt": ("prompt", *COMPLETIONS),
    "instruction": ("instruction", *INPUTS, *OUTPUTS, "system", "history"),
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
}
"""The keys that each form reads, the one it cannot be without first."""
FORMS = ("text", *COLUMNS)
ANSWERS, EVERYTHING = "answers", "all"
ANSWER_ROLES = frozenset({"assistant", "response"})
MOST_KEYS = 5  # that a message lists


def form_of(record: Mapping[str, Any], place: str, reading: Reading) -> str:
    """Returns the form of a record: the one the user names, or the one whose keys it has; raises InputError."""
    if reading.form:
        return reading.form
    if reading.text_column:
        return "text"
    found = []
    if record.get(TEXT_COLUMN) is not None:
        found.append("text")
    # Without a completion a prompt is an extra: datasets of messages repeat the first one there.
    if "completion" in record or ("prompt" in record and "response" in record):
        found.append("prompt")
    found += [form for form in ("instruction", "messages", "conversations") if record.get(form) is not None]
    if len(found) > 1:
        choice = " or ".join(f"--form {form}" for form in found)
        raise InputError(f"{place}: can be read as {' or as '.join(found)}; choose {choice}")
    if found:
        return found[0]
    empty = [form for form in FORMS if form in record]  # with null for its value, which the form's own reader reports
    if empty and empty != ["prompt"]:
        return empty[0]
    raise no_text(record, place, TEXT_COLUMN)


def no_text(keys: Iterable[str], place: str, column: str) -> InputError:
    """Returns the error for a record, or a table with these columns, that has no text."""
    remedy = "give the document's text this key, or name another with --text-column"
    return InputError(f"{place}: no key `{quoted(column)}` (keys: {listed(keys)}); {remedy}")


def listed(keys: Iterable[str]) -> str:
    """Returns the first of a record's keys, for a message."""
    return quoted(", ".join(map(repr, list(keys)[:MOST_KEYS]))) or "none"


@lru_cache(maxsize=8)
def learned_roles(reading: Reading) -> frozenset[str] | None:
    """Returns the roles whose turns are learned; None for everything. Raises InputError for one no template has."""
    if reading.learn == EVERYTHING:
        return None
    if reading.learn == ANSWERS:
        return ANSWER_ROLES
    roles = [role.strip() for role in reading.learn.split(",")]
    known = get_template(reading.template or DEFAULT).roles
    for role in roles:
        if role not in known:
            raise InputError(
                f"--learn: {quoted(role) or 'nothing'} is no role; choose {ANSWERS}, {EVERYTHING}, or "
                f"some of {', '.join(known)}"
            )
    return frozenset(roles)


class FormTally:
    """Counts the turns that are read in each form.

    Raises InputError for a reading whose form, template or roles to learn do not exist.
    """

    def __init__(self, reading: Reading) -> None:
        if reading.form and reading.form not in FORMS:
            raise InputError(f"--form: {quoted(reading.form)} is not known; choose one of {', '.join(FORMS)}")
        if reading.text_column and reading.form not in (None, "text"):
            raise InputError(f"--text-column: is for texts, and --form is {reading.form}; leave one of them out")
        get_template(reading.template or DEFAULT)
        learned_roles(reading)
        self._reading = reading
        self._turns: dict[str, Counter[str]] = {}
        self._last: tuple[str, str] = ("", "")

    def add(self, document: Document, file: str) -> None:
        """Counts a document of a record; raises InputError if the form changes within a file."""
        last_file, last = self._last
        if file == last_file and document.form != last:
            raise InputError(
                f"{document.place}: is of form {document.form}, and those before it in the file of form {last}; "
                "split the file"
            )
        self._last = (file, document.form)
        if document.roles:
            self._turns.setdefault(document.form, Counter()).update(document.roles)

    def refuse_missing_roles(self) -> None:
        """Raises InputError if a role that is to be learned is in no document."""
        if self._reading.learn in (ANSWERS, EVERYTHING):
            return
        there = set().union(*self._turns.values())
        for role in sorted(learned_roles(self._reading) or ()):
            if role not in there:
                roles = f"the roles there are {', '.join(sorted(there))}" if there else "they are text, without roles"
                raise InputError(f"--learn: no document has a turn of {role}; {roles}")

    def lines(self) -> list[str]:
        """Returns a line for each form with turns."""
        lines = []
        for form, counts in self._turns.items():
            turns = ", ".join(counted(count, f"{role} turn") for role, count in counts.items())
            template = self._reading.template or ("none" if form == "prompt" else DEFAULT)
            lines.append(f"{form}: {turns}; template {template}; learned: {self._reading.learn}")
        return lines

"""infctx chat"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from infctx.commands.options import (
    describe_adapter,
    describe_chat,
    describe_device,
    describe_model,
    describe_sampling,
    describe_state,
    open_chat,
)
from infctx.documents.templates import DEFAULT
from infctx.errors import InputError

if TYPE_CHECKING:
    from infctx.evaluate.chat import Chat

COMMANDS = "/retry: another answer, /reset: start again, Ctrl-C: stop an answer, Ctrl-D: leave"


def describe(parser: argparse.ArgumentParser) -> None:
    """Chat with a model; the state is carried from turn to turn."""
    describe_model(parser)
    describe_chat(parser)
    describe_sampling(parser)
    describe_state(parser)
    describe_adapter(parser)
    describe_device(parser)


def run(options: argparse.Namespace) -> None:
    if sys.stdout is None or sys.stdin is None:
        raise InputError("chat: standard input or output is closed; open both")
    chat = open_chat(options)
    _note(f"{options.model}{f' from {options.state}' if options.state else ''}, template {options.template or DEFAULT}")
    _note(COMMANDS)
    for line in _lines():
        try:
            _take(chat, line)
        except InputError as error:  # in the message, such as a lone surrogate
            _note(str(error))


def _take(chat: Chat, line: str) -> None:
    if not line:
        return
    if line == "/reset":
        chat.reset()
        _note("started again")
    elif line == "/retry" and chat.has_answer:
        _show(chat.retry())
    elif line == "/retry":
        _note("there is no answer yet; write a message first")
    elif line.startswith("/") and " " not in line:
        _note(f"{line}: no such command; {COMMANDS}")
    else:
        try:
            pieces = chat.say(line)
        except KeyboardInterrupt:
            _note("stopped before the answer; the message is not part of the chat")
        else:
            _show(pieces)


def _show(pieces: Iterator[str]) -> None:
    """Prints an answer; Ctrl-C ends it, and what is there of it stays part of the chat."""
    output = sys.stdout.buffer
    try:
        for piece in pieces:
            output.write(piece.encode())
            output.flush()
    except KeyboardInterrupt:
        _note(" (stopped)")
    output.write(b"\n")
    output.flush()


def _lines() -> Iterator[str]:
    """Yields what the user writes, line by line, until the end of input."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        import readline  # noqa: F401  (lets `input` edit the line)
    while True:
        try:
            line = input("> ") + "\n" if at_terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _note(f"\n{COMMANDS}")
            continue
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: is not UTF-8 at byte {error.start}; give it as UTF-8") from None
        if not line:
            return
        yield line.strip()


def _note(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)

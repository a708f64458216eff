"""infctx generate"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from infctx.commands.options import (
    describe_adapter,
    describe_chat,
    describe_device,
    describe_model,
    describe_sampling,
    describe_state,
    load_model,
    open_chat,
)
from infctx.errors import InputError


def describe(parser: argparse.ArgumentParser) -> None:
    """Continue a prompt, or answer it."""
    describe_model(parser)
    parser.add_argument("--prompt", default="", help="the text to continue; - for standard input")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message: print the answer to it, and nothing else"
    )
    describe_chat(parser)
    describe_sampling(parser)
    describe_state(parser)
    describe_adapter(parser)
    describe_device(parser)


def run(options: argparse.Namespace) -> None:
    if sys.stdout is None or (options.prompt == "-" and sys.stdin is None):
        raise InputError("generate: standard input or output is closed; open both")
    given = sys.stdin.buffer.read() if options.prompt == "-" else os.fsencode(options.prompt)
    try:
        prompt = given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt: is not UTF-8 at byte {error.start}; give it as UTF-8") from None
    output = sys.stdout.buffer
    for piece in _answer(options, prompt) if options.chat else _continued(options, prompt):
        output.write(piece)
        output.flush()
    output.write(b"\n")
    output.flush()


def _answer(options: argparse.Namespace, prompt: str) -> Iterator[bytes]:
    if not prompt.strip():
        raise InputError("--chat: there is no message to answer; give it with --prompt")
    return (text.encode() for text in open_chat(options).say(prompt))


def _continued(options: argparse.Namespace, prompt: str) -> Iterator[bytes]:
    from infctx.evaluate.generate import generate

    for name in ("system", "template", "think"):
        if getattr(options, name):
            raise InputError(f"--{name}: is for a chat; add --chat, or leave it out")
    pieces = generate(
        load_model(options),
        prompt,
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    yield prompt.encode()
    yield from pieces

"""infctx generate"""

from __future__ import annotations

import argparse
import os
import sys

from infctx.arguments import count, number, seed
from infctx.commands.options import describe_device, describe_model, describe_state, load_model
from infctx.errors import InputError


def describe(parser: argparse.ArgumentParser) -> None:
    """Continue a prompt."""
    describe_model(parser)
    parser.add_argument("--prompt", default="", help="the text to continue; - for standard input")
    parser.add_argument(
        "--tokens", type=count, default=256, help="generate at most this many tokens (default %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=number, default=1.0, help="randomness; 0: always the most likely token (default 1)"
    )
    parser.add_argument(
        "--top-p",
        type=number,
        default=0.7,
        help="draw from the likeliest tokens, up to this probability (default %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same text (default %(default)s)")
    describe_state(parser)
    describe_device(parser)


def run(options: argparse.Namespace) -> None:
    from infctx.evaluate.generate import generate

    if sys.stdout is None or (options.prompt == "-" and sys.stdin is None):
        raise InputError("generate: standard input or output is closed; open both")
    given = sys.stdin.buffer.read() if options.prompt == "-" else os.fsencode(options.prompt)
    try:
        prompt = given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt: is not UTF-8 at byte {error.start}; give it as UTF-8") from None
    pieces = generate(
        load_model(options),
        prompt,
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    output = sys.stdout.buffer
    output.write(prompt.encode())
    for piece in pieces:
        output.write(piece)
        output.flush()
    output.write(b"\n")
    output.flush()

"""The words of a command line: a parser that reports a mistake in one line, and the types of options."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from infctx.exits import EXIT_INPUT, fail
from infctx.small_texts import quoted


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message}; see {self.prog} --help", EXIT_INPUT))


def count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Reads whole numbers of at least 1 between commas; 4k is 4,096."""
    found = []
    for part in text.split(","):
        digits = part.strip().removesuffix("k")
        if not digits.isdecimal() or int(digits) < 1:
            raise argparse.ArgumentTypeError(f"{quoted(part)} is not a whole number of at least 1, such as 4096 or 4k")
        found.append(int(digits) * (1024 if part.strip().endswith("k") else 1))
    return sorted(set(found))


def whole(text: str) -> int:
    """Reads a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number of at least 0")
    return int(text)


def seed(text: str) -> int:
    """Reads a whole number from 0 to 2^63 - 1, the seeds that torch takes."""
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def number(text: str) -> float:
    """Reads a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number") from None

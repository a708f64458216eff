"""The command line: `infctx COMMAND ...`; infctx/commands has what each command does."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import infctx
from infctx.arguments import Parser
from infctx.commands import chat, evaluate, export, generate, inspect, prepare, report, train
from infctx.environment import rank_number
from infctx.exits import run_command
from infctx.small_texts import quoted


class Command(NamedTuple):
    """A command: its name, what it does, its options (the docstring is its help), and when it differs from others."""

    name: str
    run: Callable[[argparse.Namespace], int | None]
    describe: Callable[[argparse.ArgumentParser], None]
    loads_torch: bool = True
    """Takes seconds to begin."""
    trains: bool = False
    """Takes settings of a run after its configuration."""
    is_quiet: bool = False
    """Prints text on standard output, so that lines about progress would land between its words."""


COMMANDS = (
    Command("prepare", prepare.run, prepare.describe, loads_torch=False),
    Command("inspect", inspect.run, inspect.describe, loads_torch=False),
    Command("train", train.train_command, train.describe_train, trains=True),
    Command("tune", train.tune_command, train.describe_tune, trains=True),
    Command("plan", train.plan_command, train.describe_plan, loads_torch=False, trains=True),
    Command("evaluate", evaluate.run, evaluate.describe),
    Command("report", report.report, report.describe_report, loads_torch=False),
    Command("compare", report.compare, report.describe_compare, loads_torch=False),
    Command("generate", generate.run, generate.describe, is_quiet=True),
    Command("chat", chat.run, chat.describe, is_quiet=True),
    Command("export", export.run, export.describe),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 1 for a run that failed by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample in a script that the terminal does not have is no failure
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parse(arguments)
    parsed.arguments = arguments
    if parsed.name not in ("train", "tune"):  # training finishes its step; the others clean up and go
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("infctx").setLevel(logging.WARNING if parsed.command.is_quiet else logging.INFO)
    if parsed.command.loads_torch and rank_number() == 0 and sys.stderr is not None and sys.stderr.isatty():
        print(f"infctx {infctx.__version__} {parsed.name}: loading torch ...", file=sys.stderr, flush=True)
    warnings.simplefilter("default" if "INFCTX_DEBUG" in os.environ else "ignore")
    return run_command(lambda: parsed.command.run(parsed))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    names = [command.name for command in COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        meant = difflib.get_close_matches(arguments[0], names, n=1)
        remedy = f"; perhaps {meant[0]} is meant" if meant else f"; there are {', '.join(names[:5])} and more"
        parser.error(f"{quoted(arguments[0], 20)}: is no command{remedy}")
    parsed, rest = parser.parse_known_args(arguments)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        known = re.findall(r"--[a-z-]+", parsed.parser.format_help())
        meant = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1)
        remedy = f"perhaps {meant[0]} is meant" if meant else "leave it out"
        parsed.parser.error(f"{quoted(flags[0])}: infctx {parsed.name} has no such flag; {remedy}")
    if rest and not parsed.command.trains:
        parsed.parser.error(f"{quoted(' '.join(rest))}: more words than infctx {parsed.name} takes; leave them out")
    if rest:  # argparse takes overrides before an option or after it, not both
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="infctx",
        description="Trains RWKV-5 (Eagle), RWKV-6 (Finch) and RWKV-7 (Goose) on documents of any length.",
    )
    parser.add_argument("--version", action="version", version=f"infctx {infctx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        summary = (command.describe.__doc__ or "").strip()
        described = commands.add_parser(command.name, help=summary, description=summary)
        described.set_defaults(command=command, name=command.name, parser=described)
        command.describe(described)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `infctx COMMAND ...`; each command is one call into a room."""

from __future__ import annotations

import argparse
import difflib
import io
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import infctx
from infctx.arguments import Parser, count, number, seed
from infctx.environment import is_rank, rank_number
from infctx.errors import InputError
from infctx.exits import EXIT_INPUT, run_command
from infctx.small_texts import quoted

if TYPE_CHECKING:
    from infctx.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 1 for a run that failed by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample in a script that the terminal does not have is no failure
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parse(arguments)
    parsed.arguments = arguments
    if parsed.command not in (_train, _tune):  # training finishes its step; the others clean up and go
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("infctx").setLevel(logging.WARNING if parsed.command is _generate else logging.INFO)
    if parsed.command in LOADS_TORCH and rank_number() == 0 and sys.stderr is not None and sys.stderr.isatty():
        print(f"infctx {infctx.__version__} {parsed.name}: loading torch ...", file=sys.stderr, flush=True)
    warnings.simplefilter("default" if "INFCTX_DEBUG" in os.environ else "ignore")
    return run_command(lambda: parsed.command(parsed))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    names = [name for name, _, _ in COMMANDS]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in names:
        choice = f"{', '.join(names[:-1])} or {names[-1]}"
        parser.error(f"{quoted(arguments[0], 20)}: no such command; choose {choice}")
    parsed, rest = parser.parse_known_args(arguments)
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        known = re.findall(r"--[a-z-]+", parsed.parser.format_help())
        meant = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1)
        remedy = f"perhaps {meant[0]} is meant" if meant else "leave it out"
        parsed.parser.error(f"{quoted(flags[0])}: infctx {parsed.name} has no such flag; {remedy}")
    if rest and parsed.command not in (_plan, _train, _tune):
        parsed.parser.error(f"{quoted(' '.join(rest))}: more words than infctx {parsed.name} takes; leave them out")
    if rest:  # argparse takes overrides before an option or after it, not both
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="infctx", description="Trains RWKV-5 (Eagle) and RWKV-6 (Finch) on documents of any length.")
    parser.add_argument("--version", action="version", version=f"infctx {infctx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, describe in COMMANDS:
        summary = (describe.__doc__ or "").strip()
        described = commands.add_parser(name, help=summary, description=summary)
        described.set_defaults(command=command, name=name, parser=described)
        describe(described)
    return parser


def _describe_prepare(parser: argparse.ArgumentParser) -> None:
    """Turn text into a token store."""
    parser.add_argument(
        "inputs", nargs="+", help=".txt, .md, .jsonl (key text), also .gz and .zst; folders, globs, - for stdin"
    )
    parser.add_argument("--output", required=True, type=Path, help="new folder for the stores train and held_out")
    parser.add_argument(
        "--tokenizer",
        choices=("world", "bytes"),
        default="world",
        help="world for the published models, bytes for small ones (default %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=number,
        default=0.0,
        metavar="FRACTION",
        help="share of the documents to hold out, such as 0.02 (default: none)",
    )
    parser.add_argument(
        "--format", choices=("text", "jsonl"), help="what standard input and files of any other suffix hold"
    )
    parser.add_argument("--workers", type=count, help="processes (default: all cores)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses which documents are held out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output folder once the new one is complete"
    )


def _prepare(options: argparse.Namespace) -> None:
    from infctx.data.prepare import prepare

    summary = prepare(
        options.inputs,
        options.output,
        tokenizer=options.tokenizer,
        held_out=options.held_out,
        input_format=options.format,
        workers=options.workers,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(summary)


def _describe_train(parser: argparse.ArgumentParser) -> None:
    """Train as a configuration file says; the same command resumes a run."""
    parser.add_argument("config", type=Path, help="a YAML file such as configs/finch-tiny.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.setting=value",
        help="such as optimizer.steps=50 (docs/settings.md has them all)",
    )
    if parser.prog.endswith(("train", "tune")):
        parser.add_argument(
            "--rehearse", action="store_true", help="try the same settings on a small model first, in a minute"
        )
    parser.add_argument(
        "--device-gb",
        type=number,
        metavar="GB",
        help="to plan or rehearse for GPUs of this memory (1 GB is 1e9 bytes); default: the GPUs here",
    )


def _train(options: argparse.Namespace) -> int:
    return _run(options)


def _describe_tune(parser: argparse.ArgumentParser) -> None:
    """Tune the initial state of a model whose weights stay frozen."""
    _describe_train(parser)


def _tune(options: argparse.Namespace) -> int:
    return _run(options, learn="initial_state")


def _run(options: argparse.Namespace, learn: str | None = None) -> int:
    from infctx.config import load_config

    config = load_config(options.config, options.overrides, learn)
    if options.rehearse:
        return _rehearse(config, options)
    if options.device_gb is not None:
        raise InputError("--device-gb: is for --rehearse and for infctx plan; leave it out")
    return _start(config, options.arguments)


def _start(config: Config, arguments: Sequence[str]) -> int:
    """Trains in this process, or starts the ranks of the run and waits for them; returns the exit code."""
    from infctx.distributed.launch import launch, refuse_before_launch

    ranks = config.distributed
    if ranks.world_size == 1 or is_rank():
        if ranks.world_size > 1:  # if a rank dies, torch's own warnings would bury the one line about it
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from infctx.train.loop import train

        train(config)
        return 0
    if ranks.nodes > 1:
        raise InputError(
            f"distributed.nodes: {ranks.nodes} nodes; start this command on each of them, with torchrun or srun "
            "(docs/distributed.md):",
            f"torchrun --nnodes {ranks.nodes} --nproc-per-node {ranks.devices} ... -m infctx {shlex.join(arguments)}",
        )
    refuse_before_launch(config)
    return launch(arguments, ranks.devices)


def _rehearse(config: Config, options: argparse.Namespace) -> int:
    from infctx.train.rehearsal import describe_real_run, open_rehearsal

    if is_rank():
        raise InputError("--rehearse: starts its own processes; run it by itself, without torchrun or srun")
    rehearsal = open_rehearsal(config, options.config, options.device_gb)
    print("\n".join(rehearsal.lines), flush=True)
    code = _start(rehearsal.config, [options.name, str(rehearsal.file)])
    if code == 0 and rehearsal.is_done:
        command = shlex.join(["infctx", options.name, str(options.config), *options.overrides])
        print("\n".join(["", *describe_real_run(config, command, options.device_gb)]))
    return code


def _describe_plan(parser: argparse.ArgumentParser) -> None:
    """Show the memory and network traffic that a run needs, before it starts."""
    _describe_train(parser)


def _plan(options: argparse.Namespace) -> int:
    """Exits with 2 for a run that does not fit, so that a script can stop there."""
    from infctx.config import load_config
    from infctx.plan.report import plan_report

    report = plan_report(load_config(options.config, options.overrides), options.device_gb)
    print(report.text)
    return EXIT_INPUT if report.fits is False else 0


def _describe_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        help="a .pth, a .safetensors, a folder in Hugging Face's layout, a checkpoint or a run's folder",
    )


def _describe_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one (default auto)"
    )
    parser.add_argument(
        "--dtype", default="fp32", choices=("fp32", "bf16"), help="precision of the weights (default %(default)s)"
    )


def _describe_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, help="a state file of any form, for documents to start from")


def _describe_evaluate(parser: argparse.ArgumentParser) -> None:
    """Measure the loss on held-out documents, by position."""
    _describe_model(parser)
    parser.add_argument("store", type=Path, help="a token store, such as data/books/held_out")
    parser.add_argument("--max-tokens", type=count, default=262144, help="tokens to evaluate (default %(default)s)")
    parser.add_argument(
        "--segment-tokens", type=count, default=1024, help="tokens computed at once (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="keep the table as JSON, as a run does")
    _describe_state(parser)
    _describe_device(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from infctx.data.token_store import TokenStore, is_store
    from infctx.evaluate.loss_by_position import evaluate_store, format_table
    from infctx.evaluate.record import Evaluation, write_record

    if options.output and options.output.exists():
        raise InputError(f"{options.output}: exists; choose another name")
    if is_store(options.model) and not is_store(options.store):
        words = shlex.join(["infctx", "evaluate", str(options.store), str(options.model)])
        raise InputError(f"{options.model}: is a token store, and the model comes first; run {words}")
    store, model = TokenStore(options.store), _load(options)
    buckets = evaluate_store(model, store, options.segment_tokens, options.max_tokens)
    print(format_table(buckets, store))
    if options.output:
        evaluation = Evaluation(None, model.initial_wkv is not None, buckets)
        write_record(options.output, store.path, options.max_tokens, [evaluation])


def _describe_generate(parser: argparse.ArgumentParser) -> None:
    """Continue a prompt."""
    _describe_model(parser)
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
    _describe_state(parser)
    _describe_device(parser)


def _generate(options: argparse.Namespace) -> None:
    from infctx.evaluate.generate import generate

    if sys.stdout is None or (options.prompt == "-" and sys.stdin is None):
        raise InputError("generate: standard input or output is closed; open both")
    given = sys.stdin.buffer.read() if options.prompt == "-" else os.fsencode(options.prompt)
    try:
        prompt = given.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt: is not UTF-8 at byte {error.start}; give it as UTF-8") from None
    pieces = generate(
        _load(options),
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


def _describe_export(parser: argparse.ArgumentParser) -> None:
    """Write weights or a tuned state for other programs."""
    parser.add_argument("model", type=Path, help="a weights file, a state file, a checkpoint or the folder of a run")
    parser.add_argument(
        "output",
        help="weights: a .pth or .safetensors file, or with --names huggingface or fla a folder, such as hf/; "
        "a state: a .pth, .st or .safetensors file",
    )
    parser.add_argument(
        "--form",
        choices=("weights", "pth", "st", "merged", "infctx"),
        help="weights, or a state as pth (RWKV-Runner, ChatRWKV), st (Ai00), infctx, or merged into the weights (the "
        "rwkv package); default: a state if MODEL is one or tuned one, as the suffix of OUTPUT says; else weights",
    )
    parser.add_argument(
        "--names",
        default="official",
        choices=("official", "huggingface", "fla"),
        help="whose names the tensors of weights get (default %(default)s); infctx reads all three",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 for weights, fp32 for a state of form pth"
    )
    parser.add_argument("--state", type=Path, help="a state file to merge into the weights of MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT once the new one is complete")


def _export(options: argparse.Namespace) -> None:
    from infctx.formats.export import export

    print(
        export(
            options.model,
            options.output,
            form=options.form,
            names=options.names,
            dtype=options.dtype,
            state=options.state,
            overwrite=options.overwrite,
        )
    )


def _load(options: argparse.Namespace):  # noqa: ANN202  (the type would load torch)
    import torch

    from infctx.formats.model_files import open_model
    from infctx.machine import pick_device

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    return open_model(options.model, options.state, dtype, pick_device(options.device))


COMMANDS = (
    ("prepare", _prepare, _describe_prepare),
    ("train", _train, _describe_train),
    ("tune", _tune, _describe_tune),
    ("plan", _plan, _describe_plan),
    ("evaluate", _evaluate, _describe_evaluate),
    ("generate", _generate, _describe_generate),
    ("export", _export, _describe_export),
)

LOADS_TORCH = (_train, _tune, _evaluate, _generate, _export)
"""Commands that take seconds to begin."""


if __name__ == "__main__":
    sys.exit(main())

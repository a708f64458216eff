"""infctx train, tune and plan: everything that starts from a configuration."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infctx.arguments import number
from infctx.environment import is_rank
from infctx.errors import InputError
from infctx.exits import EXIT_INPUT
from infctx.files import atomic_file

if TYPE_CHECKING:
    from infctx.settings.config import Config


def describe_train(parser: argparse.ArgumentParser) -> None:
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


def train_command(options: argparse.Namespace) -> int:
    return _run(options)


def describe_tune(parser: argparse.ArgumentParser) -> None:
    """Tune the initial state of a model whose weights stay frozen."""
    describe_train(parser)


def tune_command(options: argparse.Namespace) -> int:
    return _run(options, learn="initial_state")


def _run(options: argparse.Namespace, learn: str | None = None) -> int:
    from infctx.settings.load import load_config

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


def describe_plan(parser: argparse.ArgumentParser) -> None:
    """Show the memory and network traffic that a run needs, or with --gpu what one GPU can do with a model."""
    describe_train(parser)
    parser.add_argument(
        "--gpu",
        type=number,
        metavar="GB",
        help="name a model instead of a configuration (finch-3b, a file, a name on the hub): shows how one GPU of this "
        "memory can train it, and proposes a configuration",
    )
    parser.add_argument(
        "--learn",
        choices=("weights", "adapter", "initial_state"),
        help="with --gpu: what to learn; default: whatever fits and changes the most",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --gpu: write the configuration to a new file")


def plan_command(options: argparse.Namespace) -> int:
    """Exits with 2 for a run that does not fit, so that a script can stop there."""
    from infctx.plan.report import plan_report
    from infctx.settings.load import load_config

    if options.gpu is not None:
        return _propose(options)
    for name in ("learn", "write"):
        if getattr(options, name):
            raise InputError(f"--{name}: goes with --gpu, which proposes a configuration; add --gpu 24 or leave it out")
    report = plan_report(load_config(options.config, options.overrides), options.device_gb)
    print(report.text)
    return EXIT_INPUT if report.fits is False else 0


def _propose(options: argparse.Namespace) -> int:
    from infctx.plan.propose import propose

    if options.overrides:
        raise InputError(f"{options.overrides[0]}: settings go with a configuration; change the proposed one instead")
    if options.device_gb is not None:
        raise InputError("--device-gb: is for a configuration; --gpu has the memory already")
    proposal = propose(str(options.config), options.gpu, options.learn)
    print(proposal.text)
    if proposal.configuration is None:
        return EXIT_INPUT
    if options.write:
        if options.write.exists():
            raise InputError(f"{options.write}: exists already; name a new file")
        with atomic_file(options.write) as temporary:
            temporary.write_text(proposal.configuration, encoding="utf-8")
        print(f"written to {options.write}")
    else:
        print(f"\n{proposal.configuration.rstrip()}")
    return 0

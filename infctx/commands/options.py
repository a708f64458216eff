"""Options that several commands share, and the model that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from infctx.arguments import count, number, seed
from infctx.documents.templates import DEFAULT, HELP, get_template

QUANTIZED = ("int8", "nf4")
MODEL = (
    "a .pth, a .safetensors, a folder in Hugging Face's layout, a checkpoint or a run's folder; or a name on the hub, "
    "OWNER/REPO:FILE"
)


def describe_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help=MODEL)


def describe_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one (default auto)"
    )
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=("fp32", "bf16", *QUANTIZED),
        help="precision of the weights (default %(default)s); int8 and nf4 keep the matrices of the blocks in 8 and 4 "
        "bits, and compute in bf16 on a GPU and in fp32 on a CPU",
    )


def describe_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state", type=Path, help="a state file of any form, or its name on the hub, for documents to start from"
    )


def describe_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=Path, help="an adapter trained over MODEL: a file, a folder of RWKV-PEFT's, or a run's folder"
    )


def describe_sampling(parser: argparse.ArgumentParser) -> None:
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


def describe_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="what the system says before the chat begins")
    parser.add_argument("--template", metavar="NAME", help=HELP)
    parser.add_argument("--think", action="store_true", help="let answers begin with reasoning (--template g1)")


def open_chat(options: argparse.Namespace):  # noqa: ANN202  (the type would load torch)
    """Returns a chat with the model that the options name."""
    from infctx.evaluate.chat import Chat
    from infctx.evaluate.generate import Sampling

    template = get_template(options.template or DEFAULT)
    sampling = Sampling(options.tokens, options.temperature, options.top_p, options.seed)
    return Chat(load_model(options), template, sampling, system=options.system or "", thinks=options.think)


def load_model(options: argparse.Namespace, files=None):  # noqa: ANN001, ANN202  (the types would load torch)
    """Returns the model that the options name; files: its `model_files`, if they are known already."""
    import torch

    from infctx.formats.model_files import open_model
    from infctx.machine import pick_device
    from infctx.model.rwkv import Compute

    files = files or model_files(options)
    device = pick_device(options.device)
    if options.dtype in QUANTIZED:
        compute = Compute(torch.float32 if device.type == "cpu" else torch.bfloat16)
        return open_model(files, options.state, options.dtype, device, compute)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    return open_model(files, options.state, dtype, device)


def model_files(options: argparse.Namespace, path: Path | None = None):  # noqa: ANN202  (the type would load torch)
    """Returns the files of the model that the options name, with its adapter; path: of one of several models."""
    from infctx.formats.model_files import find_model, with_adapter

    files = find_model(path or options.model)
    return files if options.adapter is None else with_adapter(files, options.adapter)

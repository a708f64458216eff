"""Options that several commands share, and the model that they name."""

from __future__ import annotations

import argparse
from pathlib import Path


def describe_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        help="a .pth, a .safetensors, a folder in Hugging Face's layout, a checkpoint or a run's folder",
    )


def describe_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one (default auto)"
    )
    parser.add_argument(
        "--dtype", default="fp32", choices=("fp32", "bf16"), help="precision of the weights (default %(default)s)"
    )


def describe_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state", type=Path, help="a state file of any form, for documents to start from")


def load_model(options: argparse.Namespace):  # noqa: ANN202  (the type would load torch)
    import torch

    from infctx.formats.model_files import open_model
    from infctx.machine import pick_device

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    return open_model(options.model, options.state, dtype, pick_device(options.device))

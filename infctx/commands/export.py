"""infctx export"""

from __future__ import annotations

import argparse
from pathlib import Path


def describe(parser: argparse.ArgumentParser) -> None:
    """Write weights, a tuned state or an adapter for other programs."""
    parser.add_argument("model", type=Path, help="a weights file, a state file, a checkpoint or the folder of a run")
    parser.add_argument(
        "output",
        help="weights: a .pth or .safetensors file, or with --names huggingface or fla a folder, such as hf/; "
        "a state: a .pth, .st or .safetensors file; an adapter: a folder, or a .safetensors file",
    )
    parser.add_argument(
        "--form",
        choices=("weights", "pth", "st", "merged", "infctx", "adapter"),
        help="weights, merged with the adapter if MODEL has one; adapter, alone (a folder: RWKV-PEFT's form); or a "
        "state as pth (RWKV-Runner, ChatRWKV), st (Ai00), infctx, or merged into the weights (the rwkv package); "
        "default: a state if MODEL is one or tuned one alone, as the suffix of OUTPUT says; else weights",
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
    parser.add_argument("--adapter", type=Path, help="an adapter to merge into the weights of MODEL: a file or a run")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT once the new one is complete")


def run(options: argparse.Namespace) -> None:
    from infctx.formats.export import export

    print(
        export(
            options.model,
            options.output,
            form=options.form,
            names=options.names,
            dtype=options.dtype,
            state=options.state,
            adapter=options.adapter,
            overwrite=options.overwrite,
        )
    )

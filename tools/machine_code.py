"""Compiles a CUDA source of infctx for one architecture, without a GPU: each kernel's resources and machine code.

python tools/machine_code.py wkv_backward.cu --arch sm_90 --output wkv_backward.cubin
nvdisasm --print-code wkv_backward.cubin           # in the wheel nvidia-cuda-nvdisasm, under nvidia/cu13/bin
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A bare machine has torch, but infctx only as this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infctx.cuda.compile import KernelsUnavailable, compile_source
from infctx.cuda.driver import SOURCE_FOLDER


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=sorted(path.name for path in SOURCE_FOLDER.glob("*.cu")))
    parser.add_argument("--arch", default="sm_90", help="default: %(default)s")
    parser.add_argument("--head-size", type=int, default=64, help="16, 32 or 64 (default)")
    parser.add_argument("--fp32", action="store_true", help="for fp32 inputs instead of bf16")
    parser.add_argument("--output", type=Path, help="where the cubin goes")
    options = parser.parse_args(arguments)
    headers = {path.name: path.read_text() for path in SOURCE_FOLDER.glob("*.cuh")}
    words = [f"-DHEAD_SIZE={options.head_size}", *["-DINPUT_FLOAT"] * options.fp32]
    source = (SOURCE_FOLDER / options.source).read_text()
    try:
        compiled = compile_source(source, options.source, options.arch, words, headers)
    except KernelsUnavailable as error:
        print(f"machine_code: {error}", file=sys.stderr)
        return 2
    for name, used in compiled.resources.items():
        spilled = used.spill_store_bytes + used.spill_load_bytes
        print(f"{name:<24} {used.registers:>3} registers, {used.stack_bytes} bytes of stack, {spilled} bytes spilled")
    if options.output:
        options.output.write_bytes(compiled.cubin)
        print(f"{options.output}: {len(compiled.cubin):,} bytes for {options.arch} by {compiled.compiler}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles a CUDA source of infctx for one architecture, without a GPU: each kernel's resources and machine code.

python tools/machine_code.py wkv_backward.cu --arch sm_90 --output wkv_backward.cubin
python tools/machine_code.py wkv_backward.cu --replay             instructions and modeled cycles of a chunk
nvdisasm --print-code wkv_backward.cubin           # in the wheel nvidia-cuda-nvdisasm, under nvidia/cu13/bin
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

# A bare machine has torch, but infctx only as this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from infctx.cuda import wkv7_layout
from infctx.cuda.compile import Compiled, KernelsUnavailable, compile_source
from infctx.cuda.driver import SOURCE_FOLDER
from infctx.cuda.wkv_layout import backward_shared_bytes, cut, forward_shared_bytes, span_shared_bytes
from infctx.cuda.wkv_time import Processors, blocks_at_once

from machine_replay import Estimate, estimate, parse

H100 = Processors(132, 233_472)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=sorted(path.name for path in SOURCE_FOLDER.glob("*.cu")))
    parser.add_argument("--arch", default="sm_90", help="default: %(default)s")
    parser.add_argument("--head-size", type=int, default=64, help="16, 32 or 64 (default)")
    parser.add_argument("--fp32", action="store_true", help="for fp32 inputs instead of bf16")
    parser.add_argument("--output", type=Path, help="where the cubin goes")
    parser.add_argument("--replay", action="store_true", help="a chunk's instructions and modeled cycles, on an H100")
    parser.add_argument("--folder", type=Path, default=SOURCE_FOLDER, help="of the sources, to compare with others")
    options = parser.parse_args(arguments)
    headers = {path.name: path.read_text() for path in options.folder.glob("*.cuh")}
    words = [f"-DHEAD_SIZE={options.head_size}", *["-DINPUT_FLOAT"] * options.fp32]
    source = (options.folder / options.source).read_text()
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
    if options.replay:
        print_replay(compiled, options.head_size, torch.float32 if options.fp32 else torch.bfloat16)
    return 0


def print_replay(compiled: Compiled, head_size: int, dtype: torch.dtype) -> None:
    """Prints a row for each kernel with a loop of chunks: see machine_replay.py for what is modeled and what is not."""
    layout = cut((1, 4096, 1, head_size), dtype, spans=2)
    roles = {"wkv_forward": 2, "wkv_backward": 4}
    shared = {"wkv_forward": forward_shared_bytes, "wkv_backward": backward_shared_bytes}
    shared |= {"wkv7_forward": wkv7_layout.forward_shared_bytes, "wkv7_backward": wkv7_layout.backward_shared_bytes}
    shared |= {f"wkv7_sum_span{end}": wkv7_layout.span_shared_bytes for end in ("s", "_gradients")}
    print(
        "| kernel | instructions a chunk, each warp | products | issue limit, cycles | cycles by blocks a processor |"
    )
    print("|---|---|---|---|---|")
    for name, code in parse(disassembled(compiled.cubin)).items():
        threads = 32 * layout.warps * roles.get(name, 1)
        shared_bytes = shared.get(name, span_shared_bytes)(layout)
        most = blocks_at_once(H100, threads, compiled.resources[name].registers, shared_bytes)
        chunks = layout.tile_tokens // 16
        found = estimate(code, chunks, min(most, 4), layout.warps)
        if found:
            print(row(name, found))


def row(name: str, found: Estimate) -> str:
    counts = " + ".join(f"{sum(count.values()):,.0f}" for count in found.instructions)
    products = " + ".join(f"{count['tensor']:,.0f}" for count in found.instructions)
    cycles = ", ".join(f"{cycles:,.0f}" for cycles in found.cycles.values())
    return f"| `{name}` | {counts} | {products} | {found.issue_cycles:,.0f} | {cycles} |"


def disassembled(cubin: bytes) -> str:
    """Returns nvdisasm's text with the encodings, which hold the control codes."""
    (program,) = (file for file in metadata.files("nvidia-cuda-nvdisasm") or () if file.name == "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program.locate()), "--print-code", "--print-instruction-encoding", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())

"""Writes tests/cuda/fragment_maps.json: which lane holds which element of a tensor core's operands, by CuTe's traits.

python tools/fragment_maps.py nvidia_cutlass-4.2.0.0-py3-none-any.whl

CuTe is NVIDIA's and is in the wheel nvidia-cutlass, which asks for too many others to be a dependency of the tests.
The maps are evaluated here from the text of its headers; the tests compare the emulator with them.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "cuda" / "fragment_maps.json"
HEADERS = "cutlass_library/source/include/cute/atom/"
MMA_HEADER, COPY_HEADER = "mma_traits_sm80.hpp", "copy_traits_sm75.hpp"

# Our name: the trait, and the rows of the operand's first coordinate (CuTe counts them first).
MMAS = {"tf32": "SM80_16x8x8_F32TF32TF32F32_TN", "bf16": "SM80_16x8x16_F32BF16BF16F32_TN"}
OPERANDS = {"left": ("ALayout", 16), "right": ("BLayout", 8), "sum": ("CLayout", 16)}
COPIES = {
    "ldmatrix 1": ("SM75_U32x1_LDSM_N", 1),
    "ldmatrix 2": ("SM75_U32x2_LDSM_N", 2),
    "ldmatrix 4": ("SM75_U32x4_LDSM_N", 4),
    "ldmatrix transposed 1": ("SM75_U16x2_LDSM_T", 1),
    "ldmatrix transposed 2": ("SM75_U16x4_LDSM_T", 2),
    "ldmatrix transposed 4": ("SM75_U16x8_LDSM_T", 4),
}
Nested = int | tuple["Nested", ...]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="of nvidia-cutlass")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: tests/cuda/fragment_maps.json")
    options = parser.parse_args(arguments)
    with zipfile.ZipFile(options.wheel) as wheel:
        mma, copy = (wheel.read(HEADERS + name).decode() for name in (MMA_HEADER, COPY_HEADER))
    name, version = options.wheel.name.split("-")[:2]
    found = {"source": f"CuTe's {MMA_HEADER} and {COPY_HEADER} in {name} {version}", "maps": maps(mma, copy)}
    lines = json.dumps(found, indent=1)
    # A lane a line.
    lines = re.sub(r"\[\s+((?:\[[^\[\]]*\],?\s*)+)\]", lambda match: f"[{' '.join(match[1].split())}]", lines)
    options.output.write_text(lines + "\n", encoding="utf-8")
    print(f"{options.output}: {len(found['maps'])} maps")
    return 0


def maps(mma: str, copy: str) -> dict[str, list[list[list[int]]]]:
    """Returns, for each operand and lane, the (row, column) of its elements in order, from the text of two headers.

    Of ldmatrix, (i, j) is element j of the row whose address lane i gave; two elements fill a register.
    """
    found = {}
    for kind, trait in MMAS.items():
        for operand, (layout, rows) in OPERANDS.items():
            table = lanes(*find_layout(mma, "MMA_Traits", trait, layout))
            # The right operand is (column, row) there.
            turn = -1 if operand == "right" else 1
            found[f"{kind} {operand}"] = [[[x % rows, x // rows][::turn] for x in lane] for lane in table]
    for name, (trait, matrices) in COPIES.items():
        table = lanes(*find_layout(copy, "Copy_Traits", trait, "DstLayout"))
        assert all(len(lane) == 32 * matrices for lane in table), name
        # In bits: a row is 128, an element 16.
        found[name] = [[[x // 128, x % 128 // 16] for x in lane[::16]] for lane in table]
    return found


def lanes(shape: tuple[Nested, ...], stride: tuple[Nested, ...]) -> list[list[int]]:
    """Evaluates a layout of (lane, value)."""
    sizes = [size_of(mode) for mode in shape]
    assert sizes[0] == 32, sizes
    at = [[offset(i, shape[mode], stride[mode]) for i in range(sizes[mode])] for mode in (0, 1)]
    return [[lane + value for value in at[1]] for lane in at[0]]


def size_of(shape: Nested) -> int:
    if isinstance(shape, int):
        return shape
    product = 1
    for part in shape:
        product *= size_of(part)
    return product


def offset(index: int, shape: Nested, stride: Nested) -> int:
    """The first coordinate of a nested shape counts fastest."""
    if isinstance(shape, int):
        assert isinstance(stride, int)
        return index * stride
    assert isinstance(stride, tuple)
    total = 0
    for part, step in zip(shape, stride, strict=True):
        total += offset(index % size_of(part), part, step)
        index //= size_of(part)
    return total


def find_layout(header: str, kind: str, trait: str, name: str) -> tuple[tuple[Nested, ...], tuple[Nested, ...]]:
    """Finds `using name = Layout<Shape, Stride>` of a trait, or of the trait that it is derived from."""
    struct = re.search(rf"struct {kind}<{trait}>\s*(?::\s*{kind}<(\w+)>)?\s*\{{(.*?)\n\}};", header, re.DOTALL)
    if struct is None:
        raise SystemExit(f"fragment_maps: the wheel's headers have no {trait}; use version 4.2.0")
    using = re.search(rf"using {name}\s*=\s*(.*?);", struct[2], re.DOTALL)
    if using is None:
        return find_layout(header, kind, struct[1], name)
    text = using[1]
    if re.fullmatch(r"\w+", text):
        alias = re.search(rf"using {text}\s*=\s*(.*?);", header, re.DOTALL)
        assert alias is not None, text
        text = alias[1]
    text = re.sub(r"_(\d+)", r"\1", re.sub(r"(Layout|Shape|Stride)\s*<", "(", text)).replace(">", ",)")
    shape, stride = ast.literal_eval(" ".join(text.split()))
    return shape, stride


if __name__ == "__main__":
    sys.exit(main())

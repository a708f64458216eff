"""The emulator: primitives follow the PTX manual, correct kernels are correct in every order, bugs are found."""

import functools
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from emulator.emulator import HERE, ORDERS, PRIMITIVES, EmulatorError, build

SAMPLE = HERE / "sample.cu"
SHARED_BYTES = 20480
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
RACES = ["MISSING_BARRIER_BEFORE_READ", "MISSING_BARRIER_BEFORE_OVERWRITE", "MISSING_SYNC_WARP", "LATE_WAIT"]
SIZES = [(64, 32, 96), (77, 45, 51), (1, 1, 1), (130, 72, 104)]  # rows, columns, depth

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles with g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(scope="session")
def sample():
    """Builds sample.cu, each variant once: sample(*planted bugs, sanitize=False)."""
    return functools.cache(
        lambda *bugs, sanitize=False: build(SAMPLE, [f"PLANT_{bug}" for bug in bugs], sanitize=sanitize)
    )


def matrix_product_is_right(emulation, sizes, order, seed=0):
    rows, columns, depth = sizes
    g = torch.Generator().manual_seed(rows)
    left = torch.randn(rows, depth, generator=g).bfloat16()
    right = torch.randn(depth, columns, generator=g).bfloat16()
    grid = -(-columns // 32), -(-rows // 64)
    product = torch.full((rows, columns), torch.nan)
    results = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    row_sums = torch.full((rows, grid[0]), torch.nan)
    arguments = (left, right, product, results, row_sums, rows, columns, depth)
    emulation.launch("matrix_product", grid, 128, SHARED_BYTES, arguments, order, seed)
    expected = left.double() @ right.double()
    powers = torch.exp2(-expected.abs())
    sums = torch.nn.functional.pad(powers, (0, grid[0] * 32 - columns)).unflatten(1, (grid[0], 32)).sum(2)
    return all(
        torch.allclose(found.double(), truth, rtol=relative, atol=1e-5)
        for found, truth, relative in ((product, expected, 1e-5), (results, powers, 2**-8), (row_sums, sums, 1e-5))
    )


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_sample_is_right_in_every_order(sample, sizes, sanitize, order):
    assert matrix_product_is_right(sample(sanitize=sanitize), sizes, order, seed=1)


@needs_compiler
@pytest.mark.parametrize("bug", RACES)
def test_race_gives_wrong_numbers_in_some_order(sample, bug):
    assert not all(matrix_product_is_right(sample(bug), SIZES[0], order) for order in ORDERS)


REPORTS = {
    "MISSING_WAIT": "the thread ended without waiting for this cp_async_16",
    "DIVERGENT_BARRIER": r"divergent barrier: .*96 of 128 threads wait at sync_block of sample.cu:\d+ \(0-31, 64-127\)",
    "EARLY_RETURN": r"divergent barrier: 96 of 128 threads have ended \(32-127\); 32 .* sync_block of sample.cu:",
    "DIVERGENT_SHUFFLE": r"divergent warp primitive: .* wait at shuffle_xor of sample.cu:.* shuffle_xor of sample.cu:",
    "OUT_OF_BOUNDS_SHARED": "written out of bounds: byte 20480 of dynamic shared memory, which has 20480 bytes",
    "OUT_OF_BOUNDS_GLOBAL_WRITE": "written out of bounds: byte 13860 of the 13860 bytes of argument 2",
}


@needs_compiler
@pytest.mark.parametrize("bug", REPORTS)
def test_bug_is_reported(sample, bug):
    with pytest.raises(EmulatorError, match=REPORTS[bug]) as report:
        matrix_product_is_right(sample(bug), SIZES[0] if "WAIT" in bug else SIZES[1], "forward")
    assert "kernel matrix_product" in str(report.value)
    if bug == "DIVERGENT_BARRIER":
        lines = [int(line) for line in re.findall(r"sample.cu:(\d+)", str(report.value))]
        assert len(lines) == 2 and set(lines) <= set(planted_lines(bug))
    # An error leaves no trace: the same library runs the next kernel correctly.
    values = torch.arange(128.0)
    sample(bug).launch("hand_round", 1, 128, arguments=(values, 3))
    assert torch.equal(values, (torch.arange(128.0) + 3) % 128)


@needs_compiler
@pytest.mark.parametrize(
    "bug, access",
    [("OUT_OF_BOUNDS_SHARED", "WRITE"), ("OUT_OF_BOUNDS_GLOBAL_READ", "READ"), ("OUT_OF_BOUNDS_GLOBAL_WRITE", "WRITE")],
)
def test_sanitized_build_names_the_line_out_of_bounds(sample, bug, access):
    with pytest.raises(
        EmulatorError, match=f"AddressSanitizer.*{access} of size [24].*kernel matrix_product"
    ) as report:
        matrix_product_is_right(sample(bug, sanitize=True), SIZES[1], "forward")
    if "GLOBAL" in bug:
        line = int(re.search(r"sample.cu:(\d+)", str(report.value))[1])
        assert line in planted_lines(bug)
    else:
        assert "byte 20480 of dynamic shared memory" in str(report.value)


TOUCHES = {
    "dynamic": (0, 8, r"use-after-poison; READ of size 4; \S+sample.cu:\d+; kernel touch, .*; byte 32 of dynamic"),
    "static": (
        1,
        8,
        r"sample.cu:\d+:\d+: runtime error: index 8 out of bounds.*; kernel touch, block \(0, 0, 0\), thread",
    ),
    "ldmatrix": (2, 8, r"sample.cu:\d+: ldmatrix: the address is outside of shared memory: byte 32 of dynamic shared"),
    "copy from": (3, 32, r"heap-buffer-overflow; READ of size 16; \S+sample.cu:\d+; is located 0 bytes"),
    "copy to": (4, 8, r"sample.cu:\d+: cp_async_16: the address is outside of shared memory"),
    "copy, odd": (3, 2, r"sample.cu:\d+: cp_async_16: the address is not a multiple of 16"),
    "load, odd": (5, 1, r"sample.cu:\d+: load_packet: the address is not a multiple of 8"),
    "load": (5, 32, r"heap-buffer-overflow; READ of size \d; \S+sample.cu:\d+; is located 0 bytes"),
}


@needs_compiler
@pytest.mark.parametrize("name", TOUCHES)
def test_memory_that_must_not_be_touched(sample, name):
    what, position, message = TOUCHES[name]
    with pytest.raises(EmulatorError, match=message):
        sample(sanitize=True).launch("touch", 1, 32, 32, (torch.zeros(32), what, position))
    if message.startswith(r"sample.cu:\d+: "):  # reported by the emulator, not by a sanitizer
        with pytest.raises(EmulatorError, match=message):
            sample().launch("touch", 1, 32, 32, (torch.zeros(32), what, position))


@needs_compiler
@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("what", [0, 1])
def test_shared_memory_is_nan_until_written(sample, sanitize, what):
    x = torch.zeros(32)
    sample(sanitize=sanitize).launch("touch", 1, 1, 32, (x, what, 3))
    assert x[0].isnan()


def planted_lines(bug):
    """Returns the numbers of the lines that a bug plants."""
    lines = SAMPLE.read_text().splitlines()
    start = lines.index(f"#ifdef PLANT_{bug}")
    end = next(i for i in range(start + 1, len(lines)) if lines[i].startswith("#"))
    return range(start + 2, end + 1)


# ---- layouts, described a second time: (row, column) of each element of each lane, from the PTX manual ----

LANES = np.arange(32)
GROUP, PLACE = LANES // 4, LANES % 4


def left_bf16():
    """(32 lanes, 8 elements): elements 0 and 1 are register 0, the lower half first."""
    rows = [GROUP if i in (0, 1, 4, 5) else GROUP + 8 for i in range(8)]
    columns = [PLACE * 2 + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
    return np.stack(rows, 1), np.stack(columns, 1)


def right_bf16():
    rows = [PLACE * 2 + (i & 1) + (8 if i >= 2 else 0) for i in range(4)]
    return np.stack(rows, 1), np.stack([GROUP] * 4, 1)


def left_tf32():
    rows = [GROUP if i in (0, 2) else GROUP + 8 for i in range(4)]
    return np.stack(rows, 1), np.stack([PLACE if i in (0, 1) else PLACE + 4 for i in range(4)], 1)


def right_tf32():
    return np.stack([PLACE, PLACE + 4], 1), np.stack([GROUP] * 2, 1)


def sum_layout():
    rows = [GROUP if i < 2 else GROUP + 8 for i in range(4)]
    return np.stack(rows, 1), np.stack([PLACE * 2 + (i & 1) for i in range(4)], 1)


def bf16_bits(x):
    return np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) >> 16


def multiply_fragments(emulation, left, right, sums):
    found = [torch.full((32, 4), torch.nan) for _ in range(2)]
    words = [torch.from_numpy(np.ascontiguousarray(x).view(np.int32)) for x in (left, right)]
    emulation.launch("multiply_fragments", 1, 32, arguments=(*words, torch.from_numpy(sums.astype(np.float32)), *found))
    return [x.numpy() for x in found]


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_mma_bf16(sample, order):
    random = np.random.default_rng(0)
    left, right = random.integers(-8, 9, (16, 16)) / 4, random.integers(-8, 9, (16, 8)) / 4
    sums = random.integers(-9, 9, (16, 8)) / 2
    registers = [bf16_bits(x[layout]) for x, layout in ((left, left_bf16()), (right, right_bf16()))]
    registers = [(x[:, ::2] | x[:, 1::2] << 16).astype(np.uint32) for x in registers]
    found, _ = multiply_fragments(sample(), *registers, sums[sum_layout()])
    assert np.array_equal(found, (sums + left @ right)[sum_layout()])  # small multiples of 1/16: exact in any order


@needs_compiler
def test_mma_tf32_ignores_the_low_bits(sample):
    random = np.random.default_rng(1)
    left, right = random.integers(-64, 65, (16, 8)) / 4, random.integers(-64, 65, (8, 8)) / 4
    sums = random.integers(-9, 9, (16, 8)) / 2
    registers = [np.float32(x[layout]).view(np.uint32) for x, layout in ((left, left_tf32()), (right, right_tf32()))]
    registers = [x | random.integers(0, 2**13, x.shape, dtype=np.uint32) for x in registers]
    _, found = multiply_fragments(sample(), *registers, sums[sum_layout()])
    assert np.array_equal(found, (sums + left @ right)[sum_layout()])


@needs_compiler
def test_mma_on_random_matrices_rounds_like_fp32(sample):
    random = np.random.default_rng(2)
    for _ in range(20):
        left, right = random.standard_normal((16, 16)), random.standard_normal((16, 8))
        registers = [bf16_bits(x[layout]) for x, layout in ((left, left_bf16()), (right, right_bf16()))]
        left, right = [(bf16_bits(x) << 16).astype(np.uint32).view(np.float32).astype(float) for x in (left, right)]
        registers = [(x[:, ::2] | x[:, 1::2] << 16).astype(np.uint32) for x in registers]
        found, _ = multiply_fragments(sample(), *registers, np.zeros((32, 4)))
        assert np.abs(found - (left @ right)[sum_layout()]).max() < 16 * 2**-24 * (np.abs(left) @ np.abs(right)).max()


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_ldmatrix(sample, order):
    elements = torch.arange(256, dtype=torch.int16) * 11 + 3
    registers = torch.zeros(32, 14, dtype=torch.int32)
    sample().launch("load_matrices", 1, 32, arguments=(elements.view(torch.bfloat16), registers), order=order)
    halves = registers.numpy().view(np.uint16).reshape(32, 14, 2)
    matrices = elements.numpy().reshape(4, 8, 8)
    for lane, place in np.ndindex(32, 14):
        transposed, word = divmod(place, 7)
        matrix = word - (0, 1, 1, 3, 3, 3, 3)[word]  # words of x1, x2, x4
        wanted = matrices[matrix].T if transposed else matrices[matrix]
        assert halves[lane, place].tolist() == wanted[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()


# ---- numbers and lanes ----


def many_floats():
    """Returns every upper half of a float, with lower halves at, next to and between the ties of bf16 and tf32."""
    random = np.random.default_rng(3)
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    lower = [np.full(2**16, low, dtype=np.uint32) for low in lower]
    lower.append(random.integers(0, 2**16, 2**16, dtype=np.uint32))
    return np.concatenate([upper | low for low in lower]).view(np.float32)


def nearest_tf32(x):
    """Rounds by arithmetic in float64: 10 bits after the leading one, or multiples of 2^-136; ties away from zero."""
    quantum = np.exp2(np.maximum(np.frexp(x)[1] - 11.0, -136.0))
    rounded = np.copysign(np.floor(np.abs(x) / quantum + 0.5) * quantum, x)
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, x), rounded)


@needs_compiler
def test_conversions_bit_for_bit(sample):
    x = torch.from_numpy(many_floats())
    count = len(x)
    rounded = torch.zeros(count, dtype=torch.bfloat16)
    packed = torch.zeros(count, dtype=torch.int32)
    widened, unpacked, tf32, powers = (torch.full((count,), -7.0) for _ in range(4))
    arguments = (x, rounded, widened, packed, unpacked, tf32, powers, count)
    sample().launch("convert", -(-count // 256), 256, arguments=arguments)
    numbers = ~x.isnan()
    expected = x.bfloat16()
    assert torch.equal(rounded[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert (rounded[~numbers].view(torch.int16) == 0x7FFF).all()
    assert torch.equal(widened[numbers], expected[numbers].float()) and widened[~numbers].isnan().all()
    halves = packed.view(torch.int16).view(-1, 2)
    assert torch.equal(halves[numbers, 0], expected[numbers].view(torch.int16))
    assert torch.equal(halves[numbers, 1], (-x).bfloat16()[numbers].view(torch.int16))
    assert torch.equal(unpacked[numbers], 2 * expected[numbers].float())

    finite = x.isfinite()
    truth = torch.from_numpy(nearest_tf32(x[finite].double().numpy())).float()
    assert torch.equal(tf32[finite].view(torch.int32), truth.view(torch.int32))
    assert torch.equal(tf32[x.isinf()], x[x.isinf()]) and tf32[~numbers].isnan().all()

    truth = torch.exp2(x.double())
    plain = numbers & (truth >= 2.0**-126) & (truth < 2.0**128)
    assert ((powers[plain].double() / truth[plain] - 1).abs() <= 2**-22).all()
    assert (powers[truth < 2.0**-126] == 0).all() and powers[~numbers].isnan().all()


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(sample, order):
    x = torch.linspace(-3, 5, 32)
    floats, integers = torch.zeros(4, 32), torch.zeros(4, 32, dtype=torch.int32)
    sample().launch("shuffles", 1, 32, arguments=(x, floats, integers, 100.0), order=order)
    lanes, whole = torch.arange(32), (x * 100).int()

    def kept(source):
        return torch.where((source >= 0) & (source < 32), source, lanes)

    assert torch.equal(floats, x[torch.stack([lanes ^ 5, kept(lanes - 3), kept(lanes + 7), lanes * 7 % 32])])
    sources = torch.stack([lanes ^ 16, kept(lanes - 1), kept(lanes + 31), torch.full((32,), 9)])
    assert torch.equal(integers, whole[sources])


@needs_compiler
@pytest.mark.parametrize("order", ORDERS)
def test_thousands_of_barriers(sample, order):
    values = torch.arange(128.0)
    sample().launch("hand_round", 1, 128, arguments=(values, 3000), order=order, seed=5)
    assert torch.equal(values, (torch.arange(128.0) + 3000) % 128)


# ---- arguments ----


@needs_compiler
@pytest.mark.parametrize("sanitize", [False, True])
def test_views_of_one_storage_stay_so(sample, sanitize):
    storage = torch.arange(300.0)
    before = storage.clone()
    sample(sanitize=sanitize).launch("hand_round", 1, 128, arguments=(storage[37:165], 1))
    assert torch.equal(storage[37:165], before[37:165].roll(-1))
    assert torch.equal(storage[:37], before[:37]) and torch.equal(storage[165:], before[165:])
    with pytest.raises(EmulatorError, match="out of bounds|heap-buffer-overflow"):
        sample(sanitize=sanitize).launch("hand_round", 1, 128, arguments=(storage[37:164], 1))


@needs_compiler
@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel": "hand_over"}, "no kernel hand_over; there are: matrix_product"),
        ({"arguments": (1,)}, "hand_round has 2 parameters, not 1"),
        ({"arguments": (torch.zeros(128, dtype=torch.float64), 1)}, "argument 0: elements of torch.float64"),
        ({"arguments": (torch.zeros(128), 2**40)}, "argument 1: 1099511627776 does not go into 4 bytes"),
        ({"arguments": (torch.zeros(128), 1.5)}, "argument 1: 1.5 for a parameter that is an integer"),
        ({"arguments": (torch.zeros(128), torch.zeros(1))}, "argument 1: a tensor for a parameter that is no pointer"),
        ({"block": 2048}, "a block has 1 to 1024 threads"),
        ({"shared_bytes": 101377}, "101377 bytes of dynamic shared memory"),
    ],
)
def test_wrong_launch_is_reported(sample, change, message):
    launch = {"kernel": "hand_round", "grid": 1, "block": 128, "arguments": (torch.zeros(128), 1)}
    with pytest.raises(EmulatorError, match=re.escape(message)):
        sample().launch(**(launch | change))


@needs_compiler
def test_source_that_does_not_compile_is_reported(tmp_path):
    (tmp_path / "broken.cu").write_text(
        '#include "primitives.cuh"\nextern "C" __global__ void broken(int32 x) { x = y; }\n'
    )
    with pytest.raises(EmulatorError, match=r"broken.cu:2:\d+: error: .y. was not declared"):
        build(tmp_path / "broken.cu", cache=tmp_path / "cache")
    (tmp_path / "empty.cu").write_text("")
    with pytest.raises(EmulatorError, match="has no kernel"):
        build(tmp_path / "empty.cu", cache=tmp_path / "cache")


# ---- the same source for GPUs ----


@pytest.fixture(scope="session")
def cubins(tmp_path_factory):
    """Compiles sample.cu for an architecture, once: (file, ptxas's output)."""

    @functools.cache
    def compile_for(architecture):
        cubin = tmp_path_factory.mktemp("cubin") / f"sample_{architecture}.cubin"
        command = ["nvcc", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-I", PRIMITIVES, SAMPLE, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cubin, done.stderr

    return compile_for


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(cubins, architecture):
    _, log = cubins(architecture)
    assert "warning" not in log
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(stacks) == 7 and set(stacks) == {("0", "0", "0")}


@needs_nvcc
@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="needs cuobjdump")
def test_machine_code_has_the_instructions_meant(cubins):
    command = ["cuobjdump", "-sass", "-fun", "matrix_product", cubins(80)[0]]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in ("HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "SHFL.BFLY"):
        assert instruction in code
    assert not re.search(r"\b(LDL|STL)\b", code)

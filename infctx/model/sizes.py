"""Sizes of a model: those of a configuration or a weights file in, all of them out; the published models by name."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from infctx.errors import InputError
from infctx.small_texts import quoted


@dataclass(frozen=True)
class Sizes:
    """Everything that fixes the shapes of a model.

    version: 5 for RWKV-5.2 (Eagle), 6 for RWKV-6 (Finch), 7 for RWKV-7 (Goose)
    mix_rank ... gate_rank: ranks of the version's low-rank products (RANKS), None for those of other versions
    keeps_first_blend: Goose's first block holds the three weights that blend values, as some files do; it has no use
        for them
    """

    version: int
    num_layers: int
    width: int
    vocab_size: int
    head_size: int
    ffn_width: int
    mix_rank: int | None
    decay_rank: int | None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    keeps_first_blend: bool = False

    @property
    def num_heads(self) -> int:
        return self.width // self.head_size

    @property
    def num_parameters(self) -> int:
        """Returns the number of weights, without an initial state, by the closed forms of the architecture."""
        layers, width = self.num_layers, self.width
        ends = 4 * width
        if self.version == 7:
            assert self.decay_rank and self.rate_rank and self.value_rank and self.gate_rank
            ranks = self.decay_rank + self.rate_rank + self.value_rank + self.gate_rank
            small = layers * (19 + 2 * ranks) * width
            unused = 0 if self.keeps_first_blend else (1 + 2 * self.value_rank) * width
            return self.matrix_parameters + small + ends - unused
        small = 14 * width
        if self.version == 6:
            assert self.mix_rank is not None and self.decay_rank is not None
            small = (16 + 10 * self.mix_rank + 2 * self.decay_rank) * width
        return self.matrix_parameters + layers * small + ends

    @property
    def block_matrix_parameters(self) -> int:
        """Returns the number of weights in the matrices of all blocks, which `model.frozen_dtype` quantizes."""
        squares = 4 if self.version == 7 else 6
        return self.num_layers * (squares * self.width * self.width + 2 * self.width * self.ffn_width)

    @property
    def matrix_parameters(self) -> int:
        """Returns the same with the embedding and the head, which `optimizer.weights` holds in bf16."""
        return self.block_matrix_parameters + 2 * self.vocab_size * self.width

    @property
    def state_elements(self) -> int:
        """Returns how many numbers one lane's state has: matrices and both shift vectors of every layer."""
        return self.num_layers * (self.width * self.head_size + 2 * self.width)


NAMES = {5: "Eagle", 6: "Finch", 7: "Goose"}
RANKS: dict[int, tuple[str, ...]] = {
    5: (),
    6: ("mix_rank", "decay_rank"),
    7: ("decay_rank", "rate_rank", "value_rank", "gate_rank"),
}
"""Version -> the ranks that it has."""


# Eleven parameters: the sizes that a configuration or a file may give.
def make_sizes(
    *,
    version: int,
    num_layers: int,
    width: int,
    vocab_size: int = 65536,
    head_size: int = 64,
    ffn_width: int | None = None,
    mix_rank: int | None = None,
    decay_rank: int | None = None,
    rate_rank: int | None = None,
    value_rank: int | None = None,
    gate_rank: int | None = None,
) -> Sizes:
    """Fills in the sizes that the official models derive: F = 3.5 D (Goose: 4 D), and the ranks.

    Raises InputError if the sizes do not make a model.
    """
    if version not in NAMES:
        known = ", ".join(f"{number} is RWKV-{number} ({name})" for number, name in NAMES.items())
        raise InputError(f"version: {version!r} is not known; {known}")
    positive = {"num_layers": num_layers, "width": width, "vocab_size": vocab_size, "head_size": head_size}
    ranks = {
        "mix_rank": mix_rank,
        "decay_rank": decay_rank,
        "rate_rank": rate_rank,
        "value_rank": value_rank,
        "gate_rank": gate_rank,
    }
    optional = {"ffn_width": ffn_width, **ranks}
    for name, value in (positive | {k: v for k, v in optional.items() if v is not None}).items():
        if value < 1:
            raise InputError(f"{name}: {value} is not a size; give a positive number")
    if width % head_size:
        near = -(-width // head_size) * head_size
        raise InputError(f"width: {width} is not a multiple of head_size {head_size}; {near} would work")
    for name, rank in ranks.items():
        if rank and name not in RANKS[version]:
            having = " and ".join(str(other) for other, its in RANKS.items() if name in its)
            raise InputError(f"{name}: only version {having} has it; leave it out")
    ranks |= {name: ranks[name] or _usual_rank(name, version, width) for name in RANKS[version]}
    ffn_width = ffn_width or (4 * width if version == 7 else int(3.5 * width) // 32 * 32 or 32)
    mix, decay, rate, of_value, gate = ranks.values()
    return Sizes(version, num_layers, width, vocab_size, head_size, ffn_width, mix, decay, rate, of_value, gate)


def _usual_rank(name: str, version: int, width: int) -> int:
    """Returns the rank that official code gives new models of this width; those of published Gooses differ."""
    if version == 6:
        return {"mix_rank": 32, "decay_rank": 64}[name] * (2 if width >= 4096 else 1)
    factor = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5}[name]
    return max(32, 32 * round(factor * width**0.5 / 32))


def describe(sizes: Sizes) -> str:
    """Returns one line for people: Finch, 3,099,863,040 parameters, 32 layers of width 2560."""
    return (
        f"{NAMES[sizes.version]}, {sizes.num_parameters:,} parameters, {sizes.num_layers} layers of width {sizes.width}"
    )


def _goose(num_layers: int, width: int, ranks: tuple[int, int, int, int]) -> Sizes:
    return make_sizes(version=7, num_layers=num_layers, width=width, **dict(zip(RANKS[7], ranks, strict=True)))


PUBLISHED_SIZES = {
    "eagle-0.4b": make_sizes(version=5, num_layers=24, width=1024),
    "eagle-1.5b": make_sizes(version=5, num_layers=24, width=2048),
    "eagle-3b": make_sizes(version=5, num_layers=32, width=2560),
    "eagle-7b": make_sizes(version=5, num_layers=32, width=4096),
    "finch-1.6b": make_sizes(version=6, num_layers=24, width=2048),
    "finch-3b": make_sizes(version=6, num_layers=32, width=2560),
    "finch-7b": make_sizes(version=6, num_layers=32, width=4096),
    "finch-14b": make_sizes(version=6, num_layers=61, width=4096),
    "goose-0.1b": _goose(12, 768, (64, 64, 32, 128)),
    "goose-0.4b": _goose(24, 1024, (64, 64, 32, 128)),
    "goose-1.5b": _goose(24, 2048, (96, 96, 64, 256)),
    "goose-2.9b": _goose(32, 2560, (96, 96, 64, 320)),
    "goose-7.2b": _goose(32, 4096, (128, 128, 96, 480)),
    "goose-13.3b": _goose(61, 4096, (192, 192, 128, 384)),
}
"""Sizes of the published models; the sizes of a file are read from the file, never from this table."""


def published_sizes(name: str, place: str = "") -> Sizes:
    """Returns the sizes of a published model; raises InputError, which begins with `place`, with the known names."""
    if name not in PUBLISHED_SIZES:
        raise InputError(
            f"{place}no published model is called {quoted(repr(name))}; choose one of these:",
            *(", ".join(names) for _, names in groupby(PUBLISHED_SIZES, lambda name: name.partition("-")[0])),
        )
    return PUBLISHED_SIZES[name]

"""Sizes of a model: those of a configuration or a weights file in, all of them out; the published models by name."""

from __future__ import annotations

from dataclasses import dataclass

from infctx.errors import InputError
from infctx.small_texts import quoted


@dataclass(frozen=True)
class Sizes:
    """Everything that fixes the shapes of a model.

    version: 5 for RWKV-5.2 (Eagle), 6 for RWKV-6 (Finch)
    mix_rank, decay_rank: ranks of the two low-rank products of Finch, None for Eagle
    """

    version: int
    num_layers: int
    width: int
    vocab_size: int
    head_size: int
    ffn_width: int
    mix_rank: int | None
    decay_rank: int | None

    @property
    def num_heads(self) -> int:
        return self.width // self.head_size

    @property
    def num_parameters(self) -> int:
        """Returns the number of weights, without an initial state, by the closed forms of the architecture."""
        layers, width = self.num_layers, self.width
        matrices = 6 * width * width + 2 * width * self.ffn_width
        small = 14 * width
        if self.version == 6:
            assert self.mix_rank is not None and self.decay_rank is not None
            small = (16 + 10 * self.mix_rank + 2 * self.decay_rank) * width
        return layers * (matrices + small) + 4 * width + 2 * self.vocab_size * width

    @property
    def state_elements(self) -> int:
        """Returns how many numbers one lane's state has: matrices and both shift vectors of every layer."""
        return self.num_layers * (self.width * self.head_size + 2 * self.width)


# Eight parameters: the sizes that a configuration or a file may give.
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
) -> Sizes:
    """Fills in the sizes that the official models derive: F = 3.5 D, and the ranks of Finch.

    Raises InputError if the sizes do not make a model.
    """
    if version not in (5, 6):
        raise InputError(f"version: {version!r} is not known; 5 is RWKV-5 (Eagle), 6 is RWKV-6 (Finch)")
    positive = {"num_layers": num_layers, "width": width, "vocab_size": vocab_size, "head_size": head_size}
    optional = {"ffn_width": ffn_width, "mix_rank": mix_rank, "decay_rank": decay_rank}
    for name, value in (positive | {k: v for k, v in optional.items() if v is not None}).items():
        if value < 1:
            raise InputError(f"{name}: {value} is not a size; give a positive number")
    if width % head_size:
        near = -(-width // head_size) * head_size
        raise InputError(f"width: {width} is not a multiple of head_size {head_size}; {near} would work")
    if version == 5 and (mix_rank or decay_rank):
        raise InputError("mix_rank, decay_rank: only version 6 has them; leave them out")
    if version == 6:
        mix_rank = mix_rank or (64 if width >= 4096 else 32)
        decay_rank = decay_rank or (128 if width >= 4096 else 64)
    ffn_width = ffn_width or int(3.5 * width) // 32 * 32 or 32
    return Sizes(version, num_layers, width, vocab_size, head_size, ffn_width, mix_rank, decay_rank)


def describe(sizes: Sizes) -> str:
    """Returns one line for people: Finch, 3,099,863,040 parameters, 32 layers of width 2560."""
    name = {5: "Eagle", 6: "Finch"}[sizes.version]
    return f"{name}, {sizes.num_parameters:,} parameters, {sizes.num_layers} layers of width {sizes.width}"


PUBLISHED_SIZES = {
    "eagle-0.4b": make_sizes(version=5, num_layers=24, width=1024),
    "eagle-1.5b": make_sizes(version=5, num_layers=24, width=2048),
    "eagle-3b": make_sizes(version=5, num_layers=32, width=2560),
    "eagle-7b": make_sizes(version=5, num_layers=32, width=4096),
    "finch-1.6b": make_sizes(version=6, num_layers=24, width=2048),
    "finch-3b": make_sizes(version=6, num_layers=32, width=2560),
    "finch-7b": make_sizes(version=6, num_layers=32, width=4096),
    "finch-14b": make_sizes(version=6, num_layers=61, width=4096),
}
"""Sizes of the published models; the sizes of a file are read from the file, never from this table."""


def published_sizes(name: str, place: str = "") -> Sizes:
    """Returns the sizes of a published model; raises InputError, which begins with `place`, with the known names."""
    if name not in PUBLISHED_SIZES:
        raise InputError(
            f"{place}no published model is called {quoted(repr(name))}; choose one of these:",
            ", ".join(PUBLISHED_SIZES),
        )
    return PUBLISHED_SIZES[name]

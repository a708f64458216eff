"""What a benchmark measures: cases, each a model, a window and a way of training it.

In: lists of versions, vocabularies, windows and modes; out: one case for each combination.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from infctx.errors import InputError
from infctx.model.sizes import NAMES, PUBLISHED_SIZES, make_sizes, published_sizes

MODES = {
    "exact": "all weights learn, the gradient of the whole window",
    "truncated": "all weights learn, the gradient is cut at every segment",
    "tune": "the initial state learns, exact",
    "adapter": "a LoRA of rank 16 learns, exact",
    "op": "the WKV op alone, as often as a truncated step runs it",
}
"""The ways of training, and what each of them is."""

GPU_SIZES = ("finch-3b", "goose-2.9b")
GPU_WINDOWS = (16384, 65536, 262144, 1048576)


class Case(NamedTuple):
    """One line of the table.  The worker gets it as JSON, so all fields are plain."""

    sizes: dict[str, Any]
    """A published size as {"name": ...}, or the sizes themselves; as `infctx.build_model` takes them."""
    window_tokens: int
    segment_tokens: int
    mode: str
    precision: str
    threads: int
    device: str

    @property
    def model(self) -> str:
        """Names the model: finch-3b, or Finch 6 x 384."""
        sizes = self.sizes
        return sizes.get("name") or f"{NAMES[sizes['version']]} {sizes['num_layers']} x {sizes['width']}"

    @property
    def vocab_size(self) -> int:
        return published_sizes(self.sizes["name"]).vocab_size if "name" in self.sizes else self.sizes["vocab_size"]

    @property
    def recomputes_blocks(self) -> bool:
        """Large models keep only the inputs of their blocks, as their configurations do."""
        return "name" in self.sizes


class Choices(NamedTuple):
    """What the command's options name; each combination is a case."""

    names: Sequence[str]
    versions: Sequence[int]
    layers: int
    width: int
    vocab_sizes: Sequence[int]
    windows: Sequence[int]
    segment_tokens: int
    modes: Sequence[str]
    precisions: Sequence[str]
    threads: Sequence[int]
    device: str


def make_groups(choices: Choices) -> list[list[Case]]:
    """Returns the cases in groups that differ only in their mode: these are measured in turn, and compared.

    Raises InputError for sizes that make no model.
    """
    groups = []
    for sizes, window, precision, threads in itertools.product(
        _models(choices), choices.windows, choices.precisions, choices.threads
    ):
        segment = min(choices.segment_tokens, window)
        groups.append(
            [Case(sizes, window, segment, mode, precision, threads, choices.device) for mode in choices.modes]
        )
    return groups


def _models(choices: Choices) -> list[dict[str, Any]]:
    for name in choices.names:
        if name not in PUBLISHED_SIZES:
            raise InputError(f"bench --size {name}: there is no such size; docs/models.md lists them")
    if choices.names:
        return [{"name": name} for name in choices.names]
    models = []
    for version, vocab_size in itertools.product(choices.versions, choices.vocab_sizes):
        sizes = {
            "version": version,
            "num_layers": choices.layers,
            "width": choices.width,
            "vocab_size": vocab_size,
        }
        try:
            make_sizes(**sizes)
        except InputError as error:
            raise InputError(f"bench: {error}") from None
        models.append(sizes)
    return models

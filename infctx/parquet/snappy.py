"""Snappy without its whole text in memory: compressed blocks in; decompressed bytes into an array out.

Source: format_description.txt of google/snappy. A text is its length, then literals and copies of what came before. A
copy may reach back to the beginning, so the array holds the whole text; it is a mapped file, whose pages come and go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DONE, DAMAGED = 0, 1
Kernel = Callable[[Any, Any, Any], int]


def decompress_snappy(blocks: Iterator[bytes], target: np.ndarray) -> Iterator[int]:
    """Fills `target`, uint8, with the decompressed bytes; yields how many there are so far, after each block.

    Raises ValueError if they are not exactly as many as fit.
    """
    kernel = _compiled()
    progress = np.zeros(2, np.int64)  # bytes written, and bytes of a literal that are still to come
    rest, length = b"", -1
    for block in blocks:
        rest += block
        if length < 0:
            length, begin = _length(rest)
            rest = rest[begin:]
            if length not in (-1, len(target)):
                raise ValueError("the length of a compressed page is not what its header says")
        source = np.frombuffer(rest, np.uint8)
        taken = kernel(source, target, progress)
        if taken < 0:
            raise ValueError("the compressed bytes of a page are damaged")
        rest = rest[taken:]
        yield int(progress[0])
    if rest or progress[0] != len(target) or progress[1]:
        raise ValueError("the compressed bytes of a page end too early")


def _length(head: bytes) -> tuple[int, int]:
    """Returns the length of the text and how many bytes say so; -1 and 0 if they are not all there yet."""
    length = 0
    for place, byte in enumerate(head[:5]):
        length |= (byte & 127) << (7 * place)
        if byte < 128:
            return length, place + 1
    if len(head) >= 5:
        raise ValueError("the length of a compressed page is damaged")
    return -1, 0


@functools.cache
def _compiled() -> Kernel:
    from numba import njit, types  # it takes a second to load, and few files need it

    signature = types.int64(types.Array(types.uint8, 1, "C", readonly=True), types.uint8[::1], types.int64[::1])
    try:
        return njit(signature, nogil=True, cache=True)(_expand)
    except (RuntimeError, OSError):  # no place to write a cache to
        return njit(signature, nogil=True)(_expand)


def _expand(source, target, progress):
    """Expands as much as it can; returns how many bytes of `source` it took, -1 for damaged ones."""
    place, taken, literal = progress[0], 0, progress[1]
    while True:
        if literal > 0:
            count = min(literal, len(source) - taken)
            if count > len(target) - place:
                return -1
            target[place : place + count] = source[taken : taken + count]
            place, taken, literal = place + count, taken + count, literal - count
        if literal > 0 or taken == len(source):
            break
        tag = np.int64(source[taken])
        kind, size = tag & 3, tag >> 2
        more = max(size - 59, 0) if kind == 0 else 1 << (kind - 1)
        if taken + 1 + more > len(source):
            break
        number = np.int64(0)
        for i in range(more):
            number |= np.int64(source[taken + 1 + i]) << (8 * i)
        taken += 1 + more
        if kind == 0:
            literal = (number if more else size) + 1
            continue
        if kind == 1:
            count, back = (size & 7) + 4, (size >> 3) << 8 | number
        else:
            count, back = size + 1, number
        if back == 0 or back > place or count > len(target) - place:
            return -1
        for i in range(place, place + count):  # one by one: a copy may reach into itself
            target[i] = target[i - back]
        place += count
    progress[0], progress[1] = place, literal
    return taken

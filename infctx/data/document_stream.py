"""The endless order of documents: a stream index in, the number of a document in the store out.

Stream index i belongs to epoch i // n. Within an epoch, every document comes exactly once, in an order that depends on
the seed and the epoch alone. It is computed one index at a time, so a store of 1e8 documents takes no memory and no
time to start.

How 0..n-1 are permuted (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): with a = ceil(sqrt(n)), a
number x < a*a is a pair (left, right) of digits in base a. Eight Feistel rounds
(left, right) -> (right, (left + F(right, key of the round)) mod a) can be inverted whatever F is, so they permute
0..a*a-1. A result >= n goes through the rounds again until it is below n (cycle walking), which permutes 0..n-1.
F is the finalizer of SplitMix64; the round keys are the BLAKE2b digest of seed and epoch.
"""

import hashlib
import math
import struct

NUM_ROUNDS = 8
MASK64 = (1 << 64) - 1


class DocumentStream:
    """Documents 0..num_documents-1 over and over, shuffled anew in each epoch (or in order, with shuffle=False)."""

    def __init__(self, num_documents: int, seed: int, shuffle: bool = True) -> None:
        if num_documents < 1:
            raise ValueError(f"a stream needs at least one document, not {num_documents}")
        self.num_documents = num_documents
        self.seed = seed
        self.shuffle = shuffle
        self._side = math.isqrt(num_documents - 1) + 1
        self._keys: tuple[int, tuple[int, ...]] = (-1, ())

    def epoch(self, i: int) -> int:
        """Returns the epoch of stream index i."""
        return i // self.num_documents

    def document(self, i: int) -> int:
        """Returns the document at stream index i >= 0."""
        epoch, place = divmod(i, self.num_documents)
        if not self.shuffle:
            return place
        if self._keys[0] != epoch:
            self._keys = (epoch, _round_keys(self.seed, epoch))
        place = self._permute(place)
        while place >= self.num_documents:
            place = self._permute(place)
        return place

    def _permute(self, x: int) -> int:
        left, right = divmod(x, self._side)
        for key in self._keys[1]:
            left, right = right, (left + _mix(right, key)) % self._side
        return left * self._side + right


def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * NUM_ROUNDS).digest()
    return struct.unpack(f"<{NUM_ROUNDS}Q", digest)


def _mix(x: int, key: int) -> int:
    z = (x + key) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)

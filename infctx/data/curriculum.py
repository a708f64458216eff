"""A curriculum of lengths: the number of a step in; the most tokens that a document may have in it out."""

from typing import NamedTuple


class Curriculum(NamedTuple):
    """Documents are cut at from_tokens in the first step, at to_tokens in the last of `steps`, and never after it.

    In between, the limit grows by `unit_tokens` at a time, and each length lasts equally long.  All lengths are
    multiples of unit_tokens, which is a multiple of 16.
    """

    from_tokens: int
    to_tokens: int
    steps: int
    unit_tokens: int

    def limit(self, step: int) -> int | None:
        """Returns the most tokens of a document that begins in a step (counted from 0); None for no limit."""
        if step >= self.steps:
            return None
        lengths = (self.to_tokens - self.from_tokens) // self.unit_tokens + 1
        return self.from_tokens + self.unit_tokens * (lengths * step // self.steps)

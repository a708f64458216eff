"""Settings of the window: the tokens of a step, and how many are in memory at once."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from infctx.settings.section import Positive, Section, refuse


class WindowSettings(Section):
    """How many tokens make up a step, and how many of them are in memory at the same time."""

    segment_tokens: Positive
    """Tokens of a lane whose activations are in memory together, a multiple of 16 (for each of `time_ranks`).  Memory
    grows in proportion; the gradient stays the same.  Short segments leave a GPU idle: 1,024 to 4,096 is typical."""
    window_tokens: Positive
    """Tokens of a lane in one optimizer step, a multiple of `segment_tokens`.  Within a window the gradient is exact
    across all segments; each segment keeps one more state in memory (see `seam_store`).  Longer documents continue in
    the next window from their state, with no gradient back across the boundary."""
    gradient_segments: Positive | None = None
    """Segments that a gradient flows through before it is cut.  null: the whole window, which is exact.  1: cut at
    every segment (truncated): faster, because nothing is computed twice, but learns less from far back."""
    lanes: Positive = 1
    """Rows of the batch across all devices; each holds documents end to end.  A step trains on `lanes` times
    `window_tokens` tokens."""
    lanes_per_pass: Positive | None = None
    """Lanes that a device computes together; null: all of them.  Fewer need less memory and give the same gradient,
    added up pass by pass."""
    carry: Literal["document", "lane"] = "document"
    """What a document starts from.  `document`: the initial state, so that documents know nothing of each other.
    `lane`: the last state of the document before it in its lane, padding included, with no gradient back into that
    document.  Models that only ever started from the initial state get worse far beyond the lengths they were trained
    on; some hundred steps with `lane` repair that (arXiv 2507.02782).  The first document of a lane starts from the
    initial state, which does not learn.  Costs a call of the WKV op and a kept state for each start: on a CPU 5% more
    time with documents of 300 tokens, 16% with 64 (six layers of width 384, one lane)."""
    seam_store: Literal["auto", "device", "host"] = "auto"
    """Where to keep the states between segments.  `device`: in the device's memory; `host`: in main memory, copied
    while the GPU computes; `auto`: `host` for a GPU.  A state of Finch 3B is 21.6 MB per lane."""

    @property
    def window_segments(self) -> int:
        return self.window_tokens // self.segment_tokens

    @model_validator(mode="after")
    def _fits(self) -> WindowSettings:
        problems = []
        if self.segment_tokens % 16:
            near = max(16, round(self.segment_tokens / 16) * 16)
            problems.append(f"segment_tokens: {self.segment_tokens} is not a multiple of 16; {near} would work")
        elif self.window_tokens % self.segment_tokens:
            near = max(1, round(self.window_tokens / self.segment_tokens)) * self.segment_tokens
            problems.append(
                f"window_tokens: {self.window_tokens} is not a multiple of segment_tokens {self.segment_tokens}; "
                f"{near} would work"
            )
        if self.gradient_segments and self.gradient_segments > max(self.window_segments, 1):
            problems.append(
                f"gradient_segments: {self.gradient_segments} is more than the {self.window_segments} segments of a "
                "window; null means all of them"
            )
        if self.lanes % (self.lanes_per_pass or 1):
            problems.append(f"lanes_per_pass: {self.lanes_per_pass} does not divide the {self.lanes} lanes; try 1")
        return refuse(self, problems)

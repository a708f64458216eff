"""Replays the loops of a kernel's machine code: instructions a chunk of 16 tokens, and how many cycles they take.

What goes in is nvdisasm's text with encodings, what comes out is a `Estimate` of a kernel.  It is how kernels are
judged while no GPU is at hand, and no measurement: it knows the compiler's own control codes (how long an instruction
holds its warp up, and which of six scoreboards it sets and waits for), the width of the pipes and assumed latencies.
It does not know the instruction cache, queues of the memory, and the clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# Cycles until a result is there, of instructions that set a scoreboard; assumed, for an H100.
LATENCIES = {"LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 22, "LDG": 600, "LD": 600, "LDGSTS": 600, "LDC": 40, "S2R": 30}
OTHER_LATENCY = 22
READ_LATENCY = 15  # until an instruction has read its operands
BARRIER_LATENCY = 20  # once all have met

# Cycles that a warp's instruction takes of a pipe of one scheduler; shared memory serves four schedulers.
WIDTHS = {"tensor": 6.4, "special": 8.0, "float": 1.0, "integer": 2.0, "shared": 4.0, "memory": 4.0, "other": 1.0}
KINDS = {
    "tensor": ("HMMA",),
    "float": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP"),
    "special": ("MUFU", "I2F", "F2I", "F2F", "SHFL"),
    "shared": ("LDS", "LDSM", "STS"),
    "memory": ("LDG", "LD", "STG", "ST", "LDGSTS"),
    "integer": ("IADD", "IADD3", "IMAD", "LOP3", "LEA", "SHF", "ISETP", "SEL", "MOV", "PRMT", "VIADD", "F2FP", "IABS"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


@dataclass
class Instruction:
    address: int
    guard: str
    name: str
    operands: str
    control: int
    target: int | None = None

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def kind(self) -> str:
        return KIND_OF.get(self.opcode, "other")

    stall = property(lambda self: self.control & 15)
    write_board = property(lambda self: self.control >> 5 & 7)
    read_board = property(lambda self: self.control >> 8 & 7)
    waits = property(lambda self: self.control >> 11 & 63)

    @property
    def is_barrier(self) -> bool:
        """Of the whole block.  That of one role is met by its warps on the other schedulers at the same time."""
        return self.opcode == "BAR" and re.search(r"0x(?!0\b)\w+, ", self.operands) is None


def parse(text: str) -> dict[str, list[Instruction]]:
    """Returns each kernel's instructions from `nvdisasm --print-code --print-instruction-encoding`."""
    sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)
    return {name: _instructions(body) for name, body in zip(sections[1::2], sections[2::2], strict=True)}


def _instructions(body: str) -> list[Instruction]:
    first = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s+/\* 0x[0-9a-f]+ \*/")
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"^(\S+):$", line):
            labels[label[1]] = len(found)
        elif begin := first.match(line):
            found.append(Instruction(int(begin[1], 16), (begin[2] or "").strip(), begin[3], begin[4], 0))
        elif (rest := re.match(r"^\s+/\* 0x([0-9a-f]+) \*/", line)) and found:
            found[-1].control = int(rest[1], 16) >> 41 & 0x1FFFFF
    for one in found:
        if one.opcode == "BRA" and (label := re.search(r"`\((\S+)\)", one.operands)):
            one.target = labels.get(label[1])
    return found


# ---- the instructions of a turn ----


Loop = tuple[int, int]


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    """Returns loops as (first, last) positions, outer before inner.

    A jump back without a condition also ends code that comes after the kernel's exit, and is no loop there.
    """
    end = max((i for i, one in enumerate(code) if one.opcode == "EXIT"), default=len(code))
    found = [(one.target, i) for i, one in enumerate(code[:end]) if one.target is not None and one.target < i]
    return sorted(found, key=lambda loop: (loop[0], -loop[1]))


@dataclass(frozen=True)
class Turn:
    """What runs in a turn of a loop, besides what always does.

    trips:     how often a loop with matrix products inside it runs; other inner loops run once
    has_part:  whether a part with many matrix products or exponentials runs, that a branch may pass over
    has_state: whether a part that loads a state runs
    has_loads: whether a part that loads a chunk's vectors runs
    """

    trips: int = 1
    has_part: bool = True
    has_state: bool = True
    has_loads: bool = True


def turn(code: Sequence[Instruction], loop: Loop, what: Turn | None = None) -> list[int]:
    """Returns the positions that run in one turn of a loop; all of it, inner loops once, without `what`.

    A part that runs where a document starts, after a branch on a byte just loaded, is passed over.
    """
    inner = [each for each in loops_of(code) if loop[0] < each[0] and each[1] < loop[1]]
    inner = [each for each in inner if any(code[i].kind == "tensor" for i in range(each[0], each[1]))]
    left = dict.fromkeys(inner, what.trips if what else 1)
    ends = {each[1]: each for each in inner}
    path: list[int] = []
    i = loop[0]
    while i <= loop[1]:
        path.append(i)
        one = code[i]
        if one.target is None or one.name != "BRA" or i == loop[1]:
            i += 1
        elif one.target > i:
            i = one.target if not one.guard or _passes(code, i, loop, inner, what) else i + 1
        elif i in ends and left[ends[i]] > 1:
            left[ends[i]] -= 1
            i = one.target
        else:
            i += 1
    return path


def _passes(code: Sequence[Instruction], branch: int, loop: Loop, inner: Sequence[Loop], what: Turn | None) -> bool:
    """Returns whether a branch forward is taken."""
    part = code[branch : code[branch].target]
    if what is None or _is_document(code, branch):
        return _is_document(code, branch)
    if 2 * len(part) >= loop[1] - loop[0] or any(one.is_barrier for one in part):
        return False
    around = [each for each in inner if branch < each[0] and each[1] < branch + len(part)]
    if around and len(part) < 2 * (around[0][1] - around[0][0]):
        return what.trips == 0
    if _is_busy(part) and not around:
        return not what.has_part
    last = part[-1]
    if last.name == "BRA" and not last.guard and _is_busy(code[branch + len(part) : last.target]):
        return what.has_part  # this one is the other part of an if and else
    loads = sum(one.opcode == "LDG" for one in part)
    if loads >= 8 and not around:
        return not (what.has_state if loads >= 16 else what.has_loads)
    return False


def _is_busy(part: Sequence[Instruction]) -> bool:
    return sum(one.kind == "tensor" for one in part) >= 16 or sum(one.opcode == "MUFU" for one in part) >= 8


def _is_document(code: Sequence[Instruction], branch: int) -> bool:
    predicate = code[branch].guard.lstrip("@!")
    for i in range(branch - 1, max(0, branch - 150), -1):
        if code[i].opcode.endswith("SETP") and code[i].operands.split(", ")[0] == predicate:
            register = code[i].operands.split(", ")[2].split(".")[0]
            makers = [one for one in code[max(0, i - 150) : i] if one.operands.split(", ")[0] == register]
            # A byte, or the truth of one: 0x9910 extends it.
            return bool(makers) and (".U8" in makers[-1].name or "0x9910" in makers[-1].operands)
    return False


# ---- replay ----


@dataclass
class Warp:
    """A warp that goes through a path again and again."""

    code: Sequence[Instruction]
    path: Sequence[int]
    at: int = 0
    ready: float = 0.0
    issued: float = 0.0
    turns: int = 0
    waits_at_barrier: bool = False
    boards: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    copies: float = 0.0

    @property
    def next(self) -> Instruction:
        return self.code[self.path[self.at]]

    def may_issue(self) -> float:
        """Returns the first cycle in which its scoreboards let the next instruction go."""
        one, when = self.next, self.ready
        for number, ends in enumerate(self.boards):
            if one.waits >> number & 1 and ends:
                when = max(when, *ends)
        if one.opcode == "DEPBAR" and (match := re.match(r"SB(\d), 0x(\w+)", one.operands)):
            ends = sorted(self.boards[int(match[1])])
            allowed = int(match[2], 16)
            if len(ends) > allowed:
                when = max(when, ends[-1 - allowed])
        return when

    def issue(self, now: float) -> None:
        one, self.issued = self.next, now
        self.boards = [[end for end in ends if end > now] for ends in self.boards]
        latency = LATENCIES.get(one.opcode, OTHER_LATENCY)
        if one.opcode == "LDGSTS":
            self.copies = now + latency
        if one.write_board < 6:
            self.boards[one.write_board].append(self.copies if one.opcode == "LDGDEPBAR" else now + latency)
        if one.read_board < 6:
            self.boards[one.read_board].append(now + READ_LATENCY)
        self.ready = now + max(1, one.stall, BARRIER_LATENCY if one.opcode == "BAR" else 0)
        self.at += 1
        if self.at == len(self.path):
            self.at, self.turns = 0, self.turns + 1


def replay(blocks: Sequence[Sequence[Warp]], turns: int = 12) -> float:
    """Returns the cycles of a turn, on a scheduler that has these warps of these blocks."""
    warps = [warp for block in blocks for warp in block]
    pipes = dict.fromkeys(WIDTHS, 0.0)
    now = 0.0
    marks: dict[int, float] = {}
    while min(warp.turns for warp in warps) < turns:
        for block in blocks:  # a barrier opens when all warps of the block are there
            if all(warp.next.is_barrier and warp.may_issue() <= now for warp in block):
                for warp in block:
                    warp.issue(now)
        # Of those that may issue, the one that has not for longest.
        candidates = [
            (max(now, warp.may_issue(), pipes[warp.next.kind]), warp.issued, i)
            for i, warp in enumerate(warps)
            if not warp.next.is_barrier
        ]
        times = [when for when, _, _ in candidates]
        times += [max(warp.may_issue() for warp in block) for block in blocks if all(w.next.is_barrier for w in block)]
        now = max(now, min(times))
        if candidates and min(candidates)[0] <= now:
            warp = warps[min(candidates)[2]]
            pipes[warp.next.kind] = now + WIDTHS[warp.next.kind]
            warp.issue(now)
            now += 1
        marks.setdefault(min(warp.turns for warp in warps), now)
    return (marks[turns] - marks[turns // 3]) / (turns - turns // 3)


# ---- a kernel ----


@dataclass
class Estimate:
    """A kernel's figures for a chunk: instructions of each role's warp by kind, and cycles by blocks on a processor."""

    instructions: list[dict[str, float]]
    issue_cycles: float
    cycles: dict[int, float]


def estimate(code: Sequence[Instruction], tile_chunks: int, most_blocks: int, slab_warps: int) -> Estimate | None:
    """Replays a kernel's outer loops with barriers, each by one warp of a scheduler; None if it has no such loop.

    tile_chunks: chunks of a tile, which roles go through from last to first: the state before an odd one is found from
                 that before the tile; a role's part with many products is one warp's by turns.  A turn of a loop
                 without roles is one chunk
    most_blocks: that fit on a processor
    slab_warps:  warps of a role; above 64 channels' 4 a scheduler would have more
    """
    loops = loops_of(code)
    outer = [loop for loop in loops if any(code[i].is_barrier for i in range(loop[0], loop[1]))]
    outer = [loop for loop in outer if not any(a < loop[0] and loop[1] < b for a, b in outer)]
    if not outer:
        return None
    if len(outer) == 1:
        tile_chunks = 1
    paths: list[list[int]] = [[] for _ in outer]
    for chunk in reversed(range(tile_chunks)):
        for loop, path in zip(outer, paths, strict=True):
            names = {code[i].opcode for i in range(*loop)}
            if "LDGSTS" in names:  # copies, and finds dscores: each warp those of one chunk
                has_part = has_loads = chunk % slab_warps == 0
            elif "CCTL" in names:  # prefetches, and walks through the tile before
                has_part = has_loads = chunk < 2 < tile_chunks
            else:  # loads in one turn what it needs in the next
                has_part, has_loads = chunk % 2 == 1, chunk % 2 == 0
            what = Turn(1, has_part, chunk == 2 % tile_chunks, has_loads)
            path += turn(code, loop, what if len(outer) > 1 else None)
    counts = [dict.fromkeys(WIDTHS, 0.0) for _ in paths]
    for count, path in zip(counts, paths, strict=True):
        for i in path:
            count[code[i].kind] += 1 / tile_chunks
    share = slab_warps / 4
    cycles = {}
    for blocks in range(1, most_blocks + 1):
        there = [[Warp(code, path) for path in paths] for _ in range(blocks)]
        cycles[blocks] = replay(there, turns=12 // tile_chunks) / tile_chunks
    return Estimate(counts, share * sum(sum(count.values()) for count in counts), cycles)

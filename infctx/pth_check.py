"""Checks a .pth from outside before torch opens it: the path in, InputError for a file that torch would choke on.

torch runs no code from a file (weights_only), but a few bytes can keep its loader busy forever, and it allocates
whatever a file claims to hold.  This check reads the container and the pickle's opcodes and builds nothing.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from infctx.errors import InputError
from infctx.small_texts import quoted

MOST_PICKLE_BYTES = 1 << 23
"""Limit for the list of tensors; a model of 61 layers has 240 kB."""
MOST_IN_TUPLE = 64
"""Values in a tuple, including the tuples in it; a tensor's arguments are about fifteen."""
LARGEST_INTEGER = 1 << 63
ZIP_MAGIC = b"PK\x03\x04"
TOO_MUCH = "its pickle holds {}, which no file of weights needs; save the weights alone, as a dict of tensors"


def refuse_odd_pth(path: Path) -> None:
    """Raises InputError for a file that is not a .pth, is cut short, or claims more than weights need."""
    status = path.stat()
    problem = _find_problem(path, status.st_size, status.st_mtime_ns)
    if problem is not None:
        raise InputError(f"{path}: {problem}")


def is_zip(path: Path) -> bool:
    """Returns whether a file begins like a zip, torch's container since 1.6, even if it is cut short."""
    with path.open("rb") as file:
        return ZIP_MAGIC.startswith(file.read(4))


@lru_cache(maxsize=64)  # a file is opened again for every few tensors
def _find_problem(path: Path, num_bytes: int, _changed: int) -> str | None:
    if is_zip(path):
        return _zip_problem(path, num_bytes)
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MOST_PICKLE_BYTES + 1))
    text = _text_at(head.getvalue()[:60])
    if text is not None:
        return f'not a .pth of weights: it begins with the text "{quoted(text, 40)}"; name a weights file'
    if head.getvalue()[:1] != b"\x80":  # PROTO, which every pickle of torch begins with
        return "not a whole .pth or .safetensors file; copy it again, or name a weights file"
    for _ in range(5):  # magic number, version, system, tensors, storage keys; then come the values
        problem = _pickle_problem(head)
        if problem is not None or head.tell() == num_bytes:
            return problem
    return None


def _text_at(head: bytes) -> str | None:
    """Returns the first line if the first bytes are text."""
    try:
        text = head.decode("utf-8", "strict" if len(head) < 60 else "ignore").strip()
    except UnicodeDecodeError:
        return None
    is_text = text.isascii() and all(letter.isprintable() or letter in "\t\r\n" for letter in text)
    return text.split("\n")[0].strip() if text and is_text else None


def _zip_problem(path: Path, num_bytes: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.lower().split("/")[-1] == "data.pkl"]
            if len(pickles) != 1:
                return f"not a whole .pth file ({len(pickles) or 'no'} data.pkl in it); copy it again"
            for entry in entries:  # torch compresses nothing, so that files can be mapped
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > num_bytes:
                    return f"not a .pth that torch wrote: {quoted(entry.filename)} in it is compressed; copy it again"
            if pickles[0].file_size > MOST_PICKLE_BYTES:
                return f"{TOO_MUCH.format(f'{pickles[0].file_size:,} bytes')}"
            content = archive.read(pickles[0])
    except Exception:  # zipfile raises nearly anything on damaged bytes
        return "not a whole .pth file (its end or its list of parts is damaged); copy it again"
    return _pickle_problem(io.BytesIO(content))


def _pickle_problem(stream: io.BytesIO) -> str | None:
    """Describes the problem of the pickle that begins here, None for none; leaves the stream at its end."""
    try:
        return next(filter(None, _excesses(stream)), None)
    except Exception:  # from pickletools: a cut argument, an unknown opcode, an empty stack
        if stream.tell() > MOST_PICKLE_BYTES:
            return TOO_MUCH.format(f"more than {MOST_PICKLE_BYTES:,} bytes")
        return "not a whole .pth file (the list of its tensors is cut short or damaged); copy it again"


def _excesses(stream: io.BytesIO) -> Iterator[str | None]:
    """Follows the stack of a pickle; each entry is the number of values in a tuple, 0 for anything else.

    Tuples can share their parts, so a few bytes can make one whose hash takes forever to compute.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if "GET" in name:
            stack.append(memo[argument])
        elif "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        else:
            taken = opcode.stack_before
            begin = marks.pop() if pickletools.markobject in taken else len(stack)
            begin -= taken.index(pickletools.markobject) if pickletools.markobject in taken else len(taken)
            if begin < 0:
                raise IndexError
            parts = stack[begin:]
            del stack[begin:]
            size = len(parts) + sum(parts) if "TUPLE" in name else 0
            stack.extend(size for _ in opcode.stack_after)
            if size > MOST_IN_TUPLE:
                yield TOO_MUCH.format("tuples of tuples")
            if isinstance(argument, int) and abs(argument) > LARGEST_INTEGER and name == "LONG1":
                yield None if argument == torch.serialization.MAGIC_NUMBER else TOO_MUCH.format("a huge number")
            if name == "GLOBAL" and str(argument).split(" ")[-1] == "bytearray":
                yield TOO_MUCH.format("a bytearray")

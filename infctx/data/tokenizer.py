"""Tokenizers: text in, token ids (uint16) out, and ids back into bytes.

`world` is the RWKV World vocabulary (65,529 tokens, greedy longest match on UTF-8 bytes); `bytes` has one token per
byte. In both, id 0 ends a document and nothing in a text is encoded as it: U+0000 is id 1.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from infctx.conventions import END_OF_DOCUMENT
from infctx.errors import InputError

TOKENIZER_NAMES = ("world", "bytes")


class Tokenizer(Protocol):
    """The interface of every tokenizer; `encode` never adds the end of document."""

    name: str
    vocab_size: int
    end_of_document: int

    @property
    def byte_lengths(self) -> np.ndarray:
        """Returns the bytes of each id, int64 (vocab_size,); 0 for the end of document and for ids without a token."""

    def encode(self, text: str) -> np.ndarray:
        """Returns a text's ids, uint16 (num_tokens,); InputError for lone surrogates, which UTF-8 cannot hold."""

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields exactly the ids of the joined pieces, in memory bounded by the longest piece."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the bytes of ids, complete UTF-8 or not; none if `byte_lengths` is 0. InputError for ids outside."""


def get_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called `name`: "world" or "bytes". Raises InputError for any other name."""
    if name == "world":
        return _world()
    if name == "bytes":
        return ByteTokenizer()
    raise InputError(f"tokenizer {name!r} is not known; choose one of {', '.join(TOKENIZER_NAMES)}")


def tokenizer_for_vocab(vocab_size: int) -> str | None:
    """Returns the name of the tokenizer that a model with `vocab_size` ids uses; None if none fits."""
    if vocab_size == ByteTokenizer.vocab_size:
        return "bytes"
    # 65,530 is all tokens and the end of document; files in the wild are padded to anything up to 65,536.
    return "world" if 65530 <= vocab_size <= WorldTokenizer.vocab_size else None


def refuse_other_tokenizer(store: str, made_with: str | None, vocab_size: int) -> None:
    """Raises InputError for a store made with another tokenizer than that of a model with `vocab_size` ids.

    store: its name, for the message
    made_with: the tokenizer's name; None if it is not known
    """
    wanted = tokenizer_for_vocab(vocab_size)
    if made_with is not None and wanted not in (None, made_with):
        raise InputError(
            f"{store}: its tokenizer is {made_with}, and the model's is {wanted}; prepare it with "
            f"--tokenizer {wanted}, or name another model"
        )


@cache
def _world() -> Tokenizer:
    """Returns the shared tokenizer: its tables cost 0.3 s and 230 MB."""
    return WorldTokenizer()


class WorldTokenizer:
    """The RWKV World vocabulary: ids 1..65529, size padded to 65,536."""

    name = "world"
    vocab_size = 65536
    end_of_document = END_OF_DOCUMENT
    longest_token = 128  # bytes

    @cached_property
    def _encoder(self) -> Any:
        # Imported here because it takes 0.3 s and 230 MB, which reading a store does not need.
        from pyrwkv_tokenizer import RWKVTokenizer

        return RWKVTokenizer()

    @cached_property
    def _vocabulary(self) -> Path:
        import pyrwkv_tokenizer

        return next(Path(pyrwkv_tokenizer.__file__).parent.glob("rwkv_vocab_*.txt"))

    @cached_property
    def _tokens(self) -> list[bytes]:
        return _read_vocabulary(self._vocabulary, self.vocab_size)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token_id, _, length in _vocabulary_lines(self._vocabulary):  # ten times as fast as reading the tokens
            lengths[int(token_id)] = int(length)
        return lengths

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = self._encoder.encode(text)
        except UnicodeEncodeError as error:
            raise _not_utf8(error) from None
        return np.fromiter(ids, np.uint16, len(ids))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        # A token depends only on the `longest_token` bytes from its start, so one that has them all is final. Those
        # nearer to the end of a piece are taken back and encoded again with the next one, if there is one.
        text = ""
        for piece in pieces:
            if not text:
                text = piece
                continue
            ids = self.encode(text)
            data = text.encode()
            starts = np.cumsum(self.byte_lengths[ids]) - self.byte_lengths[ids]
            count = int(np.searchsorted(starts, len(data) - self.longest_token, side="right"))
            # The cut must not be inside a character, where a few tokens end. No token joins the end of one character
            # to the beginning of the next, so a start on a character is at most three tokens back.
            while count < len(ids) and data[starts[count]] & 0xC0 == 0x80:
                count -= 1
            if count:
                yield ids[:count]
            text = (data[starts[count] :].decode() if count < len(ids) else "") + piece
        if text:
            yield self.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return b"".join([self._tokens[i] for i in _checked_ids(ids, self).tolist()])


class ByteTokenizer:
    """One token per byte: byte b is id b + 1."""

    name = "bytes"
    vocab_size = 257
    end_of_document = END_OF_DOCUMENT

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        return np.array([0] + [1] * 256, np.int64)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(1)
        except UnicodeEncodeError as error:
            raise _not_utf8(error) from None

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        return (self.encode(piece) for piece in pieces if piece)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = _checked_ids(ids, self)
        return (ids[ids != END_OF_DOCUMENT] - 1).astype(np.uint8).tobytes()


def _read_vocabulary(path: Path, vocab_size: int) -> list[bytes]:
    """Returns the bytes of every id, from lines of `id literal length`; the literal is a Python str or bytes."""
    tokens = [b""] * vocab_size
    for token_id, literal, length in _vocabulary_lines(path):
        value = ast.literal_eval(literal)
        token = value.encode() if isinstance(value, str) else value
        assert len(token) == int(length), f"{path}: token {token_id} has {len(token)} bytes, not {length}"
        tokens[int(token_id)] = token
    return tokens


def _vocabulary_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        token_id, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        yield token_id, literal, length


def _checked_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if outside.size:
        raise InputError(
            f"token id {outside[0]} is outside the {tokenizer.name} vocabulary (0..{tokenizer.vocab_size - 1}); "
            "decode with the tokenizer that the tokens were made with"
        )
    return ids


def _not_utf8(error: UnicodeEncodeError) -> InputError:
    return InputError(
        f"character {error.start} of the text is a lone surrogate (U+{ord(error.object[error.start]):04X}), "
        "which UTF-8 cannot hold; remove it"
    )

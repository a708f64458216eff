"""`infctx prepare`: text files in, a folder with a token store for each split out.

The folder holds train.bin and train.idx; held_out.bin and held_out.idx if documents are held out; and store.json, with
the tokenizer, vocab_size, and the documents, tokens and bytes of text of each split. It is built beside its final place
under a temporary name and renamed once it is complete. Its bytes depend on the inputs and the seed, not on the number
of workers.
"""

import json
import logging
import os
import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infctx.data.token_store import SUMMARY_FILE, TokenStore, TokenStoreWriter
from infctx.data.tokenizer import Tokenizer, get_tokenizer
from infctx.documents.inputs import find_sources
from infctx.documents.text import STDIN, Document, Source, read_documents
from infctx.errors import InputError
from infctx.files import atomic_folder, naming_errors
from infctx.prepare.workers import WorkerKilled, Workers
from infctx.small_texts import counted, quoted

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
UNSPLIT = "unsplit"
FILES = {SUMMARY_FILE, *(f"{split}{suffix}" for split in (TRAIN, HELD_OUT) for suffix in (".bin", ".idx"))}
# Characters that are sent to a worker at once, and the most that a document sent to one may have. With one batch and
# its ids per worker in flight, this bounds the memory. A longer document is encoded here, piece by piece.
BATCH_CHARS = 1 << 20
LONG_DOCUMENT_CHARS = 4 << 20
DOCUMENT_OVERHEAD = 256  # the cost of a document besides its characters, so that a batch of tiny ones ends too
# Encoding this much takes as long as starting a worker.
BYTES_PER_WORKER = 32 << 20
COPY_TOKENS = 1 << 20

Batch = list[list[str]]  # pieces of each document


@dataclass
class SplitSummary:
    """Documents, tokens (ends of documents included) and UTF-8 bytes of text of a split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class PrepareSummary:
    """A summary of what `prepare` wrote; as a string, the lines to show.

    notes: lines about the inputs: what was left out, what was named twice
    """

    output: Path
    tokenizer: str
    vocab_size: int
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    empty_documents: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.output / name}: {counted(split.documents, 'document')}, "
            f"{split.tokens:,} tokens ({self.tokenizer}), {split.bytes:,} bytes of text"
            for name, split in self.splits.items()
        ]
        if self.empty_documents:
            lines.append(f"{counted(self.empty_documents, 'empty document')} left out")
        return "\n".join([*lines, *self.notes])


# Nine parameters: one for each option of `infctx prepare`.
def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: str,
    held_out: float = 0.0,
    input_format: str | None = None,
    workers: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Turns texts into a folder of token stores, in memory that does not grow with the texts.

    inputs: files, folders, globs or "-" (see `infctx.documents.inputs`)
    output: the folder to make
    tokenizer: "world" or "bytes"
    held_out: the share of the documents (0 to 0.5) that go to the held-out split: of every 1 / held_out documents, one
        at a random place, and at least one in all
    input_format: "text" or "jsonl", what standard input and files of any other suffix hold
    workers: processes that encode; None: as many as there are CPUs, and work, for
    seed: for the choice of the held-out documents
    overwrite: replaces an existing output once the new one is complete
    progress: shows a bar if stderr is a terminal

    What the inputs leave out is logged before the work begins. Raises InputError for mistakes in the inputs or
    arguments, and OSError, with the file's name, if writing fails; in both cases, and if interrupted, nothing of the
    new output is left.
    """
    encoder = get_tokenizer(tokenizer)
    group = _documents_per_held_out(held_out)
    sources, notes = find_sources(inputs, input_format)
    workers = _num_workers(workers, encoder, sources)
    place = Path(output).resolve()
    _check_output(Path(output), overwrite)
    for note in notes:
        log.info(note)
    summary = PrepareSummary(Path(output), encoder.name, encoder.vocab_size, notes=notes)
    with atomic_folder(place) as folder, _progress_bar(sources, progress) as bar:
        documents = read_documents(sources, bar.update)
        with closing(_encoded(documents, encoder, workers)) as encoded:
            summary.splits, summary.empty_documents = _write_splits(
                folder, encoded, _random_split(group, seed), encoder.byte_lengths
            )
        if not summary.splits:
            raise InputError("all documents are empty; name files with text in them")
        if group:
            summary.splits = _with_both_splits(folder, summary.splits, seed, encoder.byte_lengths)
        _write_summary(folder / SUMMARY_FILE, summary)
    return summary


def _documents_per_held_out(held_out: float) -> int:
    """Returns the size of the groups in which one document is held out; 0: none."""
    if not 0 <= held_out <= 0.5:
        raise InputError(
            f"--held-out: {held_out} is no share that can be held out; give 0 to 0.5 of the documents, such as 0.05"
        )
    if not held_out:
        return 0
    group = round(min(1 / held_out, 1e9))
    if abs(1 / group - held_out) > 0.1 * held_out:
        raise InputError(
            f"--held-out: {held_out} is not one document out of a whole number of them; give a share such as "
            f"{1 / group:.3g} or {1 / (group + 1):.3g}"
        )
    return group


def _num_workers(workers: int | None, tokenizer: Tokenizer, sources: Sequence[Source]) -> int:
    if workers is not None:
        if workers < 1:
            raise InputError(f"{workers} workers are too few; give at least 1")
        return workers
    if tokenizer.name == "bytes":  # encoding is faster than sending the text to another process
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if any(source.path == STDIN for source in sources):
        return cpus
    return max(1, min(cpus, sum(source.num_bytes for source in sources) // BYTES_PER_WORKER))


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; name a folder for the token stores")
    present = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if present - FILES:
        raise InputError(f"{output}: holds other files ({quoted(min(present - FILES))}); choose another output folder")
    if present and not overwrite:
        raise InputError(f"{output}: exists already; choose another output folder, or add --overwrite")


def _progress_bar(sources: Sequence[Source], progress: bool) -> tqdm:
    known = all(source.path != STDIN for source in sources)
    total = sum(source.num_bytes for source in sources) if known else None
    return tqdm(total=total, unit="B", unit_scale=True, disable=not (progress and sys.stderr.isatty()))


def _encoded(
    documents: Iterator[Document], tokenizer: Tokenizer, workers: int
) -> Generator[Iterable[np.ndarray], None, None]:
    """Yields the ids of each document, as arrays, in order."""
    if workers == 1:
        for document in documents:
            yield tokenizer.encode_pieces(document.pieces)
        return
    with closing(Workers(workers, partial(_encode_batch, tokenizer.name))) as pool:
        try:
            for work in _batches(documents):
                if isinstance(work, Document):
                    while pool.num_pending:
                        yield from pool.result()
                    yield tokenizer.encode_pieces(work.pieces)
                else:
                    done = pool.result() if pool.all_busy else ()
                    pool.submit(work)
                    yield from done
            while pool.num_pending:
                yield from pool.result()
        except WorkerKilled:
            raise InputError(
                "a worker process was killed, perhaps because memory ran out; use fewer workers (--workers 1)"
            ) from None


def _batches(documents: Iterator[Document]) -> Iterator[Batch | Document]:
    """Yields short documents in batches, long ones one by one."""
    batch: Batch = []
    size = 0
    for document in documents:
        pieces: list[str] = []
        length = 0
        for piece in document.pieces:
            pieces.append(piece)
            length += len(piece)
            if length > LONG_DOCUMENT_CHARS:
                break
        if batch and size + length > BATCH_CHARS:
            yield batch
            batch, size = [], 0
        if length > LONG_DOCUMENT_CHARS:
            yield Document(document.place, chain(pieces, document.pieces))
        else:
            batch.append(pieces)
            size += length + DOCUMENT_OVERHEAD
    if batch:
        yield batch


def _encode_batch(tokenizer: str, batch: Batch) -> list[list[np.ndarray]]:
    return [[get_tokenizer(tokenizer).encode("".join(pieces))] for pieces in batch]


def _random_split(group: int, seed: int) -> Callable[[int], str]:
    """Gives the split of document i: of every `group` documents, a random one is held out; group 0: none."""

    def split(i: int) -> str:
        if group and random.Random(f"{seed}/{i // group}").randrange(group) == i % group:
            return HELD_OUT
        return TRAIN

    return split


def _write_splits(
    folder: Path, documents: Iterable[Iterable[np.ndarray]], split_of: Callable[[int], str], byte_lengths: np.ndarray
) -> tuple[dict[str, SplitSummary], int]:
    """Writes each document to its split; returns the splits that have any, and the number of empty documents."""
    splits = {name: SplitSummary() for name in (TRAIN, HELD_OUT)}
    count = empty = 0
    with ExitStack() as stack:
        writers = {name: TokenStoreWriter(folder / name) for name in splits}
        for writer in writers.values():
            stack.callback(writer.abort)
        for pieces in documents:
            name = split_of(count)
            length = 0
            for ids in pieces:
                writers[name].extend(ids)
                length += ids.size
                splits[name].bytes += int(byte_lengths[ids].sum())
            if not length:
                empty += 1
                continue
            writers[name].end_document()
            count += 1
        for name, writer in writers.items():
            splits[name].documents, splits[name].tokens = writer.num_documents, writer.num_tokens
            if writer.num_documents:
                writer.close()
    return {name: split for name, split in splits.items() if split.documents}, empty


def _with_both_splits(
    folder: Path, splits: dict[str, SplitSummary], seed: int, byte_lengths: np.ndarray
) -> dict[str, SplitSummary]:
    """If the documents ended before the first one to hold out, holds out a random one of them after all."""
    if len(splits) == 2:
        return splits
    if sum(split.documents for split in splits.values()) == 1:
        raise InputError(
            "--held-out: there is only one document, so none can be held out; give more, or leave --held-out out"
        )
    for suffix in (".bin", ".idx"):
        os.rename(folder / f"{TRAIN}{suffix}", folder / f"{UNSPLIT}{suffix}")
    store = TokenStore(folder / UNSPLIT)
    chosen = random.Random(seed).randrange(store.num_documents)
    documents = (_stored_pieces(store, i) for i in range(store.num_documents))
    splits, _ = _write_splits(folder, documents, lambda i: HELD_OUT if i == chosen else TRAIN, byte_lengths)
    for path in (store.bin_path, store.idx_path):
        path.unlink()
    return splits


def _stored_pieces(store: TokenStore, i: int) -> Iterator[np.ndarray]:
    """Returns the ids of a stored document, without its end."""
    end = store.length(i) - 1
    return (store.tokens(i, begin, min(begin + COPY_TOKENS, end)) for begin in range(0, end, COPY_TOKENS))


def _write_summary(path: Path, summary: PrepareSummary) -> None:
    content = {
        "tokenizer": summary.tokenizer,
        "vocab_size": summary.vocab_size,
        "splits": {name: asdict(split) for name, split in summary.splits.items()},
    }
    with naming_errors(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import SUMMARY_FILE, TokenStore
from infctx.data.tokenizer import get_tokenizer
from infctx.documents.document import AS_THEY_ARE, STDIN, Reading, Source
from infctx.documents.inputs import find_sources
from infctx.documents.text import read_documents
from infctx.errors import InputError
from infctx.files import atomic_folder, naming_errors
from infctx.prepare.encode import Encoded, count_workers, encode_documents
from infctx.small_texts import counted, quoted

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
UNSPLIT = "unsplit"
FILES = {SUMMARY_FILE, *(f"{split}{suffix}" for split in (TRAIN, HELD_OUT) for suffix in (".bin", ".idx", ".mask"))}
COPY_TOKENS = 1 << 20


@dataclass
class SplitSummary:
    """Documents, tokens (ends of documents included), UTF-8 bytes of text and targets of a split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    targets: int = 0


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
    documents_without_target: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.output / name}: {counted(split.documents, 'document')}, "
            f"{split.tokens:,} tokens ({self.tokenizer}), {split.bytes:,} bytes of text{_share_learned(split)}"
            for name, split in self.splits.items()
        ]
        if self.empty_documents:
            lines.append(f"{counted(self.empty_documents, 'empty document')} left out")
        if self.documents_without_target:
            lines.append(f"{counted(self.documents_without_target, 'document')} with nothing to learn left out")
        return "\n".join([*lines, *self.notes])


def _share_learned(split: SplitSummary) -> str:
    every = split.tokens - split.documents
    return "" if split.targets == every else f", {split.targets / every:.0%} of the tokens learned"


# Nine parameters: one for each option of `infctx prepare`.
def prepare(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: str,
    held_out: float = 0.0,
    reading: Reading = AS_THEY_ARE,
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
    reading: how the inputs are to be read
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
    sources, notes = find_sources(inputs, reading)
    workers = count_workers(workers, encoder, sources)
    place = Path(output).resolve()
    _check_output(Path(output), overwrite)
    for note in notes:
        log.info(note)
    summary = PrepareSummary(Path(output), encoder.name, encoder.vocab_size, notes=notes)
    with atomic_folder(place) as folder, _progress_bar(sources, progress) as bar:
        documents = read_documents(sources, reading, bar.update)
        with closing(encode_documents(documents, encoder, workers)) as encoded:
            summary.splits, summary.empty_documents, summary.documents_without_target = _write_splits(
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


def _random_split(group: int, seed: int) -> Callable[[int], str]:
    """Gives the split of document i: of every `group` documents, a random one is held out; group 0: none."""

    def split(i: int) -> str:
        if group and random.Random(f"{seed}/{i // group}").randrange(group) == i % group:
            return HELD_OUT
        return TRAIN

    return split


def _write_splits(
    folder: Path, documents: Iterable[Encoded], split_of: Callable[[int], str], byte_lengths: np.ndarray
) -> tuple[dict[str, SplitSummary], int, int]:
    """Writes each document to its split.

    Returns the splits that have any, and the numbers of empty documents and of those with nothing to learn.
    """
    splits = {name: SplitSummary() for name in (TRAIN, HELD_OUT)}
    count = empty = untaught = 0
    with ExitStack() as stack:
        writers = {name: TokenStoreWriter(folder / name) for name in splits}
        for writer in writers.values():
            stack.callback(writer.abort)
        for document in documents:
            name = split_of(count)
            length = num_bytes = 0
            for ids, are_targets in document.parts:
                writers[name].extend(ids, are_targets)
                length += ids.size
                num_bytes += int(byte_lengths[ids].sum())
            if not length:
                empty += 1
            elif not writers[name].end_document(document.learns_end):
                untaught += 1
            else:
                splits[name].bytes += num_bytes
                count += 1
        for name, writer in writers.items():
            split = splits[name]
            split.documents, split.tokens, split.targets = writer.num_documents, writer.num_tokens, writer.num_targets
            if writer.num_documents:
                writer.close()
    return {name: split for name, split in splits.items() if split.documents}, empty, untaught


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
    for path in folder.glob(f"{TRAIN}.*"):
        os.rename(path, path.with_stem(UNSPLIT))
    store = TokenStore(folder / UNSPLIT)
    chosen = random.Random(seed).randrange(store.num_documents)
    documents = (stored_document(store, i) for i in range(store.num_documents))
    splits, _, _ = _write_splits(folder, documents, lambda i: HELD_OUT if i == chosen else TRAIN, byte_lengths)
    for path in folder.glob(f"{UNSPLIT}.*"):
        path.unlink()
    return splits


def stored_document(store: TokenStore, i: int) -> Encoded:
    """Returns a document of a store as it went in."""
    end = store.length(i) - 1
    return Encoded(_stored_parts(store, i, end), bool(store.targets(i, end, end + 1)[0]))


def _stored_parts(store: TokenStore, i: int, end: int) -> Iterator[tuple[np.ndarray, bool]]:
    for begin in range(0, end, COPY_TOKENS):
        ids = store.tokens(i, begin, min(begin + COPY_TOKENS, end))
        targets = store.targets(i, begin, begin + len(ids))
        borders = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
        yield from ((ids[a:b], bool(targets[a])) for a, b in pairwise(borders))


def _write_summary(path: Path, summary: PrepareSummary) -> None:
    content = {
        "tokenizer": summary.tokenizer,
        "vocab_size": summary.vocab_size,
        "splits": {name: asdict(split) for name, split in summary.splits.items()},
    }
    with naming_errors(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")

"""`infctx prepare`: text files in, a folder with a token store for each split out.

The folder holds train.bin and train.idx; held_out.bin and held_out.idx if documents are held out; and store.json, with
the tokenizer, vocab_size, and the documents, tokens and bytes of text of each split. It is built beside its final place
under a temporary name and renamed once it is complete. Its bytes depend on the inputs and the seed, not on the number
of workers.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from infctx.data.token_store import SUMMARY_FILE
from infctx.data.tokenizer import Tokenizer, get_tokenizer
from infctx.documents.blocks import NotText
from infctx.documents.document import AS_THEY_ARE, STDIN, STORE, Reading, Source
from infctx.documents.forms import FormTally
from infctx.documents.inputs import find_sources
from infctx.documents.read import ReadLog, read_documents, with_other_files
from infctx.errors import InputError
from infctx.files import atomic_folder, naming_errors
from infctx.prepare.encode import Encoded, count_workers, encode_documents
from infctx.prepare.splits import HELD_OUT, TRAIN, SplitSummary, documents_per_held_out, write_splits
from infctx.prepare.stored import store_as_tokens
from infctx.small_texts import counted, quoted

log = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.txt"
"""The file next to the stores with a line for each file, line and row that --skip-bad left out."""
FILES = {SUMMARY_FILE, SKIPPED_FILE}
FILES |= {f"{split}{suffix}" for split in (TRAIN, HELD_OUT) for suffix in (".bin", ".idx", ".mask")}


@dataclass
class PrepareSummary:
    """A summary of what `prepare` wrote; as a string, the lines to show.

    tail_tokens: of the only document, that are held out; 0 where whole documents are
    notes: lines about the inputs: what they hold, what was left out, what was named twice
    """

    output: Path
    tokenizer: str
    vocab_size: int
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    empty_documents: int = 0
    documents_without_target: int = 0
    tail_tokens: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.output / name}: {counted(split.documents, 'document')}, "
            f"{split.tokens:,} tokens ({self.tokenizer}), {counted(split.bytes, 'byte')} of text{_share_learned(split)}"
            for name, split in self.splits.items()
        ]
        if self.empty_documents:
            lines.append(f"{counted(self.empty_documents, 'empty document')} left out")
        if self.documents_without_target:
            lines.append(f"{counted(self.documents_without_target, 'document')} with nothing to learn left out")
        if self.tail_tokens:
            tail = "token is" if self.tail_tokens == 1 else f"{self.tail_tokens:,} tokens are"
            lines.append(f"there is only one document, so its last {tail} held out")
        return "\n".join([*lines, *self.notes])


def _share_learned(split: SplitSummary) -> str:
    every = split.tokens - split.documents
    share = f"{split.targets / every:.0%}"
    return "" if share == "100%" else f", {share} of the tokens learned"


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

    inputs: files, folders, globs, "-" (see `infctx.documents.inputs`) or datasets on the hub, hf:OWNER/DATASET
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
    encoder, tally = get_tokenizer(tokenizer), FormTally(reading)
    documents_per_held_out(held_out)  # refuses a share before anything is read
    bad: list[InputError] = []
    sources, notes = find_sources(inputs, reading, bad.append if reading.skip_bad else None)
    workers = count_workers(workers, encoder, sources)
    place = Path(output).resolve()
    _check_output(Path(output), overwrite)
    for note in notes:
        log.info(note)
    summary = PrepareSummary(Path(output), encoder.name, encoder.vocab_size, notes=notes)
    with (
        atomic_folder(place) as folder,
        _progress_bar(sources, reading, progress) as bar,
        _SkippedFile(folder / SKIPPED_FILE) as skipped,
    ):
        read_log = ReadLog(bar.update, skipped.add, tally)
        for error in bad:
            read_log.leave_out(error)
        try:
            with closing(_encoded(sources, reading, encoder, workers, read_log)) as encoded:
                written = write_splits(folder, encoded, encoder, held_out, seed)
        except NotText as error:
            raise with_other_files(error, sources, reading) from None
        summary.splits, summary.tail_tokens = written.splits, written.tail_tokens
        summary.empty_documents, summary.documents_without_target = (
            written.empty_documents,
            written.documents_without_target,
        )
        _write_summary(folder / SUMMARY_FILE, summary)
    summary.notes = [*read_log.lines(), *tally.lines(), *notes, *_skipped_lines(read_log, Path(output) / SKIPPED_FILE)]
    return summary


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; name a folder for the token stores")
    present = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if present - FILES:
        raise InputError(f"{output}: holds other files ({quoted(min(present - FILES))}); choose another output folder")
    if present and not overwrite:
        raise InputError(f"{output}: exists already; choose another output folder, or add --overwrite")


def _progress_bar(sources: Sequence[Source], reading: Reading, progress: bool) -> tqdm:
    known = reading.limit is None and all(source.path != STDIN for source in sources)
    total = sum(source.num_bytes for source in sources) if known else None
    return tqdm(total=total, unit="B", unit_scale=True, disable=not (progress and sys.stderr.isatty()))


def _write_summary(path: Path, summary: PrepareSummary) -> None:
    content = {
        "tokenizer": summary.tokenizer,
        "vocab_size": summary.vocab_size,
        "splits": {name: asdict(split) for name, split in summary.splits.items()},
    }
    with naming_errors(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def _encoded(
    sources: Sequence[Source], reading: Reading, tokenizer: Tokenizer, workers: int, log: ReadLog
) -> Generator[Encoded, None, None]:
    """Yields the documents of all sources as tokens, in order."""
    num_left = reading.limit
    for each in _texts_or_store(sources):
        if num_left == 0:
            break
        left = replace(reading, limit=num_left)
        if each[0].format == STORE:
            documents = store_as_tokens(each[0], left, tokenizer, workers, log)
        else:
            documents = encode_documents(read_documents(each, left, log), tokenizer, workers)
        with closing(documents):
            for document in documents:
                yield document
                num_left = num_left and num_left - 1
    log.tally.refuse_missing_roles()


def _texts_or_store(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Yields the sources in order: those of texts that follow each other together, each store by itself."""
    for is_store, group in groupby(sources, key=lambda source: source.format == STORE):
        together = list(group)
        yield from [[store] for store in together] if is_store else [together]


class _SkippedFile:
    """Writes a line for each error; there is no file if there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def add(self, error: InputError) -> None:
        with naming_errors(self._path):
            # The name of a file need not be UTF-8.
            self._file = self._file or open(self._path, "x", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._file.write(error.lines[0] + "\n")

    def __enter__(self) -> _SkippedFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            with naming_errors(self._path):
                self._file.close()


def _skipped_lines(log: ReadLog, path: Path) -> list[str]:
    if not log.num_bad:
        return []
    what = "1 bad file, line or row" if log.num_bad == 1 else f"{log.num_bad:,} bad files, lines and rows"
    more = f"all of them are in {path}" if log.num_bad > len(log.first_bad) else f"listed in {path}"
    return [f"left out {what}; {more}:", *(f"  {line}" for line in log.first_bad)]

"""Every reader of files on damaged bytes: a result or a one-line error, quickly, and in little memory."""

import gzip
import json
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet
import pytest
import torch
import yaml
import zstandard
from hypothesis import HealthCheck, Phase, given, settings, strategies

import infctx
import infctx.parquet.large_pages as large_pages
from infctx import pth_check
from infctx.data.token_store import TokenStore
from infctx.documents.document import Reading
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import find_damage, newest_checkpoint
from infctx.formats.model_files import find_model, find_state
from infctx.formats.state_file import is_state_file, read_state
from infctx.prepare.prepare import prepare
from infctx.report.csv_log import METRICS_CSV, CsvLog
from infctx.report.step_log import STEP_LOG, read_step_log, reopen_step_log
from infctx.settings.load import load_config
from infctx.settings.optimizer import OptimizerSettings
from infctx.train.checkpoint import changed_settings, load_progress, load_units
from infctx.train.optimizer import make_optimizer

from places import FIXTURES
from readings import texts
from runs import plain_engine

OLDER = FIXTURES / "runs-of-0.1.0"
STEP = "step-000004"
EXAMPLES = 120
MOST_SECONDS = 3  # of CPU time, for a reader that needs milliseconds
MOST_GROWTH = 300 << 20  # bytes of this process, over all examples of a reader


class Case(NamedTuple):
    """A file in a folder and its reader; structured: the parser of its text, to replace single values."""

    name: str
    file: str
    read: Callable[[Path], object]
    structured: str | None = None
    examples: int = EXAMPLES


@cache
def engine():
    model = infctx.load_model(OLDER / "trained" / "model.pth")
    return plain_engine(model, make_optimizer(model, OptimizerSettings(steps=20, peak_lr=0.01)))


def resume(file):
    load_progress(file.parent, engine())


def read_override(file):
    load_config(OLDER / "trained.yaml", [file.read_bytes().decode(errors="surrogateescape")])


def read_settings(file):
    changed_settings(file.parent, load_config(OLDER / "trained.yaml"))
    find_model(file.parent)


def read_manifest(file):
    find_damage(file.parent)
    newest_checkpoint(file.parent.parent)
    infctx.load_model(file.parent)


def read_state_of(file):
    find_state(file)
    is_state_file(file)
    read_state(file)


def read_store(file):
    store = TokenStore(file)
    for document in range(store.num_documents):
        store.tokens(document, 0, store.length(document))
    return store.fingerprint


def read_log(file):
    log, _ = reopen_step_log(file, 5)
    log.close()
    read_step_log(file.parent)


def read_texts(file, **reading):
    for skip_bad in (True, False):
        with suppress(InputError) if skip_bad else nullcontext():
            texts(file, skip_bad=skip_bad, **reading)


def read_large_pages(file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_pages, "LARGE_PAGE_BYTES", 1)
        read_texts(file)


def prepare_store(file):
    reading = Reading(from_tokenizer="bytes")
    prepare([str(file)], file.with_name("prepared"), tokenizer="world", reading=reading, workers=1, overwrite=True)


CASES = [
    Case("configuration", "trained.yaml", load_config, "yaml"),
    Case("override", "override.txt", read_override),
    Case("weights .pth", "model.pth", infctx.load_model),
    Case("weights .pth before torch 1.6", "old.pth", infctx.load_model),
    Case("weights .safetensors", f"trained/{STEP}/model.safetensors", lambda file: infctx.load_model(file)),
    Case("index", f"shares/{STEP}/model.safetensors.index.json", lambda file: infctx.load_model(file.parent), "json"),
    Case("state pth", "state.pth", read_state_of),
    Case("state st", "state.st", read_state_of),
    Case("state infctx", "state.safetensors", read_state_of),
    Case("state merged", "merged.pth", read_state_of, examples=EXAMPLES // 2),
    Case("manifest", f"trained/{STEP}/manifest.json", read_manifest, "json"),
    Case("progress", f"trained/{STEP}/progress.json", resume, "json", 40),
    Case("carry", f"trained/{STEP}/carry.safetensors", resume, examples=40),
    Case("moments", f"trained/{STEP}/optimizer.safetensors", resume, None, 40),
    Case("units", f"tuned/{STEP}/carry.safetensors", lambda file: load_units(file.parent)),
    Case("saved settings", f"tuned/{STEP}/config.yaml", read_settings, "yaml"),
    Case("step log", f"log/{STEP_LOG}", read_log),
    Case("metrics.csv", f"log/{METRICS_CSV}", lambda file: CsvLog(file, 5).close()),
    Case("store .idx", "train.idx", read_store),
    Case("store .bin", "train.bin", read_store),
    Case("store.json", "store.json", lambda file: TokenStore(file.with_name("train")), "json"),
    Case("text", "a.txt", read_texts),
    Case("lines", "a.jsonl", read_texts),
    Case("lines .gz", "a.jsonl.gz", read_texts),
    Case("lines .zst", "a.jsonl.zst", read_texts),
    Case("array", "a.json", read_texts, "json"),
    Case("csv", "a.csv", read_texts),
    Case("tsv .gz", "a.tsv.gz", read_texts),
    Case("parquet", "a.parquet", read_texts),
    Case("parquet, large pages", "a.parquet", read_large_pages),
    Case("UTF-16", "wide.txt", read_texts),
    Case("repository", "repository/.gitignore", lambda file: read_texts(file.parent, join="repository"), None, 40),
    Case("store as input", "train.bin", lambda file: prepare_store(file.with_name("train")), None, 40),
    Case("store as input, index", "train.idx", lambda file: prepare_store(file.with_name("train")), None, 40),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes one valid file of each kind."""
    folder = tmp_path_factory.mktemp("hostile")
    for source, target in (("trained", "trained"), ("tuned", "tuned"), ("two-ranks", "shares")):
        shutil.copytree(OLDER / source / "checkpoints" / STEP, folder / target / STEP)
    (folder / "log").mkdir()
    shutil.copy(OLDER / "trained" / STEP_LOG, folder / "log")
    (folder / "log" / METRICS_CSV).write_text("step,loss\n1,2.5\n2,2.25\n")
    for file in ("trained.yaml", "trained/model.pth", "train.idx", "train.bin", *OLDER.glob("tuned-matrices/state.*")):
        shutil.copy(OLDER / file, folder)
    model = infctx.load_model(folder / "model.pth")
    weights = torch.load(folder / "model.pth", weights_only=True)
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    state = infctx.load_state(folder / "state.pth", model)
    infctx.save_state(state, folder / "merged.pth", "merged", model=model)
    (folder / "override.txt").write_text("optimizer.peak_lr=1.0e-4")
    splits = {"train": {"documents": 5, "tokens": 2663}}
    (folder / "store.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "splits": splits}))
    (folder / "a.txt").write_text("first\nsecond\n🙂\n")
    lines = "".join(json.dumps({"id": i, "text": f"line {i} \\ud83d\\ude42"}) + "\n" for i in range(20)).encode()
    (folder / "a.jsonl").write_bytes(lines)
    records = [json.loads(line) for line in lines.splitlines()]
    (folder / "a.json").write_text(json.dumps(records))
    rows = "id,text\n" + "".join(f'{i},"line ""{i}"" \n🙂"\n' for i in range(20))
    (folder / "a.csv").write_text(rows)
    (folder / "a.tsv.gz").write_bytes(gzip.compress(rows.replace(",", "\t").encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
    (folder / "wide.txt").write_text(rows, encoding="utf-16")
    (folder / "repository").mkdir()
    (folder / "repository" / ".gitignore").write_text("build/\n!a*\n**/b[0-9]?.txt\n")
    (folder / "repository" / "a.txt").write_text("a")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_content_gives_a_result_or_a_one_line_error(folder, case):
    file = folder / case.file
    whole = file.read_bytes()
    case.read(file)  # undamaged
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=case.examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=damaged(whole, case.structured))
    def check(content):
        file.write_bytes(content)
        pth_check._find_problem.cache_clear()  # its key, the file's time, may not change between examples
        start = time.process_time()
        try:
            case.read(file)
        except InputError as error:
            assert all(str(line).isprintable() and len(str(line)) < 1000 for line in error.args)
        except OSError as error:
            assert error.filename
        assert time.process_time() - start < MOST_SECONDS

    try:
        check()
    finally:
        file.write_bytes(whole)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown << 10 < MOST_GROWTH


HOSTILE_VALUES = [
    *(None, True, -1, 0, 3, 1.5, 10**30, 2**63, 1e308, float("nan"), float("inf"), "", "text", "1"),
    *("\x1b[31mred", "a\nb", "..", "/", "a\0b", "\u202e", "x" * 5000, [], {}, [1], [[]], {"a": 1}, ["\x1b"]),
]
WHOLE_CONTENTS = [b"", b"\0" * 100, b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"null", b"1", b'"a"', b"9" * 10_000]


def damaged(whole, structured):
    """Returns a strategy for damaged content: changed bytes or, in structured text, replaced values."""
    other = strategies.sampled_from(WHOLE_CONTENTS)
    changed = strategies.lists(byte_change(len(whole)), min_size=1, max_size=3).map(lambda do: apply(whole, do))
    if structured is None:
        return strategies.one_of(changed, changed, changed, other)
    load, dump = (json.loads, json.dumps) if structured == "json" else (yaml.safe_load, yaml.safe_dump)
    content = load(whole)
    places = list(places_in(content))
    exchanged = strategies.builds(
        lambda place, value, name: dump(exchange(content, place, value, name)).encode(errors="surrogatepass"),
        strategies.sampled_from(places),
        strategies.sampled_from(HOSTILE_VALUES),
        strategies.booleans(),
    )
    return strategies.one_of(exchanged, exchanged, exchanged, changed, other)


def byte_change(length):
    """Returns a strategy for (change, place, bytes)."""
    anywhere = strategies.integers(0, length - 1)
    near = strategies.integers(0, min(length, 3000) - 1)
    place = strategies.one_of(near, near.map(lambda offset: length - 1 - offset), anywhere)
    what = strategies.sampled_from(["flip", "set", "cut", "insert", "double", "remove"])
    return strategies.tuples(what, place, strategies.binary(min_size=1, max_size=9))


def apply(whole, changes):
    content = bytearray(whole)
    for what, place, given_bytes in changes:
        size = len(given_bytes)
        if what == "flip" and place < len(content):
            content[place] ^= 1 << (given_bytes[0] % 8)
        elif what == "set":
            content[place : place + size] = given_bytes
        elif what == "cut":
            del content[place:]
        elif what == "insert":
            content[place:place] = given_bytes
        elif what == "double":
            content[place:place] = content[place : place + 40 * size]
        else:
            del content[place : place + size]
    return bytes(content)


def places_in(content, path=()):
    yield path
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places_in(content[key], (*path, key))


def exchange(content, path, value, name):
    """Returns a copy with another value at a place; name: replaces the key there instead, if the place has one."""
    if not path:
        return value
    key, *rest = path
    copy = content.copy()
    if not rest and name and isinstance(copy, dict):
        copy[value if isinstance(value, str | int | float | None) else str(value)] = copy.pop(key)
    else:
        copy[key] = exchange(content[key], rest, value, name)
    return copy

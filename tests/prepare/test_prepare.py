import errno
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import infctx.prepare.encode as encode_module
import infctx.prepare.prepare as prepare_module
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer
from infctx.documents.document import Document, Part
from infctx.errors import InputError
from infctx.prepare.prepare import prepare

from places import ROOT


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def stored_texts(prefix: Path, tokenizer: str) -> list[str]:
    store = TokenStore(prefix)
    documents = [store.tokens(i, 0, store.length(i)) for i in range(store.num_documents)]
    assert all(ids[-1] == 0 and (ids[:-1] > 0).all() for ids in documents)
    return [get_tokenizer(tokenizer).decode(ids[:-1]).decode() for ids in documents]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["word", " ", "\n", "été", "文字", "🙂", "\x00", "  ", "x = 1"]
    return ["".join(rng.choices(words, k=rng.choice([1, 20, 300]))) for _ in range(count)]


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
def test_documents_come_out_as_they_went_in(tmp_path, tokenizer):
    texts = some_texts(50)
    (tmp_path / "a.txt").write_text("a text\r\nfile\n", encoding="utf-8", newline="")
    inputs = [str(tmp_path / "a.txt"), write_jsonl(tmp_path / "b.jsonl", texts)]
    summary = prepare(inputs, tmp_path / "new" / "out", tokenizer=tokenizer)
    texts = ["a text\r\nfile\n", *texts]
    assert stored_texts(tmp_path / "new/out/train", tokenizer) == texts
    assert sorted(content(tmp_path / "new/out")) == ["store.json", "train.bin", "train.idx"]
    store = TokenStore(tmp_path / "new/out/train")
    num_bytes = sum(len(text.encode()) for text in texts)
    split = {"documents": 51, "tokens": store.num_tokens, "bytes": num_bytes, "targets": store.num_tokens - 51}
    assert json.loads((tmp_path / "new/out/store.json").read_text()) == {
        "tokenizer": tokenizer,
        "vocab_size": {"world": 65536, "bytes": 257}[tokenizer],
        "splits": {"train": split},
    }
    assert vars(summary.splits["train"]) == split
    assert f"51 documents, {store.num_tokens:,} tokens ({tokenizer})" in str(summary)


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    # Small, so that there are many batches, and documents too long for a batch.
    monkeypatch.setattr(encode_module, "BATCH_CHARS", 3_000)
    monkeypatch.setattr(encode_module, "LONG_DOCUMENT_CHARS", 5_000)
    texts = some_texts(200)
    for place in (0, 50, 51, 150):
        texts.insert(place, "".join(some_texts(60, seed=place)))
    texts.insert(100, "")
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("long " * 500_000)  # in several pieces
    for workers in (1, 2, 3):
        prepare(
            [source, str(tmp_path / "b.txt")],
            tmp_path / str(workers),
            tokenizer="world",
            held_out=0.1,
            workers=workers,
        )
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    splits = [stored_texts(tmp_path / "1" / split, "world") for split in ("train", "held_out")]
    expected = sorted([text for text in texts if text] + ["long " * 500_000])
    assert sorted(splits[0] + splits[1]) == expected
    assert len(splits[1]) in (20, 21)


@pytest.mark.parametrize("held_out, group", [(0.5, 2), (0.1, 10), (0.03, 33)])
def test_one_document_of_every_group_is_held_out(tmp_path, held_out, group):
    texts = [f"document {i}" for i in range(330)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare([source], tmp_path / "out", tokenizer="bytes", held_out=held_out, seed=3)
    chosen = [texts.index(text) for text in stored_texts(tmp_path / "out" / "held_out", "bytes")]
    assert [i // group for i in chosen] == list(range(330 // group))
    assert len({i % group for i in chosen}) > 1
    train = stored_texts(tmp_path / "out" / "train", "bytes")
    assert train == [text for i, text in enumerate(texts) if i not in chosen]
    prepare([source], tmp_path / "other", tokenizer="bytes", held_out=held_out, seed=4)
    assert stored_texts(tmp_path / "other" / "held_out", "bytes") != [texts[i] for i in chosen]


def test_a_few_documents_have_a_held_out_one_too(tmp_path):
    chosen = set()
    for seed in range(20):
        texts = ["a", "", "bé" * 1000, "c"]
        source = write_jsonl(tmp_path / "a.jsonl", texts)
        out = tmp_path / f"out{seed}"
        summary = prepare([source], out, tokenizer="world", held_out=0.01, seed=seed)
        assert summary.empty_documents == 1
        assert sorted(content(out)) == ["held_out.bin", "held_out.idx", "store.json", "train.bin", "train.idx"]
        (held_out,) = stored_texts(out / "held_out", "world")
        assert stored_texts(out / "train", "world") == [text for text in texts if text and text != held_out]
        assert summary.splits["held_out"].bytes == len(held_out.encode())
        assert summary.splits["train"].documents == 2
        chosen.add(held_out)
    assert chosen == {"a", "bé" * 1000, "c"}


def refused(tmp_path, message, inputs, **rest):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        prepare(inputs, tmp_path / "out", **{"tokenizer": "bytes", **rest})
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_wrong_arguments(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    refused(tmp_path, "tokenizer 'gpt2' is not known", [source], tokenizer="gpt2")
    refused(tmp_path, "0 workers are too few; give at least 1", [source], workers=0)
    refused(tmp_path, "--held-out: 0.6 is no share that can be held out", [source], held_out=0.6)
    refused(tmp_path, "--held-out: -0.1 is no share that can be held out", [source], held_out=-0.1)
    refused(tmp_path, "--held-out: nan is no share that can be held out", [source], held_out=float("nan"))
    refused(tmp_path, "no such file", [str(tmp_path / "b.jsonl")])
    refused(tmp_path, "nothing to read", [])


@pytest.mark.parametrize("workers", [1, 2])
def test_mistakes_in_the_text_leave_nothing(tmp_path, workers):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(500))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    refused(tmp_path, r"bad\.jsonl:2: `text` is int", [source, str(tmp_path / "bad.jsonl")], workers=workers)
    (tmp_path / "bad.txt").write_bytes(b"a" * 5_000_000 + b"\xff")
    message = r"bad\.txt: not UTF-8: byte 0xff at offset 5000000"
    refused(tmp_path, message, [source, str(tmp_path / "bad.txt")], workers=workers)


def test_an_error_in_a_worker_is_raised_unchanged(tmp_path, monkeypatch):
    """text.py would refuse these documents; here only a worker can find them."""
    documents = [Document(text, iter([Part([text])])) for text in ("good", "\ud800")]
    monkeypatch.setattr(prepare_module, "read_documents", lambda sources, reading, log: iter(documents))
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    refused(tmp_path, r"character 0 of the text is a lone surrogate", [source], workers=2)


def test_empty_documents_are_left_out_and_counted(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["", "a", "", "b"])
    summary = prepare([source], tmp_path / "out", tokenizer="bytes")
    assert summary.empty_documents == 2
    assert "2 empty documents left out" in str(summary)
    assert stored_texts(tmp_path / "out" / "train", "bytes") == ["a", "b"]
    source = write_jsonl(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(InputError, match="all documents are empty"):
        prepare([source], tmp_path / "other", tokenizer="bytes", held_out=0.1)
    assert not (tmp_path / "other").exists()


def test_an_output_that_exists(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    out = tmp_path / "out"
    out.mkdir()
    prepare([source], out, tokenizer="bytes")  # an empty folder is no output
    old = content(out)
    refused(tmp_path, "out: exists already; .* add --overwrite", [source])
    assert content(out) == old
    source = write_jsonl(tmp_path / "a.jsonl", ["b", "c"])
    prepare([source], out, tokenizer="bytes", overwrite=True, held_out=0.5)
    assert len(content(out)) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_overwrite_keeps_the_old_output_when_the_new_one_fails(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    prepare([source], tmp_path / "out", tokenizer="bytes")
    old = content(tmp_path / "out")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    refused(tmp_path, "a.jsonl:2: not JSON", [source], overwrite=True)
    assert content(tmp_path / "out") == old


def test_overwrite_puts_the_old_output_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    prepare([source], tmp_path / "out", tokenizer="bytes")
    old = content(tmp_path / "out")
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".tmp") and Path(target) == tmp_path / "out":
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        prepare([source], tmp_path / "out", tokenizer="bytes", overwrite=True)
    assert content(tmp_path / "out") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused(tmp_path, r"out: holds other files \(thesis.tex\)", [source], overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_output_that_is_a_file(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "out").write_text("")
    refused(tmp_path, "out: is a file", [source], overwrite=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(tmp_path, capsys, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    prepare([source], tmp_path / "a", tokenizer="bytes")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    prepare([source], tmp_path / "b", tokenizer="bytes", progress=False)
    assert sys.stderr.getvalue() == ""
    prepare([source], tmp_path / "c", tokenizer="bytes")
    assert "100%" in sys.stderr.getvalue()


def large_jsonl(path: Path, megabytes: int) -> Path:
    line = json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 50}) + "\n"
    path.write_text(line * (megabytes * 1_000_000 // len(line)))
    return path


@pytest.mark.parametrize("delay", [0, 0.1, 0.8])  # while they start, while they encode
def test_a_killed_worker_is_one_line(tmp_path, delay):
    source = large_jsonl(tmp_path / "a.jsonl", 60)
    killed = []

    def kill():
        while not killed:
            time.sleep(0.05)
            children = multiprocessing.active_children()
            if len(children) == 2:
                time.sleep(delay)
                os.kill(children[0].pid, signal.SIGKILL)
                killed.append(children[0].pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    refused(tmp_path, r"a worker process was killed.*\(--workers 1\)", [str(source)], tokenizer="world", workers=2)
    thread.join(timeout=30)
    assert killed
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, resource, signal, sys, threading, time
from pathlib import Path
from infctx.prepare.prepare import prepare

def print_workers():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.02)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    source, output, tokenizer, workers, limit = sys.argv[1:]
    if int(workers) > 1:
        threading.Thread(target=print_workers, daemon=True).start()
    if int(limit):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        prepare([source], Path(output), tokenizer=tokenizer, workers=int(workers), overwrite=True)
    except OSError as error:
        print(error.errno, error.filename)
    except KeyboardInterrupt:
        print("interrupted")
    # VmHWM, for ru_maxrss begins with what the process that started this one had.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak.split()[1]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def start(tmp_path: Path, source: Path, tokenizer: str, workers: int, limit: int = 0) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, script, source, tmp_path / "out", tokenizer, workers, limit]
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> list[str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    return output.splitlines()


@pytest.mark.parametrize("delay", [0, 1])  # while the workers start, while they encode
def test_ctrl_c_cleans_up(tmp_path, delay):
    process = start(tmp_path, large_jsonl(tmp_path / "a.jsonl", 200), "world", 2)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(delay)
    assert any(path.name.startswith(".out") for path in tmp_path.iterdir())
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process)[0] == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "script.py"]
    assert not any(alive(pid) for pid in workers)


def test_workers_end_with_a_killed_parent(tmp_path):
    process = start(tmp_path, large_jsonl(tmp_path / "a.jsonl", 200), "world", 2)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.7)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".out.")]) == 1
    prepare([write_jsonl(tmp_path / "b.jsonl", ["b"])], tmp_path / "out", tokenizer="bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out", "script.py"]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("suffix, workers", [(".txt", 1), (".jsonl", 2)])
def test_memory_does_not_grow_with_the_input(tmp_path, suffix, workers):
    peaks = []
    for megabytes in (8, 60):
        source = large_jsonl(tmp_path / f"a{suffix}", megabytes)
        peaks.append([int(peak) for peak in finish(start(tmp_path, source, "world", workers))[-1].split()])
        assert TokenStore(tmp_path / "out" / "train").num_tokens > megabytes * 200_000
    assert peaks[1][0] < peaks[0][0] + 16
    assert peaks[1][1] < peaks[0][1] + 16


@pytest.mark.parametrize("limit, file", [(1_000_000, ".train.bin"), (1_000, ".train.bin")])
def test_a_full_disk_names_the_file_and_keeps_the_old_output(tmp_path, limit, file):
    prepare([write_jsonl(tmp_path / "old.jsonl", ["old"])], tmp_path / "out", tokenizer="bytes")
    old = content(tmp_path / "out")
    source = large_jsonl(tmp_path / "a.jsonl", 3)
    number, name = finish(start(tmp_path, source, "bytes", 1, limit))[0].split(" ", 1)
    assert int(number) == errno.EFBIG
    assert Path(name).name.startswith(file)
    assert content(tmp_path / "out") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "old.jsonl", "out", "script.py"]

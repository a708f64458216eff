"""Encoding in worker processes; tests/prepare/test_prepare.py sees all of it from outside."""

import os

from infctx.data.tokenizer import get_tokenizer
from infctx.documents.inputs import find_sources
from infctx.prepare.encode import BYTES_PER_WORKER, count_workers


def test_workers_are_chosen_by_the_work(tmp_path, monkeypatch):
    def chosen(tokenizer, num_bytes):
        (tmp_path / "a.txt").write_bytes(b"")
        os.truncate(tmp_path / "a.txt", num_bytes)
        sources, _ = find_sources([str(tmp_path / "a.txt")])
        return count_workers(None, get_tokenizer(tokenizer), sources)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    unit = BYTES_PER_WORKER
    assert [chosen("world", size) for size in (0, unit, 3 * unit, 100 * unit)] == [1, 1, 3, 8]
    assert chosen("bytes", 100 * unit) == 1

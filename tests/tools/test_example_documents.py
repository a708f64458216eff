import io
import json
import os
import subprocess
import sys

import numpy as np

from infctx.data.token_store import TokenStore
from infctx.documents.document import Reading
from infctx.prepare.prepare import prepare

from places import ROOT


def test_the_documents_of_the_python_installation(tmp_path, monkeypatch):
    tool = [sys.executable, str(ROOT / "tools" / "example_documents.py"), "python", "--min-bytes", "60000"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    lines = subprocess.run(tool, capture_output=True, check=True, env=environment).stdout
    assert subprocess.run(tool, capture_output=True, check=True).stdout == lines
    documents = [json.loads(line) for line in lines.splitlines()]
    sources = [document["source"] for document in documents]
    assert sources[0] == "pydoc_data/topics.py"
    assert sources[1:] == sorted(sources[1:])
    assert len(sources) > 10
    assert not any({"test", "tests", "idlelib", "site-packages"} & set(source.split("/")) for source in sources)
    assert all(len(document["text"].encode()) >= 60_000 for document in documents)

    class Stdin:
        buffer = io.BytesIO(lines)

    monkeypatch.setattr(sys, "stdin", Stdin)
    summary = prepare(["-"], tmp_path / "out", tokenizer="bytes", reading=Reading(format="jsonl"), held_out=0.1)
    assert sum(split.documents for split in summary.splits.values()) == len(documents)
    store = TokenStore(tmp_path / "out" / "train")
    assert summary.splits["train"].bytes == store.num_tokens - store.num_documents
    assert np.all(store.tokens(0, 0, 1000) < 257)


def test_the_headers_of_torch():
    tool = [sys.executable, str(ROOT / "tools" / "example_documents.py"), "cpp"]
    documents = [json.loads(line) for line in subprocess.run(tool, capture_output=True, check=True).stdout.splitlines()]
    sources = [document["source"] for document in documents]
    assert sources == sorted(sources)
    assert len(sources) > 100
    assert all(source.endswith(".h") for source in sources)
    assert all(20_000 <= len(document["text"].encode()) <= 200_000 for document in documents)
    assert sum("#include" in document["text"] for document in documents) > len(documents) / 2

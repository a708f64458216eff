"""The tail of the only document; tests/prepare/test_prepare.py has whole documents that are held out."""

import json
import random

import pytest

from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer
from infctx.errors import InputError
from infctx.prepare.prepare import prepare


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_the_tail_of_the_only_document_is_held_out(tmp_path, tokenizer, share):
    text = "".join(random.Random(share).choices(["word ", "🙂", "文字", "été\n", "ă"], k=3_001))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    summary = prepare([str(tmp_path / "book.txt")], tmp_path / "out", tokenizer=tokenizer, held_out=share)
    coder = get_tokenizer(tokenizer)
    train, tail = (TokenStore(tmp_path / "out" / split) for split in ("train", "held_out"))
    first, last = (store.tokens(0, 0, store.length(0) - 1) for store in (train, tail))
    assert coder.decode(first).decode() + coder.decode(last).decode() == text  # each is whole characters
    assert [*first, *last] == coder.encode(text).tolist()
    exact = share * (len(first) + len(last))
    assert exact - 1 <= len(last) <= exact + 3
    # The document does not end at the cut, but after its tail.
    assert train.num_targets == len(first) - 1
    assert tail.num_targets == len(last)
    assert f"only one document, so its last {len(last):,} tokens are held out" in str(summary)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "held_out.bin",
        "held_out.idx",
        "store.json",
        "train.bin",
        "train.idx",
        "train.mask",
    ]


@pytest.mark.parametrize("text", ["a", "🙂"])
def test_a_document_of_one_character_has_no_tail(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(InputError, match="--held-out: the only document is too short"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer="bytes", held_out=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]

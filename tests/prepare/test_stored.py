"""Token stores as inputs: the texts, targets and borders of documents survive another tokenizer."""

import random
import re

import numpy as np
import pytest

from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer
from infctx.documents.document import Reading
from infctx.errors import InputError
from infctx.prepare.prepare import prepare

WORDS = ["word", " ", "\n", "été", "文字", "🙂", "\x01", "  ", "x = 1"]


def write(path, documents, tokenizer):
    """Writes a store of documents, each a list of (text, whether it is learned)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TokenStoreWriter(path) as writer:
        for parts, learns_end in documents:
            for text, learned in parts:
                writer.extend(get_tokenizer(tokenizer).encode(text), learned)
            writer.end_document(learns_end)


def some_documents(seed, with_masks):
    rng = random.Random(seed)
    documents = []
    for _ in range(30):
        parts = [
            ("".join(rng.choices(WORDS, k=rng.choice([1, 3, 40]))), not with_masks or rng.random() < 0.5)
            for _ in range(rng.choice([1, 2, 5]))
        ]
        documents.append(([*parts, ("the end, at last", True)], not with_masks or rng.random() < 0.5))
    return documents


def learned(store, i, tokenizer):
    """Returns the text of a document, and for each of its bytes, whether it is learned; without the first token's."""
    coder = get_tokenizer(tokenizer)
    length = store.length(i)
    ids, targets = store.tokens(i, 0, length), store.targets(i, 0, length)
    flags = np.repeat(targets[1:-1], coder.byte_lengths[ids[1:-1]])
    return coder.decode(ids[:-1]), flags.tolist(), targets[-1]


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("before, after", [("world", "bytes"), ("bytes", "world"), ("world", "world")])
def test_documents_and_masks_survive_another_tokenizer(tmp_path, monkeypatch, before, after, with_masks):
    monkeypatch.setattr("infctx.prepare.stored.READ_TOKENS", 7)
    documents = some_documents(1, with_masks)
    write(tmp_path / "old" / "train", documents, before)
    reading = Reading(from_tokenizer=before)
    for workers in (1, 2):
        prepare(
            [str(tmp_path / "old/train")], tmp_path / f"{workers}", tokenizer=after, reading=reading, workers=workers
        )
    old, new = TokenStore(tmp_path / "old" / "train"), TokenStore(tmp_path / "1" / "train")
    assert new.num_documents == old.num_documents == len(documents)
    for i in range(old.num_documents):
        (text, flags, end), (new_text, new_flags, new_end) = learned(old, i, before), learned(new, i, after)
        assert (text, end) == (new_text, new_end)
        shared = min(len(flags), len(new_flags))  # the first token is never a target, and not equally long in both
        assert flags[len(flags) - shared :] == new_flags[len(new_flags) - shared :]
    for suffix in (".bin", ".idx", *([".mask"] if with_masks else [])):
        files = [tmp_path / name / f"train{suffix}" for name in ("1", "2", "old")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert (files[0].read_bytes() == files[2].read_bytes()) == (before == after)


def test_a_text_that_is_learned_as_a_whole_has_the_tokens_of_the_text(tmp_path):
    text = "words " + "".join(random.Random(3).choices(WORDS, k=500))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare([str(tmp_path / "a.txt")], tmp_path / "bytes", tokenizer="bytes")
    prepare([str(tmp_path / "a.txt")], tmp_path / "world", tokenizer="world")
    summary = prepare([str(tmp_path / "bytes/train.bin")], tmp_path / "again", tokenizer="world")
    assert (tmp_path / "again/train.bin").read_bytes() == (tmp_path / "world/train.bin").read_bytes()
    assert not (tmp_path / "again/train.mask").exists()
    assert f"{tmp_path / 'bytes/train'}: 1 record (token store): bytes" in str(summary)


def test_a_border_of_targets_inside_a_character_moves_to_its_end(tmp_path):
    for cut in range(1, 4):
        path = tmp_path / str(cut) / "train"
        path.parent.mkdir()
        data = [byte + 1 for byte in "a🙂b".encode()]
        with TokenStoreWriter(path) as writer:
            writer.extend(np.array(data[: 1 + cut]), False)
            writer.extend(np.array(data[1 + cut :]), True)
            writer.end_document()
        prepare([str(path)], tmp_path / f"w{cut}", tokenizer="world", reading=Reading(from_tokenizer="bytes"))
        store = TokenStore(tmp_path / f"w{cut}" / "train")
        ids = store.tokens(0, 0, store.length(0))
        assert get_tokenizer("world").decode(ids[-2:-1]) == b"b"
        assert store.targets(0, 0, len(ids)).tolist() == [False] * (len(ids) - 2) + [True, True]


def test_texts_and_stores_keep_their_order(tmp_path):
    for name in "ac":
        (tmp_path / f"{name}.txt").write_text(name)
    write(tmp_path / "b" / "train", [([("b", True)], True), ([("bb", True)], True)], "bytes")
    inputs = [str(tmp_path / name) for name in ("a.txt", "b/train.idx", "c.txt")]
    for limit, expected in (None, b"a\0b\0bb\0c\0"), (4, b"a\0b\0bb\0c\0"), (2, b"a\0b\0"), (1, b"a\0"):
        for tokenizer in ("bytes", "world"):
            reading = Reading(from_tokenizer="bytes", limit=limit)
            prepare(inputs, tmp_path / "out", tokenizer=tokenizer, reading=reading, overwrite=True)
            store = TokenStore(tmp_path / "out/train")
            ids = np.concatenate([store.tokens(i, 0, store.length(i)) for i in range(store.num_documents)])
            assert get_tokenizer(tokenizer).decode(ids) == expected.replace(b"\0", b"")
            assert store.num_documents == expected.count(b"\0")


def test_one_store_under_two_names_is_taken_once(tmp_path):
    write(tmp_path / "train", [([("b", True)], True)], "bytes")
    inputs = [str(tmp_path / name) for name in ("train", "train.bin")]
    summary = prepare(inputs, tmp_path / "out", tokenizer="bytes", reading=Reading(from_tokenizer="bytes"))
    assert f"1 file named twice, taken once: {inputs[1]}" in str(summary)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(InputError, match="train: no such file or folder; of a token store there is only .*train.idx"):
        prepare(inputs[:1], tmp_path / "out", tokenizer="bytes", overwrite=True)


def test_an_end_inside_a_document(tmp_path):
    with TokenStoreWriter(tmp_path / "store") as writer:
        for document in ([7], [5, 6]):
            writer.extend(np.array(document))
            writer.end_document()
    data = (tmp_path / "store.bin").read_bytes()
    (tmp_path / "store.bin").write_bytes(data[:4] + b"\0\0" + data[6:])
    with pytest.raises(InputError, match="document 1: token 0 is 0, which ends a document, and more tokens follow"):
        prepare([str(tmp_path / "store")], tmp_path / "out", tokenizer="world", reading=Reading(from_tokenizer="world"))


@pytest.mark.parametrize(
    ("ids", "tokenizer", "to", "message"),
    [
        ([5, 300], "bytes", "bytes", "document 1: token 1 has id 300, which the tokenizer bytes uses in no text"),
        ([5, 300], "bytes", "world", "document 1: token 1 has id 300"),
        ([1, 65535], "world", "world", "document 1: token 1 has id 65535"),
        ([0x80 + 1], "bytes", "world", "document 1: its tokens are no text in UTF-8"),
        ([5], None, "world", "no store.json here names its tokenizer; add --from-tokenizer"),
    ],
)
def test_a_store_that_cannot_be_read(tmp_path, ids, tokenizer, to, message):
    with TokenStoreWriter(tmp_path / "store") as writer:
        for document in ([50], ids):
            writer.extend(np.array(document))
            writer.end_document()
    reading = Reading(from_tokenizer=tokenizer)
    with pytest.raises(InputError, match=f"store: {re.escape(message)}"):
        prepare([str(tmp_path / "store")], tmp_path / "out", tokenizer=to, reading=reading)
    if tokenizer:
        summary = prepare(
            [str(tmp_path / "store")],
            tmp_path / "out",
            tokenizer=to,
            reading=Reading(from_tokenizer=tokenizer, skip_bad=True),
        )
        assert summary.splits["train"].documents == 1
        assert message in (tmp_path / "out" / "skipped.txt").read_text()

"""infctx inspect: its figures against loops over documents and real windows; documents as a person reads them."""

import re

import numpy as np
import pytest

import infctx.data.token_store as token_store
from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer
from infctx.errors import InputError
from infctx.prepare.inspect import describe_store, show_document

from runs import infctx_here


def write(path, documents, tokenizer="world"):
    """Writes documents of (text, is_learned) parts."""
    with TokenStoreWriter(path) as writer:
        for parts in documents:
            for text, is_learned in parts:
                writer.extend(get_tokenizer(tokenizer).encode(text), is_learned)
            writer.end_document()
    return TokenStore(path)


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_the_figures_of_a_store(tmp_path, monkeypatch, block):
    monkeypatch.setattr(token_store, "BLOCK", block)
    random = np.random.default_rng(3)
    lengths = [1, 2, 15, 16, 17, 18, 129, 3000, *random.integers(2, 400, 60).tolist()]
    with TokenStoreWriter(tmp_path / "a") as writer:
        for length in lengths:
            ids = random.integers(1, 257, length - 1)
            writer.extend(ids[: length // 2], are_targets=length % 2 == 0)
            writer.extend(ids[length // 2 :])
            writer.end_document()
    store = TokenStore(tmp_path / "a")
    assert [length for part in store.lengths() for length in part.tolist()] == lengths
    text = describe_store(store, [16, 1024])
    assert f"68 documents, {sum(lengths):,} tokens (of an unknown tokenizer)" in text
    assert f"learned: {store.num_targets:,} tokens, {store.num_targets / (sum(lengths) - 68):.1%} of those" in text
    assert (
        f"median {int(np.median(lengths)):,}, mean {np.mean(lengths):,.0f}, longest 3,000 tokens (document 7)" in text
    )
    for low in (1, 2, 16, 128, 2048):
        inside = [length for length in lengths if low <= length < 2 * low]
        row = rf" {low:,} - {2 * low - 1:,} +{len(inside)} +{sum(inside) / sum(lengths):.1%}  █+"
        assert re.search(row, text), (row, text)
    assert re.search(r"512 - 1,023 +0 +0%\n", text)  # between others, so that gaps are seen
    for window in (16, 1024):
        longer = [length for length in lengths if length - 1 > window]
        share = rf" {window:,} +{len(longer)} \({len(longer) / 68:.1%}\) +{sum(longer) / sum(lengths):.1%}"
        assert re.search(share, text), (share, text)


def test_the_padding_is_that_of_the_windows(tmp_path):
    random = np.random.default_rng(0)
    lengths = random.integers(2, 90, 64).tolist()
    with TokenStoreWriter(tmp_path / "a") as writer:
        for length in lengths:
            writer.extend(np.full(length - 1, 5))
            writer.end_document()
    # In one lane without shuffling, whole epochs fill whole windows here and there: count the places of one epoch.
    places = sum(-(-(length - 1) // 16) * 16 for length in lengths)
    lanes = Lanes([Source("a", TokenStore(tmp_path / "a"))], num_lanes=1, window_tokens=places, seed=0, vocab_size=9)
    window, _ = next(lanes)
    padding = (window.targets == -100).float().mean().item()
    assert f"padding: {padding:.1%} of the places" in describe_store(TokenStore(tmp_path / "a"))


CHAT = [
    ("User:", False),
    (" ✂ hé\u3000👩\u200d👧\n\n", False),
    ("Assistant:", False),
    (" 你好 \x1b[31m\u202e😀\n\n", True),
]


@pytest.mark.parametrize("tokenizer", ["world", "bytes"])
def test_a_document_with_what_is_learned_marked(tmp_path, tokenizer):
    store = write(tmp_path / "a", [CHAT, [("all of it", True)]], tokenizer)
    head, text = show_document(store, 0, 0, tokenizer, color=False).split("\n", 1)
    assert text == "User: ✂ hé\u3000👩\u200d👧\n\nAssistant:⟦ 你好 \\x1b[31m\\u202e😀\n\n<end>⟧"
    assert head.endswith(
        f"document 0, {store.length(0)} tokens, {store.num_targets - store.length(1) + 1} learned (between ⟦ and ⟧)"
    )
    colored = show_document(store, 0, 0, tokenizer, color=True).split("\n", 1)[1]
    assert (
        colored
        == "\033[2mUser: ✂ hé\u3000👩\u200d👧\n\nAssistant:\033[0m\033[32m 你好 \\x1b[31m\\u202e😀\n\n<end>\033[0m"
    )
    assert show_document(store, 1, 0, tokenizer, color=False).endswith("⟦all of it<end>⟧")
    assert show_document(store, 1, 1, tokenizer, color=False).endswith(
        f"... and {store.length(1) - 1} more tokens; --first 0 shows all"
    )


def test_a_document_that_is_not_there(tmp_path):
    store = write(tmp_path / "a", [CHAT])
    with pytest.raises(InputError, match="a: has no document 1; give 0 to 0"):
        show_document(store, 1, 0, "world", color=False)
    with pytest.raises(InputError, match="a: nothing says which tokenizer made it; add --tokenizer world or bytes"):
        show_document(store, 0, 0, None, color=False)


def test_the_command(tmp_path):
    write(tmp_path / "a", [CHAT])
    code, output, _ = infctx_here("inspect", tmp_path / "a", "--window-tokens", 32, 64)
    assert code == 0 and "1 document," in output and re.search(r"^ +64 +0 \(0%\) +0%$", output, re.MULTILINE)
    code, output, _ = infctx_here("inspect", tmp_path / "a", "--document", 0, "--tokenizer", "world")
    assert code == 0 and "Assistant:⟦ 你好" in output

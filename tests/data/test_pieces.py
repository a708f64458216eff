"""Documents cut into pieces: every target once, in order; lanes and messages see pieces as documents."""

import numpy as np
import pytest
import torch

from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.data.pieces import Pieces
from infctx.data.token_store import TokenStore
from infctx.errors import InputError
from infctx.settings.load import load_config
from infctx.train.start import open_lanes

from runs import write_config, write_store

LENGTHS = (700, 1, 2, 65, 64, 66, 333, 129)


@pytest.fixture
def store(tmp_path):
    return TokenStore(write_store(tmp_path / "train", lengths=LENGTHS))


@pytest.mark.parametrize("piece_tokens", [1, 16, 64, 65, 100, 10_000])
def test_every_target_appears_once(store, piece_tokens):
    pieces = Pieces(store, piece_tokens)
    found = [[] for _ in LENGTHS]
    for i in range(pieces.num_documents):
        tokens = pieces.tokens(i, 0, pieces.length(i))
        assert len(tokens) == pieces.length(i)
        assert len(tokens) <= piece_tokens + 1
        found[pieces.number(i)] += list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    for document, pairs in enumerate(found):
        whole = store.tokens(document, 0, store.length(document)).tolist()
        assert pairs == list(zip(whole[:-1], whole[1:], strict=True))
    counts = [max(1, -(-(length - 1) // piece_tokens)) for length in LENGTHS]
    assert pieces.num_documents == sum(counts)
    assert pieces.num_tokens == store.num_tokens


def test_a_part_of_a_piece(store):
    pieces = Pieces(store, 100)
    assert np.array_equal(pieces.tokens(3, 5, 20), store.tokens(0, 305, 320))
    assert pieces.number(3) == 0


def test_pieces_of_nothing(store):
    with pytest.raises(InputError, match="pieces of 0 tokens are too short; give"):
        Pieces(store, 0)


def test_each_piece_starts_from_the_initial_state(store):
    lanes = Lanes(
        [Source("one", Pieces(store, 64))], num_lanes=2, window_tokens=64, seed=1, vocab_size=257, shuffle=False
    )
    window, position = next(lanes)
    assert window.starts[:, 0].all()  # two pieces of the first document
    assert window.documents == [["0"], ["0"]]  # numbers of documents, not pieces
    assert torch.equal(window.tokens[1], torch.from_numpy(store.tokens(0, 64, 128)).long())
    again = Lanes(
        [Source("one", Pieces(store, 64))],
        num_lanes=2,
        window_tokens=64,
        seed=1,
        vocab_size=257,
        shuffle=False,
        position=position,
    )
    assert torch.equal(next(lanes)[0].tokens, next(again)[0].tokens)
    with pytest.raises(InputError, match="data.document_tokens: 64 when the checkpoint was saved"):
        Lanes(
            [Source("one", store)],
            num_lanes=2,
            window_tokens=64,
            seed=1,
            vocab_size=257,
            shuffle=False,
            position=position,
        )


def test_the_setting(tmp_path):
    config = load_config(write_config(tmp_path), ["data.document_tokens=32", "data.shuffle=false"])
    window, _ = next(open_lanes(config, 257))
    assert window.starts[0].tolist() == [True, False] * 4
    window, _ = next(open_lanes(load_config(tmp_path / "config.yaml", ["data.shuffle=false"]), 257))
    assert window.starts[0].tolist() == [True] + [False] * 7

"""Mixtures: shares of tokens, the same order on any ranks and after any interruption, every target once an epoch."""

import json
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infctx.data.curriculum import Curriculum
from infctx.data.lanes import Lanes
from infctx.data.mixture import Drawn, Mixture, Source
from infctx.data.pieces import Pieces
from infctx.data.sources import Selection, describe_sources, open_sources
from infctx.data.token_store import TokenStore
from infctx.errors import InputError
from infctx.settings.load import load_config

from list_store import ListStore
from runs import write_config, write_store


def make(sources, num_lanes=4, window_tokens=64, seed=1, vocab_size=1 << 20, **rest):
    return Lanes(sources, num_lanes=num_lanes, window_tokens=window_tokens, seed=seed, vocab_size=vocab_size, **rest)


def numbered_sources(rng, count, masked=False, most=300):
    """Makes sources in which every token is another one, so that a target says which it is."""
    sources, first = [], 1
    for number in range(count):
        lengths = [rng.choice([rng.randrange(2, 40), rng.randrange(2, most), 17]) for _ in range(rng.randrange(2, 12))]
        store = ListStore(lengths, seed=number, masked=masked)
        store.masks[0][1] = True  # something to learn in every source
        for document in store.documents:
            document[:] = np.arange(first, first + len(document))
            first += len(document)
        store.fingerprint = f"of no file {number}"
        sources.append(Source(f"source {number}", store, rng.choice([0.5, 1, 3])))
    return sources


def targets_in(windows):
    """Returns the targets of windows, in no order, and checks that an input comes right before its target."""
    found = []
    for window in windows:
        learned = window.targets != -100
        assert torch.equal(window.tokens[learned] + 1, window.targets[learned])
        found += window.targets[learned].tolist()
        assert window.num_targets == sum(window.source_targets)
    return found


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 3),
    masked=st.booleans(),
    piece_tokens=st.sampled_from([None, 7, 64]),
    curriculum=st.sampled_from([None, Curriculum(16, 64, 9, 16), Curriculum(32, 32, 40, 32)]),
)
@settings(deadline=None, max_examples=40)
def test_every_target_is_trained_once_an_epoch_of_its_source(seed, count, masked, piece_tokens, curriculum):
    """On 1, 2 or 4 ranks, another number after each interruption, wherever it comes."""
    rng = random.Random(seed)
    sources = numbered_sources(rng, count, masked)
    cut = [source._replace(store=Pieces(source.store, piece_tokens)) if piece_tokens else source for source in sources]
    wanted = Counter()
    for source in sources:
        for document, mask in zip(source.store.documents, source.store.masks, strict=True):
            wanted.update(document[mask].tolist())
    position, found, lanes = None, Counter(), None
    for _ in range(12):
        ranks = rng.choice([1, 2, 4])
        shares = [range(rank * 4 // ranks, (rank + 1) * 4 // ranks) for rank in range(ranks)]
        lanes = [make(cut, curriculum=curriculum, lanes=share, position=position) for share in shares]
        for _ in range(rng.randrange(1, 4)):
            windows, positions = zip(*(next(each) for each in lanes), strict=True)
            assert all(each == positions[0] for each in positions)
            position = json.loads(json.dumps(positions[0]))
            here = targets_in(windows)
            assert len(here) == windows[0].num_targets
            found.update(here)
    # Finish what lanes have begun: documents that start from here on belong to nobody.
    rest, mixture = make(cut, curriculum=curriculum, position=position), lanes[0].mixture
    begun = list(mixture.next)
    late = Counter()
    for window, after in islice(rest, 40):
        late.update(targets_in([window]))
        if all(
            index < 0 or index >= begun[source]
            for source, index in zip(after["sources"], after["indices"], strict=True)
        ):
            break

    def draws(place):
        return mixture.at(*place)._replace(place=0)

    places = zip(position["sources"], position["indices"], strict=True)
    unfinished = Counter(draws(place) for place in places if place[1] >= 0)
    for number, source in enumerate(cut):
        times = Counter(draws((number, index)) for index in range(begun[number]))
        for piece in range(source.store.num_documents):
            drawn, length = Drawn(number, 0, piece), source.store.length(piece)
            for token in source.store.tokens(piece, 1, length)[source.store.targets(piece, 1, length)].tolist():
                assert times[drawn] - unfinished[drawn] <= found[token] <= times[drawn] <= found[token] + late[token]
    assert set(found) <= set(wanted)


def test_the_order_stays_on_two_ranks_then_one_then_four():
    sources = numbered_sources(random.Random(8), 3, masked=True)
    curriculum = Curriculum(32, 64, 10, 16)
    whole = [window for window, _ in islice(make(sources, curriculum=curriculum), 12)]
    position, found = None, []
    for ranks in (2, 1, 4):
        shares = [range(rank * 4 // ranks, (rank + 1) * 4 // ranks) for rank in range(ranks)]
        each = [make(sources, curriculum=curriculum, lanes=share, position=position) for share in shares]
        for _ in range(4):
            windows, positions = zip(*map(next, each), strict=True)
            found.append(windows)
        position = json.loads(json.dumps(positions[-1]))
    for window, windows in zip(whole, found, strict=True):
        for name in ("tokens", "targets", "starts", "sources"):
            assert torch.equal(torch.cat([getattr(each, name) for each in windows]), getattr(window, name))
        assert sum((each.documents for each in windows), []) == window.documents
        assert {(each.num_targets, *each.source_targets) for each in windows} == {
            (window.num_targets, *window.source_targets)
        }


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (1, 20), (5, 3, 2), (0.01, 0.01, 1, 0.5)])
def test_shares_are_those_of_the_weights(weights):
    """Within 1% after 2,000 documents, and within a document or so all along, though lengths differ."""
    rng = random.Random(len(weights))
    lengths = [[rng.randrange(2, rng.choice([20, 100, 300])) for _ in range(50)] for _ in weights]
    lengths[0] = [rng.randrange(2, 40) for _ in range(50)]  # far shorter than the others
    sources = [Source(str(i), ListStore(each), weights[i]) for i, each in enumerate(lengths)]
    mixture = Mixture(sources, seed=4, shuffle=True)
    wanted = np.array(weights) / sum(weights)
    for _ in range(2000):
        mixture.draw()
        off = np.abs(np.array(mixture.taken) - wanted * sum(mixture.taken))
        assert off.max() <= (len(weights) - 1) * max(map(max, lengths))
    assert np.abs(np.array(mixture.taken) / sum(mixture.taken) - wanted).max() < 0.01
    # The order within a source is the one it has alone.
    alone = Mixture(sources[-1:], seed=4, shuffle=True)
    assert [alone.draw().place for _ in range(mixture.next[-1])] == list(range(mixture.next[-1]))
    assert alone.at(0, 77).document == mixture.at(len(weights) - 1, 77).document


def test_trained_targets_have_the_shares_too():
    rng = random.Random(3)
    stores = [ListStore([rng.randrange(100, most) for _ in range(40)]) for most in (200, 2000)]
    lanes = make([Source("a", stores[0], 2), Source("b", stores[1], 3)], num_lanes=3, window_tokens=512)
    found = np.zeros(2)
    for window, _ in islice(lanes, 400):
        found += window.source_targets
        mine = [int(((window.sources == source) & (window.targets != -100)).sum()) for source in range(2)]
        assert mine == window.source_targets
        assert all(name.split(" ")[0] in "ab" for names in window.documents for name in names)
    assert abs(found[0] / found.sum() - 0.4) < 0.01


def test_the_seed_breaks_ties():
    sources = [Source(str(i), ListStore([10] * 5)) for i in range(4)]
    firsts = {
        tuple(mixture.draw().source for _ in range(4)) for mixture in (Mixture(sources, s, True) for s in range(9))
    }
    assert len(firsts) > 1 and all(sorted(first) == [0, 1, 2, 3] for first in firsts)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s[:1], "data.sources: 2 sources when the checkpoint was saved, 1 source now; set it back"),
        (lambda s: [s[1], s[0]], r"data.sources\[0\].store: memory/store holds other documents than when"),
        (
            lambda s: [s[0], s[1]._replace(weight=9)],
            "data.sources: shares of 0.25 and 0.75 when .*, shares of 0.1 and 0.9 now",
        ),
    ],
)
def test_a_position_of_another_mixture(change, message):
    sources = [Source("a", ListStore([100, 200]), 1), Source("b", ListStore([50, 70, 90]), 3)]
    _, position = next(make(sources))
    with pytest.raises(InputError, match=message):
        make(change(sources), position=position)
    renamed = [sources[0]._replace(name="other", weight=0.5), sources[1]._replace(weight=1.5)]
    make(renamed, position=position)  # neither changes the order


def test_a_source_with_nothing_to_learn():
    with pytest.raises(InputError, match="memory/store: no document has 2 tokens or more to learn from; prepare"):
        make([Source("a", ListStore([5])), Source("b", ListStore([1]))])


LENGTHS = (700, 1, 2, 65, 64, 66, 333, 129)


def test_short_and_long_documents_are_left_out(tmp_path):
    write_store(tmp_path / "train", lengths=LENGTHS)
    store = Selection(tmp_path / "train", 64, 333)
    kept = [i for i, length in enumerate(LENGTHS) if 64 <= length <= 333]
    assert store.kept() == (len(kept), sum(LENGTHS[i] - 1 for i in kept))
    for source in (store, Pieces(store, 50)):
        mixture, tokens = Mixture([Source("one", source)], 1, True), Counter()
        while mixture.next[0] < 2 * source.num_documents:
            drawn = mixture.draw()
            tokens[source.number(drawn.document)] += source.length(drawn.document) - 1
        assert {i: count // (LENGTHS[i] - 1) for i, count in tokens.items()} in (
            dict.fromkeys(kept, 2),
            dict.fromkeys(kept, 3),
        )
    with pytest.raises(InputError, match="left by data.min_tokens 800; choose others"):
        Mixture([Source("one", Selection(tmp_path / "train", 800, None))], 1, True)
    _, position = next(make([Source("one", store)]))
    with pytest.raises(InputError, match="data.min_tokens: 64 when the checkpoint was saved, null now"):
        make([Source("one", TokenStore(tmp_path / "train"))], position=position)


def test_the_settings(tmp_path):
    for name, lengths in (("books", (500, 90)), ("chats", (40, 30, 20))):
        (tmp_path / name).mkdir()
        write_store(tmp_path / name / "train", lengths=lengths)
    sources = [{"store": str(tmp_path / name / "train")} for name in ("books", "chats")]
    path = write_config(tmp_path, data={"sources": sources, "min_tokens": 25})
    found = open_sources(load_config(path), 257)
    assert [(source.name, source.weight) for source in found] == [("books", 588), ("chats", 68)]
    lines = describe_sources(load_config(path), Mixture(found, 1, True))
    assert lines == ["sources: 89.6% books, 10.4% chats", "left out 1 of 5 documents: shorter than 25 tokens"]
    weights = [sources[0] | {"weight": 2}, sources[1] | {"weight": 6, "name": "talk"}]
    found = open_sources(load_config(write_config(tmp_path, data={"sources": weights, "document_tokens": 32})), 257)
    assert [(source.name, source.weight) for source in found] == [("books", 2), ("talk", 6)]
    assert found[0].store.limits == {"document_tokens": 32}

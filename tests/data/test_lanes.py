import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infctx.data.document_stream import DocumentStream
from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import TokenStore
from infctx.errors import InputError

from list_store import ListStore


def make(store, num_lanes=3, window_tokens=64, seed=1, vocab_size=257, **rest):
    return Lanes(
        [Source("one", store)],
        num_lanes=num_lanes,
        window_tokens=window_tokens,
        seed=seed,
        vocab_size=vocab_size,
        **rest,
    )


def same(a, b):
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.starts, b.starts)
        and (a.documents, a.num_targets, a.epoch) == (b.documents, b.num_targets, b.epoch)
    )


def expected_windows(store, num_lanes, window_tokens, seed, shuffle, count):
    """The definition from the other side: gives whole documents to the lanes, place by place."""
    stream = DocumentStream(store.num_documents, seed, shuffle)
    queues = [[] for _ in range(num_lanes)]  # (input, target, document, starts) of each place
    index = 0
    for _ in range(count):
        tokens, targets, starts = [], [], []
        for queue in queues:
            while len(queue) < window_tokens:
                number = stream.document(index)
                document, mask = store.documents[number].tolist(), store.masks[number].tolist()
                index += 1
                if not any(mask):
                    continue
                wanted = [token if learned else -100 for token, learned in zip(document, mask, strict=True)]
                places = [(a, b, number) for a, b in zip(document[:-1], wanted[1:], strict=True)]
                places += [(0, -100, number)] * (-len(places) % 16)
                queue += [(*place, i == 0) for i, place in enumerate(places)]
            now, queue[:] = queue[:window_tokens], queue[window_tokens:]
            tokens.append([place[0] for place in now])
            targets.append([place[1] for place in now])
            starts.append([any(place[3] for place in now[i : i + 16]) for i in range(0, window_tokens, 16)])
        yield tokens, targets, starts


LENGTHS = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 400), st.sampled_from([15, 16, 17, 18, 33, 65])))


@given(
    lengths=LENGTHS.filter(lambda lengths: max(lengths, default=0) >= 2),
    num_lanes=st.integers(1, 5),
    window_tokens=st.sampled_from([16, 32, 48, 64, 160]),
    seed=st.integers(0, 100),
    shuffle=st.booleans(),
    masked=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_windows_are_the_documents_end_to_end(lengths, num_lanes, window_tokens, seed, shuffle, masked):
    store = ListStore(lengths, seed, masked)
    assume(any(mask.any() for mask in store.masks))
    lanes = make(store, num_lanes, window_tokens, seed, shuffle=shuffle)
    for expected, (window, _) in zip(
        expected_windows(store, num_lanes, window_tokens, seed, shuffle, 6), lanes, strict=False
    ):
        tokens, targets, starts = expected
        assert window.tokens.tolist() == tokens
        assert window.targets.tolist() == targets
        assert window.starts.tolist() == starts
        assert window.num_targets == sum(target != -100 for lane in targets for target in lane)
        assert window.tokens.dtype == window.targets.dtype == torch.int64
        assert window.starts.dtype == torch.bool


def test_a_window_by_hand():
    store = ListStore([20, 3, 1, 40])
    a, b, _, c = (document.tolist() for document in store.documents)
    lanes = make(store, num_lanes=2, window_tokens=48, shuffle=False)
    window, position = next(lanes)
    # lane 0: a in places 0..18, filled up to 32, then b in places 32..33; lane 1: document 2 has one token, then c
    assert window.tokens[0].tolist() == a[:-1] + [0] * 13 + b[:-1] + [0] * 14
    assert window.targets[0].tolist() == a[1:] + [-100] * 13 + b[1:] + [-100] * 14
    assert window.targets[0, 18] == 0  # the end of the document is a target
    assert window.tokens[1].tolist() == c[:-1] + [0] * 9
    assert window.targets[1].tolist() == c[1:] + [-100] * 9
    assert window.starts.tolist() == [[True, False, True], [True, False, False]]
    assert (window.documents, window.num_targets, window.epoch) == ([["0", "1"], ["3"]], 19 + 2 + 39, 0)
    assert position["next"] == [4]
    assert next(lanes)[0].epoch == 1


def targets_of_each_document(store, lanes, num_windows):
    """Returns (document, targets) in the order in which documents end, joined from the windows of all lanes."""
    done, open_documents = [], {}
    for window, _ in islice(lanes, num_windows):
        for lane, documents in enumerate(window.documents):
            documents = iter(documents)
            for place in range(window.tokens.shape[1]):
                begins = place % 16 == 0 and window.starts[lane, place // 16]
                if begins or place == 0:
                    if begins and lane in open_documents:
                        done.append(open_documents.pop(lane))
                    number = int(next(documents))
                    if begins:
                        open_documents[lane] = (number, [])
                    assert open_documents[lane][0] == number
                if (target := int(window.targets[lane, place])) != -100:
                    open_documents[lane][1].append(target)
            assert next(documents, None) is None
    return done, list(open_documents.values())


@pytest.mark.parametrize("num_lanes, window_tokens, masked", [(1, 16, False), (3, 64, True), (4, 512, True)])
def test_every_target_of_every_document_comes_once_an_epoch(num_lanes, window_tokens, masked):
    rng = random.Random(0)
    lengths = [rng.choice([rng.randrange(2, 30), rng.randrange(2, 900)]) for _ in range(37)] + [1, 0]
    store = ListStore(lengths, masked=masked)
    kept = [number for number, mask in enumerate(store.masks) if mask.any()]
    epochs = 3
    lanes = make(store, num_lanes, window_tokens)
    places = sum(-(-(length - 1) // 16) * 16 for length in map(lengths.__getitem__, kept))
    # The last documents of an epoch end while other lanes have begun the next one.
    num_windows = epochs * places // (num_lanes * window_tokens) + max(lengths) // window_tokens + 2
    done, unfinished = targets_of_each_document(store, lanes, num_windows)
    counts = [0] * len(lengths)
    for number, targets in done:
        assert targets == store.documents[number][store.masks[number]].tolist()
        counts[number] += 1
    for number, targets in unfinished:
        assert targets == store.documents[number][store.masks[number]].tolist()[: len(targets)]
        counts[number] += 1
    assert {number for number, count in enumerate(counts) if count} == set(kept)
    assert min(counts[number] for number in kept) >= epochs
    assert max(counts) - min(counts[number] for number in kept) <= 1


def test_a_long_document_continues_in_its_lane():
    store = ListStore([1000, 50])
    windows = [window for window, _ in islice(make(store, 2, 64, shuffle=False), 15)]
    inputs = torch.cat([window.tokens[0] for window in windows])
    assert inputs.tolist() == store.documents[0][:960].tolist()
    assert [bool(window.starts[0].any()) for window in windows] == [True] + [False] * 14
    assert all(window.documents[0] == ["0"] for window in windows)


@pytest.mark.parametrize("shuffle", [True, False])
def test_resuming_from_any_position_equals_never_stopping(shuffle):
    store = ListStore([5, 700, 33, 1, 90, 17, 16, 260])
    whole = list(islice(make(store, shuffle=shuffle), 40))
    for stop in range(39):
        position = json.loads(json.dumps(whole[stop][1]))
        resumed = list(islice(make(store, shuffle=shuffle, position=position), min(5, 39 - stop)))
        for (window, after), (expected, expected_after) in zip(resumed, whole[stop + 1 :], strict=False):
            assert same(window, expected)
            assert after == expected_after


def test_later_windows_do_not_change_a_position():
    lanes = make(ListStore([100, 200]))
    _, position = next(lanes)
    before = json.dumps(position)
    resumed = make(ListStore([100, 200]), position=position)
    for _ in range(5):
        next(lanes)
        next(resumed)
    assert json.dumps(position) == before


@pytest.mark.parametrize("parts", [[2, 2], [1, 1, 1, 1], [3, 1]])
def test_ranks_together_have_what_one_rank_has(parts):
    store = ListStore([5, 700, 33, 1, 90, 17, 16, 260])
    borders = np.cumsum([0, *parts])
    whole = make(store, num_lanes=4)
    ranks = [make(store, num_lanes=4, lanes=range(a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    for _ in range(30):
        window, position = next(whole)
        shares = [next(rank) for rank in ranks]
        assert torch.equal(torch.cat([share.tokens for share, _ in shares]), window.tokens)
        assert torch.equal(torch.cat([share.targets for share, _ in shares]), window.targets)
        assert torch.equal(torch.cat([share.starts for share, _ in shares]), window.starts)
        assert sum([share.documents for share, _ in shares], []) == window.documents
        for share, share_position in shares:
            assert (share.num_targets, share.epoch, share_position) == (window.num_targets, window.epoch, position)


def test_another_number_of_ranks_resumes_with_the_same_documents():
    store = ListStore([5, 700, 33, 90, 17, 260])
    whole = list(islice(make(store, num_lanes=4), 10))
    _, position = list(islice(make(store, num_lanes=4, lanes=range(2, 4)), 5))[-1]
    for lanes in (range(0, 1), range(1, 4), None):
        for (window, _), (expected, _) in zip(
            islice(make(store, num_lanes=4, lanes=lanes, position=position), 5), whole[5:], strict=True
        ):
            assert torch.equal(window.tokens, expected.tokens[lanes or range(4)])


def test_a_rank_reads_only_the_tokens_of_its_lanes():
    store = ListStore([3000] * 8)
    list(islice(make(store, num_lanes=4, lanes=range(1)), 10))
    assert store.num_read <= 10 * 65


def test_counts_that_disagree_with_the_bits_of_a_mask():
    store = ListStore([100], masked=True)
    store.count_targets = lambda i, begin, end: end - begin
    with pytest.raises(InputError, match=r"store\.mask: its running counts and its bits disagree in document 0; copy"):
        next(make(store))


def test_the_window_may_change_at_a_position():
    store = ListStore([500, 300])
    lanes = make(store, num_lanes=1, window_tokens=64, shuffle=False)
    for _ in range(3):
        _, position = next(lanes)
    window, _ = next(make(store, num_lanes=1, window_tokens=128, shuffle=False, position=position))
    assert window.tokens[0].tolist() == store.documents[0][192:320].tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_lanes_of_a_store_on_disk(tmp_path, masked):
    source = ListStore([5, 700, 33, 20], masked=masked)
    with TokenStoreWriter(tmp_path / "train") as writer:
        for document, mask in zip(source.documents, source.masks, strict=True):
            for token, is_target in zip(document[:-1], mask[:-1], strict=True):
                writer.extend(token[None], bool(is_target))
            assert writer.end_document(bool(mask[-1])) == mask.any()
    assert (tmp_path / "train.mask").exists() == masked
    for (window, _), (expected, _) in islice(zip(make(TokenStore(tmp_path / "train")), make(source), strict=True), 10):
        assert same(window, expected)


@pytest.mark.parametrize("window_tokens", [0, -16, 8, 100])
def test_a_window_that_is_not_a_multiple_of_16(window_tokens):
    with pytest.raises(InputError, match=f"window of {window_tokens} tokens is not a multiple of 16"):
        make(ListStore([10]), window_tokens=window_tokens)


def test_no_lanes():
    with pytest.raises(InputError, match="0 lanes are too few; give at least one"):
        make(ListStore([10]), num_lanes=0)


def test_a_store_with_nothing_to_learn():
    with pytest.raises(InputError, match="memory/store: no document has 2 tokens or more to learn from; prepare"):
        make(ListStore([1, 0, 1]))


def test_ids_beyond_the_vocabulary():
    store = ListStore([50, 40])
    store.documents[1][20] = 300
    lanes = make(store, num_lanes=1, window_tokens=16, shuffle=False)
    message = r"memory/store\.bin: token 20 of document 1 is 300, and the model's vocabulary has 257 ids; prepare"
    with pytest.raises(InputError, match=message):
        list(islice(lanes, 6))
    list(islice(make(store, num_lanes=1, window_tokens=16, vocab_size=301), 10))


def test_an_id_that_is_only_a_target_is_checked_too():
    store = ListStore([17])
    store.documents[0][16] = 257
    with pytest.raises(InputError, match="token 16 of document 0 is 257"):
        next(make(store))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_lanes": 4}, "window.lanes: 3 when the checkpoint was saved, 4 now; set it back"),
        ({"seed": 2}, "run.seed: 1 when the checkpoint was saved, 2 now"),
        ({"shuffle": False}, "data.shuffle: true when the checkpoint was saved, false now"),
        ({"store": ListStore([100, 200, 5])}, "data.store: .*holds other documents than when"),
        ({"store": ListStore([100, 201])}, "data.store: .*holds other documents than when"),
    ],
)
def test_a_position_of_something_else(change, message):
    _, position = next(make(ListStore([100, 200])))
    with pytest.raises(InputError, match=message):
        make(**{"store": ListStore([100, 200]), **change}, position=position)


@pytest.mark.parametrize(
    "damage",
    [
        {"next": None},
        {"next": [-1], "indices": [-1, -1, -1], "begins": [0, 0, 0]},
        {"indices": [0, 1]},
        {"indices": "012"},
        {"indices": [0, 1, 2.5]},
        {"indices": [0, 1, 10**6]},
        {"indices": [0, 1, -2]},
        {"begins": [0, 0, 8]},
        {"begins": [0, 0, 16000]},
        {"begins": [0, 0, -16]},
        {"begins": None},
        {"sources": [0, 1, 0]},
        {"sources": [0, -1, 0]},
        {"cuts": [48, -1, -1]},
        {"cuts": [-1, 72, -1]},
        {"cuts": [-1, -1, 16000]},
        {"taken": [-1]},
        {"windows": [-1]},
        {"windows": 1},
    ],
)
def test_a_damaged_position(damage):
    store = ListStore([1000, 2000, 1500])
    _, position = next(make(store))
    assert position["begins"] == [64, 64, 64]
    with pytest.raises(InputError, match="the saved position .*; the checkpoint is damaged"):
        make(store, position={**position, **damage})

import time
from collections import Counter

import pytest

from infctx.data.document_stream import DocumentStream


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 99, 100, 101, 1000, 1023, 4097])
def test_every_epoch_has_every_document_once(n):
    stream = DocumentStream(n, seed=n)
    for epoch in range(3):
        assert sorted(stream.document(epoch * n + place) for place in range(n)) == list(range(n))


def test_earlier_calls_do_not_matter():
    n = 50
    forward = DocumentStream(n, seed=3)
    backward = DocumentStream(n, seed=3)
    expected = [forward.document(i) for i in range(4 * n)]
    assert [backward.document(i) for i in reversed(range(4 * n))] == expected[::-1]


def test_epochs_and_seeds_differ():
    n = 1000
    orders = {
        tuple(DocumentStream(n, seed).document(epoch * n + place) for place in range(n))
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


def test_the_order_is_fixed():
    """A checkpoint resumes in this order; changing it breaks resuming."""
    assert [DocumentStream(10, seed=0).document(i) for i in range(20)] == [
        8,
        4,
        9,
        1,
        5,
        7,
        3,
        0,
        2,
        6,
        3,
        9,
        5,
        2,
        0,
        6,
        4,
        1,
        8,
        7,
    ]
    assert DocumentStream(10**8, seed=7).document(123456789) == 41060107


def test_every_order_of_a_few_documents_is_about_as_likely():
    for n, orders in ((2, 2), (3, 6), (4, 24)):
        trials = 100 * orders
        counts = Counter(tuple(DocumentStream(n, seed).document(i) for i in range(n)) for seed in range(trials))
        assert len(counts) == orders
        # chi-square with orders - 1 degrees of freedom: mean orders - 1, deviation sqrt(2 (orders - 1)); 5 deviations
        chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
        assert chi_square < (orders - 1) + 5 * (2 * (orders - 1)) ** 0.5


@pytest.mark.parametrize("n", [5, 7, 9, 10])
def test_every_pair_of_first_documents_is_about_as_likely(n):
    pairs = n * (n - 1)
    counts = Counter()
    for seed in range(50 * pairs):
        stream = DocumentStream(n, seed)
        counts[stream.document(0), stream.document(1)] += 1
    assert len(counts) == pairs
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values())
    assert chi_square < (pairs - 1) + 5 * (2 * (pairs - 1)) ** 0.5


def test_neighbors_do_not_stay_together():
    n = 10_000
    stream = DocumentStream(n, seed=1)
    order = [stream.document(i) for i in range(n)]
    near = sum(abs(a - b) < n // 100 for a, b in zip(order, order[1:], strict=False))
    assert near < 3 * n * 2 // 100
    assert sum(a == i for i, a in enumerate(order)) < 10


def test_a_huge_number_of_documents_costs_nothing():
    begin = time.process_time()
    stream = DocumentStream(10**12, seed=5)
    documents = {stream.document(i) for i in range(1000)}
    assert len(documents) == 1000
    assert all(0 <= document < 10**12 for document in documents)
    assert time.process_time() - begin < 1


def test_in_order_without_shuffle():
    stream = DocumentStream(3, seed=9, shuffle=False)
    assert [stream.document(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_epoch():
    stream = DocumentStream(3, seed=0)
    assert [stream.epoch(i) for i in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_no_documents_are_refused():
    with pytest.raises(ValueError, match="at least one document"):
        DocumentStream(0, seed=0)

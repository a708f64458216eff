"""What a model remembers, measured on models whose memory is known, and on documents made for it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import infctx
from infctx.data.store_writer import TokenStoreWriter
from infctx.data.synthetic_tasks import ASK, FIRST_NOISE, VOCAB_SIZE, WRITE, Task
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer
from infctx.evaluate.loss_by_position import Bucket, DocumentLoss, choose_documents, evaluate_reading, total
from infctx.measures.bootstrap import standard_error
from infctx.measures.forgetting import distances_of, measure_forgetting
from infctx.measures.needle import DEPTHS, TASKS, lengths_of, make_prompt, measure_needle
from infctx.measures.positions import position_rows
from infctx.measures.reach import measure_reach
from infctx.measures.recall import gaps_of, measure_recall
from infctx.measures.states import format_states, measure_states
from infctx.measures.text import StoreText

from remembering import Answering, Copier, Finder
from runs import write_store
from tiny_models import random_model


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(write_store(tmp_path_factory.mktemp("stores") / "store"))


@pytest.fixture(scope="module")
def model():
    return random_model(6, vocab_size=257, dtype=torch.float64)


def write_tokens(path, documents):
    """Writes a store of documents: their tokens, and the place of the only target, None for every token."""
    with TokenStoreWriter(path) as writer:
        for tokens, target in documents:
            ids, place = np.asarray(tokens, np.uint16), target or 0
            parts = np.split(ids, [place, place + 1])
            for part, is_target in zip(parts, (target is None, True, target is None), strict=True):
                writer.extend(part, is_target)
            writer.end_document(target is None)
    return TokenStore(path)


# Positions.


def test_errors_are_those_of_the_mean():
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, 400).astype(float)
    sums = random.normal(2, 0.5, 400) * counts
    ratio = sums.sum() / counts.sum()
    wanted = math.sqrt(((sums - ratio * counts) ** 2).sum()) / counts.sum()
    assert standard_error(sums, counts, 3) == pytest.approx(wanted, rel=0.15)
    assert standard_error(sums, counts, 3) == standard_error(sums, counts, 3) != standard_error(sums, counts, 4)
    other = sums + 0.1 * counts  # worse everywhere by the same: no error of the difference
    assert standard_error(sums, counts, 3, other) == pytest.approx(0, abs=1e-12)
    assert standard_error(sums[:1], counts[:1], 3) is None


def test_models_differ_only_where_they_do(store, model):
    """Without carry, nothing changes in the first segment."""
    reading = choose_documents(store, 257, 256, 1 << 20)
    with_carry, without = (evaluate_reading(model, reading, carries=carries) for carries in (True, False))
    first, *others, whole = position_rows(without, 0, with_carry)
    assert (first.end, first.difference, first.difference_error) == (256, 0, 0)
    assert all(abs(row.difference) > 1e-4 and row.difference_error > 1e-5 for row in others[:1])
    assert whole.num_tokens == sum(row.num_tokens for row in (first, *others))
    assert whole.difference == pytest.approx(
        total([b for d in without for b in d.buckets]).nats_per_token
        - total([b for d in with_carry for b in d.buckets]).nats_per_token
    )
    assert all(row.difference == row.difference_error == 0 for row in position_rows(without, 0, without)[:2])
    assert position_rows(without, 0)[0].difference is None and "difference" not in position_rows(without, 0)[0].entry()


def test_a_bucket_of_one_document_has_no_error():
    def loss(*buckets):
        return DocumentLoss([Bucket(*bucket) for bucket in buckets], [])

    documents = [loss((0, 256, 5, 6.0)), loss((0, 256, 5, 9.0), (256, 1024, 3, 4.0))]
    first, second, _ = position_rows(documents, 0)
    assert first.standard_error > 0 and second.standard_error is None
    assert (second.num_tokens, second.nats_per_token) == (3, pytest.approx(4 / 3))


@pytest.mark.parametrize("segment_tokens", [7, 64, 1000, 4096])
def test_the_total_is_the_sum_over_segments(store, segment_tokens):
    model = random_model(7, vocab_size=257)
    (whole,) = _totals(model, store, 1 << 20)
    (cut,) = _totals(model, store, segment_tokens)
    assert cut == pytest.approx(whole, rel=1e-6)


def _totals(model, store, segment_tokens):
    documents = evaluate_reading(model, choose_documents(store, 257, segment_tokens, 700))
    sums = {total([bucket for its in documents for bucket in its.buckets]).nats}
    pieces = sum(nats for its in documents for _, nats in its.pieces)
    assert sums.pop() == pytest.approx(pieces, rel=1e-12)
    return [pieces]


def test_no_more_than_a_segment_is_in_memory(store, model, monkeypatch):
    """Whatever the length: of a document, a text, a past."""
    read, spans = TokenStore.tokens, []

    def watched(self, document, begin, end):
        spans.append(end - begin)
        return read(self, document, begin, end)

    monkeypatch.setattr(TokenStore, "tokens", watched)
    reading = choose_documents(store, 257, 64, 1 << 20).only([0, 3])
    measures = (
        lambda: evaluate_reading(model, reading),
        lambda: measure_reach(model, reading, 1, 0),
        lambda: measure_states(model, reading, 1),
        lambda: measure_forgetting(model, StoreText(store, 257), 64, [200], 3, 0),
    )
    for measure in measures:
        measure()
        assert 60 <= max(spans) <= 65
        spans.clear()


# Reach.


def test_nothing_reaches_beyond_a_segment_without_carry(store, model):
    reading = choose_documents(store, 257, 64, 1 << 20)
    with_carry, without = (measure_reach(model, reading, 4, 0, carries) for carries in (True, False))
    assert [row.tokens for row in with_carry] == [row.tokens for row in without] == [2**n for n in range(len(without))]
    assert len(without) >= 8
    assert all(row.distance == 0 for row in without if row.tokens >= 64)
    assert without[0].distance > 1e-3 and with_carry[6].distance > 1e-6
    assert all(row.standard_error > 0 for row in with_carry[:6])


def test_reach_is_the_total_variation_of_two_predictions(tmp_path, model):
    tokens = np.random.default_rng(0).integers(1, 257, 90)
    store = write_tokens(tmp_path / "one", [(tokens, 64)])
    rows = measure_reach(model, choose_documents(store, 257, 50, 1 << 20), 9, 0)
    assert [row.tokens for row in rows] == [1, 2, 4, 8, 16, 32]  # 64 would be the whole past
    past = torch.from_numpy(tokens[:64])[None]
    for row in rows:
        whole, part = (model.logits(model(t)[0][0, -1]).softmax(-1) for t in (past, past[:, -row.tokens :]))
        assert row.distance == pytest.approx((whole - part).abs().sum().item() / 2, rel=1e-9)
        assert row.standard_error is None


def test_reach_goes_as_far_as_the_fact_that_is_asked_for(tmp_path):
    """The answer is 40 tokens after its fact: with fewer it is unknown, and what is further back does not count."""
    random = np.random.default_rng(0)
    documents = []
    for value in range(1, 9):
        tokens = random.integers(FIRST_NOISE, FIRST_NOISE + 16, 201)
        tokens[150:152], tokens[190:192] = (WRITE, value), (ASK, value)
        documents.append((tokens, 191))
    store = write_tokens(tmp_path / "facts", documents)
    rows = measure_reach(Answering(1000, VOCAB_SIZE), choose_documents(store, VOCAB_SIZE, 16, 1 << 20), 8, 0)
    distances = {row.tokens: row.distance for row in rows}
    assert sorted(distances) == [1, 2, 4, 8, 16, 32, 64, 128]
    for tokens, distance in distances.items():
        assert distance == pytest.approx(1 - 1 / VOCAB_SIZE if tokens < 41 else 0, abs=1e-6), tokens


# Forgetting.


def test_a_model_that_copies_forgets_in_one_step(store):
    """Its memory is 130 tokens: a text of 127 and the three tokens that it recognizes."""
    text = StoreText(store, 257)
    lengths = [64, 126, 130, 200]
    rows = measure_forgetting(Copier(130), _random_text(), 50, lengths, 3, 0)
    assert [row.distance for row in rows] == lengths
    assert [row.copy_accuracy for row in rows] == [1, 1, 0, 0]
    assert all(row.language_accuracy == 0 and row.difference == row.copy_accuracy for row in rows)
    assert distances_of(text, None, 1 << 20) == [64, 256]
    assert distances_of(text, None, 100) == [64] and distances_of(text, [99], 100) == [99]


def _random_text():
    """A text in which no three tokens come twice."""
    tokens = torch.from_numpy(np.random.default_rng(0).permutation(256 * 4) % 256 + 1)
    pairs = torch.stack([tokens, torch.roll(tokens, 7)], 1).flatten()
    return SimpleNamespace(
        num_tokens=len(pairs),
        read=lambda begin, end: pairs[begin:end],
        begins=lambda count, _: [500 * number for number in range(count)],
    )


def test_a_stores_text_is_its_documents_without_their_ends(store):
    text = StoreText(store, 257)
    whole = np.concatenate([store.tokens(n, 0, store.length(n) - 1) for n in range(store.num_documents)])
    assert text.num_tokens == len(whole) and 0 not in whole
    for begin, end in ((0, len(whole)), (698, 701), (699, 700), (0, 1), (738, 1072), (len(whole) - 1, len(whole))):
        assert text.read(begin, end).tolist() == whole[begin:end].tolist()
    assert text.begins(3, 100) == [0, (len(whole) - 100) // 2, len(whole) - 100] and text.begins(1, 5) == [0]


# Recall.


def test_recall_ends_where_memory_does():
    assert gaps_of(257, None) == [128, 512, 2048]
    for memory in (100, 1000):
        rows = measure_recall(Answering(memory), 64, [40, 200], 5, 0)
        cells = [(row.gap_tokens, row.keys, row.overwritten) for row in rows]
        assert cells == [(g, k, o) for o in (False, True) for g in (40, 200) for k in (1, 4, 16)]
        for row in rows:
            assert row.asked == 5 * row.keys
            if memory == 1000 or (row.gap_tokens == 40 and row.keys < 16 and not row.overwritten):
                assert row.right == row.asked, row
            elif row.gap_tokens == 200:
                assert row.right == 0, row


def test_recall_is_the_same_in_segments_of_any_length():
    model = random_model(7, vocab_size=100)
    counts = [[row.right for row in measure_recall(model, tokens, [70], 20, 5)] for tokens in (1 << 20, 160)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_a_model_that_learned_to_recall_reaches_its_fact_and_no_further(tmp_path):
    """Trained with the exact gradient; its fact is at most 16 tokens before the gap, and the answer is at its end."""
    task = Task("recall", 64, 1)
    model = infctx.build_model(version=6, vocab_size=VOCAB_SIZE, num_layers=1, width=64, head_size=32, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    random = np.random.default_rng(0)
    for _ in range(250):
        tokens, targets = (torch.from_numpy(part) for part in task.batch(random, 32))
        loss, _ = infctx.window_backward(model, tokens, targets, 16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    (row,) = measure_recall(model, 64, [64], None, 1)[:1]
    assert (row.keys, row.overwritten) == (1, False) and row.right >= 0.95 * row.asked
    documents = []
    for _ in range(12):
        tokens, _ = task.batch(random, 1)
        before = random.integers(FIRST_NOISE, FIRST_NOISE + 16, 100)
        documents.append((np.concatenate([before, tokens[0]]), 100 + task.num_tokens - 1))
    store = write_tokens(tmp_path / "facts", documents)
    reading = choose_documents(store, VOCAB_SIZE, 16, 1 << 20)
    distances = {row.tokens: row.distance for row in measure_reach(model, reading, 12, 0)}
    assert distances[32] > 0.6 and distances[128] < 0.2, distances


# Needles.


def test_needles_are_found_as_far_back_as_memory_goes(tmp_path):
    sentences = " ".join(f"Sentence {number} says little." for number in range(200))
    ids = np.frombuffer(sentences.encode(), np.uint8).astype(np.uint16) + 1
    text = StoreText(write_tokens(tmp_path / "text", [(ids, None)]), 257)
    (length,) = lengths_of(text, [1024])
    for memory, found in ((1 << 20, {0, 0.5, 1}), (600, {1.0}), (40, set())):
        rows = measure_needle(Finder(memory), text, 300, [length], 1, 0)
        assert [(row.task, row.depth) for row in rows] == [(task, depth) for task in TASKS for depth in DEPTHS]
        for row in rows:
            assert row.asked == 1
            if row.depth in (0, 1) or memory != 600:
                assert row.right == (row.depth in found or memory > 5000), row


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(tmp_path, task):
    tokenizer = get_tokenizer("bytes")
    sentences = "é, and this says little. " * 200
    ids = np.frombuffer(sentences.encode(), np.uint8).astype(np.uint16) + 1
    text = StoreText(write_tokens(tmp_path / "text", [(ids, None)]), 257)
    for depth in (0, 0.3, 1):
        prompt = make_prompt(task, text, tokenizer, (1500, depth), np.random.default_rng(1))
        words = tokenizer.decode(prompt.tokens).decode()
        value = tokenizer.decode(prompt.answer).decode()
        assert 1490 <= len(prompt.tokens) + len(prompt.answer) <= 1500
        assert words.count(value) == 1 and words.endswith("mentioned in the provided text is")
        begin, end = words.index("afterwards.\n"), words.index("\nWhat is")
        assert (words.index("One of") - begin) / (end - begin) == pytest.approx(0.94 * depth + 0.01, abs=0.09)
        again = make_prompt(task, text, tokenizer, (1500, depth), np.random.default_rng(1))
        assert (again.tokens == prompt.tokens).all()


# States.


def test_states_are_measured_as_they_are(store, model):
    reading = choose_documents(store, 257, 100, 1 << 20)
    rows, _ = measure_states(model, reading, 1)
    assert [(row.layer, row.position) for row in rows] == [(n, p) for n in (0, 1) for p in (100, 200, 400, 800)]
    tokens = torch.from_numpy(store.tokens(3, 0, 800))[None]
    before, after = (model(tokens[:, :end])[1].wkv[1, 0] for end in (700, 800))  # (H, N, N)
    row = rows[-1]
    assert row.norm == pytest.approx(after.norm().item(), rel=1e-9)
    assert row.saturation == pytest.approx(max(0, 1 - ((after - before).norm() / after.norm()).item() ** 2), rel=1e-6)
    values = torch.linalg.svdvals(after)
    shares = values / values.sum(1, keepdim=True)
    assert row.effective_rank == pytest.approx((-shares * shares.log()).sum(1).exp().mean().item(), rel=1e-6)


def test_a_state_that_collapses_is_found(store):
    """A head that forgets nothing, and always writes nearly the same."""
    model = random_model(6, vocab_size=257)
    reading = choose_documents(store, 257, 50, 1 << 20)
    rows, collapse = measure_states(model, reading, 2)
    assert collapse is None
    assert "state collapse: no sign up to 800 tokens" in format_states(rows, collapse, "it")
    with torch.no_grad():
        model.blocks[1].time_norm.bias += 5
        model.blocks[1].time_mix.mixing.decay[..., 8:16] = -20.0
    rows, collapse = measure_states(model, reading, 2)
    assert (collapse.layer, collapse.head) == (1, 1)
    assert format_states(rows, collapse, "it").splitlines()[-1] == (
        "state collapse, a sign: layer 1, head 1 grows 4.0 times in norm from 200 to 800 tokens; its effective rank "
        "was 1.2 and is 1.2"
    )
    short = choose_documents(store, 257, 500, 1 << 20)
    assert "not judged" in format_states(*measure_states(model, short, 2), "it")

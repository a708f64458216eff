"""Loss by position: the judge is one forward pass over each whole document in float64."""

import io
import math

import numpy as np
import pytest
import torch

from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import TokenStore
from infctx.errors import InputError
from infctx.evaluate import loss_by_position as evaluate_module
from infctx.evaluate.loss_by_position import Bucket, evaluate_store, format_table, summarize, total
from infctx.evaluate.record import Evaluation, read_record, write_record

from tiny_models import random_model

ALL = 1 << 30


def write_documents(path, lengths, vocab_size=257, seed=0, masked=False):
    """Writes a store of random documents, each with its end; `lengths` in tokens; masked: a third is no target."""
    random = np.random.default_rng(seed)
    with TokenStoreWriter(path) as writer:
        for length in lengths:
            ids = random.integers(1, vocab_size, length - 1).astype(np.uint16)
            for part in np.array_split(ids, 7):
                writer.extend(part, not masked or random.random() > 1 / 3)
            writer.end_document()
    return TokenStore(path)


@pytest.fixture(scope="module")
def model():
    return random_model(6, dtype=torch.float64, vocab_size=257, with_state=True)


@torch.no_grad()
def losses_of(model, store, document, limit=ALL):
    """Returns the judge's losses in nats for targets 1, 2, ... of a document."""
    tokens = torch.from_numpy(store.tokens(document, 0, min(limit, store.length(document))))
    hidden, _ = model(tokens[None, :-1])
    return -model.logits(hidden)[0].log_softmax(1).gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize(
    "segment_tokens, masked", [(1, False), (100, True), (255, False), (256, True), (1024, True), (5000, False)]
)
def test_buckets_and_losses(tmp_path, model, segment_tokens, masked):
    lengths = (2, 257, 258, 40, 1500) if segment_tokens > 1 else (2, 258, 40)
    store = write_documents(tmp_path / "store", lengths, masked=masked)
    buckets = evaluate_store(model, store, segment_tokens, ALL)
    borders = [(0, 256), (256, 1024), (1024, 4096)][: 3 if segment_tokens > 1 else 2]
    assert [(bucket.begin, bucket.end) for bucket in buckets] == borders
    losses = [losses_of(model, store, document) for document in range(len(lengths))]
    masks = [torch.from_numpy(store.targets(i, 1, length)) for i, length in enumerate(lengths)]
    for bucket in buckets:
        place = slice(bucket.begin, bucket.end)
        inside = torch.cat([of_one[place][mask[place]] for of_one, mask in zip(losses, masks, strict=True)])
        assert bucket.num_tokens == len(inside) > 0
        assert bucket.nats == pytest.approx(inside.sum().item(), rel=1e-12)
        assert bucket.nats_per_token == pytest.approx(inside.mean().item(), rel=1e-12)
    assert total(buckets).num_tokens == store.num_targets


def test_the_end_of_a_document_is_not_a_byte(tmp_path, model):
    store = write_documents(tmp_path / "store", (300, 20))
    first, second = evaluate_store(model, store, 64, ALL)
    # targets: 299 and 19; the last of each ends its document, and the first token is not a target
    assert (first.num_tokens, first.num_bytes) == (256 + 19, 256 + 18)
    assert (second.num_tokens, second.num_bytes) == (43, 42)
    for bucket in (first, second):
        assert bucket.bits_per_byte == pytest.approx(bucket.nats / math.log(2) / bucket.num_bytes, rel=1e-12)
    whole = total([first, second])
    assert (whole.num_tokens, whole.num_bytes) == (318, 316)
    assert whole.bits_per_byte == pytest.approx((first.nats + second.nats) / math.log(2) / 316, rel=1e-12)


def test_a_model_that_knows_nothing_needs_eight_bits(tmp_path):
    """257 equally likely tokens: log2(257) = 8.0056 bits each, over the bytes without the ends of documents."""
    model = random_model(5, vocab_size=257)
    with torch.no_grad():
        model.head.weight.zero_()
    store = write_documents(tmp_path / "store", (1001,))
    whole = total(evaluate_store(model, store, 128, ALL))
    assert whole.nats_per_token == pytest.approx(math.log(257), rel=1e-6)
    assert whole.bits_per_byte == pytest.approx(math.log2(257) * 1000 / 999, rel=1e-6)


def test_other_vocabularies_have_no_bytes(tmp_path):
    model = random_model(5, vocab_size=300)
    store = write_documents(tmp_path / "store", (50,), vocab_size=300)
    buckets = evaluate_store(model, store, 64, ALL)
    assert buckets[0].bits_per_byte is None
    assert format_table(buckets, "a store").splitlines()[2].endswith(" -")
    assert "nats per token" in summarize(buckets)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "limit"),
    [
        ((100, 200, 400), 700, 400),  # every token
        ((100, 200, 400), 699, 399),
        ((100, 200, 400), 500, 200),
        ((100, 200, 400), 499, 199),  # 100 and twice 199
        ((100, 200, 400), 290, 96),
        ((400, 100, 200), 290, 96),
        ((100, 200, 400), 1, 2),  # one target of each document, despite the limit
    ],
)
def test_tokens_are_divided_evenly(tmp_path, model, lengths, max_tokens, limit):
    store = write_documents(tmp_path / "store", lengths)
    buckets = evaluate_store(model, store, 4096, max_tokens)
    assert total(buckets).num_tokens == sum(min(length, limit) - 1 for length in lengths)
    wanted = sum(losses_of(model, store, document, limit).sum().item() for document in range(len(lengths)))
    assert total(buckets).nats == pytest.approx(wanted, rel=1e-12)


def test_documents_without_a_target_are_left_out(tmp_path, model):
    store = write_documents(tmp_path / "store", (1, 30, 1))
    assert total(evaluate_store(model, store, 64, ALL)).num_tokens == 29
    empty = write_documents(tmp_path / "empty", (1, 1))
    with pytest.raises(InputError, match="empty: no document of two tokens"):
        evaluate_store(model, empty, 64, ALL)


def test_many_documents_are_sampled_evenly(tmp_path, model, monkeypatch):
    monkeypatch.setattr(evaluate_module, "MOST_DOCUMENTS", 4)
    lengths = tuple(range(2, 12))
    store = write_documents(tmp_path / "store", lengths)
    whole = total(evaluate_store(model, store, 64, ALL))
    assert whole.num_tokens == sum(lengths[document] - 1 for document in (0, 2, 5, 7))


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    store = write_documents(tmp_path / "store", (20, 400), vocab_size=60000)
    with pytest.raises(
        InputError, match=r"store: document 0 has token \d+, and the model has 257 ids; prepare"
    ) as refused:
        evaluate_store(random_model(5, vocab_size=257), store, 64, ALL)
    assert "\n" not in str(refused.value)


def test_the_model_does_not_change(tmp_path):
    model = random_model(6, vocab_size=257)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    evaluate_store(model, write_documents(tmp_path / "store", (40,)), 16, ALL)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_table_and_summary(tmp_path):
    buckets = [Bucket(0, 256, 1000, 2000 * math.log(2), 990), Bucket(256, 1024, 3000, 3000 * math.log(2), 3000)]
    lines = format_table(buckets, "data/store").splitlines()
    assert lines[0] == "held-out loss by position in data/store"
    assert [line.split() for line in lines[2:]] == [
        ["0", "-", "255", "1,000", "1.3863", "2.020"],
        ["256", "-", "1,023", "3,000", "0.6931", "1.000"],
        ["all", "4,000", "0.8664", "1.253"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1
    assert summarize(buckets) == ("1.253 bits per byte: 2.020 in a document's first 256 tokens, 1.000 from 256 on")
    assert summarize(buckets[:1]) == "2.020 bits per byte"


def test_a_record_keeps_the_measurements(tmp_path, model):
    store = write_documents(tmp_path / "store", (300, 20))
    unknown = [Bucket(0, 256, 3, 2.5)]
    measured = [Evaluation(0, False, evaluate_store(model, store, 64, ALL)), Evaluation(7, True, unknown)]
    write_record(tmp_path / "held_out.json", str(store.path), 500, measured)
    again = read_record(tmp_path / "held_out.json", str(store.path), 500)
    for one, other in zip(measured, again, strict=True):
        assert one[:2] == other[:2]
        for mine, its in zip(one.buckets, other.buckets, strict=True):
            assert (mine.begin, mine.end, mine.num_tokens, mine.num_bytes) == (
                its.begin,
                its.end,
                its.num_tokens,
                its.num_bytes,
            )
            assert its.nats == pytest.approx(mine.nats, rel=1e-12)
    assert read_record(tmp_path / "held_out.json", tmp_path / "other", 500) == []
    assert read_record(tmp_path / "held_out.json", str(store.path), 501) == []
    assert read_record(tmp_path / "gone.json", store.path, 500) == []


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[" * 9999, '{"store": "s", "tokens": 5, "evaluations": [{"step": 1, "buckets": 3}]}']
)
def test_a_damaged_record_is_a_value_error(tmp_path, content):
    (tmp_path / "held_out.json").write_text(content)
    with pytest.raises(ValueError):
        read_record(tmp_path / "held_out.json", "s", 5)


def test_only_a_terminal_shows_a_bar_and_then_clears_it(tmp_path, model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    store = write_documents(tmp_path / "store", (300, 20))
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        evaluate_store(model, store, 64, ALL)
        shown = stream.getvalue()
        assert ("held-out loss:   0%" in shown and "/318" in shown) == stream.isatty()
        assert shown == "" or shown.split("\r")[-1].strip() == ""

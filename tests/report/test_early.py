"""Early reports: a rise that noise explains is never reported, a real one is, once, with what to do."""

import numpy as np
import pytest

from infctx.evaluate.loss_by_position import Bucket, DocumentLoss, merge
from infctx.evaluate.record import Evaluation
from infctx.report.early import EarlyReport, rise_by_position
from infctx.settings.load import load_config

from runs import write_config

EDGES = [0, 256, 1024, 4096, 16384, 65536]
PIECE = 128


def measured(random, lengths, level, noise=1.5, rise=0.0):
    """Losses of documents: independent tokens around a level for each document, plus `rise` per bucket.

    level: of each document, in nats per token
    """
    documents = []
    for length, mean in zip(lengths, level, strict=True):
        losses = mean + noise * random.standard_normal(length)
        for number, (begin, end) in enumerate(zip(EDGES, EDGES[1:], strict=False)):
            losses[begin:end] += rise * number
        buckets = [
            Bucket(begin, end, len(losses[begin:end]), float(losses[begin:end].sum()))
            for begin, end in zip(EDGES, EDGES[1:], strict=False)
            if begin < length
        ]
        pieces = [(len(piece), float(piece.sum())) for piece in np.split(losses, range(PIECE, length, PIECE))]
        documents.append(DocumentLoss(buckets, pieces))
    return documents


def report_of(config, series):
    """Returns the lines of a series of measurements, by evaluation."""
    report = EarlyReport(config)
    return [
        report.add(Evaluation(10 * number, False, merge([one.buckets for one in documents])), documents)
        for number, documents in enumerate(series, start=1)
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_config(tmp_path_factory.mktemp("early"), run__evaluate_every_steps=10))


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_noise_is_never_reported(config, count):
    """A constant loss: 100 evaluations, each with new noise, of documents of different lengths and difficulty."""
    random = np.random.default_rng(count)
    lengths = random.integers(300, 9_000, count)
    level = random.uniform(1.0, 1.4, count)
    series = (measured(random, lengths, level) for _ in range(100))
    assert [lines for lines in report_of(config, series) if lines] == []


def test_documents_of_different_difficulty_are_not_compared_with_each_other():
    """Short documents are easy and long ones hard, and none gets harder on the way."""
    random = np.random.default_rng(0)
    lengths = np.array([900] * 20 + [8000] * 20)
    assert rise_by_position(measured(random, lengths, np.where(lengths > 4000, 3.0, 1.0))) is None


@pytest.mark.parametrize(("count", "rise"), [(5, 1.0), (30, 0.15)])
def test_a_rise_with_position_is_reported_with_both_places(config, count, rise):
    random = np.random.default_rng(1)
    level = random.uniform(1.0, 3.0, count)
    documents = measured(random, [5000] * count, level, rise=rise)
    line = rise_by_position(documents)
    assert line.startswith("held-out loss by position: rises from ")
    assert "at 256 - 1,023 to " in line and f"at 1,024 - 4,095 in the same {count} documents: " in line
    assert "window.window_tokens of 4,096 or more" in line
    lines = report_of(config, [documents] * 3)
    assert lines == [[line], [], []]  # once
    assert rise_by_position(documents[:4]) is None  # too few to know
    assert rise_by_position(measured(random, [5000] * count, level, rise=-0.15)) is None
    assert rise_by_position(measured(random, [5000] * count, level, noise=0.01, rise=0.002)) is None  # too small


def test_a_harder_middle_after_an_easy_head_is_no_rise():
    """The first bucket may be a license that every document begins with."""
    random = np.random.default_rng(2)
    documents = measured(random, [3000] * 20, [2.0] * 20)
    for document in documents:
        document.buckets[0].nats *= 0.1
    assert rise_by_position(documents) is None


@pytest.mark.parametrize("lengths", [[20_000], [700] * 12])
def test_a_loss_that_rises_for_several_evaluations_is_reported(config, lengths):
    random = np.random.default_rng(3)
    level = np.full(len(lengths), 2.0)
    losses = [2.0, 1.6, 1.5, 1.53, 1.57, 1.62, 1.7, 1.2, 1.3, 1.4, 1.5]
    series = [measured(random, lengths, level * loss / 2, noise=0.3) for loss in losses]
    lines = report_of(config, series)
    assert [bool(line) for line in lines] == [number in (5, 10) for number in range(len(losses))]
    ((line,),) = [found for found in lines[:6] if found]
    assert line.startswith("held-out loss: has risen 3 times in a row, from 1.5") and "at step 30 to 1.6" in line
    assert f"{config.run.checkpoints}/best has the best" in line

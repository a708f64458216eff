"""A curriculum: documents are cut where the limit of the step says, and nothing is lost at a cut."""

from itertools import islice

import pytest

from infctx.data.curriculum import Curriculum
from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.errors import InputError
from infctx.settings.load import load_config
from infctx.train.start import open_lanes

from list_store import ListStore
from runs import write_config


def make(lengths, curriculum, num_lanes=1, position=None):
    sources = [Source("one", ListStore(lengths))]
    return Lanes(
        sources,
        num_lanes=num_lanes,
        window_tokens=64,
        seed=1,
        vocab_size=257,
        shuffle=False,
        curriculum=curriculum,
        position=position,
    )


def test_the_limit_grows_by_a_unit_at_a_time():
    curriculum = Curriculum(32, 80, 8, 16)
    assert [curriculum.limit(step) for step in range(10)] == [32, 32, 48, 48, 64, 64, 80, 80, None, None]
    assert [Curriculum(16, 64, 2, 16).limit(step) for step in range(3)] == [16, 48, None]
    assert [Curriculum(48, 48, 2, 16).limit(step) for step in range(3)] == [48, 48, None]


def test_cuts_by_hand():
    """One document of 399 inputs in windows of 64: cut by the limit of the window in which each part starts."""
    lanes = make([400, 20], Curriculum(16, 96, 5, 16))
    starts, tokens = [], []
    for window, _ in islice(lanes, 7):
        starts += window.starts[0].tolist()
        tokens += window.tokens[0].tolist()
    # limits 16, 32, 48, 64, 80 (never 96: six lengths in five steps), then none: from 368 on it is whole
    begins = [16 * place for place, start in enumerate(starts) if start]
    assert begins == [0, 16, 32, 48, 64, 96, 128, 176, 224, 288, 368, 400, 432]
    store = ListStore([400, 20])
    assert tokens[:399] == store.documents[0][:399].tolist()
    assert tokens[400:419] == store.documents[1][:19].tolist()


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_resuming_inside_equals_never_stopping(num_lanes):
    lengths, curriculum = [5, 700, 33, 90, 260], Curriculum(16, 128, 20, 16)
    whole = list(islice(make(lengths, curriculum, num_lanes), 24))
    for stop in range(23):
        resumed = make(lengths, curriculum, num_lanes, whole[stop][1])
        for (window, after), (expected, expected_after) in zip(islice(resumed, 4), whole[stop + 1 :], strict=False):
            assert after == expected_after
            assert window.starts.tolist() == expected.starts.tolist()
            assert window.tokens.tolist() == expected.tokens.tolist()


def test_the_setting(tmp_path):
    """Steps are those of the run, lengths whole segments; a resumed run may change it."""
    grows = {"from_tokens": 32, "to_tokens": 64, "steps": 2}
    path = write_config(tmp_path, data__curriculum=grows)
    lanes = open_lanes(load_config(path, ["data.shuffle=false"]), 257)
    starts = [(window.starts[0].tolist(), position) for window, position in islice(lanes, 3)]
    assert starts[0][0] == [True, False] * 4
    assert starts[1][0] == [True, False, False, False] * 2
    assert starts[2][0] == [True] + [False] * 7  # whole again
    longer = load_config(path, ["data.shuffle=false", "data.curriculum={from_tokens: 64, to_tokens: 64, steps: 9}"])
    assert next(open_lanes(longer, 257, starts[1][1]))[0].starts[0].tolist() == [True, False, False, False] * 2
    with pytest.raises(
        InputError, match="data.curriculum.to_tokens: 80 is not a multiple of window.segment_tokens 32;"
    ):
        load_config(path, ["data.curriculum={from_tokens: 32, to_tokens: 80, steps: 9}"])

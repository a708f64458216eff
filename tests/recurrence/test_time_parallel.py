"""Time over ranks: outputs, states and gradients are those of one rank, wherever documents start and segments end."""

import pytest
import torch
import torch.distributed as dist

from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import Compute
from infctx.model.state import State
from infctx.recurrence.time_parallel import Received, TimeRanks
from infctx.train.window import PlainBackward, backward_through_window, cut_window

from ranks import bytes_received, run_ranks
from tiny_models import random_model, random_window

BATCH = 2
CASES = {
    # name: (version, tokens, segment tokens, start rate, gradient segments, recompute blocks)
    "eagle": (5, 256, 64, 0.2, None, False),
    "finch": (6, 256, 64, 0.2, None, False),
    "finch, one segment": (6, 128, 128, 0.2, None, False),
    "finch, starts everywhere": (6, 256, 128, 1.0, None, False),
    "finch, no starts": (6, 192, 64, 0.0, None, False),
    "finch, recomputed": (6, 256, 64, 0.2, None, True),
    "eagle, recomputed": (5, 384, 128, 0.2, None, True),
    "finch, truncated": (6, 256, 64, 0.2, 2, False),
    "finch, truncated at every segment": (6, 256, 64, 0.2, 1, True),
    "goose": (7, 256, 64, 0.2, None, False),
    "goose, recomputed": (7, 256, 128, 0.2, None, True),
    "goose, no starts": (7, 192, 64, 0.0, None, False),
}


def window_of(case, ranks=None, dtype=torch.float64):
    """Makes the model, the window and the state before it: everything that a rank needs."""
    version, num_tokens, segment_tokens, start_rate, gradient_segments, recompute = CASES[case]
    compute = Compute(recompute_blocks=recompute, time_ranks=ranks)
    model = random_model(version, dtype=dtype, with_state=True, seed=num_tokens, compute=compute)
    model.add_initial_state(shifts=True)
    for part in model.initial_parts():
        torch.nn.init.normal_(part, std=0.3, generator=torch.Generator().manual_seed(5))
    window = random_window(num_tokens, batch=BATCH, seed=segment_tokens, start_rate=start_rate)
    window[2][:, 0] = False  # so that the state before the window matters
    random = torch.Generator().manual_seed(1)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    before = State(*(torch.randn(x.shape, generator=random).to(precise) for x in model.initial_state(BATCH)))
    return model, window, segment_tokens, gradient_segments, before


def through_window(case, ranks=None):
    """Returns loss sum, state after, gradients of all weights and of the state before; for one rank or all together."""
    model, window, segment_tokens, gradient_segments, state = window_of(case, ranks)
    place = () if ranks is None else (ranks.rank, ranks.size)
    segments = cut_window(*window, segment_tokens, *place)
    state = state.leaf()
    loss, after = backward_through_window(SegmentLoss(model), segments, state, PlainBackward(0.01), gradient_segments)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if ranks is not None:
        for tensor in (loss, *gradients.values()):
            dist.all_reduce(tensor)
    gradients |= {f"before.{name}": part for name, part in state.gradient()._asdict().items()}
    return {"loss": loss, "after": tuple(after), "gradients": gradients}


def hidden_of(case, ranks=None):
    """Returns hidden vectors of a window run as one segment: the whole, or this rank's slice."""
    model, (tokens, _, starts), _, _, state = window_of(case, ranks)
    slices = ranks.size if ranks else 1
    (piece,) = cut_window(tokens, tokens, starts, tokens.shape[1], ranks.rank if ranks else 0, slices)
    hidden, _ = model(piece.tokens, state, piece.starts)
    return hidden.detach()


def all_cases(time_ranks):
    ranks = TimeRanks(dist.group.WORLD)
    assert ranks.size == time_ranks
    return {case: through_window(case, ranks) | {"hidden": hidden_of(case, ranks)} for case in CASES}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"{request.param}_ranks")
    return run_ranks(request.param, all_cases, request.param, folder=folder)


def assert_same(found, truth, name, bar=1e-11):
    scale = truth.abs().max().clamp_min(1e-30)
    assert ((found - truth).abs().max() / scale).item() <= bar, name


@pytest.mark.parametrize("case", CASES)
def test_all_that_one_rank_finds(found, case):
    truth = through_window(case)
    assert truth["gradients"]["initial_wkv"].any() == (CASES[case][3] > 0)
    assert_same(torch.cat([rank[case]["hidden"] for rank in found], dim=1), hidden_of(case), "hidden")
    for rank in found:
        assert_same(rank[case]["loss"], truth["loss"], "loss")
        for name, part, whole in zip(State._fields, rank[case]["after"], truth["after"], strict=True):
            assert_same(part, whole, name)
        for name, gradient in truth["gradients"].items():
            assert_same(rank[case]["gradients"][name], gradient, name)


@pytest.mark.parametrize("case", CASES)
def test_shared_states_are_the_same_bit_for_bit_on_all_ranks(found, case):
    for rank in found[1:]:
        for part, first in zip(rank[case]["after"], found[0][case]["after"], strict=True):
            assert torch.equal(part, first)
        for name in State._fields:
            gradients = (each[case]["gradients"][f"before.{name}"] for each in (rank, found[0]))
            assert torch.equal(*gradients)


WIRE_SIZES = {"num_layers": 3, "width": 256, "head_size": 64, "vocab_size": 19}
WIRE_SEGMENTS, WIRE_SEGMENT_TOKENS, WIRE_BATCH = 3, 128, 3


def formula(time_ranks, element_bytes, kept=1):
    """Returns bytes that a rank receives per layer and segment, forward and backward (docs/distributed.md)."""
    width, channels = WIRE_SIZES["width"], WIRE_SIZES["head_size"]
    heads, shifts = width // channels, 2 * width * element_bytes
    forward = 4 * heads * channels * (channels + kept) + shifts
    backward = 4 * heads * channels * channels + shifts
    return (time_ranks - 1) * WIRE_BATCH * forward, (time_ranks - 1) * WIRE_BATCH * backward


def wire_of(version, low, recompute):
    """Returns bytes per layer that this rank receives: in a forward pass, in its repetition, backward, in a window."""
    ranks = TimeRanks(dist.group.WORLD)
    compute = Compute(torch.bfloat16 if low else None, recompute, time_ranks=ranks)
    model = random_model(version, **WIRE_SIZES, compute=compute)
    tokens, targets, starts = random_window(WIRE_SEGMENTS * WIRE_SEGMENT_TOKENS, batch=WIRE_BATCH)
    segments = cut_window(tokens, targets, starts, WIRE_SEGMENT_TOKENS, ranks.rank, ranks.size)
    zeros = State(*(torch.zeros_like(part) for part in model.initial_state(WIRE_BATCH)))
    received, found = Received(), {}

    def measured(name, work):
        dist.barrier()
        before = bytes_received()
        result = work()
        dist.barrier()
        found[name] = (bytes_received() - before) / WIRE_SIZES["num_layers"]
        return result

    def run():
        return model(segments[0].tokens, zeros.leaf(), segments[0].starts, received)

    measured("forward", run)
    hidden, after = measured("again", run)
    scalar = hidden.float().sum() + after.dot(after.detach())
    measured("backward", scalar.backward)
    window = (SegmentLoss(model), segments, zeros, PlainBackward(0.01))
    measured("window", lambda: backward_through_window(*window))
    return found


def all_wires():
    cases = [(6, low, recompute) for low in (False, True) for recompute in (False, True)] + [(7, True, False)]
    return {case: wire_of(*case) for case in cases}


@pytest.mark.slow
@pytest.mark.parametrize("time_ranks", [2, 4])
def test_bytes_on_the_wire_are_those_of_the_formula(tmp_path, time_ranks):
    """Counts bytes over TCP as the kernel does; computing again must not send anything twice."""
    for rank in run_ranks(time_ranks, all_wires, folder=tmp_path):
        for (version, low, _), found in rank.items():
            forward, backward = formula(time_ranks, 2 if low else 4, WIRE_SIZES["head_size"] if version == 7 else 1)
            assert found["forward"] == pytest.approx(forward, rel=0.01)
            assert found["again"] < 0.01 * forward
            assert found["backward"] == pytest.approx(backward, rel=0.01)
            assert found["window"] == pytest.approx(WIRE_SEGMENTS * (forward + backward), rel=0.01)

"""The plan for many ranks: bytes computed by hand, the bytes that DeepSpeed and time ranks really hold and send, and
the report."""

import gc
import os
import re
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
import yaml

from infctx.distributed.ranks import Ranks
from infctx.distributed.zero import ZeroEngine
from infctx.errors import InputError
from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import Compute
from infctx.model.sizes import PUBLISHED_SIZES
from infctx.plan.memory import (
    PARAMETER_BYTES,
    STEP_PARAMETER_BYTES,
    ZERO_BUFFERS,
    Strategy,
    activation_bytes,
    rank_memory,
    received_bytes,
    state_bytes,
    step_wire,
    time_wire,
    with_distributed,
    with_strategy,
)
from infctx.plan.report import plan_report
from infctx.plan.strategy import STRATEGIES, resolve_strategy
from infctx.recurrence.time_parallel import Received, TimeRanks
from infctx.settings.load import load_config
from infctx.train.window import PlainBackward, backward_through_window, cut_window

from plan_tables import example_config
from plans import FINCH, bytes_of, many, model_sizes, other_run, planned_bytes
from ranks import run_ranks
from runs import write_config
from tiny_models import random_model

GB = 1e9


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, reduction, every, shared, host",
    [
        (("ddp",), "segment", 16, 0, 0),
        (("zero1",), "step", 8, 16, 0),
        (("zero2",), "segment", 4, 20, 0),
        (("zero2",), "step", 8, 16, 0),
        (("zero3",), "segment", 0, 20, 0),
        (("zero3",), "step", 4, 20, 0),
        (("zero1", True), "segment", 8, 0, 20),
        (("zero2", True), "segment", 4, 0, 24),
        (("zero2", True), "step", 8, 0, 20),
        (("zero3", True), "step", 4, 4, 20),
    ],
)
def test_what_a_parameter_takes(option, reduction, every, shared, host):
    """Compares differences: between numbers of ranks for divided bytes, between strategies for the others."""
    four, eight = (bytes_of(many(count), *option, reduction=reduction) for count in (4, 8))
    parameters, embedding = FINCH.num_parameters, FINCH.vocab_size * FINCH.width
    assert four.device - eight.device == pytest.approx(parameters * shared / 8)
    if option[0] != "zero3":  # it builds the whole model there
        assert four.host - eight.host == pytest.approx(parameters * host / 8)
    beside = eight.device - every * parameters - shared * parameters // 8
    buffers = beside - (bytes_of(many(8), "ddp").device - 16 * parameters)
    live = 250_000_000 + 50_000_000 + embedding if option[0] == "zero3" else 0
    sent = 0 if option[0] == "ddp" else 3 * 50_000_000
    passing = option[0] == "zero3" or (option[0] == "zero2" and reduction == "segment")
    assert buffers == 4 * (sent + live + embedding * (passing + len(option) - 1))


def test_more_ranks_never_take_more():
    for size, sizes in PUBLISHED_SIZES.items():
        for option in STRATEGIES:
            runs = [with_strategy(example_config(size, gpus), option) for gpus in (1, 2, 4, 8)]
            found = [rank_memory(run, sizes, "cuda") for run in runs]
            assert [rank.device for rank in found] == sorted((rank.device for rank in found), reverse=True)
            assert [rank.host for rank in found] == sorted((rank.host for rank in found), reverse=True)
    eight = [bytes_of(many(8), *option).device for option in STRATEGIES[:4]]
    assert eight == sorted(eight, reverse=True)


def test_reducing_by_segment_takes_the_least():
    for option in STRATEGIES:
        least, whole = (bytes_of(many(8), *option, reduction=reduction) for reduction in ("segment", "step"))
        assert bytes_of(many(8), *option, reduction="auto") == least
        assert (least.device < whole.device) == (option[0] in ("zero2", "zero3"))


def test_time_ranks_share_activations_and_keep_what_was_sent():
    alone, shared = many(2), many(2, distributed__time_ranks=2, window__lanes=1)
    layers, width, channels = 32, 2560, 64
    sent = layers * (4 * width * channels + 4 * 2 * width + 2 * 2 * width)
    assert received_bytes(shared, FINCH) == sent
    assert received_bytes(alone, FINCH) == 0
    seams = 16 * state_bytes(FINCH)
    assert planned_bytes(alone, FINCH, "cuda").host == seams
    assert planned_bytes(shared, FINCH, "cuda").host == seams + 16 * sent
    activations = 2048 * activation_bytes(alone, FINCH)
    assert planned_bytes(alone, FINCH, "cuda").device - planned_bytes(shared, FINCH, "cuda").device == activations


# --- bytes really held and sent ---------------------------------------------------------------------------------------

WIDTH, LAYERS = 256, 12
COUNTED = [
    (reduction, option)
    for reduction, shares in (("segment", PARAMETER_BYTES), ("step", STEP_PARAMETER_BYTES))
    for option in shares
    if option[0] != "ddp" and option[1:] != (False, True)
]


class OursOver(ZeroEngine):
    """The engine of ZeRO over DeepSpeed's, without Fabric around it."""

    def __init__(self, engine, reduction):
        self.deepspeed, self.zero, self.reduction = engine, engine.optimizer, reduction
        self.ranks, self.device, self.watchdog, self._one_reduction = Ranks(), torch.device("cpu"), None, ExitStack()


def deepspeed_bytes():
    """Returns bytes per parameter of all of this rank's tensors, on the CPU, after a backward call inside a step."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    small = {"overlap_comm": False, "stage3_param_persistence_threshold": 0}
    small |= dict.fromkeys(ZERO_BUFFERS, WIDTH * WIDTH)
    found, before, here = {}, [], {}
    for reduction, (strategy, *offloads) in COUNTED:
        zero = {"stage": int(strategy[-1])} | small
        for name, chosen in zip(("offload_optimizer", "offload_param"), offloads, strict=True):
            zero |= {name: {"device": "cpu"}} if chosen else {}
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        ours = OursOver(engine, reduction)
        for step in range(3):
            ours.begin_step(step, num_targets=1, num_backwards=2)
            for last in (False, True):
                ours.enter(0, "backward")
                ours.backward(engine(torch.ones(1, WIDTH)).sum())
                here = here if last else storages()
            ours.step()
        new = here.keys() - {storage.data_ptr() for storage in before}
        found[reduction, (strategy, *offloads)] = sum(here[place].nbytes() for place in new) / (WIDTH * WIDTH * LAYERS)
        before = [*before, *storages().values(), *here.values()]  # kept, so that their addresses are not reused
    return found


def storages():
    """Returns address -> storage for all tensors of this process."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return found


@pytest.mark.slow
def test_deepspeed_holds_what_is_planned(tmp_path):
    """ZeRO 1 and 2 also hold the gradient that is being reduced, which is gone after the call or comes later."""
    one, two = run_ranks(2, deepspeed_bytes, folder=tmp_path)
    matrix = 4 / LAYERS
    for reduction, option in COUNTED:
        share = (PARAMETER_BYTES if reduction == "segment" else STEP_PARAMETER_BYTES)[option]
        passing = 2 if option in (("zero1", False, False), ("zero2", False, False)) else 0
        planned = share.every + (share.device + share.host) / 2 - passing
        for found in (one[reduction, option], two[reduction, option]):
            assert planned - 0.1 <= found <= planned + 5 * matrix, (reduction, option, planned, found)


def sent_and_kept():
    """Returns one rank's bytes received in a window of four segments, and bytes kept of a segment."""
    received = []

    class Counting(TimeRanks):
        def gather(self, x):
            received.append((self.size - 1) * x.nbytes)
            return super().gather(x)

    ranks = Counting(dist.group.WORLD)
    model = random_model(6, compute=Compute(None, True, "chunked", ranks))
    tokens = torch.arange(2 * 128).reshape(2, 128) % model.sizes.vocab_size
    state = model.initial_state(2)
    sent = Received()
    with torch.no_grad():
        model(tokens[:, :16], state, received=sent)
    kept = sum(part.nbytes for part in sent.stacked().values())
    received.clear()
    segments = cut_window(tokens, tokens, None, 32, ranks.rank, ranks.size)
    backward_through_window(SegmentLoss(model), segments, state, PlainBackward(1.0))
    return sum(received), kept


def test_time_ranks_send_and_keep_what_is_planned(tmp_path):
    sizes = random_model(6).sizes
    config = many(2, distributed__time_ranks=2, window__lanes=2, window__segment_tokens=32, window__window_tokens=128)
    config = config.model_copy(update={"run": config.run.model_copy(update={"precision": "fp32"})})
    for received, kept in run_ranks(2, sent_and_kept, folder=tmp_path):
        assert received == step_wire(config, sizes).time == 4 * sizes.num_layers * sum(time_wire(config, sizes))
        assert kept == config.pass_lanes * received_bytes(config, sizes)


# --- on the wire ------------------------------------------------------------------------------------------------------


def test_bytes_of_time_by_hand():
    config = many(8, distributed__time_ranks=8, window__lanes=1)
    forward, backward = 7 * (4 * 40 * 64 * 65 + 2 * 2560 * 2), 7 * (4 * 40 * 64 * 64 + 2 * 2560 * 2)
    assert time_wire(config, FINCH) == (forward, backward)
    assert step_wire(config, FINCH).time == 16 * 32 * (forward + backward)
    assert step_wire(many(8), FINCH).time == 0
    four = many(8, distributed__time_ranks=8, window__lanes=4, window__lanes_per_pass=2)
    assert time_wire(four, FINCH) == (2 * forward, 2 * backward)
    assert step_wire(four, FINCH).time == 4 * step_wire(config, FINCH).time


def test_bytes_of_gradients_and_weights_by_hand():
    config, share = many(8, window__lanes=16, window__lanes_per_pass=1), 7 / 8 * 4 * FINCH.num_parameters
    passes, segments = 2, 16
    gathered = share * (15 + 16 + 16) * passes
    expected = {
        ("ddp", "step"): (2 * share, 0),
        ("ddp", "segment"): (2 * share, 0),
        ("zero1", "step"): (2 * share, share),
        ("zero1", "segment"): (2 * share, share),
        ("zero2", "step"): (2 * share, share),
        ("zero2", "segment"): (2 * share * segments * passes, share),
        ("zero3", "step"): (share, gathered),
        ("zero3", "segment"): (share * segments * passes, gathered),
    }
    for (strategy, reduction), (gradients, weights) in expected.items():
        wire = step_wire(other_run(config, strategy, reduction=reduction), FINCH)
        assert (wire.gradients, wire.weights) == (pytest.approx(gradients), pytest.approx(weights))
    truncated = many(8, window__gradient_segments=4)
    assert step_wire(with_strategy(truncated, Strategy("zero3")), FINCH).weights == pytest.approx(
        share * (12 + 16 + 16)
    )
    assert step_wire(many(1), FINCH) == (0, 0, 0)


# --- the report -------------------------------------------------------------------------------------------------------


def rows_of(report):
    """Reads the table of strategies: (name, step or segment) -> (GB per device, GB per host, fits, received, marks)."""
    table = report.split("\n\n")[1].splitlines()
    cells = [re.split(r"\s{2,}", line) for line in table[1:]]
    assert len({line.index(cell) + len(cell) for line, (_, _, cell, *_) in zip(table[1:], cells, strict=True)}) == 1
    return {(name, when.removeprefix("each ")): (*rest, "")[:5] for name, when, *rest in cells}


NAMES = {
    ("ddp", False, False): "ddp",
    ("zero1", False, False): "zero1",
    ("zero2", False, False): "zero2",
    ("zero3", False, False): "zero3",
    ("zero2", True, False): "zero2, optimizer on host",
    ("zero3", True, True): "zero3, all on host",
    ("zero3", True, False): "zero3, optimizer on host",
}
REDUCTIONS = {"ddp": ["step"], "zero1": ["step"], "zero2": ["step", "segment"], "zero3": ["step", "segment"]}
ROWS = [(option, reduction) for option in STRATEGIES for reduction in REDUCTIONS[option[0]]]


@pytest.mark.parametrize("gigabytes", [24.0, 40.0, 80.0, None])
@pytest.mark.parametrize("strategy", ["auto", "zero1", "zero3"])
def test_the_report_has_the_functions_numbers(strategy, gigabytes):
    config = many(8, distributed__strategy=strategy)
    report = plan_report(config, gigabytes).text
    assert "Finch, 3,099,863,040 parameters, 32 layers of width 2560; the weights learn" in report
    assert "65,536 tokens: 16 segments of 4,096, the gradient over all of them" in report
    assert "8 in all, 1 per rank, 1 per pass; 524,288 tokens per step" in report
    rows = rows_of(report)
    assert list(rows) == [(NAMES[option], reduction) for option, reduction in ROWS]
    memory = None if gigabytes is None else gigabytes * 1e9
    for option, reduction in ROWS:
        rank = bytes_of(config, *option, reduction=reduction)
        fits = "?" if memory is None else "yes" if rank.device <= 0.9 * memory else "no"
        received = sum(step_wire(other_run(config, *option, reduction=reduction), FINCH)[:2])
        row = f"{rank.device / GB:.1f}", f"{8 * rank.host / GB:.1f}", fits, f"{received / GB:.1f} GB"
        assert rows[NAMES[option], reduction][:4] == row
    assert ("--device-gb 80" in report) == (gigabytes is None)
    assert "time_ranks" not in report


@pytest.mark.parametrize(
    ("settings", "gigabytes", "auto", "this_run"),
    [
        ({"strategy": "auto"}, 80, ["ddp step"], ["ddp step"]),
        ({"strategy": "auto"}, 40, ["zero1 step"], ["zero1 step"]),
        ({"strategy": "auto"}, 30, ["zero2 segment"], ["zero2 segment"]),
        ({"strategy": "auto", "gradient_reduction": "step"}, 30, ["zero3 step"], ["zero3 step"]),
        ({"strategy": "auto"}, None, [], []),
        ({"strategy": "zero3"}, 30, ["zero2 segment"], ["zero3 step"]),
        ({"strategy": "zero3"}, None, [], ["zero3 step", "zero3 segment"]),
        ({"strategy": "zero3", "gradient_reduction": "segment"}, None, [], ["zero3 segment"]),
        ({"strategy": "zero2", "gradient_reduction": "segment"}, 80, ["ddp step"], ["zero2 segment"]),
        ({"strategy": "zero1", "gradient_reduction": "segment"}, 80, ["ddp step"], ["zero1 step"]),
    ],
)
def test_the_report_marks_what_auto_and_this_run_take(settings, gigabytes, auto, this_run):
    rows = rows_of(plan_report(with_distributed(many(8), **settings), gigabytes).text)
    for mark, expected in (("auto", auto), ("this run", this_run)):
        assert [" ".join(row) for row, cells in rows.items() if mark in cells[-1]] == expected


def test_the_report_of_time_ranks_and_offload():
    config = many(16, distributed__devices=8, distributed__nodes=2, distributed__time_ranks=4, window__lanes=8)
    config = with_strategy(config, Strategy("zero3", True))
    report = plan_report(config, 80).text
    assert "16 on 2 nodes; 4 share a document's time, 1,024 tokens of each segment" in report
    assert rows_of(report)[NAMES["zero3", True, False], "step"][-1] == "<- this run"
    forward, backward = time_wire(config, FINCH)
    layer = " MB +".join(f"{part / 1e6:.1f}" for part in (forward, backward, forward + backward))
    assert re.search(rf"2 lanes per pass +{layer} MB", report)
    assert re.search(rf"a segment, 32 layers +{32 * (forward + backward) / 1e6:.1f} MB", report)
    assert re.search(rf"a window, 16 segments +{16 * 32 * (forward + backward) / GB:.1f} GB", report)
    assert re.search(rf"a step, 2 lanes +{step_wire(config, FINCH).time / GB:.1f} GB", report)


def test_the_report_of_a_run_on_a_cpu(tmp_path):
    config = load_config(write_config(tmp_path), ["distributed.devices=2"])
    report = plan_report(config).text
    rank = rank_memory(resolve_strategy(config, model_sizes(config), "cpu"), model_sizes(config), "cpu")
    row, on_host = rows_of(report)["ddp", "step"], f"{2 * rank.device / GB:.1f}"
    assert row[:3] + row[-1:] == (f"{rank.device / GB:.1f}", on_host, "yes", "<- auto, this run")
    assert "of this machine" in report


def with_printed_settings(config, text):
    """The run with the settings that a report prints at its end."""
    content = config.model_dump()
    for section, name, value in re.findall(r"^  (\w+)\.(\w+)=(\w+)$", text, re.M):
        content[section][name] = yaml.safe_load(value)
    return type(config)(**content)


def test_a_run_that_does_not_fit_gets_settings_that_do(tmp_path):
    """Uses the printed settings as overrides of a run, which fits; every line is at most 100 columns wide."""
    text, fits = plan_report(many(1, window__lanes=4), 24)
    assert fits is False
    assert "distributed.strategy=zero3" in text
    better = plan_report(with_printed_settings(many(1, window__lanes=4), text), 24)
    assert better.fits is True
    text = plan_report(many(1, window__lanes=4), 6).text
    assert "window.lanes_per_pass=1" in text and "window.segment_tokens=" in text
    assert plan_report(with_printed_settings(many(1, window__lanes=4), text), 6).fits is True
    assert "No smaller segments fit either" in plan_report(many(1, window__lanes=4), 1).text
    config = load_config(write_config(tmp_path))
    for report in (text, better.text, plan_report(many(8)).text, plan_report(config).text):
        assert max(map(len, report.splitlines())) <= 100


def test_whether_a_run_fits():
    assert [plan_report(many(8), gigabytes).fits for gigabytes in (80, 3, None)] == [True, False, None]


def test_what_cannot_be_reported(tmp_path):
    config = load_config(write_config(tmp_path))
    with pytest.raises(InputError, match="--device-gb: the run is on the CPU"):
        plan_report(config, 80)
    for gigabytes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="--device-gb: .* is not a GPU's memory; give it in GB, such as 80"):
            plan_report(many(8), gigabytes)
    unknown = many(8, model__size=None, model__weights=tmp_path / "none.pth")
    with pytest.raises(InputError, match="there is no .*none.pth to read the sizes from"):
        plan_report(unknown, 80)

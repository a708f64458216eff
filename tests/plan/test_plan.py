"""Everything missing for a run is reported together before it starts; planned memory equals real memory."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import infctx
from infctx import machine
from infctx.errors import InputError
from infctx.machine import pick_device
from infctx.model.sizes import published_sizes
from infctx.plan.memory import (
    ACTIVATION_BYTES,
    PASSING_STATES,
    Strategy,
    activation_bytes,
    rank_memory,
    state_bytes,
    with_distributed,
    with_strategy,
)
from infctx.plan.plan import make_plan
from infctx.plan.strategy import FILLED, STRATEGIES, choose_reduction, choose_strategy, resolve_strategy
from infctx.settings.load import load_config

from places import CONFIGS
from plans import FINCH, bytes_of, many, model_sizes, other_run, planned_bytes, saved_bytes
from runs import write_config, write_store
from tiny_models import random_model
from wkv_emulated import emulated


def missing(config):
    with pytest.raises(InputError) as refused:
        make_plan(config)
    heading, *lines, last = refused.value.args
    assert heading == "this machine does not have everything the run needs" and "--rehearse" in last
    return "\n".join(lines)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def given_bytes(monkeypatch, available):
    memory = psutil.virtual_memory()._replace(available=available)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)


def test_everything_missing_is_reported_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = missing(load_config(CONFIGS / "finch-3b-64k.yaml"))
    assert "model.weights" not in message  # they are on the hub
    assert "data.store: there is no data/pg19/train.idx with its .bin; make it with `infctx prepare`" in message
    assert "data.held_out: there is no data/pg19/held_out.idx" in message
    assert "run.device: cuda" in message
    sizes = published_sizes("finch-3b")
    needed = planned_bytes(load_config(CONFIGS / "finch-3b-64k.yaml"), sizes, "cuda").device / 1e9
    assert f"needs one with {needed:.1f} GB" in message
    assert 16 * sizes.num_parameters / 1e9 < needed < 80  # from weights and optimizer alone to one GPU of 80 GB


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_reports_what_is_missing_and_builds(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    message = missing(config)
    assert f"data.store: there is no {config.data.store}.idx" in message
    sizes = model_sizes(config)
    if sizes is None:  # another run makes this file
        assert config.model.weights in (Path("runs/finch-tiny/model.pth"), Path("runs/length-tiny/model.pth"))
        sizes = model_sizes(load_config(CONFIGS / f"{config.model.weights.parent.name}.yaml"))
    settings = {name: value for name, value in vars(sizes).items() if value not in (None, False)}
    assert infctx.build_model(**settings, device="meta").sizes == sizes
    assert ("run.device: cuda" in message) == (config.run.device == "cuda")
    ours = config.model.weights is not None and config.model.weights.parts[0] == "runs"
    assert (f"no {config.model.weights}" in message) == ours


def test_nothing_is_missing(tmp_path):
    make_plan(load_config(write_config(tmp_path)))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("name", ["train", "held_out"])
def test_half_a_store_is_none(tmp_path, name, suffix):
    config = load_config(write_config(tmp_path))
    (tmp_path / f"{name}{suffix}").unlink()
    assert {"train": "data.store", "held_out": "data.held_out"}[name] in missing(config)


def test_memory_is_reported_with_its_number(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path))
    needed = planned_bytes(config, model_sizes(config), "cpu").device
    given_bytes(monkeypatch, needed)
    make_plan(config)
    given_bytes(monkeypatch, needed - 1)
    gigabytes = f"{needed / 1e9:.1f} GB"
    message = missing(config)
    assert f"memory: the run needs {gigabytes} on cpu, and {gigabytes} is free" in message
    assert "window.segment_tokens" in message
    assert "model.recompute_blocks" in message


def test_memory_is_reported_for_a_published_model(tmp_path, monkeypatch):
    write_store(tmp_path / "train")
    given_bytes(monkeypatch, 1e9)
    config = load_config(
        CONFIGS / "finch-3b-64k.yaml",
        [f"data.store={tmp_path}/train", "data.held_out=null", "model.weights=null", "run.device=cpu"],
    )
    message = missing(config)
    assert message.startswith("memory: the run needs ")
    assert message.count(";") == 1


def test_memory_is_reported_though_data_is_missing(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path))
    (tmp_path / "train.idx").unlink()
    given_bytes(monkeypatch, 1e6)
    assert "data.store: there is no" in missing(config)
    assert "memory: the run needs" in missing(config)


@pytest.mark.parametrize("size", [{}, {"size": "eagle-0.4b"}])
def test_weights_are_not_needed_after_a_checkpoint(tmp_path, size):
    config = load_config(write_config(tmp_path))
    config = type(config)(**config.model_dump() | {"model": {"weights": tmp_path / "none.pth"} | size})
    assert "model.weights: there is no" in missing(config)
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    make_plan(config)


def test_a_file_that_is_not_the_size_it_should_be(tmp_path):
    infctx.save_weights(random_model(6), tmp_path / "model.pth")
    config = load_config(write_config(tmp_path))
    model = {"weights": tmp_path / "model.pth", "size": "finch-3b"}
    config = type(config)(**config.model_dump() | {"model": model})
    with pytest.raises(
        InputError, match=r"model.size: finch-3b is not the size of (?s:.*)model.pth: Finch, .* 2 layers of width 24"
    ):
        make_plan(config)
    found = model_sizes(type(config)(**config.model_dump() | {"model": {"weights": tmp_path / "model.pth"}}))
    assert found == random_model(6).sizes


def test_an_unknown_size_is_refused(tmp_path):
    config = load_config(write_config(tmp_path))
    config = type(config)(**config.model_dump() | {"model": {"size": "finch-2b"}})
    with pytest.raises(InputError, match="'finch-2b'"):
        make_plan(config)


def test_devices():
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device cuda: torch .* finds no GPU here; choose cpu or auto"):
        pick_device("cuda")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ACTIVATION_BYTES, ids=str)
def test_activations_take_what_the_plan_says(kind, frozen):
    version, low, kernels = kind
    said = ACTIVATION_BYTES[kind][frozen]
    for backend in ("compiled", "cuda") if kernels else ("chunked",):
        with emulated():
            found = saved_bytes(version, low, backend, frozen, width=256, num_tokens=512 - 16)
        assert found == pytest.approx(said, rel=0.1), backend


def test_the_parts_of_the_memory(tmp_path):
    base = load_config(write_config(tmp_path))
    sizes = model_sizes(base)
    assert state_bytes(sizes) == 4 * 2 * (32 * 16 + 2 * 32)

    def needed(device="cpu", **changes):
        return planned_bytes(load_config(write_config(tmp_path, **changes)), sizes, device).device

    seams = 2 * 4 * state_bytes(sizes)  # two lanes, four segments
    slices = 4 * 2 * 32 * 257  # of the logits: another copy, but for a CPU
    assert needed() - needed("cuda", model__backend="compiled") == seams - slices
    assert needed("cuda", window__seam_store="device") - needed("cuda") == seams
    assert needed() - needed(window__gradient_segments=1) == seams * 3 / 4
    longer = needed(window__window_tokens=256) - needed()
    assert longer == seams  # a longer window costs only its seams
    a_token = activation_bytes(base, sizes) + 4 * 257  # and its logits
    a_lane = 32 * a_token + (4 + PASSING_STATES) * state_bytes(sizes)
    assert needed() - needed(window__lanes_per_pass=1) == a_lane
    assert needed(window__segment_tokens=64, window__window_tokens=256) - needed() == 2 * 32 * a_token


def given_gpus(monkeypatch, count, free, total=80 * 10**9):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=total))


def test_processes_on_a_cpu_share_its_memory(tmp_path, monkeypatch):
    changes = {"distributed__devices": 2, "model__width": 256, "model__num_layers": 8, "distributed__strategy": "ddp"}
    changes |= {"window__segment_tokens": 32}
    path = write_config(tmp_path, **{name: value for name, value in changes.items() if name[:4] != "dist"})
    overrides = ["distributed.devices=2", "distributed.strategy=ddp"]
    config = load_config(path, overrides)
    needed = 2 * planned_bytes(config, model_sizes(config), "cpu").device
    given_bytes(monkeypatch, needed)
    make_plan(config)
    given_bytes(monkeypatch, needed - 1)
    message = missing(config)
    assert f"memory: the run needs {needed / 1e9:.1f} GB on cpu for 2 ranks with distributed.strategy: ddp" in message


def test_settings_that_would_fit_are_named(tmp_path, monkeypatch):
    given_bytes(monkeypatch, 10**12)
    write_config(tmp_path)
    data = {"data__store": tmp_path / "train"}
    ddp = many(8, **data)
    needed = {option: bytes_of(ddp, *option).device for option in STRATEGIES}
    given_gpus(monkeypatch, 8, free=needed["zero2", False, False])
    message = missing(ddp)
    assert f"the run needs {needed['ddp', False, False] / 1e9:.1f} GB on cuda for each rank" in message
    assert "with distributed.strategy: ddp" in message
    words = "distributed.strategy: zero2 and gradient_reduction: segment"
    assert f"; {words} would fit, or use fewer window.segment_tokens" in message
    given_gpus(monkeypatch, 8, free=needed["zero2", False, False], total=35 * 10**9)  # too small for whole gradients
    assert "; distributed.strategy: zero2 would fit, or use fewer" in missing(ddp)
    given_gpus(monkeypatch, 8, free=needed["zero3", True, True])
    words = "distributed.strategy: zero3 and offload_optimizer: true and offload_parameters: true"
    assert f"; {words} and gradient_reduction: segment would fit" in missing(ddp)
    given_gpus(monkeypatch, 8, free=needed["zero3", True, True] - 1)
    assert "would fit" not in missing(ddp)
    long = other_run(
        many(8, **data, window__segment_tokens=65536, window__lanes_per_pass=1), "zero3", True, True, reduction="auto"
    )
    given_gpus(monkeypatch, 8, free=rank_memory(long, FINCH, "cuda").device - 1)
    assert "; distributed.time_ranks: 2 would fit, or use fewer" in missing(long)


def test_reducing_by_segment_is_advised(tmp_path, monkeypatch):
    given_bytes(monkeypatch, 10**12)
    write_config(tmp_path)
    zero2 = many(8, data__store=tmp_path / "train", distributed__strategy="zero2")
    whole, least = (
        rank_memory(with_distributed(zero2, gradient_reduction=reduction), FINCH, "cuda").device
        for reduction in ("step", "segment")
    )
    given_gpus(monkeypatch, 8, free=whole)
    make_plan(zero2)
    given_gpus(monkeypatch, 8, free=least)  # of 80 GB: another program has the rest
    for config in (zero2, with_distributed(zero2, gradient_reduction="step")):
        message = missing(config)
        assert f"the run needs {whole / 1e9:.1f} GB on cuda for each rank" in message
        assert "; distributed.gradient_reduction: segment would fit, or use fewer" in message
    given_gpus(monkeypatch, 8, free=least, total=int(whole))  # too small for whole gradients
    make_plan(zero2)
    make_plan(with_distributed(zero2, gradient_reduction="segment"))


def enough_for(*option, reduction="segment"):
    """Returns the memory of a GPU of which nine tenths are just enough."""
    return -(-bytes_of(many(4), *option, reduction=reduction).device * 10 // 9)


def test_auto():
    config = many(4, distributed__strategy="auto")
    for strategy, less in (("ddp", "zero1"), ("zero1", "zero2"), ("zero2", "zero3"), ("zero3", "zero3")):
        assert choose_strategy(config, FINCH, "cuda", enough_for(strategy)) == strategy
        assert choose_strategy(config, FINCH, "cuda", enough_for(strategy) - 2) == less
    assert choose_strategy(config, None, "cuda", 80 * 10**9) == "zero2"
    assert choose_strategy(config, FINCH, "cuda", None) == "zero2"
    assert choose_strategy(config, FINCH, "cpu", 1) == "ddp"
    assert choose_strategy(many(1, distributed__strategy="auto"), FINCH, "cuda", 1) == "ddp"
    assert choose_strategy(many(4, distributed__strategy="zero1"), FINCH, "cuda", 1) == "zero1"


def test_auto_counts_with_the_configured_reduction():
    asked = many(4, distributed__strategy="auto", distributed__gradient_reduction="step")
    for strategy, less in (("zero1", "zero3"), ("zero3", "zero3")):  # zero2 needs the same as zero1
        assert choose_strategy(asked, FINCH, "cuda", enough_for(strategy, reduction="step")) == strategy
        assert choose_strategy(asked, FINCH, "cuda", enough_for(strategy, reduction="step") - 2) == less


@pytest.mark.parametrize("option", [("zero2",), ("zero3",), ("zero2", True), ("zero3", True, True)])
def test_reduction_is_once_a_step_where_that_fits(option):
    config, enough = with_strategy(many(4), Strategy(*option)), enough_for(*option, reduction="step")
    for memory, found in ((enough, "step"), (enough - 2, "segment"), (1, "segment")):
        assert choose_reduction(config, FINCH, "cuda", memory) == found
        resolved = resolve_strategy(config, FINCH, "cuda", memory)
        assert resolved == with_distributed(config, gradient_reduction=found)
        assert rank_memory(resolved, FINCH, "cuda") == bytes_of(many(4), *option, reduction=found)
    for asked in ("step", "segment"):
        assert choose_reduction(with_distributed(config, gradient_reduction=asked), FINCH, "cuda", enough) == asked


def test_reduction_is_once_a_step_by_default():
    for strategy in ("ddp", "zero1"):
        assert choose_reduction(with_strategy(many(4), Strategy(strategy)), FINCH, "cuda", 1) == "step"
    sharded = with_strategy(many(4), Strategy("zero2"))
    assert choose_reduction(sharded, FINCH, "cpu", 1) == "step"
    assert choose_reduction(sharded, None, "cuda", 1) == "step"
    assert choose_reduction(sharded, FINCH, "cuda", None) == "step"
    assert resolve_strategy(sharded, FINCH, "cpu").distributed.gradient_reduction == "step"
    assert resolve_strategy(sharded, FINCH, "cuda") == sharded  # and counts as the smallest
    assert planned_bytes(sharded, FINCH, "cuda").device == bytes_of(many(4), "zero2").device


def test_weights_that_stay_are_no_burden(tmp_path):
    frozen = many(4, model__weights=tmp_path / "none.pth", model__learn="initial_state")
    held = 2 * FINCH.num_parameters + 16 * FINCH.state_elements
    ddp = bytes_of(frozen, "ddp").device
    assert held < ddp < 1.35 * held
    assert bytes_of(frozen, "zero2").device == ddp
    assert bytes_of(frozen, "zero3").device >= 2 * FINCH.num_parameters  # whole, before it is sharded
    assert choose_strategy(with_strategy(frozen, Strategy("auto")), FINCH, "cuda", round(ddp / FILLED) + 1) == "ddp"


def test_the_host_of_several_gpus(tmp_path, monkeypatch):
    write_config(tmp_path)
    given_gpus(monkeypatch, 8, free=80 * 10**9)
    config = with_strategy(many(8, data__store=tmp_path / "train"), Strategy("zero3"))
    needed = 8 * rank_memory(config, FINCH, "cuda").host
    assert needed == 8 * 4 * FINCH.num_parameters
    given_bytes(monkeypatch, needed)
    make_plan(config)
    given_bytes(monkeypatch, needed - 1)
    message = missing(config)
    assert f"the run needs {needed / 1e9:.1f} GB on the host for 8 ranks with distributed.strategy: zero3" in message
    assert "window.seam_store" in message


def test_gpus_that_are_not_there(tmp_path, monkeypatch):
    write_config(tmp_path)
    config = many(8, data__store=tmp_path / "train")
    needed = bytes_of(config, "ddp").device
    assert f"the run needs 8 of them with {needed / 1e9:.1f} GB" in missing(config)
    given_gpus(monkeypatch, 4, free=80 * 10**9)
    assert "distributed.devices: 8, and torch finds 4 here; use 4, or more nodes" in missing(config)

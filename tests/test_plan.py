"""What a run lacks is said before it runs, all at once; and the memory it is said to take is what it takes."""

from pathlib import Path

import psutil
import pytest
import torch

import infctx
from infctx.config import load_config
from infctx.errors import InputError
from infctx.model.sizes import published_sizes
from infctx.train import plan
from infctx.train.plan import (
    ACTIVATION_BYTES,
    activation_bytes,
    device_bytes,
    model_sizes,
    pick_device,
    refuse_what_lacks,
    state_bytes,
)
from infctx.train.tune import freeze_weights

from runs import write_config, write_store
from tiny_models import random_model
from wkv_emulated import emulated

CONFIGS = Path(__file__).parent.parent / "configs"


def lacking(config):
    with pytest.raises(InputError) as refused:
        refuse_what_lacks(config)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about machines without one, wherever they run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def given_bytes(monkeypatch, available):
    memory = psutil.virtual_memory()._replace(available=available)
    monkeypatch.setattr(plan.psutil, "virtual_memory", lambda: memory)


def test_all_that_lacks_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = lacking(load_config(CONFIGS / "finch-3b-64k.yaml"))
    assert "model.weights: there is no models/rwkv6-3b.pth; download it" in message
    assert "data.store: there is no data/books/train.idx with its .bin; make it with `infctx prepare`" in message
    assert "data.held_out: there is no data/books/held_out.idx" in message
    assert "run.device: cuda" in message
    sizes = published_sizes("finch-3b")
    needed = device_bytes(load_config(CONFIGS / "finch-3b-64k.yaml"), sizes, "cuda") / 1e9
    assert f"needs one with {needed:.1f} GB" in message
    assert 16 * sizes.num_parameters / 1e9 < needed < 80  # weights and optimizer alone; the file says one of 80 GB


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_says_what_it_lacks_and_builds(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    message = lacking(config)
    assert f"data.store: there is no {config.data.store}.idx" in message
    sizes = model_sizes(config)
    if sizes is None:  # they are in a file that another run makes
        assert config.model.weights == Path("runs/finch-tiny/model.pth")
        sizes = model_sizes(load_config(CONFIGS / "finch-tiny.yaml"))
    settings = {name: value for name, value in vars(sizes).items() if value is not None}
    assert infctx.build_model(**settings, device="meta").sizes == sizes
    assert ("run.device: cuda" in message) == (config.run.device == "cuda")
    assert (f"no {config.model.weights};" in message) == (config.model.weights is not None)


def test_nothing_lacks(tmp_path):
    refuse_what_lacks(load_config(write_config(tmp_path)))


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("name", ["train", "held_out"])
def test_half_a_store_is_none(tmp_path, name, suffix):
    config = load_config(write_config(tmp_path))
    (tmp_path / f"{name}{suffix}").unlink()
    assert {"train": "data.store", "held_out": "data.held_out"}[name] in lacking(config)


def test_memory_is_said_with_its_number(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path))
    needed = device_bytes(config, model_sizes(config), "cpu")
    given_bytes(monkeypatch, needed)
    refuse_what_lacks(config)
    given_bytes(monkeypatch, needed - 1)
    gigabytes = f"{needed / 1e9:.1f} GB"
    message = lacking(config)
    assert f"memory: the run needs {gigabytes} on cpu, {gigabytes} are free" in message
    assert "window.segment_tokens" in message
    assert "model.recompute_blocks" in message


def test_memory_is_said_for_a_published_model(tmp_path, monkeypatch):
    write_store(tmp_path / "train")
    given_bytes(monkeypatch, 1e9)
    config = load_config(
        CONFIGS / "finch-3b-64k.yaml",
        [f"data.store={tmp_path}/train", "data.held_out=null", "model.weights=null", "run.device=cpu"],
    )
    message = lacking(config)
    assert message.startswith("this machine lacks what the run needs: memory: the run needs ")
    assert message.count(";") == 1


def test_memory_is_said_though_data_lack(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path))
    (tmp_path / "train.idx").unlink()
    given_bytes(monkeypatch, 1e6)
    assert "data.store: there is no" in lacking(config)
    assert "memory: the run needs" in lacking(config)


@pytest.mark.parametrize("size", [{}, {"size": "eagle-0.4b"}])
def test_weights_are_not_needed_behind_a_checkpoint(tmp_path, size):
    config = load_config(write_config(tmp_path))
    config = type(config)(**config.model_dump() | {"model": {"weights": tmp_path / "none.pth"} | size})
    assert "model.weights: there is no" in lacking(config)
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    refuse_what_lacks(config)


def test_a_file_that_is_not_the_size_it_should_be(tmp_path):
    infctx.save_weights(random_model(6), tmp_path / "model.pth")
    config = load_config(write_config(tmp_path))
    model = {"weights": tmp_path / "model.pth", "size": "finch-3b"}
    config = type(config)(**config.model_dump() | {"model": model})
    with pytest.raises(
        InputError, match=r"model.pth: holds Finch, .* 2 layers of width 24, and model.size finch-3b is"
    ) as refused:
        refuse_what_lacks(config)
    assert "\n" not in str(refused.value)
    found = model_sizes(type(config)(**config.model_dump() | {"model": {"weights": tmp_path / "model.pth"}}))
    assert found == random_model(6).sizes


def test_an_unknown_size_is_refused(tmp_path):
    config = load_config(write_config(tmp_path))
    config = type(config)(**config.model_dump() | {"model": {"size": "finch-2b"}})
    assert "'finch-2b'" in lacking(config)


def test_devices():
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device cuda: torch .* finds no GPU here; choose cpu or auto"):
        pick_device("cuda")


def saved_bytes(version, low, backend, frozen, width, num_tokens):
    """What autograd saves in one block, in bytes a token and channel: storages once, weights and their copies not."""
    sizes = {"num_layers": 1, "width": width, "vocab_size": 16}
    model = infctx.build_model(version=version, **sizes, backend=backend)
    dtype = torch.bfloat16 if low else torch.float32
    if frozen:
        freeze_weights(model.to(dtype))
    x = torch.randn(1, num_tokens, width, dtype=dtype).requires_grad_()
    state = model.initial_state(1).leaf().layers()[0]
    weights = [view for p in model.parameters() for view in ((p, p.T) if p.ndim == 2 else (p,))]
    assert num_tokens not in {length for weight in weights for length in weight.shape}
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model.blocks[0](x, state, None, None)
    shapes = {tuple(weight.shape) for weight in weights}
    counted = [tensor for tensor in held.values() if tuple(tensor.shape) not in shapes]
    return sum(tensor.untyped_storage().nbytes() for tensor in counted) / num_tokens / width


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ACTIVATION_BYTES, ids=str)
def test_activations_take_what_the_plan_says(kind, frozen):
    version, low, kernels = kind
    said = ACTIVATION_BYTES[kind][frozen]
    for backend in ("compiled", "cuda") if kernels else ("chunked",):
        with emulated():
            found = saved_bytes(version, low, backend, frozen, width=256, num_tokens=512 - 16)
        assert found == pytest.approx(said, rel=0.1), backend


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_model(tmp_path, precision, recompute):
    """All blocks, embedding and last norm: what stands between the passes, and with recomputing one block at work."""
    changes = {"model__num_layers": 4, "model__width": 128, "model__head_size": 64}
    config = load_config(write_config(tmp_path, **changes, run__precision=precision, model__recompute_blocks=recompute))
    sizes = model_sizes(config)
    model = infctx.build_model(**{name: value for name, value in vars(sizes).items() if value is not None})
    model.compute_dtype = torch.bfloat16 if precision == "bf16" else None
    model.recompute_blocks = recompute
    num_tokens = 496
    tokens = torch.randint(257, (1, num_tokens))
    shapes = {tuple(view.shape) for p in model.parameters() for view in ((p, p.T) if p.ndim == 2 else (p,))}
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        hidden, _ = model(tokens)
    counted = [tensor for tensor in [*held.values(), hidden] if tuple(tensor.shape) not in shapes]
    found = sum(tensor.untyped_storage().nbytes() for tensor in counted) / num_tokens
    if recompute:
        found += ACTIVATION_BYTES[6, precision == "bf16", True][0] * 128
    said = activation_bytes(config, sizes, "cpu")
    assert 0.85 * said <= found <= 1.15 * said


def test_the_parts_of_the_memory(tmp_path):
    base = load_config(write_config(tmp_path))
    sizes = model_sizes(base)
    assert state_bytes(sizes) == 4 * 2 * (32 * 16 + 2 * 32)

    def needed(device="cpu", **changes):
        return device_bytes(load_config(write_config(tmp_path, **changes)), sizes, device)

    seams = 2 * 4 * state_bytes(sizes)  # two lanes, four segments
    assert needed() - needed("cuda", model__backend="compiled") == seams
    assert needed("cuda", window__seam_store="device") - needed("cuda") == seams
    assert needed() - needed(window__gradient_segments=1) == seams * 3 / 4
    longer = needed(window__window_tokens=256) - needed()
    assert longer == seams  # a longer window costs its seams and nothing else
    a_lane = 32 * activation_bytes(base, sizes, "cpu") + 4 * state_bytes(sizes)
    assert needed() - needed(window__lanes_per_pass=1) == a_lane
    assert needed(window__segment_tokens=64, window__window_tokens=256) - needed() == 2 * 32 * activation_bytes(
        base, sizes, "cpu"
    )

"""Computes the memory and traffic of a run: bytes on each rank's device and host, and bytes over the wire.

In: a configuration, the sizes of the model and the kind of device; out: bytes.  Nothing is loaded or allocated.
"""

from __future__ import annotations

from typing import NamedTuple

from infctx.adapters.targets import count_learned, target_shapes
from infctx.model.loss import SLICE_LOGITS
from infctx.model.quantized import AT_ONCE, QUANTIZED_BITS
from infctx.model.sizes import Sizes
from infctx.optimizers.adamw import SLICE, SLICE_BYTES
from infctx.optimizers.eight_bits import BLOCK
from infctx.settings.config import Config

GB = 1e9

WEIGHT_BYTES = 16
"""Bytes per parameter in fp32: the weight, its gradient and Adam's two moments."""

BUCKET_PARAMETERS = 50_000_000
"""Gradients that DeepSpeed reduces together, and weights that it gathers together or ahead of time."""

LIVE_PARAMETERS = 250_000_000
"""Weights that ZeRO-3 keeps gathered: one block of the largest published model."""

REDUCING_EACH_SEGMENT = ("zero2", "zero3")
"""Strategies that can; the others reduce gradients once per step whatever distributed.gradient_reduction is."""

ZERO_BUFFERS = {
    "reduce_bucket_size": BUCKET_PARAMETERS,
    "allgather_bucket_size": BUCKET_PARAMETERS,
    "stage3_prefetch_bucket_size": BUCKET_PARAMETERS,
    "stage3_max_live_parameters": LIVE_PARAMETERS,
    "stage3_max_reuse_distance": LIVE_PARAMETERS,
}
"""DeepSpeed's settings (zero_optimization) that the plan assumes; its defaults need up to 10 GB more."""


class Strategy(NamedTuple):
    """How a run is laid out over its ranks: ddp, zero1, zero2, zero3 or auto, and the parts kept in host memory."""

    name: str
    offload_optimizer: bool = False
    offload_parameters: bool = False


class Share(NamedTuple):
    """Bytes per parameter that learns: `every` on each device; `device` and `host` are divided among the ranks."""

    every: int
    device: int
    host: int


PARAMETER_BYTES = {
    # With gradients reduced after every segment where possible, fp32 weights and many backward calls per step.  Counted
    # in DeepSpeed 0.19.8 (tests/plan/test_report.py), whose stages all step a second copy of a rank's share of the
    # weights.
    Strategy("ddp"): Share(WEIGHT_BYTES, 0, 0),  # the gradient is DDP's buckets, which stay; one device: _held_alone
    Strategy("zero1"): Share(8, 16, 0),  # weight, gradient; copy, moments, the reduced gradient
    Strategy("zero2"): Share(4, 20, 0),  # weight; copy, moments, gradients so far and of the current segment
    Strategy("zero3"): Share(0, 20, 0),  # weight, copy, moments, gradient
    # on the host: copy, moments, gradient, a buffer of the new weights
    Strategy("zero1", offload_optimizer=True): Share(8, 0, 20),
    Strategy("zero2", offload_optimizer=True): Share(4, 0, 24),  # and the gradient so far
    Strategy("zero3", offload_optimizer=True): Share(0, 4, 20),  # weight; copy, moments, gradient, the gradient so far
    Strategy("zero3", offload_parameters=True): Share(0, 16, 4),
    Strategy("zero3", offload_optimizer=True, offload_parameters=True): Share(0, 0, 24),
}

STEP_PARAMETER_BYTES = PARAMETER_BYTES | {
    # the same with one reduction per step; every rank holds whole gradients until then
    Strategy("zero2"): PARAMETER_BYTES[Strategy("zero1")],
    Strategy("zero2", offload_optimizer=True): PARAMETER_BYTES[Strategy("zero1", offload_optimizer=True)],
    Strategy("zero3"): Share(4, 20, 0),
    Strategy("zero3", offload_optimizer=True): Share(4, 4, 20),
    Strategy("zero3", offload_parameters=True): Share(4, 16, 4),
    Strategy("zero3", offload_optimizer=True, offload_parameters=True): Share(4, 0, 24),
}

ACTIVATION_BYTES = {
    # (version, bf16, WKV by kernels rather than plain torch): tensors that autograd saves in a block, in bytes per
    # token and channel of the width, when the weights learn and when they are frozen.  Counted with
    # torch.autograd.graph.saved_tensors_hooks, without the weights' bf16 copies (tests/plan/test_plan.py).
    (5, False, True): (113, 62),
    (5, True, True): (58, 33),
    (6, False, True): (153, 97),
    (6, True, True): (82, 55),
    (5, False, False): (203, 131),
    (5, True, False): (154, 108),
    (6, False, False): (238, 171),
    (6, True, False): (174, 134),
    (7, False, True): (152, 94),
    (7, True, True): (88, 57),
    (7, False, False): (409, 340),
    (7, True, False): (338, 303),
}

PASSING_BYTES = {(False, False): 38, (False, True): 20, (True, False): 28, (True, True): 38}
"""(RWKV-7, bf16): what comes and goes while the backward pass is in a block, and the embedding, the last norm and the
head, in bytes per token and channel of the width (tests/plan/test_activations.py)."""

PASSING_STATES = 5
"""States of a lane that come and go with them: before and after the blocks, their gradients, and copies of these."""

TRAINED_TOO_CHANNELS = {"norms": (1, 1), "mixes": (2, 2), "decays": (6, 1), "bonus": (1, 1)}
"""What autograd saves in a block for the weights that learn with an adapter, at most: numbers per token and channel of
the width, in fp32 and in bf16."""
BLENDS_BESIDE = {5: 0, 6: 1, 7: 3}
"""Blends of a token and the one before, in fp32 on a CPU, that lie in one block of memory with those that go into
matrices: with one, all are kept."""


class Memory(NamedTuple):
    """Bytes of one rank: on its device, and in host memory on top of that (on a CPU both are host memory)."""

    device: int
    host: int


class Wire(NamedTuple):
    """Bytes that one rank receives in one optimizer step."""

    gradients: int
    """Gradients of other ranks."""
    weights: int
    """Weights that other ranks keep or have stepped."""
    time: int
    """States and vectors of the slices of the other time ranks."""


def rank_memory(config: Config, sizes: Sizes, device_type: str) -> Memory:
    """Returns the bytes that one rank needs; config.distributed.strategy must be a name, not "auto".

    gradient_reduction "auto" counts as "segment", which needs the least; `resolve_strategy` (plan/strategy) decides it.
    device_type: "cpu" or "cuda"
    """
    lanes, segments = config.pass_lanes, _run_segments(config)
    work = lanes * (config.slice_tokens * activation_bytes(config, sizes) + PASSING_STATES * state_bytes(sizes))
    logits = min(SLICE_LOGITS, lanes * config.slice_tokens * sizes.vocab_size)
    work += _logit_bytes(config, sizes, device_type) * logits
    if not config.model.freezes_weights:
        work += 4 * sizes.vocab_size * sizes.width  # the head's gradient
        if config.run.precision == "bf16" and not _has_bf16_matrices(config):
            # Copies of the weights, of the current block or of all blocks.
            work += 2 * sizes.num_parameters // (sizes.num_layers if config.model.recompute_blocks else 1)
    elif config.model.learned_adapter:
        work += _adapter_work(config, sizes)
    work += _buffers(config, sizes) + _made_bytes(config, sizes, device_type)
    seams = lanes * segments * (state_bytes(sizes) + received_bytes(config, sizes))
    held = held_memory(config, sizes)
    on_device = held.device + max(work, _step_bytes(config, sizes)) + config.rank_lanes * state_bytes(sizes)
    on_host = held.host
    if device_type == "cpu" or config.window.seam_store == "device":
        on_device += seams
    else:
        on_host += seams
    if config.distributed.strategy == "zero3" and device_type != "cpu":  # at the start each rank holds a whole model
        whole = weight_bytes(config, sizes)
        frozen = config.model.freezes_weights
        on_device, on_host = max(on_device, whole * frozen), max(on_host, whole * (not frozen))
    return Memory(on_device, on_host)


def _logit_bytes(config: Config, sizes: Sizes, device_type: str) -> int:
    """Returns the bytes of a logit: on a CPU in one pass, else of a slice of them, as much on the way, and in bf16 also
    the head's product, and its gradient."""
    adapter = config.model.learned_adapter
    if device_type == "cpu" and (adapter is None or "head" not in target_shapes(adapter, sizes)):
        return _activation_itemsize(config)
    return 4 * (3 if config.run.precision == "bf16" else 2)


def _adapter_work(config: Config, sizes: Sizes) -> int:
    """Returns the bytes of an adapter's copies in bf16, of a matrix in fp32 whose rows dora measures, and of what
    comes and goes with the adapters of the embedding and the head."""
    adapter, itemsize = config.model.learned_adapter, _activation_itemsize(config)
    assert adapter is not None
    blocks = sizes.num_layers if config.model.recompute_blocks else 1
    shapes, low, dora = target_shapes(adapter, sizes), itemsize == 2, adapter.form == "dora"
    work = low * 2 * count_learned(adapter, sizes) // blocks
    work += 4 * max(inputs * outputs for inputs, outputs in shapes.values()) * (dora and low)
    tokens = config.pass_lanes * config.slice_tokens
    if "head" in shapes or "embedding" in shapes:
        # A gradient as long as the vocabulary, before it is added up and after; the rows and theirs.
        work += 2 * 4 * adapter.rank * sizes.vocab_size + 2 * itemsize * tokens * adapter.rank
    if "head" in shapes:
        work += itemsize * min(SLICE_LOGITS, tokens * sizes.vocab_size) * dora
        work += tokens * sizes.width * (itemsize + 1) * bool(adapter.dropout)
    return work


def strategy_of(config: Config) -> Strategy:
    """Returns the strategy that the configuration names."""
    settings = config.distributed
    return Strategy(settings.strategy, settings.offload_optimizer, settings.offload_parameters)


def with_strategy(config: Config, strategy: Strategy) -> Config:
    """Returns the same run with another strategy."""
    name, *offload = strategy
    return with_distributed(config, strategy=name, offload_optimizer=offload[0], offload_parameters=offload[1])


def with_distributed(config: Config, **changed: object) -> Config:
    """Returns the same run with other settings of `distributed`."""
    return config.model_copy(update={"distributed": config.distributed.model_copy(update=changed)})


def reduces_each_segment(config: Config) -> bool:
    """Returns whether gradients are reduced after every segment; the strategy must not be "auto"."""
    return config.distributed.strategy in REDUCING_EACH_SEGMENT and config.distributed.gradient_reduction != "step"


def activation_bytes(config: Config, sizes: Sizes) -> int:
    """Returns the bytes that a pass needs for one token: measured, see ACTIVATION_BYTES and PASSING_BYTES."""
    low = config.run.precision == "bf16"
    kernels = config.model.backend in ("auto", "compiled", "cuda")
    block = ACTIVATION_BYTES[sizes.version, low, kernels][config.model.freezes_weights] * sizes.width
    block += _adapter_activation_bytes(config, sizes)
    passing = PASSING_BYTES[sizes.version == 7, low] * sizes.width
    if config.model.recompute_blocks:
        return sizes.num_layers * (2 if low else 8) * sizes.width + block + passing
    return sizes.num_layers * block + passing


def _adapter_activation_bytes(config: Config, sizes: Sizes) -> int:
    """Returns the bytes that an adapter, and what learns with it, adds to those of a block for one token: its inputs
    but for miss, what comes out of them, for dora also its outputs, and which inputs are dropped."""
    adapter, low = config.model.learned_adapter, config.run.precision == "bf16"
    if adapter is None:
        return 0
    channels, dropped = sum(TRAINED_TOO_CHANNELS[group][low] for group in adapter.train_too) * sizes.width, 0
    for name, (inputs, outputs) in target_shapes(adapter, sizes).items():
        if not name.startswith("blocks."):
            continue
        channels += adapter.rank + inputs * (adapter.form != "miss") + outputs * (adapter.form == "dora")
        dropped += inputs if adapter.dropout else 0
    if not low and not dropped and adapter.form != "miss":
        channels += BLENDS_BESIDE[sizes.version] * sizes.width
    return (2 if low else 4) * channels + dropped


def weight_bytes(config: Config, sizes: Sizes) -> int:
    """Returns the bytes of the whole model's weights, without what it takes to learn them."""
    if not config.model.freezes_weights:
        return 4 * sizes.num_parameters
    form, itemsize = config.model.frozen_dtype, _activation_itemsize(config)
    if form is None:
        return itemsize * sizes.num_parameters
    matrices, ends = sizes.block_matrix_parameters, 2 * sizes.vocab_size * sizes.width
    bits = 16 if form == "bf16" else QUANTIZED_BITS[form]
    return round(matrices * bits / 8) + 2 * ends + itemsize * (sizes.num_parameters - matrices - ends)


def state_bytes(sizes: Sizes) -> int:
    """Returns the bytes of one lane's state in fp32, which is the size of a seam."""
    return 4 * sizes.state_elements


def received_bytes(config: Config, sizes: Sizes) -> int:
    """Returns the bytes that a rank keeps, per lane and segment, of values received from the other time ranks: the
    state and the two vectors before its slice, and each slice's `kept` (recurrence/time_parallel)."""
    ranks = config.distributed.time_ranks
    if ranks == 1:
        return 0
    matrix, kept = 4 * sizes.width * sizes.head_size, 4 * ranks * sizes.width * _kept_columns(sizes)
    return sizes.num_layers * (matrix + kept + 2 * sizes.width * _activation_itemsize(config))


def step_wire(config: Config, sizes: Sizes) -> Wire:
    """Returns the bytes that one rank receives in an optimizer step, with ring collectives.

    Gradients: all-reduced by ddp, zero1 and zero2, reduce-scattered by zero3; once per step, or at each backward call
    (reduces_each_segment).  Weights: all-gathered after the step (zero1, zero2) or for each pass (zero3).
    """
    strategy, ranks = config.distributed.strategy, config.distributed.world_size
    share = (ranks - 1) / ranks
    window, passes = config.window, -(-config.rank_lanes // config.pass_lanes)
    backwards = window.window_segments * passes
    forwards = backwards + (window.window_segments - -(-window.window_segments // _run_segments(config))) * passes
    all_weights = share * weight_bytes(config, sizes)
    learned = 4 * share * _learned_parameters(config, sizes)
    reductions = backwards if reduces_each_segment(config) else 1
    gradients = reductions * (1 if strategy == "zero3" else 2) * learned
    weights = {"ddp": 0, "zero1": learned, "zero2": learned, "zero3": (forwards + backwards) * all_weights}[strategy]
    return Wire(round(gradients), round(weights), backwards * sizes.num_layers * sum(time_wire(config, sizes)))


def time_wire(config: Config, sizes: Sizes) -> tuple[int, int]:
    """Returns the bytes that one rank receives from the other time ranks per layer and segment: forward and backward.

    (P - 1) B (4 H N (N + 1) + 2 D s) and (P - 1) B (4 H N N + 2 D s), with P time ranks, B lanes per pass, H N = D;
    for RWKV-7 forward with N + N for N + 1.
    """
    others, width = config.distributed.time_ranks - 1, sizes.width
    vectors = 2 * width * _activation_itemsize(config)
    forward = 4 * width * (sizes.head_size + _kept_columns(sizes)) + vectors
    backward = 4 * width * sizes.head_size + vectors
    return others * config.pass_lanes * forward, others * config.pass_lanes * backward


def _kept_columns(sizes: Sizes) -> int:
    """Returns the columns of what a slice leaves of a state: a factor for each key channel, or RWKV-7's matrix."""
    return sizes.head_size if sizes.version == 7 else 1


def held_memory(config: Config, sizes: Sizes) -> Memory:
    """Returns the bytes held from the first step to the last: weights, gradients and the optimizer's state."""
    distributed, ranks = config.distributed, config.distributed.world_size
    if config.model.freezes_weights:  # the learned state is small, so every rank holds it
        held = weight_bytes(config, sizes) // (ranks if distributed.strategy == "zero3" else 1)
        adapter = config.model.learned_adapter
        learned = WEIGHT_BYTES * (count_learned(adapter, sizes) if adapter else sizes.state_elements)
        return Memory(learned, held) if distributed.offload_parameters else Memory(held + learned, 0)
    if distributed.strategy == "ddp" and ranks == 1:
        return _held_alone(config, sizes)
    shares = PARAMETER_BYTES if reduces_each_segment(config) else STEP_PARAMETER_BYTES
    share = shares[strategy_of(config)]
    return Memory(
        share.every * sizes.num_parameters + share.device * sizes.num_parameters // ranks,
        share.host * sizes.num_parameters // ranks,
    )


def _has_bf16_matrices(config: Config) -> bool:
    """Returns whether matrices that learn are bf16 on the device."""
    on_host = config.distributed.offload_optimizer and config.distributed.strategy == "ddp"
    return config.optimizer.weights == "bf16_stochastic" or (on_host and config.run.precision == "bf16")


def _held_alone(config: Config, sizes: Sizes) -> Memory:
    """Returns `held_memory` of one device with an optimizer of ours or torch's (infctx/optimizers)."""
    settings, on_host = config.optimizer, config.distributed.offload_optimizer
    moments = 0.0 if on_host else 2 * (1 + 4 / BLOCK) if settings.states == "int8" else 8.0
    weight = 2 if _has_bf16_matrices(config) else 4
    gradient = 4 if settings.gradients == "fp32" else 2
    others = sizes.num_parameters - sizes.matrix_parameters
    device = sizes.matrix_parameters * (weight + gradient + moments) + others * (8 + moments)
    return Memory(round(device), 12 * sizes.num_parameters if on_host else 0)


def _buffers(config: Config, sizes: Sizes) -> int:
    """Returns the bytes that DeepSpeed needs on the device while it computes, on top of those it holds."""
    strategy = config.distributed.strategy
    if strategy == "ddp":
        return 0
    embedding = sizes.vocab_size * sizes.width  # the largest parameter; the head is just as large
    total = 0
    if not config.model.freezes_weights:
        total += 4 * 3 * min(BUCKET_PARAMETERS, sizes.num_parameters)  # two in turn, and one laid out to send
        if strategy == "zero3" or reduces_each_segment(config):
            total += 4 * embedding  # its gradient, on its way to the rank that keeps it
        total += 4 * embedding if config.distributed.offload_optimizer else 0  # on its way to the host
    if strategy == "zero3":
        live = min(LIVE_PARAMETERS + BUCKET_PARAMETERS + embedding, sizes.num_parameters)
        total += weight_bytes(config, sizes) * live // sizes.num_parameters
    return total


def _step_bytes(config: Config, sizes: Sizes) -> int:
    """Returns the bytes that the optimizer's step needs on top of those held; activations are gone by then."""
    if config.optimizer.small_forms and not config.distributed.offload_optimizer:
        return SLICE_BYTES * min(SLICE, sizes.width * max(sizes.vocab_size, sizes.ffn_width))  # of one matrix
    if config.distributed.strategy != "zero3" or config.model.freezes_weights or config.distributed.offload_optimizer:
        return 0
    return 4 * sizes.num_parameters // config.distributed.world_size  # the gradient, laid out for the optimizer


def _run_segments(config: Config) -> int:
    """Returns how many segments a gradient flows over; their seams are kept at the same time."""
    return config.window.gradient_segments or config.window.window_segments


def _made_bytes(config: Config, sizes: Sizes, device_type: str) -> int:
    """Returns the bytes of what is made of frozen weights for a product: a matrix, or in fp32 the head."""
    form, itemsize = config.model.frozen_dtype, _activation_itemsize(config)
    if form is None or (form, itemsize) == ("bf16", 2):
        return 0
    matrix = itemsize * sizes.width * max(sizes.width, sizes.ffn_width)
    on_the_way = 8 * AT_ONCE if form in QUANTIZED_BITS and device_type == "cuda" else 0  # counted in plain torch
    return max(matrix + on_the_way, 4 * sizes.vocab_size * sizes.width * (itemsize == 4))


def _activation_itemsize(config: Config) -> int:
    return 2 if config.run.precision == "bf16" else 4


def _learned_parameters(config: Config, sizes: Sizes) -> int:
    if not config.model.freezes_weights:
        return sizes.num_parameters
    if config.model.learned_adapter:
        return count_learned(config.model.learned_adapter, sizes)
    matrices = sizes.num_layers * sizes.width * sizes.head_size
    return sizes.state_elements if config.model.learn == "initial_state_and_shifts" else matrices

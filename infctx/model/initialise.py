"""New weights: the official initialisation of RWKV-5, RWKV-6 and RWKV-7 as of RWKV-LM 524481d (2026-08)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from infctx.model.block import Block
from infctx.model.channel_mix import ChannelMix
from infctx.model.delta_time_mix import DeltaTimeMix
from infctx.model.layers import HeadNorm
from infctx.model.rwkv import RWKV
from infctx.model.sizes import Sizes
from infctx.model.time_mix import DataDependentMixing, TimeMix


@torch.no_grad()
def initialise(model: RWKV, seed: int) -> None:
    """Fills every weight of the model in place, drawing on the CPU so that a seed gives the same weights anywhere.

    Norms are 1 and 0, except that the head norm's gain grows slowly with depth.  Matrices that end a residual branch
    are 0.  Decays and token-shift weights follow curves over channels and depth.
    """
    random = torch.Generator().manual_seed(seed)
    sizes = model.sizes
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, HeadNorm)):
            module.weight.fill_(1)
            module.bias.zero_()
    _uniform(model.embedding.weight, 1e-4, random)
    growth = max(sizes.vocab_size / sizes.width, 1) ** 0.5
    _orthogonal(model.head.weight, 0.5 * growth, random)
    for layer, block in enumerate(cast(Iterable[Block], model.blocks)):
        block.time_mix.head_norm.weight.fill_(((1 + layer) / sizes.num_layers) ** 0.7)
        for matrix in (block.time_mix.output, block.channel_mix.value):
            matrix.weight.zero_()
        if sizes.version == 7:
            _initialise_goose(block, layer, sizes, random)
        else:
            _initialise_mixes(block, layer, sizes, random)
            _initialise_matrices(block, random)
    for part in model.initial_parts():
        if part is not None:
            part.zero_()


def _initialise_matrices(block: Block, random: torch.Generator) -> None:
    time_mix, channel_mix = cast(TimeMix, block.time_mix), cast(ChannelMix, block.channel_mix)
    channel_mix.receptance.weight.zero_()
    for matrix, gain in (
        (time_mix.receptance, 1.0),
        (time_mix.key, 0.1),
        (time_mix.value, 1.0),
        (time_mix.gate, 0.1),
        (channel_mix.key, 1.0),
    ):
        _orthogonal(matrix.weight, gain, random)


def _initialise_mixes(block: Block, layer: int, sizes: Sizes, random: torch.Generator) -> None:
    """Fills token-shift weights, decay and bonus: curves over the channel n and the depth."""
    width, time_mix, channel_mix = sizes.width, cast(TimeMix, block.time_mix), cast(ChannelMix, block.channel_mix)
    mixing = time_mix.mixing
    depth, remaining, n, place = _places(layer, sizes)

    curve = (n / width) ** remaining
    half_curve = (n / width) ** (remaining / 2)
    current = {  # mu: the weight of the current token's vector
        "mix_key": curve,
        "mix_value": curve + 0.3 * depth,
        "mix_receptance": half_curve,
        "mix_gate": half_curve,
    }
    current_in_channel_mix = curve
    if isinstance(mixing, DataDependentMixing):
        current = {name: 1 - mu for name, mu in current.items()}
        current |= {"mix_inner": 1 - curve, "mix_decay": 1 - curve}
        current_in_channel_mix = 1 - (n / width) ** remaining**3
        for down, up in ((mixing.mix_down, mixing.mix_up), (mixing.decay_down, mixing.decay_up)):
            down.zero_()
            _uniform(up, 0.01, random)
    for name, values in current.items():
        _fill(getattr(mixing, name), values)
    _fill(block.channel_mix.mix_key, current_in_channel_mix)
    _fill(channel_mix.mix_receptance, current_in_channel_mix)
    _fill(mixing.decay, -6 + 5 * place ** (0.7 + 1.3 * depth))
    _fill(time_mix.bonus, depth * (1 - place) + 0.1 * ((n + 1) % 3 - 1))


def _initialise_goose(block: Block, layer: int, sizes: Sizes, random: torch.Generator) -> None:
    """Fills all of a block of RWKV-7 but its norms and zeros."""
    width, head_size, time_mix = sizes.width, sizes.head_size, cast(DeltaTimeMix, block.time_mix)
    depth, remaining, n, place = _places(layer, sizes)
    linear = place - 0.5
    zigzag = (n % head_size - (head_size - 1) / 2) / max((head_size - 1) / 2, 0.5)
    zigzag = zigzag * zigzag.abs()
    for names, power in (("receptance gate", 0.2), ("decay rate", 0.9), ("key value", 0.7)):
        for name in names.split():
            _fill(getattr(time_mix, f"mix_{name}"), 1 - (n / width) ** (power * remaining))
    _fill(block.channel_mix.mix_key, 1 - (n / width) ** remaining**4)
    _fill(time_mix.decay, -5.5 + 6 * place ** (1 + depth**0.3) + 2.5 * zigzag)
    _fill(time_mix.rate, -0.19 + 0.3 * zigzag + 0.4 * linear)
    _fill(time_mix.removal_scale, 0.71 - 0.1 * linear)
    time_mix.key_rate.fill_(1.02)
    time_mix.bonus.fill_(-0.04)
    products = ["decay", "rate", "gate"]
    if hasattr(time_mix, "first_value"):
        _fill(time_mix.first_value, 0.73 - 0.4 * linear)
        products.append("first_value")
    for name in products:
        up = getattr(time_mix, f"{name}_up")
        getattr(time_mix, f"{name}_down").zero_()
        _orthogonal(up, 0.1 * max(up.shape[0] / up.shape[1], 1) ** 0.5, random)
    bound = 0.5 / width**0.5
    for matrix, its in (
        (time_mix.receptance, bound),
        (time_mix.key, bound / 10),
        (time_mix.value, bound),
        (block.channel_mix.key, bound),
    ):
        _uniform(matrix.weight, its, random)


def _places(layer: int, sizes: Sizes) -> tuple[float, float, Tensor, Tensor]:
    """Returns depth 0 .. 1 (0 in a model of one layer), what remains of it 1 .. 1 / L, channels n, and n as 0 .. 1."""
    n = torch.arange(sizes.width, dtype=torch.float64)
    return layer / max(sizes.num_layers - 1, 1), 1 - layer / sizes.num_layers, n, n / max(sizes.width - 1, 1)


def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.view(parameter.shape))


def _uniform(parameter: Tensor, bound: float, random: torch.Generator) -> None:
    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=random))


def _orthogonal(parameter: Tensor, gain: float, random: torch.Generator) -> None:
    parameter.copy_(nn.init.orthogonal_(torch.empty(parameter.shape), gain, generator=random))

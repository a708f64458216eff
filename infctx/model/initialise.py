"""New weights: the official initialisation of RWKV-5 and RWKV-6 as of RWKV-LM 524481d (2026-08)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from infctx.model.block import Block
from infctx.model.layers import HeadNorm
from infctx.model.rwkv import RWKV
from infctx.model.sizes import Sizes
from infctx.model.time_mix import DataDependentMixing


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
        _initialise_mixes(block, layer, sizes, random)
        time_mix, channel_mix = block.time_mix, block.channel_mix
        time_mix.head_norm.weight.fill_(((1 + layer) / sizes.num_layers) ** 0.7)
        for matrix in (time_mix.output, channel_mix.value, channel_mix.receptance):
            matrix.weight.zero_()
        for matrix, gain in (
            (time_mix.receptance, 1.0),
            (time_mix.key, 0.1),
            (time_mix.value, 1.0),
            (time_mix.gate, 0.1),
            (channel_mix.key, 1.0),
        ):
            _orthogonal(matrix.weight, gain, random)
    for part in model.initial_parts():
        if part is not None:
            part.zero_()


def _initialise_mixes(block: Block, layer: int, sizes: Sizes, random: torch.Generator) -> None:
    """Fills token-shift weights, decay and bonus: curves over the channel n and the depth."""
    width, mixing = sizes.width, block.time_mix.mixing
    depth = layer / max(sizes.num_layers - 1, 1)  # 0 .. 1; 0 in a model of one layer
    remaining = 1 - layer / sizes.num_layers  # 1 .. 1 / L
    n = torch.arange(width, dtype=torch.float64)
    place = n / max(width - 1, 1)  # 0 .. 1

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
    _fill(block.channel_mix.mix_receptance, current_in_channel_mix)
    _fill(mixing.decay, -6 + 5 * place ** (0.7 + 1.3 * depth))
    _fill(block.time_mix.bonus, depth * (1 - place) + 0.1 * ((n + 1) % 3 - 1))


def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.view(parameter.shape))


def _uniform(parameter: Tensor, bound: float, random: torch.Generator) -> None:
    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=random))


def _orthogonal(parameter: Tensor, gain: float, random: torch.Generator) -> None:
    parameter.copy_(nn.init.orthogonal_(torch.empty(parameter.shape), gain, generator=random))

"""Small models for the tests, with random values in every weight, so that no weight can be mistaken for another."""

import torch

from infctx.model.build import new_model
from infctx.model.rwkv import Compute
from infctx.model.sizes import make_sizes

SIZES = {"num_layers": 2, "width": 24, "vocab_size": 19, "head_size": 8}
RANKS = {
    5: {},
    6: {"mix_rank": 3, "decay_rank": 5},
    7: {"decay_rank": 5, "rate_rank": 3, "value_rank": 2, "gate_rank": 4},
}


def random_model(
    version, *, dtype=torch.float32, seed=0, with_state=False, noise=0.2, backend="auto", compute=None, **sizes
):
    """Makes a model of SIZES (or others) with initial weights plus noise; with_state: a learned state too."""
    wanted = make_sizes(version=version, **(SIZES | RANKS[version] | sizes))
    model = new_model(wanted, "cpu", dtype, seed, compute or Compute(backend=backend))
    if with_state:
        model.add_initial_state()
    random = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=random, dtype=torch.float64).to(dtype)
    return model


def random_tokens(*shape, vocab_size=SIZES["vocab_size"], seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_window(num_tokens, batch=2, vocab_size=19, seed=0, start_rate=0.2):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, num_tokens), generator=random)
    targets = torch.randint(vocab_size, (batch, num_tokens), generator=random)
    targets[torch.rand(targets.shape, generator=random) < 0.3] = -100
    starts = torch.rand(batch, -(-num_tokens // 16), generator=random) < start_rate
    return tokens, targets, starts

"""Random inputs of the WKV op, and the error measure for results."""

import torch


def random_inputs(seed, decay="ordinary", dtype=torch.float64, shape=None):
    """Returns inputs of a random shape; `shape` fixes (B, T, H, N)."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def one_of(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    batch, tokens, heads, size = shape or (one_of(1, 3), one_of(1, 200), one_of(1, 5), (16, 32, 64)[one_of(0, 2)])
    z = draw(batch, tokens, heads, size)
    log_decay = {
        "ordinary": lambda: -torch.exp(z - 2),
        "extreme": lambda: -torch.exp(3 * z),
        "mixed": lambda: -(10 ** (torch.rand(z.shape, generator=g, dtype=torch.float64) * 5.78 - 4)),  # -1e-4 to -60
        "constant": lambda: -torch.exp(draw(1, 1, heads, size)).expand(z.shape),
    }[decay]()
    inputs = {
        "r": draw(*z.shape),
        "k": draw(*z.shape),
        "v": draw(*z.shape),
        "w": log_decay,
        "u": draw(heads, size),
        "state": draw(batch, heads, size, size),
        "initial": draw(batch, heads, size, size),
    }
    starts = torch.rand(batch, -(-tokens // 16), generator=g) < 0.3
    cotangents = draw(*z.shape), draw(batch, heads, size, size)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if decay == "constant":
        inputs["w"] = inputs["w"][:1, :1].expand(z.shape)
        assert inputs["w"].stride(1) == 0
    return inputs, starts, [x.to(dtype) for x in cotangents]


def relative_rms(found, truth):
    scale = truth.double().square().mean().sqrt()
    return ((found.double() - truth.double()).square().mean().sqrt() / scale.clamp_min(1e-300)).item()

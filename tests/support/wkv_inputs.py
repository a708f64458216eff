"""Random inputs of the WKV ops, and the error measure for results."""

import torch


def random_inputs(seed, decay="ordinary", dtype=torch.float64, shape=None, op="wkv"):
    """Returns inputs of a random shape, in the order of the op; `shape` fixes (B, T, H, N).

    For wkv7, a is minus a unit vector and b that vector times rates, many of them near 0 and 1; some tokens remove
    nothing, and every third seed has an a and a b without any pattern.
    """
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
    if op == "wkv7":
        direction = torch.nn.functional.normalize(draw(*z.shape), dim=-1)
        rate = torch.sigmoid(6 * draw(*z.shape))
        removes = torch.rand(z.shape[:3], generator=g, dtype=torch.float64)[..., None] > 0.1
        a, b = -direction * removes, direction * rate
        if seed % 3 == 2:
            a, b = (draw(*z.shape) * 0.8 / size**0.5 for _ in range(2))
        inputs = (
            {name: inputs[name] for name in ("r", "w", "k", "v")}
            | {"a": a, "b": b}
            | {name: inputs[name] for name in ("state", "initial")}
        )
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

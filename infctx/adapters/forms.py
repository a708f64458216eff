"""The forms of an adapter: modules that add their term to a frozen product y = x W^T, and the same as a matrix.

Parameters are fp32 and computed in the dtype of x.  r is the rank, I the inputs and O the outputs of W (O, I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infctx.adapters.dropout import kept
from infctx.model.layers import Beside, Draws, Embedding, Linear, LowRank, Matrix
from infctx.ops.precision import state_dtype
from infctx.settings.adapter import AdapterSettings


def make_adapter(settings: AdapterSettings, layer: Linear | Embedding, number: int, draws: Draws) -> Adapter:
    """Makes the adapter of a matrix, on its device, without values.

    number: of the adapter in its model, for its dropout
    """
    forms = {"lora": LookupLora} if isinstance(layer, Embedding) else {"lora": Lora, "dora": Dora, "miss": Miss}
    return forms[settings.form](settings, layer, number, draws)


class Adapter(Beside):
    """What all forms share: dropout of their inputs."""

    matrices: tuple[str, ...]
    """The parameters that weight decay is for."""

    def __init__(self, settings: AdapterSettings, layer: Linear | Embedding, number: int, draws: Draws) -> None:
        super().__init__()
        self.rank, self.scale, self.rate = settings.rank, settings.scale, settings.dropout
        self.inputs, self.outputs = inputs_and_outputs(layer)
        self.number, self.draws = number, draws

    def begin(self, random: torch.Generator, matrix: Matrix) -> None:
        """Sets the values of a new adapter, which changes no output."""
        raise NotImplementedError

    def _empty(self, layer: nn.Module, *shape: int) -> nn.Parameter:
        like = next(layer.parameters())
        return nn.Parameter(torch.empty(shape, dtype=state_dtype(like.dtype), device=like.device))

    def _dropped(self, x: Tensor) -> tuple[Tensor, float]:
        """Returns the inputs that stay, and the factor that makes up for the others."""
        if self.draws.rows is None or self.rate == 0:
            return x, 1.0
        mask = kept(self.draws.rows, self.number, self.inputs, self.rate)
        return x.masked_fill(~mask, 0), 1 / (1 - self.rate)


class Lora(Adapter):
    """y + scale (x A^T) B^T with A (r, I), B (O, r)   (arXiv 2106.09685)."""

    matrices = ("down", "up")

    def __init__(self, settings: AdapterSettings, layer: Linear | Embedding, number: int, draws: Draws) -> None:
        super().__init__(settings, layer, number, draws)
        self.down = self._empty(layer, self.rank, self.inputs)
        self.up = self._empty(layer, self.outputs, self.rank)

    def low_rank(self, x: Tensor, matrix: Matrix) -> LowRank:
        x, factor = self._dropped(x)
        return LowRank(F.linear(x, self.down.to(x.dtype)), self.up, factor * self.scale)

    @torch.no_grad()
    def begin(self, random: torch.Generator, matrix: Matrix) -> None:
        """A uniform in +-1/sqrt(I), as in RWKV-PEFT and peft (kaiming uniform with a = sqrt 5); B zeros."""
        drawn = torch.rand(self.down.shape, generator=random, dtype=torch.float64)
        self.down.copy_((2 * drawn - 1) / math.sqrt(self.inputs))
        self.up.zero_()


class LookupLora(Lora):
    """The same beside a table of vectors: x are tokens, and A has a column for each; as peft's lora.Embedding (0033694)
    it has no dropout."""

    def low_rank(self, x: Tensor, matrix: Matrix) -> LowRank:
        return LowRank(F.embedding(x, self.down.T), self.up, self.scale)

    @torch.no_grad()
    def begin(self, random: torch.Generator, matrix: Matrix) -> None:
        """A zeros, B normal, as in peft."""
        self.up.copy_(torch.randn(self.up.shape, generator=random, dtype=torch.float64))
        self.down.zero_()


class Dora(Lora):
    """c (y + scale (x A^T) B^T), for each output c = m / |its row of W + scale B A|   (arXiv 2402.09353).

    As section 4.3 says and peft does, the length is a constant in the backward pass.  With dropout, the term of W has
    all of its inputs.
    """

    def __init__(self, settings: AdapterSettings, layer: Linear | Embedding, number: int, draws: Draws) -> None:
        super().__init__(settings, layer, number, draws)
        self.magnitude = self._empty(layer, self.outputs)

    def low_rank(self, x: Tensor, matrix: Matrix) -> LowRank:
        return super().low_rank(x, matrix)._replace(factors=self.magnitude / self._lengths(matrix))

    @torch.no_grad()
    def begin(self, random: torch.Generator, matrix: Matrix) -> None:
        super().begin(random, matrix)
        self.magnitude.copy_(self._lengths(matrix))

    @torch.no_grad()
    def _lengths(self, matrix: Matrix) -> Tensor:
        """|w + scale b A| for each row w of W and b of B, (O): from w w, w A b and b A A b, without another (O, I)."""
        weight, low = matrix(self.down.dtype), self.down
        own = torch.linalg.vector_norm(weight, dim=1).square()
        mixed = ((weight @ low.T) * self.up).sum(1)
        added = ((self.up @ (low @ low.T)) * self.up).sum(1)
        return _length(own + 2 * self.scale * mixed + self.scale**2 * added)


class Miss(Adapter):
    """y + s D with D (r, O), where s (r) adds up the inputs r apart: s[j] = x[j] + x[j + r] + x[j + 2 r] + ...

    MiSS, which was called Bone and DiSHA before (arXiv 2409.15371).  As in peft's miss/layer.py (04c69f4) and
    RWKV-PEFT's BoneLinear (7912a0c): D begins as zeros; where r does not divide I, the inputs end in zeros.
    """

    matrices = ("block",)

    def __init__(self, settings: AdapterSettings, layer: Linear | Embedding, number: int, draws: Draws) -> None:
        super().__init__(settings, layer, number, draws)
        self.block = self._empty(layer, self.rank, self.outputs)

    def low_rank(self, x: Tensor, matrix: Matrix) -> LowRank:
        x, factor = self._dropped(x)
        padded = F.pad(x, (0, -self.inputs % self.rank))
        return LowRank(padded.unflatten(-1, (-1, self.rank)).sum(-2), self.block.T, factor)

    @torch.no_grad()
    def begin(self, random: torch.Generator, matrix: Matrix) -> None:
        self.block.zero_()


def inputs_and_outputs(layer: Linear | Embedding) -> tuple[int, int]:
    """Returns I and O; a lookup is the product with a vector of zeros and a 1, so I is the number of tokens."""
    if isinstance(layer, Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_features, layer.out_features


def merged(form: str, weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """Returns the matrix (O, I) that computes what W and its adapter do, in fp64.

    parts: the adapter's parameters by their names here
    """
    weight = weight.double()
    parts = {name: part.to(weight.device, torch.float64) for name, part in parts.items()}
    if form == "miss":
        rank = parts["block"].shape[0]
        return weight + parts["block"].T.repeat(1, -(-weight.shape[1] // rank))[:, : weight.shape[1]]
    weight = weight + scale * (parts["up"] @ parts["down"])
    if form == "lora":
        return weight
    return weight * (parts["magnitude"] / _length(weight.square().sum(1)))[:, None]


def _length(squared: Tensor) -> Tensor:
    """Returns the root; of zeros a tiny length instead, to divide by."""
    return squared.clamp_min(1e-30).sqrt()

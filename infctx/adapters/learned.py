"""What a run with an adapter has learned: the adapter's parameters and other weights; and matrices merged with it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from infctx.adapters.forms import merged
from infctx.adapters.stored import FORMS, Kind
from infctx.errors import InputError


class Learned(NamedTuple):
    """Parameters by their names in a model with the adapter.

    place: the file, for messages
    tuned_over: fingerprint of the frozen weights; None if unknown
    """

    place: str
    kind: Kind
    tensors: dict[str, Tensor]
    tuned_over: str | None

    def matrices(self) -> list[str]:
        """Returns the names of the matrices that have an adapter."""
        return list(dict.fromkeys(name.partition(".adapter.")[0] for name in self.tensors if ".adapter." in name))

    def refuse_shapes(self, matrix: str, outputs: int, inputs: int) -> None:
        """Raises InputError unless the adapter fits a matrix whose weight has this shape."""
        if matrix == "embedding":
            outputs, inputs = inputs, outputs
        shapes = {part: tuple(tensor.shape) for part, tensor in self._parts(matrix).items()}
        rank = next((shape[0] for part, shape in shapes.items() if part in ("down", "block")), 0)
        whole = {"down": (rank, inputs), "up": (outputs, rank), "magnitude": (outputs,), "block": (rank, outputs)}
        if shapes != {part: whole[part] for part in FORMS[self.kind.form]}:
            found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
            raise InputError(
                f"{self.place}: the adapter of {matrix} has {found}, which is no {self.kind.form} for a matrix of "
                f"{outputs} x {inputs}; use one that was trained on this model"
            )

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Returns a weight of the model as it is with what was learned: computed in fp64, rounded to fp32."""
        if name in self.tensors:
            return self.tensors[name].view_as(weight)
        parts = self._parts(name.removesuffix(".weight"))
        if not parts:
            return weight
        if name == "embedding.weight":
            return merged(self.kind.form, weight.T, parts, self.kind.scale).T.contiguous().float()
        return merged(self.kind.form, weight, parts, self.kind.scale).float()

    def _parts(self, matrix: str) -> dict[str, Tensor]:
        begin = f"{matrix}.adapter."
        return {name.removeprefix(begin): part for name, part in self.tensors.items() if name.startswith(begin)}

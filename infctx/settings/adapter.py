"""Settings of an adapter: small matrices that learn beside frozen ones."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from infctx.settings.section import Fraction, Positive, Section

Target = Literal[
    "att.receptance",
    "att.key",
    "att.value",
    "att.output",
    "att.gate",
    "ffn.key",
    "ffn.value",
    "ffn.receptance",
    "head",
    "emb",
]
Group = Literal["norms", "mixes", "decays", "bonus"]

WHERE_FORMS = ("as a word", "as a list")
"""What pydantic calls the forms of `where` in its errors."""
Where = Annotated[
    Annotated[Literal["all", "attention"], Tag(WHERE_FORMS[0])]
    | Annotated[list[Literal["all", "attention", Target]], Tag(WHERE_FORMS[1]), Field(min_length=1)],
    Discriminator(lambda value: WHERE_FORMS[isinstance(value, list)]),
]


class AdapterSettings(Section):
    """An adapter: what it is made of, which matrices have one, and what learns with it."""

    form: Literal["lora", "dora", "miss"] = "lora"
    """`lora` adds a product of two thin matrices to each weight (arXiv 2106.09685).  `dora` also learns the length of
    each of its rows (arXiv 2402.09353), and takes longer.  `miss` adds one small matrix, repeated over the
    inputs (arXiv 2409.15371): half of lora's parameters at the same rank."""
    rank: Positive = 32
    """Rows of the thin matrices.  Parameters and their memory, 16 bytes each, grow in proportion."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """lora and dora multiply their product by `alpha / rank`; null: by 1.  miss has no such factor."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs that are set to zero in training, drawn anew in each step."""
    where: Where = "all"
    """Which matrices have an adapter: `all` of the blocks, those of `attention` (the time mix), or a list of
    `att.receptance`, `att.key`, `att.value`, `att.output`, `att.gate`, `ffn.key`, `ffn.value`, `ffn.receptance`, `head`
    and `emb`, the embedding; a list can have `all` and `attention` too, as in `[all, head]`.  Goose has no `att.gate`
    and no `ffn.receptance`.  `emb` has the form lora, without dropout."""
    train_too: list[Group] = []
    """Weights that learn with the adapter, in full and in fp32: `norms`; `mixes`, the token-shift weights with Finch's
    low-rank product; `decays`, with theirs; `bonus`.  RWKV-PEFT's form of an adapter has no place for them."""
    initial_state: bool = False
    """The matrices that documents start from learn too, as in state tuning."""
    state_lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate of the initial state when the others learn at `optimizer.peak_lr`, in units of the model's own
    states (docs/state-tuning.md)."""

    @property
    def scale(self) -> float:
        """The factor of lora's and dora's product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @model_validator(mode="after")
    def _fits(self) -> AdapterSettings:
        if self.form != "lora" and "emb" in self.where:
            raise ValueError(
                f"where: {self.form} has no form for emb, a table of vectors; leave it out, or choose lora"
            )
        if self.form == "miss" and self.alpha is not None:
            raise ValueError("alpha: miss has no factor; leave it out, or choose lora or dora")
        return self

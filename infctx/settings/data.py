"""Settings of the documents that a run trains on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from infctx.settings.section import PathSetting, Positive, Section, refuse

Name = Annotated[str, StringConstraints(min_length=1, max_length=40, pattern=r"^[^/\p{C}]*$")]


class NamedStore(Section):
    """A token store with a name."""

    store: PathSetting
    """The path of its `.bin` and `.idx` without the suffix."""
    name: Name | None = None
    """What logs and messages call it; null: the name of its folder."""

    @property
    def called(self) -> str:
        return self.name or self.store.parent.name or self.store.name


class SourceSettings(NamedStore):
    """One of several sources of documents."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of the tokens, in proportion to the other weights.  null: each source's share is that of its size;
    give all of the sources a weight, or none."""


class CurriculumSettings(Section):
    """Lengths that grow over the first steps."""

    from_tokens: Positive
    """The most tokens of a document in the first step, a multiple of `window.segment_tokens`."""
    to_tokens: Positive
    """The most tokens of a document in the last step of the curriculum, a multiple of `window.segment_tokens`."""
    steps: Positive
    """Steps over which the limit grows, a segment at a time.  After them, documents are not cut anymore."""


FORMS = ("as a path", "as a list")
"""What pydantic calls the forms of StoreOrList in its errors."""
StoreOrList = Annotated[
    Annotated[PathSetting, Tag(FORMS[0])] | Annotated[list[NamedStore], Tag(FORMS[1]), Field(min_length=1)],
    Discriminator(lambda value: FORMS[isinstance(value, list)]),
]


class DataSettings(Section):
    """The documents: token stores that `infctx prepare` makes.  Set `store`, or `sources` for a mixture."""

    store: PathSetting | None = None
    """Token store to train on: the path of its `.bin` and `.idx` without the suffix, such as `data/books/train`."""
    sources: Annotated[list[SourceSettings], Field(min_length=1)] | None = None
    """Several token stores to train on, instead of `store`: a list of `{store: PATH, weight: NUMBER, name: WORD}`.
    Weights are shares of the tokens, in any unit; without them, all stores last equally long.  The shares hold at any
    time to within about a document, and each source has separate epochs.  The log shows the loss of each source."""
    held_out: StoreOrList | None = None
    """Token store of held-out documents, for the loss by position (`run.evaluate_tokens`); null: none.  Or a list of
    `{store: PATH, name: WORD}`: the table is of all of them together, and a line has the loss of each."""
    document_tokens: Positive | None = None
    """The most tokens a document may have.  Longer ones are cut, and each part starts from the initial state like a
    separate document.  null: never cut.  For state tuning, where only document starts train the state, set it to at
    most `window.window_tokens`."""
    min_tokens: Positive | None = None
    """Leaves out documents with fewer tokens, their end included; null: keeps all.  A line at the start says how many
    are left out."""
    max_tokens: Positive | None = None
    """Leaves out documents with more tokens, their end included; null: keeps all.  To cut long documents and train on
    all of their parts, set `document_tokens` instead."""
    curriculum: CurriculumSettings | None = None
    """Begins with short documents: `{from_tokens: NUMBER, to_tokens: NUMBER, steps: NUMBER}`.  In the first step,
    documents are cut at `from_tokens`; the limit grows by a segment at a time to `to_tokens` over `steps` steps, and
    after them documents are whole.  Both are multiples of `window.segment_tokens`.  What follows a cut comes next in
    the same lane, as another document: no token is lost or seen twice.  null: whole documents from the start."""
    shuffle: bool = True
    """Shuffles the documents anew each epoch; false keeps the order of the store."""

    @property
    def all_sources(self) -> list[SourceSettings]:
        """The sources, whichever way they are set."""
        return self.sources or [SourceSettings(store=store) for store in [self.store] if store is not None]

    @property
    def held_out_stores(self) -> list[tuple[str, Path]]:
        """The name and path of each held-out store; a single one is called held_out."""
        if isinstance(self.held_out, list):
            return [(each.called, each.store) for each in self.held_out]
        return [] if self.held_out is None else [("held_out", self.held_out)]

    @property
    def named_stores(self) -> list[tuple[str, Path]]:
        """The setting and path of every store that the run reads."""
        held_out = isinstance(self.held_out, list)
        return [
            *(
                (f"sources[{i}].store" if self.sources else "store", each.store)
                for i, each in enumerate(self.all_sources)
            ),
            *(
                (f"held_out[{i}].store" if held_out else "held_out", path)
                for i, (_, path) in enumerate(self.held_out_stores)
            ),
        ]

    @model_validator(mode="after")
    def _fits(self) -> DataSettings:
        problems = []
        if self.store is None and self.sources is None:
            problems.append("store: is missing; set it in the file or as an override")
        if self.store is not None and self.sources is not None:
            problems.append("sources: documents come from data.store too; set one of the two to null")
        weights = [source.weight is not None for source in self.sources or ()]
        if any(weights) and not all(weights):
            problems.append(
                f"sources[{weights.index(False)}].weight: is missing, and others have one; give all or none"
            )
        for setting in ("sources", "held_out"):
            given = getattr(self, setting)
            names = [each.called for each in given] if isinstance(given, list) else []
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                place = len(names) - 1 - names[::-1].index(twice[0])
                problems.append(f"{setting}[{place}].name: {twice[0]} is the name of another one too; give it its own")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            problems.append(f"min_tokens: {self.min_tokens} is more than max_tokens {self.max_tokens}; choose less")
        if self.curriculum and self.curriculum.from_tokens > self.curriculum.to_tokens:
            problems.append(
                f"curriculum.from_tokens: {self.curriculum.from_tokens} is more than to_tokens "
                f"{self.curriculum.to_tokens}; lengths grow, so choose less"
            )
        return refuse(self, problems)

"""Settings of the documents that a run trains on."""

from __future__ import annotations

from infctx.settings.section import PathSetting, Positive, Section


class DataSettings(Section):
    """The documents: token stores that `infctx prepare` makes."""

    store: PathSetting
    """Token store to train on: the path of its `.bin` and `.idx` without the suffix, such as `data/books/train`."""
    held_out: PathSetting | None = None
    """Token store of held-out documents, for the table of loss by position at the end of the run; null: no table."""
    document_tokens: Positive | None = None
    """The most tokens a document may have.  Longer ones are cut, and each part starts from the initial state like a
    separate document.  null: never cut.  For state tuning, where only document starts train the state, set it to at
    most `window.window_tokens`."""
    shuffle: bool = True
    """Shuffles the documents anew each epoch; false keeps the order of the store."""

"""What the documents and the model agree on; everything else may use it."""

START_SPACING = 16
"""A document may start at every token whose place in the window is a multiple of this."""

MASKED = -100
"""Target of a place that carries no loss."""

END_OF_DOCUMENT = 0
"""The token that ends a document; no tokenizer makes it of a text."""

"""Numbers that the documents and the model agree on; every room may use them."""

START_SPACING = 16
"""Documents start at tokens whose place in the window is a multiple of this."""

MASKED = -100
"""Target of a token that has no loss."""

END_OF_DOCUMENT = 0
"""The token that ends a document; no tokenizer produces it from text."""

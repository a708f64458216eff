"""Files as documents, for tests of readers."""

import pytest

from infctx.documents.document import Reading
from infctx.documents.inputs import find_sources
from infctx.documents.read import read_documents
from infctx.errors import InputError


def texts(*inputs, **reading):
    """The text of each document of the inputs; reading: the fields of a Reading."""
    reading = Reading(**reading)
    sources, _ = find_sources([str(name) for name in inputs], reading)
    return [
        "".join(piece for part in document.parts for piece in part.pieces)
        for document in read_documents(sources, reading)
    ]


def refused(message, *inputs, **reading):
    """Checks that the inputs are refused in one line that matches a message."""
    with pytest.raises(InputError, match=message) as caught:
        texts(*inputs, **reading)
    assert "\n" not in str(caught.value)

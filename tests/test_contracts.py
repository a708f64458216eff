"""Constants that two packages must hold apart and alike."""

from infctx.data import lanes
from infctx.model import START_SPACING, loss


def test_data_and_model_agree():
    assert lanes.DOCUMENT_ALIGNMENT == START_SPACING
    assert lanes.MASKED == loss.MASKED

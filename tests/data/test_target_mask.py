"""Masks of stores: the bits and counts of random documents, and damage that is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infctx.data.target_mask as target_mask
from infctx.data.store_writer import TokenStoreWriter
from infctx.data.target_mask import TargetMask, TargetMaskWriter
from infctx.data.token_store import TokenStore
from infctx.errors import InputError

RUNS = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=8)


def write(path, documents):
    """Writes documents of (count, are_targets) runs; returns the bits of those that have a target, joined."""
    kept = []
    with TokenStoreWriter(path) as writer:
        for number, (runs, end) in enumerate(documents):
            for count, are_targets in runs:
                writer.extend(np.full(count, number + 1), are_targets)
            bits = [are_targets for count, are_targets in runs for _ in range(count)] + [end]
            bits[0] = False
            assert writer.end_document(end) == (any(bits) or len(bits) == 1)
            if any(bits) or len(bits) == 1:
                kept.append((number + 1, bits))
    assert (writer.num_documents, writer.num_targets) == (len(kept), sum(sum(bits) for _, bits in kept))
    return kept


@given(st.lists(st.tuples(RUNS, st.booleans()), min_size=1, max_size=20), st.sampled_from([8, 24, 4096]))
@settings(deadline=None, max_examples=80)
def test_every_bit_and_every_count(tmp_path_factory, documents, block):
    path = tmp_path_factory.mktemp("mask") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_mask, "BLOCK_TOKENS", block)
        patch.setattr(target_mask, "AT_ONCE", 16)
        kept = write(path, [*documents, ([(2, True)], True)])
        store = TokenStore(path)
        assert store.num_documents == len(kept)
        assert path.with_suffix(".mask").exists() == any(not all(bits[1:]) for _, bits in kept)
        assert store.num_targets == sum(sum(bits) for _, bits in kept)
        for i, (number, bits) in enumerate(kept):
            assert store.tokens(i, 0, store.length(i)).tolist() == [number] * (len(bits) - 1) + [0]
            for begin, end in [(0, len(bits)), (len(bits) // 3, len(bits) // 2), (1, len(bits))]:
                assert store.targets(i, begin, end).tolist() == bits[begin:end]
                assert store.count_targets(i, begin, end) == sum(bits[begin:end])


@pytest.fixture
def mask(tmp_path):
    """The mask of 9,000 tokens, whose first and last are no targets."""
    writer = TargetMaskWriter(tmp_path / "a.mask")
    for count, is_target in [(1, False), (8998, True), (1, False)]:
        writer.add(count, is_target)
    writer.close()
    return tmp_path / "a.mask"


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda data: data[:20], "cut short: 20 bytes, and the header alone has 32"),
        (lambda data: b"NFO" + data[3:], "begins with b'NFOMASK"),
        (lambda data: data[:8] + b"\2" + data[9:], "version 2"),
        (lambda data: data[:16] + b"\1" + data[17:], "is the mask of 8,961 tokens, and the store beside it has 9,000"),
        (lambda data: data[:-1], "has 1183 bytes, and a mask of 9,000 tokens 1184"),
        (lambda data: data + b"x", "has 1185 bytes"),
        (lambda data: data[:-24] + b"\1" + data[-23:], "its running counts are not those of any mask"),
        (lambda data: data[:-15] + b"\xff" + data[-14:], "its running counts are not those of any mask"),
        (lambda data: data[:24] + b"\xff" + data[25:], "its running counts do not end at its 9,215 targets"),
    ],
)
def test_a_damaged_mask(mask, damage, said):
    mask.write_bytes(damage(mask.read_bytes()))
    with pytest.raises(InputError, match=said) as caught:
        TargetMask(mask, 9000)
    assert str(caught.value).startswith(f"{mask}: ") and "\n" not in str(caught.value)


def test_the_mask_is_part_of_the_fingerprint(tmp_path):
    write(tmp_path / "a", [([(9, False)], True)])
    write(tmp_path / "b", [([(9, True)], True)])
    first, second = TokenStore(tmp_path / "a"), TokenStore(tmp_path / "b")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert first.fingerprint != second.fingerprint

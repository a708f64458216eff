"""Packed equals alone: documents end to end in lanes train as each would by itself, and know nothing of each other."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import infctx
from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.model.loss import token_losses

from chats import prepared, random_chats
from list_store import ListStore
from tiny_models import random_model

LENGTHS = ((40, 3, 65, 18, 150, 33, 7, 90), (17, 120, 16, 2, 55))
WINDOW_TOKENS = 640


def pack(stores):
    """Returns the first window of two masked sources, in three lanes."""
    sources = [Source(name, store, weight) for name, store, weight in zip("ab", stores, (2, 3), strict=True)]
    lanes = Lanes(sources, num_lanes=3, window_tokens=WINDOW_TOKENS, seed=2, vocab_size=257)
    return next(islice(lanes, 1))[0]


def documents_of(window, stores):
    """Yields (lane, place, tokens, mask) for each document of a window; the last of a lane may be cut off."""
    for lane, names in enumerate(window.documents):
        places = [16 * place for place in window.starts[lane].nonzero().flatten().tolist()]
        for place, name in zip(places, names, strict=True):
            store, number = stores["ab".index(name[0])], int(name[2:])
            count = min(len(store.documents[number]), WINDOW_TOKENS - place + 1)
            yield lane, place, *(torch.tensor(x[number][:count]) for x in (store.documents, store.masks))


@pytest.mark.parametrize("version", [5, 6])
def test_the_gradient_is_that_of_each_document_alone(version):
    stores = [ListStore(lengths, seed, masked=True) for seed, lengths in enumerate(LENGTHS)]
    window = pack(stores)
    model = random_model(version, dtype=torch.float64, with_state=True, vocab_size=257)
    loss, num_targets = 0.0, 0
    for _, _, tokens, mask in documents_of(window, stores):
        logits = model.logits(model(tokens[None, :-1])[0])[0]
        losses = F.cross_entropy(logits, tokens[1:], reduction="none")[mask[1:]]
        loss, num_targets = loss + losses.sum(), num_targets + len(losses)
    (loss / num_targets).backward()
    assert num_targets == window.num_targets > 500
    truth = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found, _ = infctx.window_backward(model, window.tokens, window.targets, 112, starts=window.starts)
    assert found.item() == pytest.approx(loss.item() / num_targets, rel=1e-12)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - truth[name]).abs().max() <= 1e-11 * truth[name].abs().max(), name


def test_a_changed_document_changes_no_other_loss_by_a_bit():
    stores = [ListStore(lengths, seed, masked=True) for seed, lengths in enumerate(LENGTHS)]
    window = pack(stores)
    model = random_model(6, vocab_size=257)

    def losses():
        hidden, _ = model(window.tokens, model.initial_state(3), window.starts)
        return token_losses(hidden, model.head.weight, window.targets)

    before = losses()
    spans = [(lane, slice(place, place + len(tokens) - 1)) for lane, place, tokens, _ in documents_of(window, stores)]
    assert len(spans) > 10
    for lane, span in spans[1::4]:
        kept, here = window.tokens[lane, span].clone(), torch.zeros(before.shape, dtype=torch.bool)
        window.tokens[lane, span], here[lane, span] = (kept + 100) % 257, True
        after = losses()
        window.tokens[lane, span] = kept
        assert torch.equal(after[~here], before[~here])
        assert len(kept) < 5 or not torch.equal(after[here], before[here])


def test_padding_of_chats_of_300_tokens_is_below_3_percent(tmp_path):
    store = prepared(tmp_path, [{"messages": chat} for chat in random_chats(400, seed=1, words=(4, 19))])
    assert 280 < store.num_tokens / store.num_documents < 320
    lanes = Lanes([Source("chats", store)], num_lanes=4, window_tokens=4096, seed=0, vocab_size=257)
    windows = [next(lanes)[0] for _ in range(6)]
    padding = sum(int((window.tokens == 0).sum()) for window in windows)  # no input is the end of a document
    assert 0.01 < padding / sum(window.tokens.numel() for window in windows) < 0.03

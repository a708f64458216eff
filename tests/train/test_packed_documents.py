"""Packed equals alone: documents with masks, end to end in lanes, count as each would by itself."""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from infctx.prepare.store_writer import TokenStoreWriter

from infctx.data.lanes import Lanes
from infctx.data.token_store import TokenStore
from infctx.train.window import window_backward

from chats import prepared, random_chats
from tiny_models import random_model

LANES, WINDOW, SEGMENT = 3, 768, 96


def mixed_store(folder):
    """A store of chats of which the answers are learned, prompts with completions, and texts that are learned whole."""
    stores = [
        prepared(folder / "chats", [{"messages": chat} for chat in random_chats(9, seed=2, words=(1, 12))]),
        prepared(
            folder / "prompts", [{"prompt": "a 好 " * n, "completion": "yes " * (n % 3 + 1)} for n in range(1, 8)]
        ),
        prepared(folder / "texts", [{"text": "one two three " * n} for n in (1, 5, 9)]),
    ]
    with TokenStoreWriter(folder / "mixed") as writer:
        for store in stores:
            for i in range(store.num_documents):
                end = store.length(i) - 1
                ids, targets = store.tokens(i, 0, end), store.targets(i, 0, end + 1)
                borders = [0, *(np.flatnonzero(np.diff(targets[:-1])) + 1), end]
                for a, b in pairwise(borders):
                    writer.extend(ids[a:b], bool(targets[a]))
                writer.end_document(bool(targets[-1]))
    return TokenStore(folder / "mixed")


def one_window(store):
    return next(Lanes(store, num_lanes=LANES, window_tokens=WINDOW, seed=3, vocab_size=257))[0]


def documents_of(window, store):
    """(lane, place, document, inputs of it in the window) in order; the last of a lane is cut by the window's end."""
    for lane, documents in enumerate(window.documents):
        place = 0
        for document in documents:
            count = min(store.length(document) - 1, WINDOW - place)
            yield lane, place, document, count
            place += -(-count // 16) * 16
        assert place == WINDOW


def alone(store, document, count):
    """The first `count` inputs of a document, and its targets."""
    ids = store.tokens(document, 0, count + 1)
    mask = store.targets(document, 1, count + 1)
    tokens, targets = ids[:-1].astype(np.int64), np.where(mask, ids[1:].astype(np.int64), -100)
    return torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None]


def test_packed_documents_give_the_gradient_of_each_alone(tmp_path):
    store = mixed_store(tmp_path)
    window = one_window(store)
    assert 0 < window.num_targets < window.targets.numel() / 2
    model = random_model(6, dtype=torch.float64, with_state=True, vocab_size=257)
    truth = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    total, kinds = 0.0, set()
    for _, _, document, count in documents_of(window, store):
        tokens, targets = alone(store, document, count)
        num_targets = int((targets != -100).sum())
        kinds.add(num_targets == count)
        if not num_targets:
            continue
        model.zero_grad()
        hidden, _ = model(tokens)
        loss = F.cross_entropy(model.logits(hidden)[0], targets[0], ignore_index=-100)
        loss.backward()
        weight = num_targets / window.num_targets
        total += weight * loss.item()
        for name, parameter in model.named_parameters():
            truth[name] += weight * parameter.grad
    assert kinds == {True, False}
    model.zero_grad()
    loss, _ = window_backward(model, window.tokens, window.targets, SEGMENT, starts=window.starts)
    assert abs(loss.item() - total) <= 1e-12
    for name, parameter in model.named_parameters():
        scale = truth[name].abs().max().clamp_min(1e-30)
        assert ((parameter.grad - truth[name]).abs().max() / scale).item() <= 1e-11, name


def test_another_document_changes_the_loss_of_no_other_by_a_bit(tmp_path):
    store = mixed_store(tmp_path)
    window = one_window(store)
    model = random_model(6, with_state=True, vocab_size=257)

    @torch.no_grad()
    def losses(tokens):
        hidden, _ = model(tokens, None, window.starts)
        return F.cross_entropy(model.logits(hidden).flatten(0, 1), window.targets.flatten(), reduction="none").view_as(
            window.targets
        )

    before = losses(window.tokens)
    for lane, place, _, count in list(documents_of(window, store))[1::5]:
        tokens = window.tokens.clone()
        tokens[lane, place : place + count] = 257 - tokens[lane, place : place + count].clamp_min(1)
        after = losses(tokens)
        own = torch.zeros_like(before, dtype=torch.bool)
        own[lane, place : place + count] = True
        assert torch.equal(after[~own], before[~own])
        learned = own & (window.targets != -100)
        assert not learned.any() or not torch.equal(after[learned], before[learned])


def test_padding_of_chats_of_300_tokens_is_below_3_percent(tmp_path):
    store = prepared(tmp_path, [{"messages": chat} for chat in random_chats(400, seed=1, words=(4, 19))])
    assert 280 < store.num_tokens / store.num_documents < 320
    lanes = Lanes(store, num_lanes=4, window_tokens=4096, seed=0, vocab_size=257)
    windows = [next(lanes)[0] for _ in range(6)]
    padding = sum(int((window.tokens == 0).sum()) for window in windows)  # no input is the end of a document
    assert 0.01 < padding / sum(window.tokens.numel() for window in windows) < 0.03

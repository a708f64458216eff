"""State tuning: what is different about a run that learns the initial state of a model and leaves its weights alone.

Before it, the weights are frozen; the steps are those of any run (train/loop); behind it, the state is written in the
forms that other programs read, and shown to be worth something: held-out loss and a sample, with it and without.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from infctx.config import Config, WindowSettings
from infctx.data.lanes import Window
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.evaluate.generate import generate
from infctx.evaluate.loss_by_position import evaluate_store, format_comparison
from infctx.formats.state_file import STATE_FILE, save_state
from infctx.formats.weights import fingerprint
from infctx.model.rwkv import RWKV
from infctx.model.state import State, state_dtype
from infctx.train.checkpoint import TUNED_OVER
from infctx.train.window import cut_window

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 200

log = logging.getLogger(__name__)


def freeze_weights(model: RWKV, shifts: bool = False) -> None:
    """Leaves the initial state as all that learns, zeros at first where the model has none; shifts: with its shift
    vectors.  For frozen weights no gradient is computed, and the inputs of their products are not held."""
    model.requires_grad_(False)
    model.weights_fingerprint = fingerprint(model)
    parts = model.add_initial_state(shifts)
    for part in parts if shifts else parts[:1]:
        part.requires_grad_()


@torch.no_grad()
def natural_units(model: RWKV, window: Window, settings: WindowSettings, most_lanes: int | None = None) -> State:
    """The size of the states that the model itself makes of a window: what one unit of its initial state is.

    The root mean square over the seams, lanes and value channels for each key channel of `wkv`, over all channels for
    the shift vectors, rounded to a power of two.  States differ by orders of magnitude from model to model, layer to
    layer and channel to channel, with the decay and the size of the keys; and Adam moves every number by about the
    learning rate, whatever its gradient.  In these units one learning rate suits all.

    most_lanes: that are run at once, if settings.lanes_per_pass does not say it; None for all.
    """
    weight = model.embedding.weight
    squares = []
    at_once = settings.lanes_per_pass or most_lanes or len(window.tokens)
    for lanes in range(0, len(window.tokens), at_once):
        parts = (
            part[lanes : lanes + at_once].to(weight.device) for part in (window.tokens, window.targets, window.starts)
        )
        segments = cut_window(*parts, settings.segment_tokens)
        state = State.zeros(model.sizes, len(segments[0].tokens), state_dtype(weight.dtype), weight.device)
        for segment in segments:
            _, state = model(segment.tokens, state, segment.starts)
            wkv = state.wkv.square().mean((1, 4))[..., None]  # (L, H, N, 1)
            squares.append((wkv, *(part.square().mean((1, 2))[:, None] for part in state[1:])))
    means = (torch.stack(parts).mean(0) for parts in zip(*squares, strict=True))
    return State(*(_power_of_two(mean.clamp_min(1e-12).sqrt()) for mean in means))


def _power_of_two(x: Tensor) -> Tensor:
    """The nearest power of two by ratio, exact: x = mantissa * 2^n with 0.5 <= mantissa < 1."""
    x = x * 0.5**0.5
    return x / torch.frexp(x).mantissa


def finish_tuning(config: Config, model: RWKV, checkpoint: Path | None) -> None:
    """Writes the state, and prints what it gains on held-out documents, a sample, and what to do next."""
    files = write_states(model, config.run.folder)
    if config.data.held_out and config.run.evaluate_tokens:
        store = TokenStore(config.data.held_out)
        tokens = config.run.evaluate_tokens
        with without_state(model):
            before = evaluate_store(model, store, config.window.segment_tokens, tokens)
        after = evaluate_store(model, store, config.window.segment_tokens, tokens)
        print(format_comparison(before, after, store, ("without state", "with the state")))
        _show_samples(model, store)
    print(f"Files: {', '.join(map(str, files))}, checkpoint {checkpoint}.")
    command = f"{os.path.relpath(Path(sys.executable).parent)}/infctx"
    more = f", {command} export {config.run.folder} merged.pth --form merged for programs that take one file"
    print(
        f"Next: {command} generate {config.model.weights} --state {files[-1]} --prompt '...' to read what it writes"
        f"{'' if model.initial_time_shift is not None else more}."
    )


def write_states(model: RWKV, folder: Path) -> list[Path]:
    """state.safetensors, .st and .pth in a run's folder, those that can hold the state; says why not."""
    state, written = model.learned_state(), []
    for name in (STATE_FILE, "state.st", "state.pth"):
        path = folder / name
        try:
            save_state(state, path, metadata={TUNED_OVER: model.weights_fingerprint})
            written.append(path)
        except InputError as error:
            path.unlink(missing_ok=True)  # of an earlier run: it would be taken for this state
            log.warning("not written: %s", error)
    return written


@contextmanager
def without_state(model: RWKV) -> Iterator[None]:
    """Documents start from zeros inside."""
    parts = {f"initial_{name}": part for name, part in model.initial_parts()._asdict().items()}
    for name in parts:
        setattr(model, name, None)
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(model, name, part)


@torch.no_grad()
def _show_samples(model: RWKV, store: TokenStore) -> None:
    """What the model writes behind the first words of a held-out document."""
    name = tokenizer_for_vocab(model.sizes.vocab_size)
    if name is None:
        return
    longest = max(range(min(store.num_documents, 1000)), key=store.length)
    prompt = get_tokenizer(name).decode(store.tokens(longest, 0, PROMPT_TOKENS).tolist()).decode(errors="ignore")
    print(f"a sample behind the first {PROMPT_TOKENS} tokens of held-out document {longest}, {prompt!r}")
    with without_state(model):
        print(f"--- without the state\n{_sample(model, prompt)}")
    print(f"--- with the state\n{_sample(model, prompt)}\n---")


def _sample(model: RWKV, prompt: str) -> str:
    pieces = generate(model, prompt, max_tokens=SAMPLE_TOKENS, top_p=0.85)
    return b"".join(pieces).decode(errors="replace")

"""The end of a run: writes what was learned, shows what it is worth on held-out documents, and says what to do next."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.evaluate.generate import generate
from infctx.evaluate.loss_by_position import evaluate_store, format_comparison, format_table, summarise
from infctx.formats.checkpoint_folder import STATE_FILE, TUNED_OVER
from infctx.formats.state_file import save_state
from infctx.formats.weights import save_weights
from infctx.machine import free_device_memory
from infctx.model.rwkv import RWKV
from infctx.train.metrics import read_step_log
from infctx.train.run import Run
from infctx.train.start import make_model

EVALUATION_BYTES = 4 << 30
"""What evaluating takes of a device besides the weights: activations of one document, slices of the logits."""
PROMPT_TOKENS = 16
SAMPLE_TOKENS = 200

log = logging.getLogger(__name__)


def finish(run: Run) -> None:
    """For the first rank, once the process group is closed."""
    config, model = run.plan.config, whole_model(run)
    losses = [entry["loss"] for entry in read_step_log(config.run.folder)]
    outcome = f"trained {run.progress.step} steps on {run.progress.num_tokens:,} tokens"
    if losses:
        outcome += f": loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token"
    with model.alone():
        if config.model.freezes_weights:
            print(f"{outcome}.")
            _finish_tuning(run, model)
        else:
            _finish_training(run, model, outcome)


def whole_model(run: Run) -> RWKV:
    """The model in this process alone, for what comes after the steps; on the CPU where the device is full."""
    model, engine = run.model, run.engine
    if engine.holds_whole_weights:
        return model
    device = engine.device
    del run.model, run.engine, model, engine
    model = make_model(run.plan, run.checkpoint, torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) + EVALUATION_BYTES
        device = device if needed < free_device_memory(device) else torch.device("cpu")
    return model.to(device)


def _finish_training(run: Run, model: RWKV, outcome: str) -> None:
    config, folder = run.plan.config, run.plan.config.run.folder
    weights = folder / "model.pth"
    save_weights(model, weights)
    if config.data.held_out and config.run.evaluate_tokens:
        store = TokenStore(config.data.held_out)
        if model.embedding.weight.device.type != run.plan.device.type:
            log.warning("the whole model does not fit on one device: it is evaluated on the CPU, many times slower")
        buckets = evaluate_store(model, store, config.window.segment_tokens, config.run.evaluate_tokens)
        print(format_table(buckets, store))
        outcome += f"; {summarise(buckets)}"
    print(f"{outcome}.")
    print(f"Files: weights {weights}, checkpoint {run.checkpoint}, TensorBoard {folder / 'tensorboard'}.")
    programs = os.path.relpath(Path(sys.executable).parent)
    print(
        f"Next: {programs}/tensorboard --logdir {folder / 'tensorboard'} to see the curves, "
        f"{programs}/infctx generate {folder} --prompt 'def ' to read what it writes."
    )


def _finish_tuning(run: Run, model: RWKV) -> None:
    """Writes the state, and prints what it gains on held-out documents, a sample, and what to do next."""
    config = run.plan.config
    files = write_states(model, config.run.folder, run.tuned_over)
    if config.data.held_out and config.run.evaluate_tokens:
        store = TokenStore(config.data.held_out)
        tokens = config.run.evaluate_tokens
        with without_state(model):
            before = evaluate_store(model, store, config.window.segment_tokens, tokens)
        after = evaluate_store(model, store, config.window.segment_tokens, tokens)
        print(format_comparison(before, after, store, ("without state", "with the state")))
        _show_samples(model, store)
    print(f"Files: {', '.join(map(str, files))}, checkpoint {run.checkpoint}.")
    command = f"{os.path.relpath(Path(sys.executable).parent)}/infctx"
    more = f", {command} export {config.run.folder} merged.pth --form merged for programs that take one file"
    print(
        f"Next: {command} generate {config.model.weights} --state {files[-1]} --prompt '...' to read what it writes"
        f"{'' if model.initial_time_shift is not None else more}."
    )


def write_states(model: RWKV, folder: Path, tuned_over: str | None) -> list[Path]:
    """state.safetensors, .st and .pth in a run's folder, those that can hold the state; says why not.

    tuned_over: fingerprint of the weights that it was tuned over
    """
    state, written = model.learned_state(), []
    assert state is not None and tuned_over is not None
    for name in (STATE_FILE, "state.st", "state.pth"):
        path = folder / name
        try:
            save_state(state, path, metadata={TUNED_OVER: tuned_over})
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
    """What the model writes after the first words of a held-out document."""
    name = tokenizer_for_vocab(model.sizes.vocab_size)
    if name is None:
        return
    longest = max(range(min(store.num_documents, 1000)), key=store.length)
    prompt = get_tokenizer(name).decode(store.tokens(longest, 0, PROMPT_TOKENS).tolist()).decode(errors="ignore")
    print(f"a sample after the first {PROMPT_TOKENS} tokens of held-out document {longest}, {prompt!r}")
    with without_state(model):
        print(f"--- without the state\n{_sample(model, prompt)}")
    print(f"--- with the state\n{_sample(model, prompt)}\n---")


def _sample(model: RWKV, prompt: str) -> str:
    pieces = generate(model, prompt, max_tokens=SAMPLE_TOKENS, top_p=0.85)
    return b"".join(pieces).decode(errors="replace")

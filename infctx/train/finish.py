"""The end of a run: writes what was learned, measures it on held-out documents, and prints what to do next."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path

import torch

from infctx.adapters.install import learned_names
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.evaluate.generate import generate
from infctx.evaluate.held_out import UNMEASURABLE, fits, measure_after, without_state
from infctx.evaluate.loss_by_position import format_value, total, unit_of
from infctx.evaluate.record import Evaluation
from infctx.formats.checkpoint_folder import ADAPTER_FILE, BEST, TUNED_OVER
from infctx.formats.model_files import RUN_WEIGHTS
from infctx.formats.state_file import save_state
from infctx.formats.weights import save_weights
from infctx.model.rwkv import RWKV
from infctx.pages.write import write_own_report
from infctx.report.csv_log import METRICS_CSV
from infctx.report.evaluations import held_out_scalars
from infctx.report.loggers import TENSORBOARD, Loggers
from infctx.report.progress import duration
from infctx.report.step_log import STEP_LOG, read_step_log
from infctx.small_texts import counted
from infctx.train.checkpoint import save_adapter
from infctx.train.run import STATE_FILES, Run
from infctx.train.start import make_model

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 200
WHAT_IT_IS = {
    RUN_WEIGHTS: "the weights, in fp32: generate, evaluate, export",
    ADAPTER_FILE: "the adapter, in fp32: generate, evaluate, export",
    "state.safetensors": "the state, in fp32: generate, evaluate, export",
    "state.st": "the state for Ai00",
    "state.pth": "the state for RWKV-Runner, ChatRWKV and the like",
}

log = logging.getLogger(__name__)


def finish(run: Run) -> None:
    """Finishes a run, on the first rank, after the process group is closed.

    What was learned is on disk and announced before anything else is tried.  If the held-out loss cannot be measured,
    there is a warning.
    """
    config, model, measured = run.plan.config, whole_model(run), True
    with model.alone():
        print(f"{_outcome(run)}\n{_list_files(run, _write(run, model))}", flush=True)
        if config.data.held_out and config.run.evaluate_tokens:
            try:
                print(_measure(run, model))
                if config.model.tunes_state:
                    _show_samples(model, TokenStore(config.data.held_out_stores[0][1]))
            except BrokenPipeError:  # nobody reads our output anymore
                raise
            except UNMEASURABLE as error:
                measured = False
                log.warning("the held-out loss could not be measured: %s", str(error).partition("\n")[0])
    if page := write_own_report(config.run.folder):
        print(f"report in {page}")
    print("\n".join(["next", *(f"  {command}" for command in _next_commands(run, model, measured))]))


def _measure(run: Run, model: RWKV) -> str:
    """Measures the held-out loss, logs it, and returns the table of it."""
    config, step = run.plan.config, run.progress.step
    measured = run.measured if run.measured and run.measured.step == step else None
    outcome = measure_after(run.plan, model, step, measured)
    if outcome.evaluations:
        with Loggers(config, step + 1) as loggers:
            for evaluation in outcome.evaluations:
                loggers.log(held_out_scalars(evaluation, config), step)
    return outcome.text


def whole_model(run: Run) -> RWKV:
    """Returns a whole model in this process, for the work after the last step; on the CPU if the device is full."""
    model, engine = run.model, run.engine
    if engine.holds_whole_weights:
        return model
    device = engine.device
    del run.model, run.engine, model, engine
    model = make_model(run.plan, run.checkpoint, torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        device = device if fits(model, device) else torch.device("cpu")
    return model.to(device)


def _outcome(run: Run) -> str:
    steps = read_step_log(run.plan.config.run.folder)
    took = f", in {duration(steps[-1]['seconds'])}" if steps and "seconds" in steps[-1] else ""
    lines = [f"trained {counted(run.progress.step, 'step')}, {run.progress.num_tokens:,} tokens{took}"]
    if steps:
        lines.append(f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f} nats per token")
    return "\n".join(lines)


def _write(run: Run, model: RWKV) -> list[Path]:
    """Writes the weights, adapter or states that were learned into the run's folder; returns the files."""
    folder, settings = run.plan.config.run.folder, run.plan.config.model
    if settings.freezes_weights:
        learned = {name: model.get_parameter(name).detach().cpu() for name in learned_names(model)}
        adapter = [save_adapter(folder, run, learned)] if settings.learned_adapter else []
        return adapter + (write_states(model, folder, run.tuned_over) if settings.learns_state else [])
    save_weights(model, folder / RUN_WEIGHTS)
    return [folder / RUN_WEIGHTS]


def write_states(model: RWKV, folder: Path, tuned_over: str | None) -> list[Path]:
    """Writes state.safetensors, .st and .pth into a run's folder; warns about formats that cannot hold the state.

    tuned_over: fingerprint of the weights that the state was tuned over
    """
    state, written = model.learned_state(), []
    assert state is not None and tuned_over is not None
    for name in STATE_FILES:
        path = folder / name
        try:
            save_state(state, path, metadata={TUNED_OVER: tuned_over})
            written.append(path)
        except InputError as error:
            path.unlink(missing_ok=True)  # left by an earlier end of this run; it would pass for this state
            log.warning("not written: %s", error)
    return written


def _list_files(run: Run, learned: list[Path]) -> str:
    folder = run.plan.config.run.folder
    files = {path: WHAT_IT_IS[path.name] for path in learned}
    if run.checkpoint:
        files[run.checkpoint] = "the checkpoint, to continue from"
    if run.best:
        files[run.plan.config.run.checkpoints / BEST] = _describe_best(run.best, run)
    files[folder / STEP_LOG] = "loss and speed of each step"
    kinds = {"tensorboard": (TENSORBOARD, "the same, as curves"), "csv": (METRICS_CSV, "the same, as a table")}
    files |= {folder / name: what for kind, (name, what) in kinds.items() if kind in run.plan.config.run.loggers}
    width = max(len(str(path)) for path in files)
    return "\n".join(["files", *(f"  {path!s:<{width}}  {what}" for path, what in files.items())])


def _describe_best(best: Evaluation, run: Run) -> str:
    whole = total(best.buckets)
    if best.step == run.progress.step:
        return f"the best by held-out loss: the last, {format_value(whole)} {unit_of(whole)}"
    text = f"the best by held-out loss: step {best.step}, {format_value(whole)} {unit_of(whole)}"
    last = run.measured if run.measured and run.measured.step == run.progress.step else None
    return f"{text}; the last is worse, {format_value(total(last.buckets))}" if last else text


def _next_commands(run: Run, model: RWKV, measured: bool) -> list[str]:
    """Returns commands to run next, each a line for a shell in this folder."""
    config = run.plan.config
    folder, commands = str(config.run.folder), []
    if not measured:
        tokens = str(config.run.evaluate_tokens)
        commands.append(["infctx", "evaluate", folder, str(config.data.held_out_stores[0][1]), "--max-tokens", tokens])
    if tokenizer_for_vocab(model.sizes.vocab_size):
        commands.append(["infctx", "generate", folder])
    if config.model.learns_state and model.initial_time_shift is None:  # for programs that want a single file
        commands.append(["infctx", "export", folder, f"{folder}/merged.pth", "--form", "merged"])
    elif config.model.learned_adapter:
        commands.append(["infctx", "export", folder, f"{folder}/merged.pth"])
    if run.best and run.best.step != run.progress.step:
        commands.append(["infctx", "export", f"{config.run.checkpoints}/{BEST}", f"{folder}/best.pth"])
    if "tensorboard" in config.run.loggers:
        commands.append(["tensorboard", "--logdir", f"{folder}/{TENSORBOARD}"])
    return [shlex.join([*_program(name), *words]) for name, *words in commands]


def _program(name: str) -> list[str]:
    """Returns the words that start a program of this Python from this folder."""
    folder = Path(sys.executable).parent
    if not (folder / name).is_file():  # infctx is not installed
        return [sys.executable, "-m", {"tensorboard": "tensorboard.main"}.get(name, name)]
    return [f"{min(os.path.relpath(folder), str(folder), key=len)}/{name}"]


@torch.no_grad()
def _show_samples(model: RWKV, store: TokenStore) -> None:
    """Prints what the model writes after the first words of a held-out document."""
    name = tokenizer_for_vocab(model.sizes.vocab_size)
    if name is None:
        return
    longest = max(range(min(store.num_documents, 1000)), key=store.length)
    prompt = get_tokenizer(name).decode(store.tokens(longest, 0, PROMPT_TOKENS).tolist()).decode(errors="ignore")
    print(f"samples after the first {PROMPT_TOKENS} tokens of held-out document {longest}:\n{prompt!r}")
    with without_state(model):
        print(f"--- without the state\n{_sample(model, prompt)}")
    print(f"--- with the state\n{_sample(model, prompt)}\n---")


def _sample(model: RWKV, prompt: str) -> str:
    pieces = generate(model, prompt, max_tokens=SAMPLE_TOKENS, top_p=0.85)
    return b"".join(pieces).decode(errors="replace")

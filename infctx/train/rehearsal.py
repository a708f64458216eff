"""Rehearsal: a run of any size, made small enough to try on a laptop.

In: a configuration.  Out: the folder of a small run with the same structure (version, lanes, segments in a window,
schedule, precision, strategy), with its configuration in REHEARSAL, and a line for each setting that was replaced.  The
small run is then trained like any other.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from infctx.data.store_writer import TokenStoreWriter
from infctx.data.tokenizer import get_tokenizer
from infctx.documents.example_documents import python_documents
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import ADAPTER_FILE, LOCK, STATE_FILE
from infctx.formats.model_files import RUN_WEIGHTS
from infctx.formats.weights import save_weights
from infctx.model.build import new_model
from infctx.model.sizes import Sizes, describe, make_sizes
from infctx.plan.missing import files_to_download, missing_files, refuse_folder
from infctx.plan.plan import find_weights
from infctx.plan.report import plan_report, real_device
from infctx.plan.strategy import resolve_strategy
from infctx.settings.config import Config
from infctx.settings.load import load_config
from infctx.train.checkpoint import lock_folder

REHEARSAL = "rehearsal.yaml"
STEPS, LAYERS, WIDTH, HEAD_SIZE = 4, 2, 64, 32
STEP_TOKENS = 1024
MOST_SEGMENTS, MOST_LANES, MOST_SHARES = 32, 2, 2
EVALUATED_TOKENS = 1024
NUM_DOCUMENTS = 12


class Rehearsal(NamedTuple):
    """A small run that is ready to start."""

    file: Path
    """Its configuration, for other processes."""
    config: Config
    """The same, loaded."""
    lines: list[str]
    """A report of what was replaced."""

    @property
    def is_done(self) -> bool:
        """Returns whether it was trained to its end."""
        return any((self.file.parent / name).exists() for name in (RUN_WEIGHTS, ADAPTER_FILE, STATE_FILE))


def open_rehearsal(config: Config, name: str | Path, device_gb: float | None = None) -> Rehearsal:
    """Makes the folder of a rehearsal, RUN_FOLDER-rehearsal, replacing an earlier rehearsal.

    name: of the configuration, as the user gave it
    device_gb: memory of each GPU of the real machine, in GB; None: of the GPUs here, or unknown
    Raises InputError if that folder has other content, or if a file that the run names exists but is wrong.
    """
    refuse_folder(config.run.folder)
    folder = config.run.folder.with_name(f"{config.run.folder.name}-rehearsal")
    _, sizes = find_weights(config)  # finds mistakes before anything is written, as does real_device
    device_type, memory = real_device(config, device_gb)
    distributed = _distributed(config, sizes, device_type, memory)
    others = [path for path in folder.iterdir() if path.name != LOCK] if folder.exists() else []
    if others and not (folder / REHEARSAL).exists():
        raise InputError(f"{folder}: is no rehearsal, and would be replaced by one; move it, or choose a run.folder")
    with lock_folder(folder):
        for path in folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        settings, lines = _shrink(config, sizes, folder, distributed)
        file = folder / REHEARSAL
        file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        small = load_config(file)
    if memory is None and config.distributed.strategy == "auto" and config.distributed.world_size > 1:
        lines.append("  the GPUs' memory is unknown, and auto depends on it: add --device-gb 80 for GPUs of 80 GB")
    return Rehearsal(file, small, [f"Rehearsal of {name}: the same run on a small model.  Replaced:", *lines])


def describe_real_run(config: Config, command: str, device_gb: float | None = None) -> list[str]:
    """Returns the command for the real machine, the files still missing here, and the plan."""
    missing = missing_files(config)
    missing += [f"{name}: from the hub, downloaded when the run starts" for name in files_to_download(config)]
    lines = ["What would run on the real machine:", f"  {command}"]
    if missing:
        lines += ["Not here yet:", *(f"  {line}" for problem in missing for line in problem.splitlines())]
    _, sizes = find_weights(config)
    if sizes is None:
        return [*lines, "Its plan needs the sizes of the model: get the weights, or set model.size"]
    return [*lines, "", plan_report(config, device_gb).text]


def _shrink(
    config: Config, sizes: Sizes | None, folder: Path, distributed: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings of the small run, whose files are in `folder`, and the lines about replaced settings."""
    settings = config.model_dump(mode="json")
    settings["distributed"] |= distributed
    settings["window"] |= _window(config, distributed)
    settings["optimizer"] |= _optimizer(config)
    settings["run"] |= _run(config, folder, distributed["devices"])
    window = settings["window"]
    data, notes = _data(config, folder, window["window_tokens"], window["segment_tokens"])
    settings["data"] |= data
    vocab_size = 257 if notes or sizes is None else sizes.vocab_size
    small = _sizes(config, sizes, vocab_size)
    settings["model"] |= _model(config, folder, small)
    if small != sizes:
        before = "a model that is not here, so of unknown size" if sizes is None else describe(sizes)
        notes = [f"the model: {before}", f"  -> {describe(small)}", *notes]
    return settings, [f"  {line}" for line in [*notes, *_changes(config, settings)]]


def _changes(config: Config, settings: dict[str, Any]) -> Iterator[str]:
    for section, before in config.model_dump(mode="json").items():
        for name, value in before.items():
            now = settings[section][name]
            if now != value:
                yield f"{section}.{name}: {_shown(value)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(yaml.safe_dump(value)).split("\n")[0]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _distributed(config: Config, sizes: Sizes | None, device_type: str, memory: int | None) -> dict[str, Any]:
    """Uses at most two processes for each kind of sharing in the run, with the strategy of the real machine."""
    asked = config.distributed
    real = resolve_strategy(config, sizes, device_type, memory).distributed
    time_ranks = min(asked.time_ranks, MOST_SHARES)
    return {
        "devices": time_ranks * min(asked.data_ranks, MOST_SHARES),
        "nodes": 1,
        "time_ranks": time_ranks,
        "strategy": real.strategy,
        "gradient_reduction": real.gradient_reduction,
    }


def _window(config: Config, distributed: dict[str, Any]) -> dict[str, Any]:
    """Keeps lanes, passes and segments, up to a limit, with fewer tokens in each segment."""
    asked, time_ranks = config.window, distributed["time_ranks"]
    rank_lanes = min(config.rank_lanes, MOST_LANES)
    lanes = rank_lanes * distributed["devices"] // time_ranks
    per_pass = None
    if asked.lanes_per_pass is not None:
        most = rank_lanes if config.pass_lanes == config.rank_lanes else max(1, rank_lanes // 2)
        per_pass = next(count for count in range(min(most, config.pass_lanes), 0, -1) if lanes % count == 0)
    segments = min(asked.window_segments, MOST_SEGMENTS)
    unit = 16 * time_ranks
    segment_tokens = min(asked.segment_tokens, unit * max(1, STEP_TOKENS // (lanes * segments * unit)))
    return {
        "segment_tokens": segment_tokens,
        "window_tokens": segments * segment_tokens,
        "gradient_segments": asked.gradient_segments and min(asked.gradient_segments, segments),
        "lanes": lanes,
        "lanes_per_pass": per_pass,
    }


def _optimizer(config: Config) -> dict[str, Any]:
    asked = config.optimizer
    steps = min(asked.steps, STEPS)
    warmup = asked.warmup_steps and min(asked.warmup_steps, steps // 2)
    return {"steps": steps, "warmup_steps": warmup}


def _run(config: Config, folder: Path, devices: int) -> dict[str, Any]:
    asked = config.run
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "folder": str(folder),
        "threads": asked.threads or 1,  # in such a small model, more would wait for each other
        "device": "cpu" if asked.device == "cuda" and gpus < devices else asked.device,
        "save_every_steps": min(asked.save_every_steps, 2),
        "log_every_steps": 1,
        "loggers": [name for name in asked.loggers if name in ("tensorboard", "csv")],  # a rehearsal is nobody's run
        "evaluate_every_steps": asked.evaluate_every_steps and min(asked.evaluate_every_steps, 2),
        "evaluate_tokens": min(asked.evaluate_tokens, EVALUATED_TOKENS),
    }


def _data(config: Config, folder: Path, window_tokens: int, segment_tokens: int) -> tuple[dict[str, Any], list[str]]:
    """Uses the stores that exist, or small ones of documents that every machine has, and lines about those."""
    asked, notes = config.data, []
    data: dict[str, Any] = {}
    if asked.document_tokens is not None:
        share = asked.document_tokens * window_tokens / config.window.window_tokens
        data["document_tokens"] = max(16, round(share / 16) * 16)
    if asked.curriculum is not None:
        data["curriculum"] = _curriculum(config, segment_tokens)
    if any(line.startswith("data.") for line in missing_files(config)):
        documents = [text for _, text in islice(python_documents(), NUM_DOCUMENTS)]
        data |= _other_stores(asked.model_dump(mode="json"), folder, documents)
        data |= {"min_tokens": None, "max_tokens": None}  # of documents that are not here
        notes = ["documents: yours are not here -> the Python installation's long sources, one token per byte"]
    return data, notes


def _curriculum(config: Config, segment_tokens: int) -> dict[str, Any]:
    """Keeps the numbers of segments, up to a limit."""
    asked, unit = config.data.curriculum, config.window.segment_tokens
    assert asked is not None
    first, last = (min(tokens // unit, MOST_SEGMENTS) for tokens in (asked.from_tokens, asked.to_tokens))
    steps = max(1, min(asked.steps, STEPS // 2))
    return {"from_tokens": first * segment_tokens, "to_tokens": last * segment_tokens, "steps": steps}


def _other_stores(data: dict[str, Any], folder: Path, documents: list[str]) -> dict[str, Any]:
    """Writes stores of documents, and returns the settings that name them instead of all stores of the run."""
    changed: dict[str, Any] = {}
    for setting, name, texts in (
        ("store", "train", documents[:-2]),
        ("sources", "train", documents[:-2]),
        ("held_out", "held_out", documents[-2:]),
    ):
        asked = data[setting]
        each = asked if isinstance(asked, list) else [{}] if asked else []
        paths = [str(folder / f"{name}{f'-{i}' if i else ''}") for i in range(len(each))]
        for number, path in enumerate(paths):
            _write_store(Path(path), texts[number % len(texts) :: len(paths)] or texts)
        named = [
            one | {"store": path, "name": one["name"] or Path(one["store"]).parent.name or None}
            for one, path in zip(each, paths, strict=True)
            if one
        ]
        changed[setting] = named or (paths[0] if paths else None)
    return changed


def _write_store(path: Path, documents: list[str]) -> None:
    tokenizer = get_tokenizer("bytes")
    with TokenStoreWriter(path) as writer:
        for text in documents:
            writer.extend(tokenizer.encode(text))
            writer.end_document()


def _sizes(config: Config, sizes: Sizes | None, vocab_size: int) -> Sizes:
    """Chooses a few narrow layers of the same version; Finch if the version is unknown."""
    if sizes is None:
        return make_sizes(version=6, num_layers=LAYERS, width=WIDTH, head_size=HEAD_SIZE, vocab_size=vocab_size)
    num_layers = min(sizes.num_layers, LAYERS)
    if sizes.width <= WIDTH:
        return replace(sizes, num_layers=num_layers, vocab_size=vocab_size)
    head_size = min(math.gcd(sizes.head_size, WIDTH), HEAD_SIZE)
    return make_sizes(
        version=sizes.version, num_layers=num_layers, width=WIDTH, head_size=head_size, vocab_size=vocab_size
    )


def _model(config: Config, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Uses a file of random weights if the run reads one, else new weights; drops a state, whose size is wrong."""
    asked = config.model
    model: dict[str, Any] = {"size": None, "initial_state": None}
    if asked.backend == "cuda" and not torch.cuda.is_available():
        model["backend"] = "auto"
    if asked.weights is not None:
        path = folder / "weights.pth"
        save_weights(new_model(sizes, "cpu", torch.float32, config.run.seed), path)
        return model | {"weights": str(path)}
    by_hand = {"version", "num_layers", "width", "vocab_size", "head_size"} | asked.sizes.keys()
    return model | {name: getattr(sizes, name) for name in sorted(by_hand)}

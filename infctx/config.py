"""Every setting of a run: a YAML file and `key=value` overrides in, a checked `Config` out.

The file has the sections below.  Unknown settings, wrong types and values that do not fit together are refused in
one line that names the file, the line, the setting, the value and what would do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from infctx.errors import InputError


def _named(path: Path) -> Path:
    if not path.name or "\0" in str(path):
        raise ValueError(f"{str(path)!r} names no file or folder")
    return path


PathSetting = Annotated[Path, Field(strict=False), AfterValidator(_named)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, strict about types, closed to unknown settings."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSettings(Section):
    """Which model: a file of weights, a published size, or sizes."""

    weights: PathSetting | None = None
    """A .pth or .safetensors, a checkpoint or a run's folder to start from; version and every size are read from it."""
    size: str | None = None
    """A published size such as finch-3b.  With `weights`: what the file must hold.  Alone: new weights."""
    version: Literal[5, 6] | None = None
    """5 for Eagle, 6 for Finch; together with num_layers and width: new weights of these sizes."""
    num_layers: Positive | None = None
    width: Positive | None = None
    vocab_size: Positive | None = None
    head_size: Positive | None = None
    ffn_width: Positive | None = None
    mix_rank: Positive | None = None
    decay_rank: Positive | None = None
    learn: Literal["weights", "initial_state", "initial_state_and_shifts"] = "weights"
    """weights: all of them, and the initial state if the file has one; initial_state: the matrices that documents
    start from, of a model that stays as it is (state tuning); initial_state_and_shifts: the shift vectors with them,
    which no other program's file has a place for."""
    initial_state: PathSetting | None = None
    """A state file to begin from, in any form that `infctx export` writes; null: zeros, or what `weights` holds."""
    recompute_blocks: bool = False
    """Holds only the input of each block and computes the rest again for the backward pass: less memory, 1/3 slower."""
    backend: Literal["auto", "cuda", "compiled", "chunked", "reference"] = "auto"
    """Of the WKV op: auto, cuda (kernels for NVIDIA GPUs), compiled (CPU), chunked (any device) or reference (a loop,
    for judging)."""

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given by hand."""
        names = ("version", "num_layers", "width", "vocab_size", "head_size", "ffn_width", "mix_rank", "decay_rank")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def freezes_weights(self) -> bool:
        return self.learn != "weights"

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if self.sizes and (self.weights or self.size):
            raise ValueError(f"{next(iter(self.sizes))}: sizes come from `weights` or `size`; leave it out")
        if not self.sizes and not self.weights and not self.size:
            raise ValueError("nothing says which model; give weights, size, or version with num_layers and width")
        if self.sizes and not {"version", "num_layers", "width"} <= self.sizes.keys():
            raise ValueError("sizes by hand need version, num_layers and width")
        if self.freezes_weights and not self.weights:
            raise ValueError(f"learn: {self.learn} tunes a finished model; say which with model.weights")
        if self.initial_state and not self.weights:
            raise ValueError("initial_state: belongs to a finished model; say which with model.weights")
        return self


class DataSettings(Section):
    """Which documents."""

    store: PathSetting
    """Token store to train on, the common part of the names of its .bin and .idx; made by `infctx prepare`."""
    held_out: PathSetting | None = None
    """Token store of held-out documents, for the loss by position at the end."""
    document_tokens: Positive | None = None
    """Longer documents are cut into documents of so many tokens, each of which starts from the initial state; null:
    none are.  An initial state learns where documents start, so tuning one on long documents wants them cut."""
    shuffle: bool = True
    """Draws the documents of each epoch in a new order; false keeps the order of the store."""


class WindowSettings(Section):
    """How documents are cut, and how much is held in memory at once."""

    segment_tokens: Positive
    """Tokens of a lane whose activations are held at once: memory grows with it, the gradient does not depend on it."""
    window_tokens: Positive
    """Tokens of a lane in one optimizer step: inside, the gradient is exact across every segment."""
    gradient_segments: Positive | None = None
    """Over how many segments a gradient flows; null: the whole window, 1: truncated at every segment."""
    lanes: Positive = 1
    """Rows of the batch: each holds documents laid end to end."""
    lanes_per_pass: Positive | None = None
    """Lanes that are computed at once, null for all: fewer take less memory and add up to the same gradient."""
    seam_store: Literal["auto", "device", "host"] = "auto"
    """Where the states between segments are kept; auto: on the host for a GPU."""

    @property
    def window_segments(self) -> int:
        return self.window_tokens // self.segment_tokens

    @model_validator(mode="after")
    def _fits(self) -> WindowSettings:
        if self.segment_tokens % 16:
            near = max(16, round(self.segment_tokens / 16) * 16)
            raise ValueError(f"segment_tokens: {self.segment_tokens} is not a multiple of 16; {near} would do")
        if self.window_tokens % self.segment_tokens:
            near = max(1, round(self.window_tokens / self.segment_tokens)) * self.segment_tokens
            raise ValueError(
                f"window_tokens: {self.window_tokens} is not a multiple of segment_tokens {self.segment_tokens}; "
                f"{near} would do"
            )
        if self.gradient_segments and self.gradient_segments > self.window_segments:
            raise ValueError(
                f"gradient_segments: {self.gradient_segments} is more than the {self.window_segments} segments of a "
                "window; null means all of them"
            )
        if self.lanes % (self.lanes_per_pass or 1):
            raise ValueError(f"lanes_per_pass: {self.lanes_per_pass} does not divide the {self.lanes} lanes")
        return self


class OptimizerSettings(Section):
    """AdamW, its schedule and what is done to gradients."""

    steps: Positive
    """Optimizer steps of the whole run; a step takes lanes * window_tokens tokens."""
    peak_lr: Annotated[float, Field(gt=0)]
    """Learning rate after the warm-up; decays learn at twice that.  Where the initial state is all that learns, in
    units of the root mean square of the states that the model makes, for each key channel: 0.1 suits all models."""
    final_lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate at the last step, null for a tenth of peak_lr; a constant schedule has none."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From peak_lr to final_lr over the steps behind the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps over which the learning rate grows linearly from 1 % of its value."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, on matrices and embeddings (and a learned initial state) only."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient, null for no clipping."""
    l2wrap: bool = False
    """Adds RWKV-LM's L2Wrap to the gradient: keeps the largest logits small, at the loss's own denominator."""

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSettings:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} must be less than the {self.steps} steps of the run")
        if self.schedule == "constant" and self.final_lr is not None:
            raise ValueError(f"final_lr: {self.final_lr} has no meaning in a constant schedule; leave it out")
        return self


class RunSettings(Section):
    """Where and how a run is done."""

    folder: PathSetting
    """Holds checkpoints, TensorBoard's files, the log of all steps and the exported weights."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of new weights and of the order of documents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """What activations and matrix products are computed in; weights, states and decays are fp32 either way."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads, null for all cores; part of what makes a resumed run equal, bit for bit."""
    resume: Literal["auto", "never"] = "auto"
    """auto: goes on from the newest whole checkpoint of the folder; never: refuses a folder that has one."""
    save_every_steps: Positive = 100
    keep_checkpoints: Positive = 3
    log_every_steps: Positive = 10
    evaluate_tokens: Annotated[int, Field(ge=0)] = 262144
    """Held-out tokens of the loss by position at the end of the run."""


class Config(Section):
    """One run."""

    model: ModelSettings
    data: DataSettings
    window: WindowSettings
    optimizer: OptimizerSettings
    run: RunSettings

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, over all lanes."""
        return self.window.lanes * self.window.window_tokens


def load_config(path: str | Path, overrides: Sequence[str] = (), learn: str | None = None) -> Config:
    """Reads a YAML file and applies overrides such as `optimizer.peak_lr=1.0e-4`; raises InputError in one line.

    learn: what model.learn is where nothing says it; then "weights" is refused.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the shipped configurations are in configs/") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    content, lines = _parse(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: no sections in it; it needs {', '.join(Config.model_fields)}")
    if learn and isinstance(content.get("model"), dict):
        content["model"].setdefault("learn", learn)
    for override in overrides:
        _apply_override(content, lines, override)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise InputError(_one_line(error, path, content, lines)) from None
    if learn and not config.model.freezes_weights:
        place = lines.get(("model", "learn"), path)
        raise InputError(f"{place}: model.learn: weights is for `infctx train`; `infctx tune` takes {learn}")
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, every setting written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: no octal or base-60 integers, no key twice."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        if re.fullmatch(r"[-+]?0[0-9]+|[-+]?[0-9]+(:[0-9]+)+", text):
            value = super().construct_yaml_int(node)
            remedy = "quote it" if ":" in text else f"write {int(text)} for decimal, or quote it"
            raise yaml.MarkedYAMLError(
                problem=f"YAML reads {node.value} as {value}; {remedy}",
                problem_mark=node.start_mark,
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a setting's name is plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parse(text: str, source: str) -> tuple[Any, dict[tuple[str, ...], str]]:
    """The content, and for each setting the place it was read from."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        content = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{source}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply; sections hold settings, and nothing deeper") from None
    except ValueError as error:  # a date or a number that is none
        raise InputError(f"{source}: {error}; quote what is text") from None
    finally:
        if loader is not None:
            loader.dispose()
    places: dict[tuple[str, ...], str] = {(): source}

    def walk(node: yaml.Node, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode) and len(path) < 2:
            for key, value in node.value:
                places[(*path, key.value)] = f"{source}:{key.start_mark.line + 1}"
                walk(value, (*path, key.value))

    walk(node, ())
    return content, places


def _apply_override(content: dict[str, Any], places: dict[tuple[str, ...], str], override: str) -> None:
    name, equals, text = override.partition("=")
    path = tuple(name.split("."))
    if not equals or len(path) != 2 or not all(path):
        raise InputError(f"{override}: an override is section.setting=value, such as optimizer.peak_lr=1.0e-4")
    value, _ = _parse(text, override)
    section = content.setdefault(path[0], {})
    if not isinstance(section, dict):
        raise InputError(f"{places[path[:1]]}: {path[0]}: is a section and needs settings below it")
    section[path[1]] = value
    places[path] = "command line"


def _one_line(error: ValidationError, path: Path, content: Any, places: dict[tuple[str, ...], str]) -> str:
    """The first problem of a validation, with its place and remedy; how many more there are."""
    # A name that is not known explains the one that is missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    where = tuple(str(part) for part in first["loc"])
    remedy = _remedy(first, where)
    setting, _, rest = remedy.partition(": ")
    if first["type"] == "value_error" and setting in Config.model_fields[where[0]].annotation.model_fields:
        where, remedy = (*where, setting), rest
    place = next((places[where[:n]] for n in range(len(where), -1, -1) if where[:n] in places), str(path))
    message = f"{place}: {'.'.join(where)}: {remedy}"
    more = len(problems) - 1
    return message + (f" (and {more} more problem{'s'[: more > 1]})" if more else "")


def _remedy(problem: dict[str, Any], where: tuple[str, ...]) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = Config.model_fields if len(where) == 1 else Config.model_fields[where[0]].annotation.model_fields
        close = difflib.get_close_matches(where[-1], known, n=1)
        return "unknown setting; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")
    if kind == "missing":
        return "is missing; give it in the file or as an override"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        if "int" in problem["msg"]:
            return f"'{value}' is text in YAML; write the number out: {int(float(value))}"
        written = value.lower() if "." in value else value.lower().replace("e", ".0e")
        return f"'{value}' is text in YAML, which wants a dot and a sign: write {_signed(written)}"
    if isinstance(value, bool):
        return f"{str(value).lower()} does not fit ({problem['msg']}); YAML reads yes, no, on and off so: quote text"
    if kind == "model_type" or value is None:
        expected = problem["msg"] if len(where) > 1 else "the section is empty" if value is None else "it is a section"
        return f"{value!r} does not fit; {expected}"
    return f"{value!r} does not fit: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _signed(number: str) -> str:
    """6.0e4 -> 6.0e+4: YAML 1.1 takes no exponent without its sign."""
    return re.sub(r"e(?=\d)", "e+", number)

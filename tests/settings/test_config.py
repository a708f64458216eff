"""Settings: every shipped file loads, and every mistake is one line with its place, setting, value and remedy."""

import itertools
import re
from pathlib import Path

import pytest

from infctx.settings.config import Config
from infctx.settings.load import dump_config, load_config

from places import CONFIGS
from settings_files import WHOLE, problems, refusal, write


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path):
    config = load_config(path)
    assert config.run.folder == Path("runs") / path.stem
    assert config.window.window_segments >= 4


def test_the_shipped_files_are_the_promised_ones():
    promised = {"finch-tiny", "eagle-tiny", "finch-3b-64k", "finch-1b6-16k", "eagle-7b-64k", "goose-tiny"}
    assert promised <= {path.stem for path in CONFIGS.glob("*.yaml")}
    assert load_config(CONFIGS / "finch-3b-64k.yaml").window.window_tokens == 65536
    assert load_config(CONFIGS / "finch-1b6-16k.yaml").window.window_tokens == 16384
    tiny = load_config(CONFIGS / "finch-tiny.yaml").window
    assert tiny.window_tokens >= 16384
    assert tiny.window_segments >= 16


def test_what_is_read_and_what_is_left_out(tmp_path):
    config = load_config(write(tmp_path))
    assert config.model.sizes == {"version": 6, "num_layers": 2, "width": 128}
    assert config.data.store == Path("data/train")
    assert config.data.held_out is None
    assert (config.window.window_segments, config.step_tokens) == (4, 1024)
    assert config.optimizer.peak_lr == 1e-3
    assert config.optimizer.clip_norm == 1.0
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3


def test_every_setting_is_documented():
    for section in Config.model_fields.values():
        documented = [name for name, field in section.annotation.model_fields.items() if field.description]
        unclear = set(section.annotation.model_fields) - set(documented)
        named_for_what_they_are = {"beta1", "beta2", "epsilon", "device", "keep_checkpoints"}
        named_for_what_they_are |= {"num_layers", "width", "vocab_size", "head_size", "ffn_width"}
        named_for_what_they_are |= {"mix_rank", "decay_rank", "rate_rank", "value_rank", "gate_rank"}
        named_for_what_they_are |= {"save_every_steps", "log_every_steps"}
        assert unclear <= named_for_what_they_are


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_dumped_settings_are_the_same_settings(tmp_path, path):
    config = load_config(path)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize("value", [1e-10, 1e-05, 6e-4, 1.0])
def test_numbers_are_dumped_as_yaml_reads_them(tmp_path, value):
    config = load_config(write(tmp_path), [f"optimizer.peak_lr={value:.12f}"])
    assert config.optimizer.peak_lr == value
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


MISTAKES = {
    # mistake: (line, its replacement, line number in the message, part of the message)
    "unknown setting": ("  lanes: 4", "  lames: 4", 10, "window.lames: unknown setting; did you mean lanes?"),
    "unknown setting, nothing near": (
        "  lanes: 4",
        "  qqq: 4",
        10,
        "window.qqq: unknown setting; known: segment_tokens",
    ),
    "unknown section": ("run:\n", "extra:\n  a: 1\nrun:\n", 14, "extra: unknown setting; known: model, data, window"),
    "near section": ("run:\n", "optimiser:\n  a: 1\nrun:\n", 14, "optimiser: unknown setting; did you mean optimizer?"),
    "text for a number": ("steps: 20", "steps: many", 12, "optimizer.steps: 'many' does not fit; give a whole number"),
    "number for a choice": (
        "  lanes: 4",
        "  seam_store: 3",
        10,
        "window.seam_store: 3 does not fit; choose 'auto', '",
    ),
    "fraction for a count": ("steps: 20", "steps: 2.5", 12, "optimizer.steps: 2.5 does not fit; give a whole number"),
    "evaluation without documents": (
        "  folder: runs/x",
        "  folder: runs/x\n  evaluate_every_steps: 5",
        16,
        "run.evaluate_every_steps: 5 has no documents to measure; set data.held_out, or null here",
    ),
    "unknown logger": (
        "  folder: runs/x",
        "  folder: runs/x\n  loggers: [mlflow]",
        16,
        "'mlflow' does not fit; choose",
    ),
    "no list": ("  folder: runs/x", "  folder: runs/x\n  loggers: csv", 16, "loggers: 'csv' does not fit; give a list"),
    "number below the range": (
        "steps: 20",
        "steps: -3",
        12,
        "optimizer.steps: -3 does not fit; give at least 1",
    ),
    "number above the range": (
        "steps: 20",
        "steps: 20\n  beta1: 1.5",
        13,
        "optimizer.beta1: 1.5 does not fit; give less than 1",
    ),
    "not a number": ("1.0e-3", ".nan", 13, "optimizer.peak_lr: nan does not fit"),
    "nothing": ("steps: 20", "steps:", 12, "optimizer.steps: is empty; give a whole number"),
    "misspelled and so missing": (
        "peak_lr",
        "peak_rl",
        13,
        r"optimizer.peak_rl: unknown setting; did you mean peak_lr\?",
    ),
    "infinite": ("1.0e-3", ".inf", 13, "optimizer.peak_lr: inf does not fit"),
    "1e-3 for a count": ("steps: 20", "steps: 1e-3", 12, "optimizer.steps: 0.001 does not fit"),
    "no name": ("runs/x", "runs/x\n  ? [a, b]\n  : 3", 16, "a setting's name is plain text"),
    "a list for a section": (
        "run:\n  folder: runs/x\n",
        "run: [1]\n",
        14,
        r"run: \[1\] is not a section; put",
    ),
    "an empty section": (
        "run:\n  folder: runs/x\n",
        "run:\n",
        14,
        "run: the section is empty; remove it",
    ),
    "octal": ("steps: 20", "steps: 010", 12, "YAML reads 010 as 8; write 10 for decimal"),
    "octal with a sign": ("steps: 20", "steps: -010", 12, "YAML reads -010 as -8"),
    "base 60": ("steps: 20", "steps: 1:30", 12, "YAML reads 1:30 as 90; .*quote it"),
    "yes for text": (
        "runs/x",
        "yes",
        15,
        "run.folder: true does not fit .*; .*quote it",
    ),
    "no for a number": ("steps: 20", "steps: no", 12, "optimizer.steps: false does not fit .*; give a whole number"),
    "a setting twice": ("steps: 20", "steps: 20\n  steps: 21", 13, "steps is given twice"),
    "a section twice": ("run:\n", "data:\n  store: b\nrun:\n", 14, "data is given twice"),
    "a tag": ("runs/x", "!!python/name:os.system", 15, r"tags \(.*name:os.system\) are not read"),
    "broken YAML": ("  width: 128", "  width: [128", 5, "expected ',' or ']'"),
    "a tab": ("  width: 128", "\twidth: 128", 4, "cannot start any token"),
    "window": (
        "window_tokens: 256",
        "window_tokens: 250",
        9,
        "window.window_tokens: 250 is not a multiple of .*64; 256 would work",
    ),
    "segment": ("segment_tokens: 64", "segment_tokens: 40", 8, "window.segment_tokens: 40 is not a multiple of 16"),
    "too many segments": (
        "  lanes: 4",
        "  gradient_segments: 5",
        10,
        "window.gradient_segments: 5 is more than the 4 .*null",
    ),
    "lanes": (
        "  lanes: 4",
        "  lanes: 4\n  lanes_per_pass: 3",
        11,
        "window.lanes_per_pass: 3 does not divide the 4 lanes",
    ),
    "more lanes": (
        "  lanes: 4",
        "  lanes: 4\n  lanes_per_pass: 8",
        11,
        "window.lanes_per_pass: 8 does not divide the 4 lanes",
    ),
    "warm-up": (
        "steps: 20",
        "steps: 20\n  warmup_steps: 20",
        13,
        "optimizer.warmup_steps: 20 is not less than the 20 steps of the run; use fewer",
    ),
    "constant": (
        "steps: 20",
        "steps: 20\n  schedule: constant\n  final_lr: 1.0e-5",
        14,
        "optimizer.final_lr: 1e-05 means nothing",
    ),
    "two sources": (
        "  version: 6",
        "  version: 6\n  size: finch-3b",
        2,
        "model.version: sizes come from .* leave it out",
    ),
    "half of the sizes": ("  width: 128\n", "", 1, "model: sizes by hand need version, num_layers and width"),
    "no model": (
        "  version: 6\n  num_layers: 2\n  width: 128\n",
        "  recompute_blocks: true\n",
        1,
        "model: no model given",
    ),
    "version": ("  version: 6", "  version: 8", 2, "model.version: 8 does not fit; choose 5, 6 or 7"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_file(tmp_path, name):
    old, new, line, says = MISTAKES[name]
    path = write(tmp_path, (old, new))
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: "), message
    assert re.search(says, message), message


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 1), (99, 9), (100, 10), (5000, 10)])
def test_a_warmup_that_is_not_set_fits_the_run(tmp_path, steps, warmup):
    config = load_config(write(tmp_path, ("steps: 20", f"steps: {steps}")))
    assert (config.optimizer.warmup, config.optimizer.warmup_steps) == (warmup, None)


def test_what_is_missing(tmp_path):
    path = write(tmp_path, ("run:\n  folder: runs/x\n", ""))
    assert refusal(path) == f"{path}: run: is missing; set it in the file or as an override"
    assert load_config(path, ["run.folder=runs/y"]).run.folder == Path("runs/y")
    path = write(tmp_path, ("  steps: 20\n", ""))
    assert refusal(path) == f"{path}:11: optimizer.steps: is missing; set it in the file or as an override"


def test_all_problems_at_once(tmp_path):
    """Problems of several sections, of settings that do not fit together, and of the command line."""
    path = write(
        tmp_path,
        ("  width: 128", "  widht: 128"),
        ("window_tokens: 256", "window_tokens: 250"),
        ("  lanes: 4", "  lanes: 4\n  lanes_per_pass: 3"),
        ("steps: 20", "steps: many"),
    )
    heading, *lines = problems(path, "optimiser.steps=5", "run.seed=-1")
    assert heading == f"{path}: 6 problems"
    assert sorted(lines) == sorted(
        [
            f"{path}:4: model.widht: unknown setting; did you mean width?",
            "command line: optimiser: unknown setting; did you mean optimizer?",
            f"{path}:9: window.window_tokens: 250 is not a multiple of segment_tokens 64; 256 would work",
            f"{path}:11: window.lanes_per_pass: 3 does not divide the 4 lanes; try 1",
            f"{path}:13: optimizer.steps: 'many' does not fit; give a whole number",
            "command line: run.seed: -1 does not fit; give at least 0",
        ]
    )


def test_files_that_are_none(tmp_path):
    assert refusal(tmp_path / "none.yaml").startswith(f"{tmp_path}/none.yaml: no such file")
    (tmp_path / "run.yaml").write_bytes(b"model:\n  size: \xff\n")
    assert refusal(tmp_path / "run.yaml").startswith(f"{tmp_path}/run.yaml: is no text in UTF-8 (byte 15)")
    for text in ("", "# nothing\n", "just text\n", "- a\n- b\n", "3\n"):
        assert "no sections in it; it needs model, data, window, optimizer, run" in refusal(write(tmp_path, text=text))
    assert "another document" in refusal(write(tmp_path, text=WHOLE + "---\na: 1\n"))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("\0", "not YAML (unacceptable character"),
        ("2024-13-45", "month must be in 1..12; quote what is text"),
        ("!!int many", ":15: tags (tag:yaml.org,2002:int) are not read; write the value without it"),
        ("!!python/object/apply:os.system [ls]", "are not read; write the value without it"),
        ("[" * 3000, "nested too deeply"),
        ("&a {b: *a}", "aliases (*name) are not read; write the value out"),
        ("{<<: {a: 1}}", "merges (<<) are not read; write the settings out"),
        ("9" * 5000, "a number of 5000 digits; no setting is that large"),
        ("0x" + "f" * 5000, "a number of 5002 digits"),
        ("[a, " + "b" * 1_000_000 + "]", "'bbbbbb"),
        ("x" * 2_000_000, "2,000,193 characters are no configuration"),
    ],
    ids=lambda value: value[:12],
)
def test_what_yaml_cannot_make_values_of(tmp_path, value, says):
    message = refusal(write(tmp_path, ("runs/x", value)))
    assert says in message and len(message) < 400 + len(str(tmp_path)) and message.isprintable()


def test_yaml_that_multiplies_is_refused_at_once(tmp_path):
    """Tries a billion laughs, in a file and in an override."""
    laughs = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnop"))
    assert "aliases (*name) are not read" in refusal(write(tmp_path, text=laughs + WHOLE))
    assert "aliases (*name) are not read" in refusal(write(tmp_path), "run.folder={a: &a [1], b: [*a, *a]}")


POWERS = {"1e-3": 1e-3, "6e-4": 6e-4, "6E4": 6e4, "1.5e3": 1500.0, "2e+2": 200.0, "+1.e1": 10.0}


@pytest.mark.parametrize(("written", "meant"), POWERS.items())
def test_powers_of_ten_are_the_numbers_that_everyone_means(tmp_path, written, meant):
    assert load_config(write(tmp_path, ("1.0e-3", written))).optimizer.peak_lr == meant
    assert load_config(write(tmp_path), [f"optimizer.peak_lr={written}"]).optimizer.peak_lr == meant


def test_a_count_may_be_a_power_of_ten(tmp_path):
    assert load_config(write(tmp_path), ["optimizer.steps=1.0e+3", "run.seed=12e0"]).optimizer.steps == 1000


@pytest.mark.parametrize("name", ["x" * 10_000_000, "red\x1b[31m", "two\nlines"])
def test_what_is_quoted_is_short_and_printable(tmp_path, name):
    for override in (name, f"run.{name}=3", f"optimizer.steps='{name}'"):
        message = refusal(write(tmp_path), override)
        assert message.isprintable() and len(message) < 500


def test_overrides(tmp_path):
    changed = ["optimizer.peak_lr=1.0e-5", "run.folder=a=b", "optimizer.clip_norm=null", "data.shuffle=false"]
    config = load_config(write(tmp_path), [*changed, "run.seed=1", "run.seed=2", "run.resume=never"])
    assert config.optimizer.peak_lr == 1e-5
    assert config.run.folder == Path("a=b")
    assert config.optimizer.clip_norm is None
    assert config.data.shuffle is False
    assert (config.run.seed, config.run.resume) == (2, "never")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.stps=5", "^command line: optimizer.stps: unknown setting; did you mean steps?"),
        ("optimizer.steps=many", "^command line: optimizer.steps: 'many' does not fit"),
        ("optimizer.steps=", "^command line: optimizer.steps: is empty; give a whole number"),
        ("window.window_tokens=250", "^command line: window.window_tokens: 250 is not a multiple"),
        ("window.lanes=010", "window.lanes=010.*YAML reads 010 as 8"),
        ("run.folder=on", "^command line: run.folder: true does not fit"),
        ("nothing.at=all", "^command line: nothing: unknown setting; known: model, data"),
        ("window.lanes=[", "window.lanes=\\["),
        ("steps=5", "steps=5: an override is section.setting=value"),
        ("optimizer.steps", "optimizer.steps: an override is section.setting=value"),
        ("a.b.c.d=5", "a.b.c.d=5: an override is section.setting=value"),
        (".steps=5", ".steps=5: an override is section.setting=value"),
    ],
)
def test_mistakes_in_overrides(tmp_path, override, says):
    assert re.search(says, refusal(write(tmp_path), override))


def test_an_override_below_what_is_no_section(tmp_path):
    path = write(tmp_path, ("run:\n  folder: runs/x\n", "run: 3\n"))
    assert refusal(path, "run.folder=x") == f"{path}:14: run: is a section; put settings below it"

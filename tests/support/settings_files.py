"""A small configuration to change, and the problems for which it is refused."""

import pytest

from infctx.errors import InputError
from infctx.settings.load import load_config

WHOLE = """\
model:
  version: 6
  num_layers: 2
  width: 128
data:
  store: data/train
window:
  segment_tokens: 64
  window_tokens: 256
  lanes: 4
optimizer:
  steps: 20
  peak_lr: 1.0e-3
run:
  folder: runs/x
"""


def write(tmp_path, *changes, text=WHOLE):
    """Writes the file above with some lines changed: ("  width: 128", "  width: 64")."""
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml"


def refusal(path, *overrides):
    """Returns the one line of an InputError."""
    (line,) = problems(path, *overrides)
    return line


def problems(path, *overrides):
    with pytest.raises(InputError) as refused:
        load_config(path, overrides)
    assert all("\n" not in line for line in refused.value.args)
    return refused.value.args

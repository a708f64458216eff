"""Writes docs/settings.md, the page of every setting, from the types and docstrings of infctx/settings/.

python tools/settings_page.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from infctx.settings.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
OPENING = """\
# Settings
Every setting of a run, by section of its YAML file. Start from one of the shipped files in [configs](../configs): copy
the one closest to your run and change what differs. A file only needs the settings marked *required*, and those that
choose the model.

```yaml
model:
  weights: BlinkDL/rwkv-6-world:RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth
data:
  store: data/books/train
window:
  segment_tokens: 2048
  window_tokens: 16384
optimizer:
  steps: 500
  peak_lr: 1e-5
run:
  folder: runs/books
```

On the command line, `section.setting=value` after the file changes a setting for one run:

```sh
infctx train books.yaml optimizer.steps=1000 run.folder=runs/books-longer data.held_out=null
```

Unknown settings, values of the wrong type and values that do not fit together stop the run before it starts, with a
message that names the setting and a value that would work. A checkpoint keeps all its settings in `config.yaml`.

(Written by `python tools/settings_page.py` from infctx/settings/: change the docstrings there.)
"""


def main() -> None:
    PAGE.write_text(settings_page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def settings_page() -> str:
    """Returns the whole page as Markdown: a heading for each section, a paragraph for each setting."""
    schema = Config.model_json_schema()
    parts = [OPENING]
    for section, reference in schema["properties"].items():
        content = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        parts.append(f"## {section}\n{_wrapped(content['description'])}\n")
        for name, setting in content["properties"].items():
            parts.append(_setting(name, setting))
            inside = next((choice["$ref"] for choice in setting.get("anyOf", ()) if "$ref" in choice), None)
            if inside:
                within = schema["$defs"][inside.rpartition("/")[2]]["properties"]
                parts += [_setting(f"{name}.{part}", its) for part, its in within.items() if "description" in its]
    return "\n".join(parts)


def _setting(name: str, setting: dict[str, Any]) -> str:
    default = f"default {_written(setting['default'])}" if "default" in setting else "*required*"
    return _wrapped(f"- **{name}** ({_kind(setting)}; {default}): {setting['description']}", "  ") + "\n"


def _kind(setting: dict[str, Any]) -> str:
    """Describes the allowed values: whole number from 1; auto, cpu, cuda; ..."""
    choices = setting.get("anyOf") or setting.get("oneOf")
    if choices:
        return " or ".join(_kind(choice) for choice in choices)
    if "$ref" in setting:
        return "settings"
    if setting.get("type") == "array":
        return f"list of {_kind(setting['items'])}"
    if "enum" in setting:
        return ", ".join(_written(choice) for choice in setting["enum"])
    kinds = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "null": "`null`"}
    kind = kinds.get(setting["type"], "path" if setting.get("format") == "path" else "text")
    bounds = [
        f"{words} {setting[bound]:,}"
        for bound, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
        )
        if bound in setting and setting[bound] < 1 << 62
    ]
    return " ".join([kind, *bounds])


def _written(value: Any) -> str:
    """Writes a value as YAML does."""
    if value is None:
        return "`null`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(" ".join(text.split()), 120, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    main()

"""The generated pages of docs/ match the code."""

import pytest

from infctx.settings.config import Config
from infctx.settings.load import load_config

import models_page
import settings_page


@pytest.mark.parametrize(
    ("tool", "made"),
    [(settings_page, settings_page.settings_page), (models_page, models_page.models_page)],
    ids=["settings", "models"],
)
def test_a_page_is_what_its_tool_writes(tool, made):
    name = tool.__name__
    assert tool.PAGE.read_text(encoding="utf-8") == made(), f"run `python tools/{name}.py` and commit what it writes"


def test_the_file_on_the_page_loads(tmp_path):
    page = settings_page.settings_page()
    shown = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "books.yaml").write_text(shown)
    (command,) = [line for line in page.splitlines() if line.startswith("infctx train books.yaml ")]
    config = load_config(tmp_path / "books.yaml", command.split()[3:])
    assert (config.optimizer.steps, config.data.held_out) == (1000, None)


def test_every_setting_has_its_docstring_and_its_place_on_the_page():
    page = settings_page.settings_page()
    for section, field in Config.model_fields.items():
        assert field.annotation.__doc__ and f"\n## {section}\n" in page
        for name, setting in field.annotation.model_fields.items():
            assert setting.description, f"{section}.{name} has no docstring in infctx/settings/"
            assert f"\n- **{name}** (" in page


@pytest.mark.parametrize(
    "line",
    [
        "- **folder** (path; *required*): ",
        "- **lanes** (whole number from 1; default `1`): ",
        "- **clip_norm** (number above 0 or `null`; default `1.0`): ",
        "- **shuffle** (`true` or `false`; default `true`): ",
        "- **precision** (`fp32`, `bf16`; default `fp32`): ",
        "- **version** (`5`, `6`, `7` or `null`; default `null`): ",
        "- **seed** (whole number from 0; default `0`): ",
    ],
)
def test_allowed_values_are_described_in_words(line):
    assert f"\n{line}" in settings_page.settings_page()

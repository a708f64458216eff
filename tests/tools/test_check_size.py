"""The check of sizes finds files, functions and parameter lists that are too long."""

import pytest

import check_size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n" * 401, "401 lines, 400 at most"),
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines, 60 at most"),
        ("def f(a, b, c, d, e, f, g): ...\n", "f has 7 parameters, 6 at most"),
        ("# As many as there are settings.\ndef f(a, b, c, d, e, f, g): ...\n", None),
        ("def _f(a, b, c, d, e, f, g): ...\n", None),
        ("class A:\n    def __init__(self, a, b, c, d, e, f, *, g): ...\n", "__init__ has 7 parameters"),
        ("class A:\n    def f(self, a, b, c, d, e, f): ...\n", None),
    ],
)
def test_what_is_too_long_is_named(tmp_path, text, said):
    file = tmp_path / "infctx" / "room.py"
    file.parent.mkdir()
    file.write_text(text)
    problems = list(check_size.too_long(file))
    assert len(problems) == (said is not None) and all(said in problem for problem in problems)

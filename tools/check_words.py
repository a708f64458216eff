"""Reports words in comments, docstrings, messages, test names and pages that a native speaker would not use there.

python tools/check_words.py          prints "file:line: word; use this instead", and exits with 1 if there are any
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BANNED = {
    r"behind": "after",
    r"told|tells?|telling": "reports, shows, sends, knows",
    r"can not": "cannot",
    r"(go|goes|going|gone|went) on": "continues, resumes",
    r"(stand|stands|stood|standing) for": "is, means",
    r"so many": "as many, a number of",
    r"hand(s|ed|ing)?( \w+)? on": "passes on, forwards",
    r"lack(s|ed|ing)?": "is missing, does not have, without",
    r"alas": "but",
    r"(can|could|cannot|to) be had": "is available",
    r"(is|are|was) no more(?! than)": "is gone",
    r"needs not": "need not",
    r"ask(s|ed)? of": "needs, sends",
    r"a matter of": "say it directly",
    r"of (its|their|our) own": "separate, its",
    r"mend(s|ed|ing)?": "fix",
    r"reckon(s|ed|ing)?": "compute, estimate",
    r"for want of|in want of": "without",
    r"(is|are|was|were|be|been) said": "is reported, is logged",
    r"misspelt|learnt|whilst|licence": "American English",
    r"(neighbour|behaviour|colour|favour)\w*": "American English",
}
"""Patterns between word boundaries, in any case -> the common word."""

EXCEPTIONS = {
    ("infctx/distributed/watchdog.py", "furthest behind"): "of progress, not of time",
    ("tests/distributed/test_watchdog.py", "furthest behind"): "the same message",
}
"""(file, part of the line) -> why the word is right there."""

NOT_CHECKED = {"tools/check_words.py", "tests/tools/test_check_words.py"}  # they quote the words
COMMENT = {".py": "#", ".yaml": "#", ".yml": "#", ".cu": "//", ".cuh": "//", ".cpp": "//", ".h": "//"}
WHOLE = (".md", "Makefile")


class Finding(NamedTuple):
    """A banned word: `text` is its line."""

    file: str
    line: int
    text: str
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word!r}; use: {self.instead}"


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.splitlines() if name not in NOT_CHECKED]
    files = [Path(name) for name in names if name.endswith((*COMMENT, *WHOLE)) and Path(name).is_file()]
    problems = check(files, EXCEPTIONS)
    print("\n".join(problems) or f"words: {len(files)} files, no word that should be another")
    return 1 if problems else 0


def check(files: list[Path], exceptions: dict[tuple[str, str], str]) -> list[str]:
    """Returns a line for each finding without an exception, and for each exception without a finding."""
    findings = [finding for file in files for finding in find_words(file)]
    excused = {(f, part): [x for x in findings if x.file == f and part in x.text] for f, part in exceptions}
    kept = [finding for finding in findings if not any(finding in matches for matches in excused.values())]
    stale = [
        f"{file}: no line has {part!r}; remove this exception" for (file, part), found in excused.items() if not found
    ]
    return [str(finding) for finding in kept] + stale


def find_words(file: Path) -> Iterator[Finding]:
    """Yields the banned words of a file, also where a phrase continues on the next line."""
    text = file.read_text(encoding="utf-8")
    for first, prose in sorted(prose_of(file, text)):
        for pattern, instead in BANNED.items():
            spaced = pattern.replace(" ", r"\s+")
            for match in re.finditer(rf"\b({spaced})\b", prose, re.IGNORECASE):
                before = prose.count("\n", 0, match.start())
                line = prose.splitlines()[before]
                yield Finding(str(file), first + before, line, " ".join(match[0].split()), instead)


def prose_of(file: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yields (number of the first line, text) of everything in a file that people read."""
    if file.name.endswith(WHOLE):
        yield 1, text
    elif file.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        yield from _blocks(comments, "#")
        yield from _strings(ast.parse(text, str(file)))
    else:
        mark = COMMENT[file.suffix]
        lines = enumerate(text.splitlines(), start=1)
        yield from _blocks({number: line[line.index(mark) :] for number, line in lines if mark in line}, mark)


def _blocks(comments: dict[int, str], mark: str) -> Iterator[tuple[int, str]]:
    """Joins comments on consecutive lines."""
    first, block = 0, list[str]()
    for number, comment in sorted(comments.items()):
        if number != first + len(block):
            yield first, "\n".join(block)
            first, block = number, []
        block.append(comment.lstrip(mark))
    yield first, "\n".join(block)


def _strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields string literals, docstrings included, and the names of tests."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            spans_lines = node.value.count("\n") == (node.end_lineno or node.lineno) - node.lineno
            yield node.lineno, node.value if spans_lines else node.value.replace("\n", " ")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


if __name__ == "__main__":
    sys.exit(main())

"""infctx bench: what a user types, in real processes; another commit; the table and its place in a page."""

import json
import subprocess

import pytest

import infctx
from infctx.bench import trees
from infctx.bench.cases import Case, Choices, make_groups
from infctx.bench.measure import Measured, Step
from infctx.bench.table import MARKS, check_output, markdown, write
from infctx.bench.worker import Subject
from infctx.errors import InputError
from infctx.report.starts import commit_of

from runs import infctx_here

SMALL = "--layers 1 --width 64 --window 96 --segment-tokens 48 --rounds 2"
CASE = Case({"name": "goose-2.9b"}, 65536, 4096, "truncated", "bf16", 1, "cpu")


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("--version 6 --vocab 300 --mode truncated tune", 2),
        pytest.param("--version 5 7 --vocab 64 300 --mode exact op", 8, marks=pytest.mark.slow),
        pytest.param(
            "--version 7 --vocab 64 --mode tune adapter --precision fp32 bf16 --against HEAD", 4, marks=pytest.mark.slow
        ),
    ],
)
def test_a_table_and_its_numbers(tmp_path, words, rows):
    output = tmp_path / "table.md"
    code, printed, _ = infctx_here("bench", *f"{SMALL} {words}".split(), "--output", output)
    assert (code, printed) == (0, output.read_text())
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == rows + 1
    head = cells(lines[0])
    numbers = json.loads((tmp_path / "table.json").read_text())
    of_two = "--against" in words
    assert (head[-1] == "speed against HEAD") == of_two
    assert len(numbers["rows"]) == rows * (1 + of_two)
    assert not of_two or {row["commit"] for row in numbers["rows"][1::2]} == {"HEAD"}
    for line, row in zip(lines[1:], numbers["rows"][:: 1 + of_two], strict=True):
        values = dict(zip(head, cells(line), strict=True))
        assert row["problem"] is None and len(row["steps"]) == 2
        assert values["mode"] == row["case"]["mode"]
        middle = sum(step["seconds"] for step in row["steps"]) / 2
        assert int(values["tokens/s"].replace(",", "")) == pytest.approx(96 / middle, abs=0.51)
        assert float(values["peak memory"].removesuffix(" GB")) > 0.1


@pytest.mark.parametrize(
    ("mode", "flops_per_weight", "learns"),
    [("exact", 6, "head.weight"), ("tune", 4, "initial_wkv"), ("adapter", 4, "adapter")],
)
def test_what_learns_and_the_flops_of_a_step(mode, flops_per_weight, learns):
    """Products with every weight but the embedding's: 2 FLOPs forward, 2 for the inputs, 2 for weights that learn."""
    sizes = {"version": 7, "num_layers": 2, "width": 64, "vocab_size": 40}
    case = Case(sizes, 64, 32, mode, "fp32", 1, "cpu")
    subject = Subject(case._asdict() | {"recompute_blocks": False})
    weights = sum(part.numel() for part in infctx.build_model(**sizes).parameters()) - 40 * 64
    assert subject.flops == flops_per_weight * weights * 64
    subject.timed()
    with_gradient = [name for name, part in subject.model.named_parameters() if part.grad is not None]
    assert any(learns in name for name in with_gradient)
    assert mode == "exact" or all(learns in name for name in with_gradient)


def test_the_cases_of_the_options():
    choices = Choices([], [5, 7], 2, 64, [256, 512], [64, 1024], 128, ["exact", "op"], ["fp32"], [1, 2], "cpu")
    groups = make_groups(choices)
    assert len(groups) == 2 * 2 * 2 * 2
    assert all([case.mode for case in group] == ["exact", "op"] for group in groups)
    assert len({case._replace(sizes=str(case.sizes)) for group in groups for case in group}) == 32
    assert {case.segment_tokens for group in groups for case in group} == {64, 128}


def measured(case, *seconds):
    return Measured(case, [Step(2 * x, x, 6e9, 0.5 / x, 2_340_000_000) for x in seconds])


def test_ratios_are_of_the_same_round():
    """The machine halves its speed after the first round, and no ratio notices."""
    exact = measured(CASE._replace(mode="exact"), 1.5, 3.0, 3.0)
    groups = [[(measured(CASE, 1.0, 2.0, 2.0), measured(CASE, 1.3, 2.6, 2.6)), (exact, Measured(CASE, [], "gone"))]]
    head, _, first, second = [line for line in markdown(groups, "x", "abc", "def").splitlines() if line[:1] == "|"]
    rows = [dict(zip(cells(head), cells(line), strict=True)) for line in (first, second)]
    assert rows[0]["tokens/s"] == "16,384"  # 65,536 tokens in 4 seconds
    assert rows[0]["tokens/CPU-s"] == "32,768"
    assert rows[0]["of a matrix product"] == "0.25 (0.25 to 0.50)"
    assert (rows[0]["time"], rows[1]["time"]) == ("1", "1.50 (1.50 to 1.50)")
    assert [row["speed against def"] for row in rows] == ["1.30 (1.30 to 1.30)", "gone"]
    assert rows[0]["peak memory"] == "2.34 GB"


def test_a_table_in_its_place_in_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{MARKS[0]}\nold\n{MARKS[1]}\nbelow\n")
    write(page, "| new |\n", {"rows": []})
    assert page.read_text() == f"above\n{MARKS[0]}\n\n| new |\n{MARKS[1]}\nbelow\n"
    write(page, "| new |\n", {"rows": []})
    assert page.read_text().count("new") == 1
    check_output(page)
    page.write_text("no place")
    with pytest.raises(InputError, match="page.md: exists, and has no lines"):
        check_output(page)


def test_another_commit_is_unpacked_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "HERE", tmp_path)
    (tmp_path / "infctx").mkdir()
    for text in ("one", "two"):
        (tmp_path / "infctx" / "x.py").write_text(text)
        for words in ("init -q", "add .", f"-c user.name=a -c user.email=b commit -qm {text}"):
            subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    with trees.tree_of("HEAD~1") as folder:
        assert (folder / "infctx" / "x.py").read_text() == "one"
    assert not folder.exists()
    clean = commit_of(tmp_path, digits=None)
    (tmp_path / "infctx" / "x.py").write_text("three")
    commit_of.cache_clear()
    assert clean and commit_of(tmp_path, digits=None) == f"{clean}-dirty"
    with pytest.raises(InputError, match="no such commit"), trees.tree_of("HEAD~7"):
        pass

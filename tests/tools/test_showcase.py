"""The showcase: real runs of two steps, asked and shown; its table, its picture, and what it promises."""

import json
from xml.etree import ElementTree

import pytest

from infctx.conventions import MASKED
from infctx.data.synthetic_tasks import VOCAB_SIZE

import showcase
from places import ROOT
from showcase_picture import MARKS, PAGES, PICTURE, RESULTS, as_promised, block_of, describe, draw, table, with_block


@pytest.fixture
def quick(tmp_path, monkeypatch, capsys):
    """Runs the showcase with a few documents and two steps; returns the folder, its results and what it printed."""
    monkeypatch.setattr(showcase, "side_by_side", lambda do, wanted, _: enumerate(map(do, wanted)))
    monkeypatch.setattr(showcase, "DOCUMENTS", 40)
    monkeypatch.setattr(showcase, "QUESTIONS", 128)
    words = ["--versions", "6", "--seeds", "1", "--steps", "2", "--folder", str(tmp_path / "shown")]
    monkeypatch.setattr("sys.argv", ["showcase.py", *words])
    showcase.main()
    return tmp_path / "shown", json.loads((tmp_path / "shown" / "results.json").read_text()), capsys.readouterr().out


def test_runs_of_infctx_train_that_differ_in_what_the_gradient_sees(quick, monkeypatch):
    folder, results, printed = quick
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "window.gradient_segments" in page and "Recall" in page
    assert "[3/3]" in printed and table(results) in printed and "3 runs of 2 steps took" in printed
    assert [run["arm"] for run in results["runs"]] == ["exact", "truncated", "no carry"]
    told = {}
    for run in results["runs"]:
        run_folder = folder / "steps-2" / f"finch-{run['arm'].replace(' ', '-')}-seed0"
        log = run_folder.with_suffix(".log").read_text()
        told[run["arm"]] = {word for word in log.splitlines()[0].split() if "run.folder" not in word}
        assert "step 2/2" in log and len(run["losses"]) == 2
        (model,) = json.loads((run_folder / "evaluation.json").read_text())["models"]
        row = {
            "gap_tokens": 128,
            "keys": 1,
            "overwritten": False,
            "right": run["right"],
            "asked": 128,
            "chance": 1 / 16,
        }
        assert model == {"name": str(run_folder), "recall": [row]}
    assert told["truncated"] - told["exact"] == {"window.gradient_segments=1"}
    assert told["no carry"] - told["exact"] == set(showcase.ARMS["no carry"])
    # The first step starts from the same weights and, where documents are whole, from the same documents.
    first = {run["arm"]: run["losses"][0] for run in results["runs"]}
    assert first["exact"] == first["truncated"] != first["no carry"]
    monkeypatch.setattr(showcase, "_infctx_train", None)  # what is done is not done again
    showcase.main()
    assert json.loads((folder / "results.json").read_text())["runs"] == results["runs"]


@pytest.mark.parametrize(("knows", "expected"), [(True, 128), (False, 0)])
def test_right_answers_are_counted(monkeypatch, knows, expected):
    """Of a stand-in that reads the answers from the task, or a wrong one."""
    monkeypatch.setattr(showcase, "QUESTIONS", 128)
    answers, task = [], showcase.TASK

    class Task:
        questions = task.questions

        def batch(self, random, count):
            tokens, targets = task.batch(random, count)
            assert (targets[:, self.questions] != MASKED).all()
            answers.append(targets[:, self.questions])
            return tokens, targets

    class Model:
        def __call__(self, tokens):
            return tokens, None

        def logits(self, hidden):
            shown = showcase.torch.from_numpy(answers[-1]) + (0 if knows else 1)
            return showcase.torch.nn.functional.one_hot(shown, VOCAB_SIZE)

    monkeypatch.setattr(showcase, "TASK", Task())
    assert showcase.right_answers(Model(), seed=0) == expected


def made_up(right):
    """Makes results of two versions and seeds; right: of 100, by arm."""
    runs = [
        {"version": version, "arm": arm, "seed": seed, "right": right[arm] + seed, "asked": 100, "cpu_seconds": 1.5}
        | {"steps_of_a_point": 3, "losses": [4.0, 2.8, 0.5, 0.0]}
        for version in (5, 7)
        for arm in right
        for seed in (0, 1)
    ]
    return {"date": "2026-01-02", "commit": "abc1234", "steps": 10, "runs": runs}


def test_the_table_and_what_is_promised():
    results = made_up({"exact": 95, "truncated": 14, "no carry": 5})
    assert table(results).splitlines()[2:] == [
        "| exact | 95%, 96% | 95%, 96% |",
        "| truncated at every segment | 14%, 15% | 14%, 15% |",
        "| no carry between segments | 5%, 6% | 5%, 6% |",
        "| guessing | 6% | 6% |",
    ]
    assert describe(results).splitlines()[0] == "12 runs of 10 steps took 18 CPU seconds"
    assert describe(results).endswith(": every run") and all(map(as_promised, results["runs"]))
    worse = describe(made_up({"exact": 94, "truncated": 15}))
    assert worse.endswith(
        "not Eagle, exact, seed 0; not Eagle, truncated, seed 1; not Goose, exact, seed 0; not Goose, truncated, seed 1"
    )


def test_the_picture_shows_every_run():
    results = made_up({"exact": 95, "truncated": 14, "no carry": 5})
    root = ElementTree.fromstring(draw(results))
    _, _, width, height = map(float, root.get("viewBox").split())
    lines = root.findall("{*}polyline")
    assert len(lines) == 12 and len({line.get("stroke") for line in lines}) == 3
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(points) == 4 and all(0 < x < width and 0 < y < height for x, y in points)
        assert points[0][1] < points[1][1] < points[2][1] < points[3][1]  # down, as the loss goes
    texts = " ".join(text.text for text in root.findall("{*}text"))
    for word in (
        "Eagle",
        "Goose",
        "guessing",
        "steps",
        "nats",
        "exact",
        "truncated",
        "no carry",
        "95%, 96%",
        "abc1234",
    ):
        assert word in texts


def test_pages_get_the_block_between_their_marks():
    results = made_up({"exact": 95})
    for place, picture in (("README.md", "docs/showcase.svg"), ("docs/evidence.md", "showcase.svg")):
        page = with_block(f"before\n{MARKS[0]}old\n{MARKS[1]}\nafter", block_of(results, ROOT / place))
        assert page.startswith(f"before\n{MARKS[0]}![Loss by step") and page.endswith(f"{MARKS[1]}\nafter")
        assert f"({picture})" in page and table(results) in page and "2 seeds, 2026-01-02, commit abc1234" in page
        assert "old" not in page
    with pytest.raises(AssertionError, match="lost its marks"):
        with_block("no marks", "")


def test_what_the_pages_show_is_what_the_tool_made_of_the_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PICTURE.read_text(encoding="utf-8") == draw(results)
    assert [run for run in results["runs"] if not as_promised(run)] == []
    assert len({(run["version"], run["arm"]) for run in results["runs"]}) * 3 == len(results["runs"])  # three seeds
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert with_block(text, block_of(results, page)) == text

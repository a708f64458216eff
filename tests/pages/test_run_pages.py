"""Reports of real runs and of written logs: what is on the page, what it never does, and what it refuses."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from infctx.evaluate.record import HELD_OUT
from infctx.figures.draw import draw_alone
from infctx.pages import measured
from infctx.pages.differences import differences_of, first_difference
from infctx.pages.measures import recall_by_method
from infctx.pages.run_folder import read_columns, read_run, read_runs, short_names
from infctx.pages.seeds import join_seeds, seed_groups
from infctx.pages.training import thin, training_figures
from infctx.pages.write import figures_of, write_own_report, write_report
from infctx.report.starts import commit_of

from places import ROOT
from runs import infctx_here, write_config

LOADS = r"(src|href)=(?!\"data:)|@import|url\(|https?://(?!www\.w3\.org/2000/svg)|<script(?! type=\"application/json\")"
"""What a page that needs no network and no script never has."""
OLD_RUNS = ROOT / "tests" / "fixtures" / "runs-of-0.1.0"


class Page(HTMLParser):
    """Reads a page; raises if its elements are not closed in order."""

    VOID = {"meta", "link"}

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open, self.words = [], []
        self.feed(self.text)
        assert self.open == [] and not re.search(LOADS, self.text)
        found = re.findall(r'<script type="application/json" id="numbers-(\w+)">(.*?)</script>', self.text)
        self.numbers = {name: json.loads(content) for name, content in found}

    def handle_starttag(self, tag, attributes):
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.words.append(data)


def write_log(folder, steps=40, cut="", settings=None, **columns):
    """Writes a run's folder as a run does; columns: step -> number."""
    folder.mkdir(parents=True)
    columns = {"loss": lambda step: 2 + 1 / step, "tokens": lambda step: 100 * step, **columns}
    lines = [json.dumps({"step": step} | {name: of(step) for name, of in columns.items()}) for step in steps_to(steps)]
    (folder / "steps.jsonl").write_text("".join(f"{line}\n" for line in lines) + cut)
    content = {"optimizer": {"steps": steps, "clip_norm": 1.0}} | (settings or {})
    (folder / "config.yaml").write_text(json.dumps(content))
    return folder


def steps_to(steps):
    return range(1, steps + 1)


def write_held_out(folder, evaluations):
    """evaluations: (step, with_state, losses of the buckets)."""
    rows = []
    for step, with_state, losses in evaluations:
        buckets = [
            {"begin": 0 if n == 0 else 256 * 4 ** (n - 1), "end": 256 * 4**n, "num_tokens": 10 + n,
             "nats_per_token": loss, "bits_per_byte": loss / 2}
            for n, loss in enumerate(losses)
        ]  # fmt: skip
        rows.append({"step": step, "with_state": with_state, "buckets": buckets})
    (folder / "held_out.json").write_text(json.dumps({"store": "x", "tokens": 1, "evaluations": rows}))


def figures(*paths):
    return {figure.name: figure for _, group in figures_of(read_runs(paths)) for figure in group}


def test_a_run_ends_with_its_report(tmp_path):
    config = write_config(tmp_path, run__evaluate_every_steps=2, optimizer__steps=4)
    code, output, errors = infctx_here("train", config)
    assert code == 0, errors
    assert f"report in {tmp_path / 'run' / 'report.html'}" in output
    page = Page(tmp_path / "run" / "report.html")
    (start,) = read_run(tmp_path / "run", "run").starts
    assert (start.from_step, start.ranks) == (1, 1) and start.plan[0].startswith("model     Finch")
    assert start.plan[0] in page.text and "optimizer.steps=4" in page.text
    assert {"loss", "held_out", "held_out_by_position", "gradient_norm", "learning_rate"} <= set(page.numbers)
    assert page.numbers["loss"]["series"][0]["x"] == [1, 2, 3, 4]

    infctx_here("train", config, "optimizer.steps=6")
    assert [start.from_step for start in read_run(tmp_path / "run", "run").starts] == [1, 5]
    (run,) = write_report([tmp_path / "run"], tmp_path / "out" / "report.html")
    assert run.last_step == 6 and not run.notes
    files = {path.name for path in (tmp_path / "out" / "report_figures").iterdir()}
    assert {"loss.svg", "loss.json", "held_out_by_position.svg"} <= files


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, caplog):
    folder = write_log(tmp_path / "run")
    (folder / "report.html" / "x").mkdir(parents=True)
    assert write_own_report(folder) is None
    assert [record.message.partition(" (")[0] for record in caplog.records] == [f"{folder}/report.html: not written"]
    (folder / "held_out.json").write_text("{")
    caplog.clear()
    assert write_own_report(folder) is None and len(caplog.records) == 1 and "\n" not in caplog.messages[0]


@pytest.mark.parametrize("name", ["trained", "eagle", "tuned", "two-ranks"])
def test_runs_of_the_first_version_have_reports(tmp_path, name):
    (run,) = write_report([OLD_RUNS / name], tmp_path / "old.html")
    page = Page(tmp_path / "old.html")
    assert run.settings and len(page.numbers["loss"]["series"][0]["x"]) == run.last_step
    assert "not known on what machine" in page.text


def test_damaged_logs_and_numbers_that_are_none(tmp_path):
    cut = 'not json\n[1]\n{"step": true}\n{"step": 10, "lo'
    losses = {"loss": lambda step: math.nan if step == 4 else 1.0 / step}
    folder = write_log(tmp_path / "run", 9, cut, {"optimizer": {"steps": 40}}, **losses)
    (folder / "environment.json").write_text("[{}]")
    columns, damaged = read_columns(folder / "steps.jsonl")
    assert damaged == 4 and columns["step"] == [float(step) for step in steps_to(9)]
    write_report([folder], tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    assert page.numbers["loss"]["series"][0]["x"] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert "4 lines cannot be read" in page.text and "environment.json cannot be read" in page.text
    assert "9 of 40 so far" in page.text


def test_a_long_log_is_thinned_honestly_and_the_page_is_small(tmp_path):
    steps = 30_000
    more = {
        name: (lambda step: 1 + step % 7)
        for name in ("gradient_norm", "learning_rate", "tokens_per_second", "peak_memory_gb", "seconds")
    }
    folder = write_log(tmp_path / "run", steps, loss=lambda step: float(step % 100), **more)
    write_report([folder], tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    (line,) = page.numbers["loss"]["series"]
    assert len(line["x"]) == 250 and line["x"][-1] == steps
    assert min(line["low"]) == 0 and max(line["high"]) == 99  # no spike is lost
    assert math.fsum(line["y"]) / 250 == pytest.approx(49.5)
    assert "mean of up to 120 steps" in page.numbers["loss"]["note"] and page.numbers["loss"]["note"] in page.text
    assert len(page.text) < 500_000
    one, each = thin("run", range(10), [float(n * n) for n in range(10)], 0, 5)
    assert each == 2 and list(one.x) == [1, 3, 5, 7, 9] and list(one.y) == [0.5, 6.5, 20.5, 42.5, 72.5]
    assert list(one.low) == [0, 4, 16, 36, 64] and list(one.high) == [1, 9, 25, 49, 81]


def test_runs_on_one_axis_keep_their_styles(tmp_path):
    for name, tokens in (("a", 100), ("b", 200)):
        folder = write_log(tmp_path / name, tokens=lambda step, tokens=tokens: tokens * step)
        write_held_out(folder, [(0, False, [4.0, 3.0]), (40, False, [3.0, 1.0 + tokens / 100])])
    found = figures(tmp_path / "a", tmp_path / "b")
    assert [[(one.name, one.style) for one in found[name].series] for name in ("loss", "held_out")] == [
        [("a", 0), ("b", 1)], [("a", 0), ("b", 1)],
    ]  # fmt: skip
    assert found["loss_by_tokens"].series[1].x[-1] == 40 * 200 / 1e6
    last = found["held_out_by_position"].series[1]
    assert (last.x, last.y) == ([127.5, 639.5], [1.5, 1.5])  # the middles, in bits per byte
    assert "loss_by_tokens" not in figures(tmp_path / "a")
    (alone,) = [figure for figure in training_figures(read_runs([tmp_path / "a"])) if figure.name == "held_out"]
    assert alone.series[0].y[0] == pytest.approx((10 * 4.0 + 11 * 3.0) / (10 * 2 + 11 * 2))


def test_sources_and_tuned_states_are_separate_lines(tmp_path):
    columns = {"loss_by_source/books": lambda step: 2.0, "loss_by_source/code": lambda step: 1.0}
    folder = write_log(tmp_path / "run", **columns)
    write_held_out(folder, [(40, False, [3.0, 2.5]), (40, True, [2.0, 1.5])])
    found = figures(folder)
    assert [one.name for one in found["loss_by_source"].series] == ["books", "code"]
    names = [one.name for one in found["held_out_by_position"].series]
    assert names == ["after step 40, without the state", "after step 40, with the state"]
    assert "held_out" not in found  # two numbers of one step are no curve


EVALUATION = {
    "name": "elsewhere/model.pth",
    "positions": [
        {"begin": 0, "end": 256, "num_tokens": 9, "nats_per_token": 2.0, "bits_per_byte": 3.0, "standard_error": 0.2},
        {"begin": 256, "end": 512, "num_tokens": 9, "nats_per_token": 1.5, "bits_per_byte": 2.0, "standard_error": None,
         "difference": -0.5, "difference_error": 0.1},
    ],
    "reach": [{"tokens": 512 * 2**n, "distance": 0.1 / 2**n, "standard_error": 0.01} for n in range(3)],
    "forgetting": [{"distance": 64, "copy_accuracy": 0.9, "language_accuracy": 0.3, "difference": 0.6}],
    "recall": [
        {"gap_tokens": gap, "keys": keys, "overwritten": False, "right": 30 * keys, "asked": 128}
        for gap in (128, 512) for keys in (1, 4)
    ],
    "needle": [{"task": "s-niah-1", "length": 1024, "depth": 0.5, "right": 9, "asked": 10}],
    "states": [
        {"layer": layer, "position": 2**n, "norm": layer + n, "saturation": 0.5, "effective_rank": 9.0}
        for layer in range(24) for n in (8, 9)
    ],
}  # fmt: skip


def evaluated(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"models": [EVALUATION | changes]}))
    return folder


def test_every_measure_has_its_figure(tmp_path):
    folder = evaluated(write_log(tmp_path / "run"))
    found = figures(folder)
    measures = {"positions", "differences", "reach", "forgetting", "recall", "needle"}
    assert measures | {"state_norm", "state_saturation", "state_rank"} <= set(found)
    assert "held_out_by_position" not in found
    position = found["positions"].series[0]
    assert (position.name, list(position.y)) == ("run", [3.0, 2.0])
    assert position.high[0] == pytest.approx(3.3) and position.low[1] == 2.0  # the error in the unit of the axis
    assert found["differences"].series[0].x == [383.5]
    assert "standard errors" in found["reach"].note and "standard errors" not in found["forgetting"].note
    assert found["recall"].panels[0].cells == [[pytest.approx(23.4375)] * 2, [pytest.approx(93.75)] * 2]
    assert found["needle"].panels[0].cells == [[90.0]] and found["needle"].panels[0].rows == ["50%"]
    assert (found["state_norm"].low, found["state_norm"].high, len(found["state_norm"].panels[0].rows)) == (8, 32, 24)
    for figure in found.values():
        root = ElementTree.fromstring(draw_alone(figure))
        assert root.tag.endswith("svg") and json.dumps(figure.numbers(), allow_nan=False)


def test_recall_is_bars_curves_or_a_grid_and_states_of_few_layers_are_curves(tmp_path):
    one_gap = [row for row in EVALUATION["recall"] if row["gap_tokens"] == 512]
    one_key = [row | {"chance": 0.25} for row in EVALUATION["recall"] if row["keys"] == 1]
    few = [row for row in EVALUATION["states"] if row["layer"] < 2]
    bars = figures(evaluated(tmp_path / "bars", recall=one_gap))["recall"]
    assert bars.groups == ["1 key", "4 keys"] and bars.bars[0].values == [pytest.approx(23.4375), pytest.approx(93.75)]
    curves = figures(evaluated(tmp_path / "curves", recall=one_key, states=few))
    assert list(curves["recall"].series[0].x) == [128, 512] and curves["recall"].levels == [(25.0, "guessing")]
    assert [one.name for one in curves["state_norm"].series] == ["layer 0", "layer 1"]
    results = {"Finch": {"truncated": [0.05, 0.07], "exact": [1.0]}, "Goose": {"exact": [0.5]}}
    methods = recall_by_method(results, 1 / 16, "Recall")
    assert [(bar.name, bar.values) for bar in methods.bars] == [
        ("truncated", [pytest.approx(6.0), None]), ("exact", [100.0, 50.0]),
    ]  # fmt: skip


def test_a_file_of_measurements_may_stand_beside_runs(tmp_path):
    run = evaluated(write_log(tmp_path / "run"))
    other = evaluated(tmp_path / "other", name="goose-0.4b") / "evaluation.json"
    found = figures(run, other)
    assert [(one.name, one.style) for one in found["reach"].series] == [("run", 0), ("goose-0.4b", 3)]
    assert [one.name for one in found["loss"].series] == ["run"]
    evaluated(tmp_path / "other", name=str(write_log(tmp_path / "second")))
    (series,) = figures(tmp_path / "second", other)["reach"].series
    assert (series.name, series.style) == ("second", 0)  # it is about a run that is on the page


def test_seeds_are_joined(tmp_path):
    runs = []
    for name, lr, seed, scale in (("exact-seed-0", 1, 0, 1), ("exact-seed-1", 1, 1, 3), ("other", 2, 0, 5)):
        settings = {"optimizer": {"peak_lr": lr}, "run": {"seed": seed, "folder": name}}
        folder = write_log(tmp_path / name, 30 - seed, loss=lambda step, scale=scale: float(scale), settings=settings)
        recall = [row | {"right": 10 * scale} for row in EVALUATION["recall"]]
        needle = [row | {"right": scale} for row in EVALUATION["needle"]]
        runs.append(evaluated(folder, recall=[row for row in recall if row["keys"] == 1][:1], needle=needle))
    found = read_runs(runs)
    assert seed_groups(found) == {"exact (2 seeds)": ["exact-seed-0", "exact-seed-1"], "other": ["other"]}
    joined = {figure.name: figure for _, group in figures_of(found) for figure in join_seeds(found, group)}
    exact, other = joined["loss"].series
    assert (exact.name, list(exact.x), set(exact.y)) == ("exact (2 seeds)", list(range(1, 30)), {2.0})
    assert (set(exact.low), set(exact.high), exact.is_band) == ({1.0}, {3.0}, True)
    assert (other.name, other.style, set(other.y)) == ("other", 1, {5.0})
    (exact, _) = joined["positions"].series
    assert not exact.is_band and exact.places == ["tokens 0 to 255", "tokens 256 to 511"]
    assert "Of several seeds" in joined["positions"].note and "standard errors" not in joined["positions"].note
    (exact, _) = joined["recall"].bars
    assert exact.dots == [pytest.approx([1000 / 128, 3000 / 128])] and exact.values == [pytest.approx(2000 / 128)]
    assert [(panel.title, panel.cells) for panel in joined["needle"].panels] == [
        ("exact (2 seeds), s-niah-1", [[20.0]]), ("other, s-niah-1", [[50.0]]),
    ]  # fmt: skip
    for figure in joined.values():
        ElementTree.fromstring(draw_alone(figure))


def test_names_are_short_and_differ(tmp_path):
    paths = [tmp_path / "one" / "run", tmp_path / "two" / "run", tmp_path / "two" / "last"]
    assert short_names(paths) == ["one/run", "two/run", "two/last"]
    assert short_names(paths[1:]) == ["run", "last"]


def test_names_from_outside_are_text(tmp_path):
    name = '<img alt=x onerror="alert(1)">&'
    folder = write_log(tmp_path / name, settings={"data": {"store": "</pre><script>x</script>"}})
    write_report([folder, write_log(tmp_path / "</script>b")], tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    assert name in "".join(page.words) and "<img" not in page.text and "<script>x" not in page.text


def test_compare_says_what_differs_first(tmp_path):
    one = write_log(tmp_path / "one", settings={"optimizer": {"steps": 40, "peak_lr": 1e-3}, "run": {"folder": "one"}})
    two = write_log(
        tmp_path / "two",
        loss=lambda step: 2 + 1 / step + (step > 7) * 1e-15,
        settings={"optimizer": {"steps": 40, "peak_lr": 2e-3}, "run": {"folder": "two", "seed": 1}},
    )
    runs = read_runs([one, two])
    assert [tuple(row) for row in differences_of(runs)] == [
        ("optimizer.peak_lr", ["0.001", "0.002"]), ("run.seed", ["(not set)", "1"]),
    ]  # fmt: skip
    assert first_difference(*runs).startswith("The losses differ from step 8 on: 2.125 and 2.125")
    assert "all 40 steps" in first_difference(runs[0], runs[0])
    code, output, errors = infctx_here("compare", one, two, "--output", tmp_path / "out.html")
    assert code == 0 and "optimizer.peak_lr" in output and "The losses differ from step 8 on" in output, errors
    headings = re.findall("<h2>(.*?)</h2>", Page(tmp_path / "out.html").text)
    assert headings[:2] == ["What differs", "Results"]


def test_a_page_needs_no_torch_and_shares_the_record_with_the_run():
    program = "import sys; from infctx.pages import write; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
    assert measured.HELD_OUT == HELD_OUT


def test_the_commit_is_that_of_our_repository_only(tmp_path):
    assert commit_of(tmp_path) is None and commit_of(ROOT / "infctx") is None
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{12,}(-dirty)?", commit_of(ROOT))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_opens_the_page_without_a_word(tmp_path):
    evaluated(write_log(tmp_path / "run"))
    write_report([tmp_path / "run"], tmp_path / "out.html")
    words = ["chromium", "--headless", "--no-sandbox", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run([*words, profile, tmp_path / "out.html"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("<svg") == 10
    assert "CONSOLE" not in done.stderr
    (tmp_path / "bad.html").write_text((tmp_path / "out.html").read_text().replace("<h1>", '<img src="https://x"><h1>'))
    done = subprocess.run([*words, profile, tmp_path / "bad.html"], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" in done.stderr  # the page's own policy refuses it

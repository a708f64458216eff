"""Reports of real runs and of written logs: what is on the page, what it never does, and what it refuses."""

import json
import re

from infctx.pages.run_folder import read_run
from infctx.pages.write import write_report

from runs import infctx_here, write_config


def test_a_run_ends_with_its_report(tmp_path):
    config = write_config(tmp_path, run__evaluate_every_steps=2, optimizer__steps=4)
    code, output, errors = infctx_here("train", config)
    assert code == 0, errors
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"report in {tmp_path / 'run' / 'report.html'}" in output
    run = read_run(tmp_path / "run", "run")
    (start,) = run.starts
    assert (start.from_step, start.ranks) == (1, 1) and start.plan[0].startswith("model     Finch")
    assert start.plan[0] in page and "optimizer.steps=4" in page
    for name in ("loss", "held_out", "held_out_by_position", "gradient_norm", "learning_rate"):
        assert f'<figure id="{name}">' in page
    assert not re.search(r"(src|href)=(?!\"data:)|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    numbers = json.loads(re.search(r'id="numbers-loss">(.*?)</script>', page)[1])
    assert numbers["series"][0]["x"] == [1, 2, 3, 4]

    infctx_here("train", config, "optimizer.steps=6")
    assert [start.from_step for start in read_run(tmp_path / "run", "run").starts] == [1, 5]
    (run,) = write_report([tmp_path / "run"], tmp_path / "out" / "report.html")
    assert run.last_step == 6 and not run.notes
    figures = {path.name for path in (tmp_path / "out" / "report_figures").iterdir()}
    assert {"loss.svg", "loss.json", "held_out_by_position.svg"} <= figures

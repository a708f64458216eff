"""The length recipe: every way is a run that loads, of as many tokens a step; its table; and all of it in small."""

import json

import pytest

from infctx.settings.load import load_config

import length_recipe
from length_recipe import LONGER, SHORT, WAYS, Wanted, do_seed, table
from real_runs import run_infctx
from runs import write_store


def test_every_way_takes_as_many_tokens_and_differs_in_what_it_says():
    short = load_config(SHORT, [])
    assert short.window.window_tokens == short.data.document_tokens == 512
    loaded = {way: load_config(LONGER, [each.format(curriculum=8) for each in WAYS[way]]) for way in WAYS}
    assert {config.step_tokens for config in loaded.values()} == {short.step_tokens}
    assert loaded["exact"].optimizer.steps * length_recipe.SHARE == short.optimizer.steps
    assert loaded["exact"].window.window_tokens == 32 * 512 == loaded["truncated"].window.window_tokens
    seen = {
        way: (config.window.carry, config.window.gradient_segments, config.data.document_tokens)
        for way, config in loaded.items()
    }
    assert seen == {
        "none": ("document", None, None),
        "the same as before": ("document", None, 512),
        "state passing": ("lane", 1, 512),
        "truncated": ("document", 1, None),
        "exact": ("document", None, None),
        "exact, documents that grow": ("document", None, None),
    }
    assert loaded["exact, documents that grow"].data.curriculum.steps == 8


def test_the_commands_in_the_configuration_are_those_of_the_tool():
    text = " ".join(LONGER.read_text(encoding="utf-8").replace("#", " ").split())
    for way, settings in WAYS.items():
        assert " ".join(settings).format(curriculum=8) in text, way


def test_the_table_has_means_and_standard_errors():
    seeds = [{"none": {0: 3.0, 256: 2.0 + seed}, "exact": {0: 1.0, 256: 1.0}} for seed in (0, 1, 2)]
    assert table(seeds).splitlines() == [
        "| 5% more steps | from 0 | from 256 |",
        "|---|---:|---:|",
        "| none | 3.000 ± 0.000 | 3.000 ± 0.577 |",
        "| exact | 1.000 ± 0.000 | 1.000 ± 0.000 |",
    ]
    assert "±" not in table(seeds[:1])


@pytest.mark.slow
def test_all_ways_in_small(tmp_path, monkeypatch):
    for split in ("train", "held_out"):
        write_store(tmp_path / split, lengths=(3000, 900))
    stores = (f"data.store={tmp_path / 'train'}", f"data.held_out={tmp_path / 'held_out'}")
    settings = (*stores, "optimizer.warmup_steps=0")
    found = do_seed(Wanted(0, 2, tmp_path, settings))
    assert list(found) == list(WAYS)
    assert all(sorted(losses) == [0, 256, 1024] for losses in found.values())
    assert len({json.dumps(losses) for losses in found.values()}) == len(WAYS)  # no two ways end with the same model
    monkeypatch.setattr("real_runs.main", None)  # what is done is not done again
    assert do_seed(Wanted(0, 2, tmp_path, settings)) == found


def test_a_run_that_fails_names_its_log(tmp_path):
    log = tmp_path / "run.log"
    with pytest.raises(SystemExit, match=f"{log}: the run did not get to its end"):
        run_infctx(["train", SHORT, "data.store=null"], log, tmp_path / "model.pth")
    assert "data.store: is missing" in log.read_text() and log.read_text().startswith(f"infctx train {SHORT} data")

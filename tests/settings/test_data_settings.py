"""Settings of sources and lengths: lists of stores in a configuration, and every mistake in them is one line."""

import re
from pathlib import Path

import pytest

from infctx.settings.load import dump_config, load_config

from settings_files import WHOLE, problems, refusal, write

LISTED = """\
  sources:
    - store: data/books/train
      weight: 0.7
    - {store: data/chats/train, weight: 0.3, name: talk}
  held_out: [{store: data/books/held_out}, {store: data/chats/held_out}]
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("weight: 0.7", "weight: -1", "8: data.sources[0].weight: -1 does not fit; give more than 0.0"),
        ("weight: 0.3", "wieght: 0.3", "9: data.sources[1].wieght: unknown setting; did you mean weight?"),
        ("weight: 0.3", "weight: much", "9: data.sources[1].weight: 'much' does not fit; give a number"),
        ("      weight: 0.7\n", "", "7: data.sources[0].weight: is missing, and others have one; give all or none"),
        ("name: talk", "name: books", "9: data.sources[1].name: books is the name of another one too; give it its own"),
        ("name: talk", "name: a/b", "9: data.sources[1].name: 'a/b' does not fit; give a word without a slash"),
        ("store: data/books/train\n      ", "", "7: data.sources[0].store: is missing; set it in the file or as"),
        ("{store: data/books/held_out}", "{}", "10: data.held_out[0].store: is missing; set it in the file or as"),
        ("{store: data/chats/held_out}", "5", "10: data.held_out[1]: 5 is not a section; put settings below the name"),
        (
            "[{store: data/books/held_out}, {store: data/chats/held_out}]",
            "[]",
            "10: data.held_out: [] does not fit; give at",
        ),
        (
            "[{store: data/books/held_out}, {store: data/chats/held_out}]",
            "5",
            "10: data.held_out: 5 does not fit; give a f",
        ),
        ("  sources:", "  store: data/train\n  sources:", "7: data.sources: documents come from data.store too; set"),
    ],
)
def test_mistakes_in_a_list(tmp_path, old, new, says):
    path = write(tmp_path, (old, new), text=WHOLE.replace("  store: data/train\n", LISTED))
    assert refusal(path).startswith(f"{path}:{says}")


@pytest.mark.parametrize(
    "override",
    [
        "data.sources=[{store: a, weight: 1}, {store: b}]",
        "data.sources=[{store: a, weight: -1}, {store: b, wait: 1}]",
        "run.loggers=[tensorbord]",
        "data.curriculum={from_tokens: 100, to_tokens: 200, steps: 3}",
    ],
)
def test_a_mistake_in_a_list_of_the_command_line_is_not_blamed_on_the_file(tmp_path, override):
    path = write(tmp_path, text=WHOLE.replace("  store: data/train\n", LISTED))
    assert all(line.startswith("command line: ") for line in problems(path, override))


def test_lists_of_stores(tmp_path):
    data = load_config(write(tmp_path, text=WHOLE.replace("  store: data/train\n", LISTED))).data
    assert [(each.called, each.weight) for each in data.all_sources] == [("books", 0.7), ("talk", 0.3)]
    assert data.held_out_stores == [("books", Path("data/books/held_out")), ("chats", Path("data/chats/held_out"))]
    settings = ["sources[0].store", "sources[1].store", "held_out[0].store", "held_out[1].store"]
    assert [name for name, _ in data.named_stores] == settings
    again = write(tmp_path, text=dump_config(load_config(tmp_path / "run.yaml")))
    assert load_config(again).data == data
    data = load_config(write(tmp_path), ["data.held_out=data/books/held_out"]).data
    assert data.held_out_stores == [("held_out", Path("data/books/held_out"))]
    assert data.named_stores == [("store", Path("data/train")), ("held_out", Path("data/books/held_out"))]
    listed = ["data.store=null", "data.sources=[{store: a/train}, {store: b/train}]"]
    assert [each.called for each in load_config(write(tmp_path), listed).data.all_sources] == ["a", "b"]
    assert refusal(write(tmp_path), "data.store=null").endswith(
        "data.store: is missing; set it in the file or as an override"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "data.curriculum={from_tokens: 64, to_tokens: 100, steps: 5}",
            "data.curriculum.to_tokens: 100 .*; 128 would work",
        ),
        (
            "data.curriculum={from_tokens: 128, to_tokens: 64, steps: 5}",
            "data.curriculum.from_tokens: 128 is more than",
        ),
        ("data.curriculum={from_tokens: 64, to_tokens: 64, stesp: 5}", "data.curriculum.stesp: .*did you mean steps?"),
        ("data.curriculum=5", "data.curriculum: 5 is not a section"),
        ("data.min_tokens=0", "data.min_tokens: 0 does not fit; give at least 1"),
        ("window.carry=lanes", "window.carry: 'lanes' does not fit; choose 'document' or 'lane'"),
    ],
)
def test_mistakes_in_lengths(tmp_path, override, says):
    assert re.search(f"^command line: {says}", refusal(write(tmp_path), override))


def test_settings_of_lengths_that_do_not_fit_together(tmp_path):
    assert "data.min_tokens: 9 is more than max_tokens 8" in refusal(
        write(tmp_path), "data.min_tokens=9", "data.max_tokens=8"
    )
    lane = "window.carry=lane"
    assert "window.carry: lane needs whole segments on each rank; set distributed.time_ranks to 1" in refusal(
        write(tmp_path), lane, "distributed.devices=2", "distributed.time_ranks=2"
    )
    path = write(
        tmp_path, ("  version: 6\n  num_layers: 2\n  width: 128\n", "  weights: m.pth\n  learn: initial_state\n")
    )
    assert "window.carry: in lane, documents never start from the state that learns; use document" in refusal(
        path, lane
    )

"""`infctx evaluate` with all measures: tables, JSON, several models, adapters, quantized weights."""

import json

import numpy as np
import pytest
import torch

import infctx
from infctx.data.store_writer import TokenStoreWriter
from infctx.measures import MEASURES

from runs import infctx_here, write_store
from tiny_models import random_model

FIELDS = {
    "positions": "begin end num_tokens nats_per_token bits_per_byte standard_error",
    "reach": "tokens distance standard_error",
    "forgetting": "distance copy_accuracy language_accuracy difference standard_error",
    "recall": "gap_tokens keys overwritten right asked chance",
    "needle": "task length depth right asked",
    "states": "layer position norm saturation effective_rank",
}

HEADS = {
    "positions": "held-out loss by position in ",
    "reach": "reach of ",
    "forgetting": "forgetting curve of ",
    "recall": "recall of ",
    "needle": "needles of ",
    "states": "states of ",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a store and a model of each version."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_store(folder / "store", (700, 40, 333, 1500))
    for version in (5, 6, 7):
        model = random_model(version, vocab_size=257, width=32, head_size=16, with_state=version == 6)
        infctx.save_weights(model, folder / f"{version}.pth")
    return folder


def evaluate(folder, *words):
    code, output, errors = infctx_here("evaluate", *words, "--output", folder / "out.json")
    assert code == 0, errors
    content = json.loads((folder / "out.json").read_text())
    (folder / "out.json").unlink()
    return output, content


@pytest.mark.parametrize(
    ("version", "what"),
    [(5, ("positions", "states")), (6, MEASURES), (7, ("positions", "reach", "recall", "states"))],
)
def test_measures_of_every_version(folder, version, what):
    model, store = folder / f"{version}.pth", folder / "store"
    few = ("--samples", 1, "--lengths", 840, "--segment-tokens", 128, "--max-tokens", 3000)
    more = ("--dtype", "nf4") if version == 7 else ()
    output, content = evaluate(folder, model, store, "--what", ",".join(reversed(what)), *few, *more)
    assert (content["store"], content["tokens"], content["segment_tokens"]) == (str(store), 3000, 128)
    (entry,) = content["models"]
    assert list(entry) == ["name", "positions", "total", *what[1:]] and entry["name"] == str(model)
    for name in what:
        assert entry[name] and all(list(row) == FIELDS[name].split() for row in entry[name]), name
    heads = [line for line in output.splitlines() if f"{model}" in line]
    assert [line.startswith(HEADS[name]) for name, line in zip(what, heads, strict=True)] == [True] * len(what)
    assert "state collapse" in output and ("nf4 weights: loss" in output) == (version == 7)
    for name, place in (("forgetting", "distance"), ("recall", "gap_tokens"), ("needle", "length")):
        assert {row[place] for row in entry.get(name, ())} == ({840} if name in what else set())


def test_evaluate_compares_models_on_the_same_tokens_and_never_replaces_a_file(folder):
    store = folder / "store"
    words = (folder / "6.pth", folder / "7.pth", folder / "6.pth", store, "--max-tokens", 1200)
    output, content = evaluate(folder, *words)
    first, other, again = content["models"]
    assert "difference" not in first["total"]
    for row, its, mine in zip(first["positions"], other["positions"], again["positions"], strict=True):
        assert its["num_tokens"] == row["num_tokens"] == mine["num_tokens"]
        assert its["difference"] == pytest.approx(its["nats_per_token"] - row["nats_per_token"])
        assert its["difference_error"] > 0 and (mine["difference"], mine["difference_error"]) == (0, 0)
        assert f"{row['num_tokens']:,} {row['nats_per_token']:12.4f} {row['standard_error']:9.4f}" in output
    assert output.count(f"difference: nats per token less those of {folder / '6.pth'}") == 2
    (folder / "there.json").write_text("")
    code, output, errors = infctx_here("evaluate", *words, "--output", folder / "there.json")
    assert (code, output, errors) == (2, "", f"infctx: {folder}/there.json: exists; choose another name\n")


def test_without_carry_is_compared_with_the_same_model(folder):
    words = (folder / "6.pth", folder / "store", "--segment-tokens", 256, "--without-carry")
    output, content = evaluate(folder, *words)
    first, *others = content["models"][0]["positions"]
    assert first["difference"] == 0 and all(row["difference"] != 0 for row in others)
    assert "less those of the same model without carry" in output


def test_a_store_of_world_tokens_has_needles_too(folder):
    random, ids = np.random.default_rng(0), infctx.tokenizer("world").encode("A lot of words. And some more of them! ")
    with TokenStoreWriter(folder / "world") as writer:
        for length in random.integers(20, 60, 30).tolist():
            writer.extend(np.resize(ids, length))
            writer.end_document()
    model = random_model(6, vocab_size=65536, width=16, head_size=8, num_layers=1)
    infctx.save_weights(model, folder / "world.pth", torch.bfloat16)
    words = ("--what", "needle", "--lengths", 300, "--samples", 1)
    _, content = evaluate(folder, folder / "world.pth", folder / "world", *words)
    assert {(row["length"], row["right"], row["asked"]) for row in content["models"][0]["needle"]} == {(300, 0, 1)}

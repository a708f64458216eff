"""Datasets on the hub: which files are a split; `infctx prepare` on them, which downloads no more than it reads."""

import gzip
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from infctx.data.token_store import TokenStore
from infctx.documents.document import Reading
from infctx.errors import InputError
from infctx.hub.datasets import dataset_files
from infctx.prepare.prepare import prepare

NAME = "some/texts"


def holding(hub, *paths, card=None):
    for path in paths:
        hub.add(NAME, path, f"content of {path}", "datasets")
    if card is not None:
        hub.add(NAME, "README.md", f"---\n{card}\n---\n# A set\n", "datasets", lfs=False)


def paths(split=None, config=None, name=f"hf:{NAME}"):
    return [file.path for file in dataset_files(name, split, config)]


def refused(*arguments, **options):
    with pytest.raises(InputError) as caught:
        paths(*arguments, **options)
    return str(caught.value)


PG19 = [f"data/train-0000{i}-of-00003-{i}a.parquet" for i in range(3)]
CARD = """configs:
- config_name: long
  data_files:
  - split: train
    path: [long/*.jsonl]
  - split: heldout
    path: rest/*.jsonl
- config_name: short
  default: true
  data_files: short/*"""


@pytest.mark.parametrize(
    ("there", "split", "config", "taken"),
    [
        ([*PG19, "data/test-00000-of-00001.parquet", "README.md"], None, None, PG19),
        (["train.jsonl", "valid.jsonl"], "validation", None, ["valid.jsonl"]),
        (["train/b.txt", "train/a.txt", "dev/c.txt"], "train", None, ["train/a.txt", "train/b.txt"]),
        (["books.jsonl.gz", "LICENSE.txt", "dataset_infos.json"], None, None, ["books.jsonl.gz"]),
        (["constrained.txt", "contest.txt", "test.txt"], None, None, ["test.txt"]),  # whole words
        (["train.parquet", "train.jsonl.zst", "train.csv"], None, None, ["train.parquet"]),
        (["en/train.jsonl", "de/train.jsonl"], None, "de", ["de/train.jsonl"]),
        ([".cache/train.jsonl", "my-train-1.csv"], None, None, ["my-train-1.csv"]),
    ],
)
def test_files_of_a_split_by_their_names(hub, there, split, config, taken):
    holding(hub, *there)
    assert paths(split, config) == taken


def test_the_card_of_a_repository_decides(hub):
    holding(hub, "long/b.jsonl", "long/a.jsonl", "rest/c.jsonl", "short/train.txt", "train.jsonl", card=CARD)
    assert paths() == ["short/train.txt"]
    assert paths(config="long") == ["long/a.jsonl", "long/b.jsonl"]
    assert paths("heldout", "long") == ["rest/c.jsonl"]
    assert refused("test", "long") == f"{NAME}: has no split test; choose one with --split: train, heldout"
    assert refused(None, "shrot").startswith(
        f"{NAME}: has no configuration shrot; choose one with --config: long, short"
    )
    holding(hub, card="license: mit")


def test_several_sets_without_a_default(hub):
    holding(hub, "long/a.jsonl", "short/a.jsonl", card=CARD.replace("  default: true\n", ""))
    assert refused() == f"{NAME}: holds several sets; choose one with --config: long, short"


CARDS = ["configs: 5", "- a", "configs:\n- data_files: [{split: a}, 5]", "a: [", "configs: [{}]", "license: mit"]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_that_makes_no_sense_is_not_asked(hub, card):
    holding(hub, "train.jsonl", card=card)
    assert paths() == ["train.jsonl"]


def test_files_named_one_by_one_or_by_a_pattern(hub):
    holding(hub, *PG19)
    assert paths(name=f"hf:{NAME}:{PG19[1]}") == [PG19[1]]
    assert paths(name=f"hf:{NAME}:data/*-0000[02]-*") == [PG19[0], PG19[2]]
    assert refused(name=f"hf:{NAME}:gone.parquet").startswith(
        f"{NAME}:gone.parquet: has no such file; there are\n  data/"
    )


def test_sets_without_data(hub):
    holding(hub, "pg19.py", "README.md", "dataset_infos.json")
    assert refused() == (
        f"{NAME}: holds no data, only the script that gets it (pg19.py), and infctx runs no code of others; look for a "
        "copy of it in parquet"
    )
    hub.files.clear()
    holding(hub, "a.png", "b.png")
    assert refused().startswith(f"{NAME}: holds no documents in .parquet, .jsonl, ")
    assert refused(name="hf:pg19") == "hf:pg19: is no dataset on the hub; give hf:OWNER/DATASET, with both parts"


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def books(hub):
    """Three files of five documents each."""
    for number in range(3):
        content = lines(f"book {number}.{i} " + "🙂 long " * 20 for i in range(5))
        hub.add(NAME, f"data/train-0000{number}-of-00003.jsonl.gz", gzip.compress(content.encode()), "datasets")
    return hub


@pytest.mark.parametrize(("limit", "num_files"), [(4, 1), (5, 1), (6, 2), (None, 3)])
def test_prepare_downloads_no_more_files_than_it_reads(books, tmp_path, limit, num_files):
    summary = prepare([f"hf:{NAME}"], tmp_path / "out", tokenizer="bytes", reading=Reading(limit=limit))
    store = TokenStore(tmp_path / "out" / "train")
    assert store.num_documents == summary.splits["train"].documents == (limit or 15)
    assert books.downloads() == {f"train-0000{number}-of-00003.jsonl.gz": 1 for number in range(num_files)}
    (note,) = [note for note in summary.notes if note.startswith(f"hf:{NAME}: 3 files of .jsonl, ")]
    assert note.endswith(" bytes, downloaded as they are read")
    first = bytes(store.tokens(0, 0, store.length(0) - 1).astype(np.uint8) - 1)
    assert first.decode() == "book 0.0 " + "🙂 long " * 20


def test_a_set_in_parquet_as_pg19_is(hub, tmp_path):
    texts = [f"book {i} " + "🙂 long " * 20 for i in range(15)]
    for number in range(3):
        rows = pyarrow.table({"short_book_title": list("abcde"), "text": texts[5 * number : 5 * number + 5]})
        parquet.write_table(rows, tmp_path / "part.parquet")
        hub.add(NAME, PG19[number], (tmp_path / "part.parquet").read_bytes(), "datasets")
    prepare([f"hf:{NAME}"], tmp_path / "out", tokenizer="bytes", reading=Reading(limit=6))
    store = TokenStore(tmp_path / "out" / "train")
    documents = [store.tokens(i, 0, store.length(i) - 1).astype(np.uint8) - 1 for i in range(store.num_documents)]
    assert [bytes(ids).decode() for ids in documents] == texts[:6]
    assert hub.downloads() == {path.rpartition("/")[2]: 1 for path in PG19[:2]}


def test_the_same_store_as_from_files_here_and_beside_them(books, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for (_, _, path), (content, _) in sorted(books.files.items()):
        (folder / path.rpartition("/")[2]).write_bytes(content)
    for name, inputs in (("here", [str(folder)]), ("hub", [f"hf:{NAME}"]), ("both", [str(folder), f"hf:{NAME}"])):
        prepare(inputs, tmp_path / name, tokenizer="bytes", held_out=0.2, reading=Reading(limit=15))
    content = {name: (tmp_path / name / "train.bin").read_bytes() for name in ("here", "hub", "both")}
    assert content["here"] == content["hub"] == content["both"]


def test_a_limit_holds_for_files_here_too(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(str(i) for i in range(9)))
    summary = prepare([str(tmp_path)], tmp_path / "out", tokenizer="bytes", reading=Reading(limit=7))
    assert summary.splits["train"].documents == 7


@pytest.mark.parametrize("option", ["split", "config"])
def test_options_of_the_hub_without_the_hub(tmp_path, option):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=f"^--{option}: is for datasets on the hub, hf:OWNER/DATASET; leave it out$"):
        prepare([str(tmp_path)], tmp_path / "out", tokenizer="bytes", reading=Reading(**{option: "x"}))


def test_a_broken_line_on_the_hub_is_named_by_file_and_line(books, tmp_path):
    books.add(NAME, "data/train-00001-of-00003.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": '), "datasets")
    with pytest.raises(InputError, match=rf"^{NAME}:data/train-00001-of-00003.jsonl.gz:2: not JSON"):
        prepare([f"hf:{NAME}"], tmp_path / "out", tokenizer="bytes")
    assert not (tmp_path / "out").exists()

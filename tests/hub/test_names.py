"""Which texts are names on the hub, and which are paths."""

from pathlib import Path

import pytest

from infctx.hub.names import HubName, hub_name

FINCH = "RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth"


@pytest.mark.parametrize(
    ("text", "repository", "revision", "file"),
    [
        (f"BlinkDL/rwkv-6-world:{FINCH}", "BlinkDL/rwkv-6-world", "main", FINCH),
        ("RWKV/v6-Finch-3B-HF", "RWKV/v6-Finch-3B-HF", "main", None),
        ("RWKV/rwkv.5@refs/pr/3", "RWKV/rwkv.5", "refs/pr/3", None),
        ("me/states@v1.2:tuned/chat.st", "me/states", "v1.2", "tuned/chat.st"),
        ("hf:runs/books", "runs/books", "main", None),
        ("hf:emozilla/pg19", "emozilla/pg19", "main", None),
        ("a/b:data/train-*.parquet", "a/b", "main", "data/train-*.parquet"),
    ],
)
def test_names(text, repository, revision, file):
    assert hub_name(text) == hub_name(Path(text)) == HubName(repository, revision, file)
    assert hub_name(str(hub_name(text)) if "hf:" not in text else f"hf:{hub_name(text)}") == hub_name(text)


PATHS = [
    "books",
    "models/x.pth",
    "runs/books",
    "data/books",
    "/disk/models",
    "a/b/c",
    "../a/b",
    "a/b:",
    ":c",
    "hf:pg19",
]
PATHS += ["a/b:/etc/passwd", "a/b:../c", "a/b:c:d", "a--b/c", "-a/b", "a/b.", "a b/c", "mine/x.safetensors", "C:/x/y"]


@pytest.mark.parametrize("text", PATHS)
def test_paths(text):
    assert hub_name(text) is None


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("RWKV/finch", "RWKV/finch:x.pth"):
        assert hub_name(text) is not None
        Path("RWKV").mkdir(exist_ok=True)
        Path(text).touch()
        assert hub_name(text) is None
    assert hub_name("RWKV/other") is None  # a folder of that name is here, so a file in it is missing
    assert hub_name("RWKV/other:x.pth") == HubName("RWKV/other", "main", "x.pth")

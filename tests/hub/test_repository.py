"""A repository's one model, by its name alone; and what is listed where that does not say it."""

import pytest
from huggingface_hub import constants

from infctx.errors import InputError
from infctx.hub.names import HubName, hub_name
from infctx.hub.repository import cached_model, download_model, list_files

NAME = HubName("some/model", "main", None)
LAYOUT = ["README.md", "config.json", "modeling.py"]
PARTS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def holding(hub, *paths, kind="models"):
    for path in paths:
        hub.add(NAME.repository, path, f"content of {path}", kind, lfs=path.endswith((".pth", ".safetensors", ".bin")))
    return hub


def refused(name):
    with pytest.raises(InputError) as caught:
        download_model(name)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["README.md", "a.pth"], "a.pth"),
        (["finch.safetensors"], "finch.safetensors"),
        ([*LAYOUT, "model.safetensors", "pytorch_model.bin", "a.pth"], {"config.json", "model.safetensors"}),
        ([*LAYOUT, "pytorch_model.bin"], {"config.json", "pytorch_model.bin"}),
        (
            [*LAYOUT, *PARTS, "model.safetensors.index.json", "old/a.pth"],
            {"config.json", *PARTS, "model.safetensors.index.json"},
        ),
    ],
)
def test_the_one_model_of_a_repository(hub, monkeypatch, there, taken):
    holding(hub, *there)
    assert cached_model(NAME) is None
    path = download_model(NAME)
    got = path.name if path.is_file() else {file.name for file in path.iterdir()}
    assert got == taken
    assert cached_model(NAME) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download_model(NAME) == path


def test_a_folder_with_a_part_missing_is_not_taken_from_the_cache(hub):
    holding(hub, *LAYOUT, *PARTS, "model.safetensors.index.json")
    folder = download_model(NAME)
    (folder / PARTS[1]).unlink()
    assert cached_model(NAME) is None
    assert download_model(NAME) == folder and (folder / PARTS[1]).exists()


def test_several_models_are_listed_with_what_to_write(hub):
    holding(hub, *(f"{size}B.pth" for size in range(1, 16)), "README.md")
    heading, *lines = refused(NAME)
    assert heading == "some/model: holds 15 models; name one of them:"
    assert lines[0] == "  some/model:10B.pth  (18 bytes)" and lines[-1] == "  and 3 more" and len(lines) == 13
    assert hub_name(lines[0].split()[0]) == HubName("some/model", "main", "10B.pth")
    assert not hub.downloads()
    download_model(NAME._replace(file="10B.pth"))
    assert refused(NAME)[0] == heading  # what the cache happens to have is no answer


def test_a_repository_without_weights(hub):
    holding(hub, "README.md", "finch.gguf")
    heading, *lines = refused(NAME)
    assert heading.startswith(
        "some/model: holds no weights that infctx reads (.pth, .safetensors, or a folder in Hugging"
    )
    assert lines == ["  README.md", "  finch.gguf"]


def test_a_wrong_file_is_answered_with_names_like_it(hub):
    holding(hub, "RWKV-x060-World-3B-v2.1.pth", "RWKV-x060-World-7B-v3.pth", "README.md")
    heading, first, *_ = refused(NAME._replace(file="RWKV-x060-World-3B-v2.pth", revision="v1"))
    assert heading == "some/model@v1:RWKV-x060-World-3B-v2.pth: some/model has no such file; check the name"
    assert first == "  some/model@v1:RWKV-x060-World-3B-v2.1.pth"


def test_a_long_list_is_read_to_its_end(hub):
    holding(hub, *(f"data/{i:04}.jsonl" for i in range(160)), kind="datasets")
    assert [file.path for file in list_files(NAME, "dataset")] == [f"data/{i:04}.jsonl" for i in range(160)]

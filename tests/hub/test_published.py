"""The table of published files against the architecture and the shipped configurations; messages about files."""

from dataclasses import replace
from pathlib import Path

import pytest

from infctx.errors import InputError
from infctx.formats.stored_names import stored_names
from infctx.hub.published import (
    EAGLE,
    FINCH,
    FLA_FOLDERS,
    GOOSE,
    PUBLISHED_FILES,
    missing_weights,
    published_file,
    refuse_stopped_download,
)
from infctx.model.sizes import PUBLISHED_SIZES, published_sizes
from infctx.settings.load import load_config

from places import CONFIGS

FINCH_3B = "RWKV-x060-World-3B-v2.1-20240417-ctx4096.pth"


@pytest.mark.parametrize("file", PUBLISHED_FILES, ids=lambda file: file.name)
def test_a_file_has_the_bytes_of_its_sizes(file):
    """bf16, and 130 to 160 bytes per tensor for names and the archive around them."""
    sizes = published_sizes(file.size)
    sizes = replace(sizes, keeps_first_blend=sizes.version == 7)
    beyond = file.num_bytes - 2 * sizes.num_parameters
    assert 100 <= beyond / len(stored_names(sizes)) <= 200
    assert file.repository == {5: EAGLE, 6: FINCH, 7: GOOSE}[sizes.version]


def test_sizes_are_published_and_no_file_is_listed_twice():
    unlisted = {"goose-13.3b"}  # its files have dates in their names, and new ones come often
    listed = {file.size for file in PUBLISHED_FILES} | set(FLA_FOLDERS.values())
    assert listed == set(PUBLISHED_SIZES) - unlisted
    assert len({file.name for file in PUBLISHED_FILES}) == len(PUBLISHED_FILES)
    assert all(repository.lower().split("-")[2] in size for repository, size in FLA_FOLDERS.items())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_configurations_name_published_files(path):
    model = load_config(path).model
    if model.size is None:
        return
    text = path.read_text(encoding="utf-8")
    file = published_file(model.weights)
    if file is None:
        assert FLA_FOLDERS[str(model.weights)] == model.size
        assert "# Published weights, a folder that is downloaded from the Hugging Face Hub once" in text
        return
    assert (file.size, file.hub_name) == (model.size, str(model.weights))
    comment = f"# Published weights of {file.gigabytes}, downloaded from the Hugging Face Hub once"
    assert comment in text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            f"models/{FINCH_3B}",
            f"there is no models/{FINCH_3B} (6.2 GB); name it on the hub, BlinkDL/rwkv-6-world:{FINCH_3B}, and it is "
            "downloaded once",
        ),
        ("mine.pth", "there is no mine.pth; train it, download it (docs/models.md), or name another file"),
        ("m/RWKV-5-World-0.1B-v1-20230803-ctx4096.pth", "ctx4096.pth, and by its name it is RWKV-5.0 or 5.1; infctx"),
        ("m/rwkv7a-g1b-0.1b.pth", "by its name it is RWKV-7a or 7b (DeepEmbed); infctx reads the files in docs/models"),
        ("RWKV7b-mine.pth", "by its name it is RWKV-7a or 7b"),
    ],
)
def test_the_message_for_a_missing_file(path, expected):
    assert expected in missing_weights(Path(path))
    assert missing_weights(Path(path)).startswith(f"there is no {path}")


def test_a_stopped_download_is_recognized_by_its_size(tmp_path):
    path = tmp_path / FINCH_3B
    refuse_stopped_download(path)
    with path.open("wb") as file:
        file.truncate(6_199_859_158)  # takes no room on disk
    refuse_stopped_download(path)
    with path.open("wb") as file:
        file.truncate(3_000_000_000)
    with pytest.raises(InputError) as caught:
        refuse_stopped_download(path)
    assert caught.value.lines == [
        f"{path}: has 3,000,000,000 bytes, the published file 6,199,859,158; get it again, or, if it is a file of your "
        "own, rename it",
        f"  hf download BlinkDL/rwkv-6-world {FINCH_3B} --local-dir {tmp_path}",
    ]
    refuse_stopped_download(path.rename(tmp_path / "mine.pth"))

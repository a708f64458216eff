"""Files from a hub of the tests' own, which speaks the real protocol: kept, resumed, checked; and what can go wrong."""

import errno
import hashlib
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from infctx.errors import InputError
from infctx.hub import files
from infctx.hub.files import HubFile, cached, download

from hub_server import COMMIT, environment
from runs import infctx_command

REPOSITORY = "some-owner/some.models"
FILE = HubFile(REPOSITORY, "weights/a b.pth")
CONTENT = random.Random(1).randbytes(300_001)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """huggingface_hub sleeps between its tries, and forgets what it has of a block when a connection breaks."""
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)


@pytest.fixture
def served(hub):
    hub.add(REPOSITORY, FILE.path, CONTENT)
    return hub


def refused(file=FILE):
    with pytest.raises(InputError) as caught:
        download(file)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{file}: ")
    return lines[0].removeprefix(f"{file}: "), lines[1:]


def incomplete():
    return list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


@pytest.mark.parametrize("lfs", [True, False])
def test_a_file_is_downloaded_once_and_then_found_without_the_network(hub, lfs):
    hub.add(REPOSITORY, FILE.path, CONTENT, lfs=lfs)
    assert cached(FILE) is None
    path = download(FILE)
    assert path.read_bytes() == CONTENT and path.name == "a b.pth" and COMMIT in path.parts
    asked = len(hub.requests)
    assert download(FILE) == cached(FILE) == path
    assert len(hub.requests) == asked
    assert download(FILE._replace(revision=COMMIT)) == path
    assert not incomplete()


def test_the_token_goes_to_the_hub_and_not_to_where_it_leads(served, monkeypatch):
    served.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert download(FILE).read_bytes() == CONTENT  # the server refuses a token at /cdn/


def test_a_broken_connection_is_taken_up_where_it_broke(served):
    served.break_connections(after=100_000, times=2)
    assert download(FILE).read_bytes() == CONTENT
    ranges = [headers.get("Range") for method, path, headers in served.requests if path.startswith("/cdn/")]
    assert ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_another_process_continues_where_one_was_stopped(served, monkeypatch):
    served.break_connections(after=0)

    def killed(*arguments, **options):
        arguments[1].write(CONTENT[:123_456])
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(files, "http_get", killed)
        with pytest.raises(KeyboardInterrupt):
            download(FILE)
    (beginning,) = incomplete()
    assert beginning.stat().st_size == 123_456
    said, _ = refused()
    assert said.startswith("the connection broke after 123,456 bytes of 300,001 bytes (")
    assert said.endswith("; run the same command again: it continues from there")
    served.break_connections(after=None)
    served.requests.clear()
    assert download(FILE).read_bytes() == CONTENT
    assert [headers.get("Range") for _, path, headers in served.requests if "/cdn/" in path] == ["bytes=123456-"]
    assert not incomplete()


@pytest.mark.parametrize("lfs", [True, False])
def test_a_damaged_file_never_gets_into_the_cache(hub, lfs, monkeypatch):
    hub.add(REPOSITORY, FILE.path, CONTENT, lfs=lfs)
    hub.damage = True
    said, _ = refused()
    given = hashlib.sha256(CONTENT).hexdigest() if lfs else hashlib.sha1(b"blob 300001\0" + CONTENT).hexdigest()
    assert said.startswith("was damaged on the way, so it is removed: its SHA-") and given[:12] in said
    assert cached(FILE) is None and not incomplete()
    hub.damage = False
    assert download(FILE).read_bytes() == CONTENT


def test_many_that_ask_at_once_download_it_once(served):
    found = []
    threads = [threading.Thread(target=lambda: found.append(download(FILE))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5 and len(set(found)) == 1
    assert served.downloads() == {"a b.pth": 1}


WRONG = {
    "no repository": (
        lambda hub: hub.files.clear(),
        f"the hub has no {REPOSITORY} that you may read; check the name, or if it is private give a token: "
        "`hf auth login`, or HF_TOKEN",
    ),
    "a gated repository": (
        lambda hub: hub.gated.add(REPOSITORY),
        f"{REPOSITORY} has conditions of use; accept them on its page on the hub, then give your token: "
        "`hf auth login`, or HF_TOKEN",
    ),
    "not allowed": (
        lambda hub: hub.refusals.append((403, {"X-Error-Message": "Your token may not read this"})),
        "the hub refuses access (Your token may not read this); give another token: `hf auth login`, or HF_TOKEN",
    ),
    "too many requests": (
        lambda hub: hub.refusals.extend([(429, {"Retry-After": "7"})] * 9),
        "the hub has had too many requests from here; try again in 7 seconds, or give a token, which may ask more "
        "often: `hf auth login`, or HF_TOKEN",
    ),
    "a hub in trouble": (
        lambda hub: hub.refusals.extend([(503, {})] * 9),
        "the hub answers with error 503; try again in a few minutes",
    ),
    "another server": (
        lambda hub: setattr(hub, "is_the_hub", False),
        "ENDPOINT answers, but not as the hub does; check HF_ENDPOINT",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_go_wrong_is_one_line(served, name):
    wrong, expected = WRONG[name]
    wrong(served)
    assert refused() == (expected.replace("ENDPOINT answers", f"{served.endpoint} answers"), [])


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(served):
    served.refusals += [(429, {"Retry-After": "0"}), (503, {})]
    assert download(FILE).read_bytes() == CONTENT


def test_a_wrong_token(served, monkeypatch):
    served.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refused() == ("the hub does not know the token; give another: `hf auth login`, or HF_TOKEN", [])


def test_a_wrong_revision(served):
    said, _ = refused(FILE._replace(revision="v9"))
    assert said == f"{REPOSITORY} has no such revision; check what follows @, or leave it out"


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "127.0.0.1:9", "http://nowhere.invalid"])
def test_no_connection(served, monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    said, _ = refused()
    assert said.startswith(f"no connection to {endpoint} (")
    assert said.endswith("); check HF_ENDPOINT, or name a file here")


def test_offline(served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = constants.HF_HUB_CACHE
    assert refused() == (
        f"is not in the cache ({cache}), and HF_HUB_OFFLINE is set; unset it, or copy that cache here",
        [],
    )
    assert served.requests == []


def test_a_full_disk(served, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    with monkeypatch.context() as small:
        small.setattr(files.shutil, "disk_usage", lambda path: usage)
        said, _ = refused()
    assert said.startswith(
        f"needs 300,001 bytes on the disk of {constants.HF_HUB_CACHE}, and 1,000 bytes is free; make "
    )

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "http_get", full)
    said, _ = refused()
    assert said == f"the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HOME to a folder elsewhere"


def test_the_variables_of_huggingface_hub_count(served, tmp_path):
    """As a user sets them, in a separate process: endpoint, cache, token and offline mode."""
    served.add("who/texts", "train.jsonl", json.dumps({"text": "two\n\nlines"}), kind="datasets")
    served.token = "hf_secret"
    prepare = ["prepare", "hf:who/texts", "--tokenizer", "bytes", "--output"]

    def run(output, **variables):
        variables = os.environ | environment(served, tmp_path / "home") | variables
        code, _, errors = infctx_command(*prepare, tmp_path / output, env=variables)
        return code, errors

    code, errors = run("a", HF_TOKEN="hf_secret")
    assert code == 0, errors
    assert list((tmp_path / "home" / "hub").glob("datasets--who--texts/snapshots/*/train.jsonl"))
    code, errors = run("b", HF_HUB_OFFLINE="1")
    assert (
        code == 0 and "hf:who/texts: HF_HUB_OFFLINE is set, so only what the cache has of it is read: 1 file" in errors
    )
    assert (tmp_path / "b" / "train.bin").read_bytes() == (tmp_path / "a" / "train.bin").read_bytes()

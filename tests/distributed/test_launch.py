"""The launcher, with small programs as ranks: how it starts them, and that every way to end ends all of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from infctx.distributed.launch import launch
from infctx.environment import is_rank

from places import ROOT

LAUNCHER = "import sys; from infctx.distributed.launch import launch; sys.exit(launch([], {count}, program={program}))"
SAYS = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def say(*words):
    os.write(1, " ".join(map(str, (f"{rank}:", *words))).encode() + b"\\n")  # in one write
"""
STEPS = """
def handle(number, frame):
    say(signal.Signals(number).name)
signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
say("ready", os.getpid())
"""
SLEEPS = "say('ready', os.getpid())\ntime.sleep(100)"


@pytest.fixture
def start_launcher():
    """Starts a launcher of ranks that run SAYS and the given lines; it is killed after the test."""
    launchers = []

    def start(count, lines):
        program = [sys.executable, "-c", SAYS + lines]
        command = [sys.executable, "-c", LAUNCHER.format(count=count, program=program)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        launchers.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.communicate()


def await_ready(launcher, count):
    """Returns the process IDs of the ranks once each has printed that it is ready."""
    said = [launcher.stdout.readline().split() for _ in range(count)]
    assert [words[1] for words in said] == ["ready"] * count, launcher.stderr.read()
    return {int(words[0][:-1]): int(words[2]) for words in said}


def finish(launcher):
    output, errors = launcher.communicate(timeout=30)
    return launcher.returncode, sorted(output.splitlines()), errors.splitlines()


def have_ended(process_ids):
    """Returns whether the processes are gone within a few seconds; a zombie counts as gone."""
    deadline = time.monotonic() + 5
    while alive := [each for each in process_ids if _status(each) not in ("", "Z")]:
        if time.monotonic() > deadline:
            return not alive
        time.sleep(0.05)
    return True


def _status(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as line:
            return line.read().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_what_a_rank_is_started_with(tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setenv("RANK", "7")  # set for something else
    lines = """
import json, os, sys
from pathlib import Path
about = {"words": sys.argv[2:], "input": sys.stdin.read(), "leads": os.getsid(0) == os.getpid()}
about["env"] = dict(os.environ)
Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(about))
"""
    assert launch([str(tmp_path), "a b", "c=d"], 3, program=(sys.executable, "-c", lines)) == 0
    about = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert all((each["words"], each["input"], each["leads"]) == (["a b", "c=d"], "", True) for each in about)
    same = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "KEPT": "yes"}
    same |= {"INFCTX_LAUNCHER": str(os.getpid()), "MASTER_PORT": about[0]["env"]["MASTER_PORT"]}
    for rank, each in enumerate(about):
        assert each["env"].items() >= (same | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items()
    assert 1024 <= int(same["MASTER_PORT"]) < 65536


def test_all_done_is_0(start_launcher):
    assert finish(start_launcher(3, "time.sleep(rank / 2)\nsay('done')")) == (0, ["0: done", "1: done", "2: done"], [])


def test_a_rank_that_fails_ends_the_others_soon(start_launcher):
    began = time.monotonic()
    lines = "if rank == 1: say('no such file'); sys.exit(2)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code, said, errors = finish(start_launcher(3, lines + SLEEPS))
    assert time.monotonic() - began < 6
    assert (code, errors) == (2, [])
    assert [line for line in said if "ready" not in line] == ["1: no such file"]
    assert have_ended([line.split()[2] for line in said if "ready" in line])


def test_what_a_rank_has_started_is_killed_with_it(start_launcher):
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '100'])\nsay('ready', child.pid)\n"
    launcher = start_launcher(2, child + "if rank == 1: time.sleep(1); child.kill(); sys.exit(1)\ntime.sleep(100)")
    children = await_ready(launcher, 2)
    assert finish(launcher)[0] == 1
    assert have_ended(children.values())


def test_others_may_name_a_rank_that_a_signal_killed(start_launcher):
    lines = "if rank == 1: say('ready', os.getpid()); time.sleep(100)\nsay('ready', os.getpid())\n"
    launcher = start_launcher(2, lines + "time.sleep(2); say('rank 1 is gone'); sys.exit(1)")
    os.kill(await_ready(launcher, 2)[1], signal.SIGKILL)
    assert finish(launcher) == (1, ["0: rank 1 is gone"], [])


@pytest.mark.parametrize("all_die", [True, False])
def test_the_launcher_reports_what_no_rank_can(all_die, capfd, tmp_path):
    lines = f"import os, time\nif os.environ['RANK'] == '1' or {all_die}: os.kill(os.getpid(), 11)\ntime.sleep(100)"
    began = time.monotonic()
    assert launch([], 2, program=(sys.executable, "-c", lines), watch_seconds=2.0) == 1
    assert time.monotonic() - began > (0 if all_die else 2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.match(f"infctx: rank {'[01]' if all_die else 1} was killed by SIGSEGV; run the same", lines[0])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_request_to_stop_reaches_every_rank_once(start_launcher, name):
    launcher = start_launcher(3, STEPS + "time.sleep(2)\nsay('saved')")
    await_ready(launcher, 3)
    launcher.send_signal(getattr(signal, name))
    said = sorted(f"{rank}: {word}" for rank in range(3) for word in ("SIGTERM", "saved"))
    assert finish(launcher) == (0, said, [])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_request_kills(start_launcher, name, code):
    launcher = start_launcher(2, STEPS + "for _ in range(100): time.sleep(1)")
    ranks = await_ready(launcher, 2)
    launcher.send_signal(getattr(signal, name))
    assert sorted(launcher.stdout.readline() for _ in range(2)) == ["0: SIGTERM\n", "1: SIGTERM\n"]
    launcher.send_signal(getattr(signal, name))
    began = time.monotonic()
    assert finish(launcher) == (code, [], ["infctx: interrupted"])
    assert time.monotonic() - began < 3
    assert have_ended(ranks.values())


def test_a_request_before_the_ranks_can_save_ends_them(start_launcher):
    launcher = start_launcher(2, "if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPS)
    await_ready(launcher, 2)
    launcher.terminate()
    assert finish(launcher) == (143, [], ["infctx: interrupted"])


WATCHED = """
import torch.distributed as dist
from infctx.distributed.beats import open_watch_store
from infctx.distributed.watchdog import Watchdog, Patience
dist.init_process_group("gloo")
store = open_watch_store(rank, 2)
watchdog = Watchdog(rank, 2, store, describe_remedy=lambda: "Run it again", patience=Patience(beat=0.2, silent=10.0))
watchdog.start()
watchdog.mark(3, 1, "forward")
time.sleep(1)
say("ready", os.getpid())
time.sleep(100)
"""


def test_ranks_end_with_their_launcher(start_launcher):
    launcher = start_launcher(2, WATCHED)
    ranks = await_ready(launcher, 2)
    launcher.kill()
    assert finish(launcher)[1:] == ([], [])  # and nobody holds the pipes anymore
    assert have_ended(ranks.values())


def test_a_rank_that_is_killed_is_named_by_its_watchdogs_alone(start_launcher):
    launcher = start_launcher(2, WATCHED)
    os.kill(await_ready(launcher, 2)[1], signal.SIGKILL)
    code, said, errors = finish(launcher)
    assert (code, said, len(errors)) == (1, [], 1)
    assert "is gone: last seen in step 3, segment 1 (forward). Run it again" in errors[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, False),
    ],
)
def test_who_is_a_rank(monkeypatch, environment, expected):
    for name in ("LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_rank() is expected

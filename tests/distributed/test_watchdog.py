"""The watchdog, in real processes: a rank that dies, stops or fails is named in one line, and all ranks end."""

import os
import re
import signal
import socket
import time

import pytest

from forked import Forked, run_script
from places import ROOT

RANK = """
import os, sys, time
import torch
import torch.distributed as dist
from infctx.distributed.beats import open_watch_store
from infctx.distributed.watchdog import Patience, Watchdog

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
store = open_watch_store(rank, world_size)
seconds = dict(beat=0.1, silent=3.0, lost=1.0, stall=100.0, linger=0.7) | eval(os.environ.get("SECONDS", "{}"))

def work(step, segment, doing):
    watchdog.mark(step, segment, doing)
    time.sleep(0.5)
    print("ready", flush=True)

def collective():
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError:
        watchdog.await_verdict(30)
    print("nobody was gone", flush=True)

def done():
    watchdog.leave(None)
    watchdog.close()
    print("done", time.time(), flush=True)

watchdog = Watchdog(rank, world_size, store, describe_remedy=lambda: "Run it again", patience=Patience(**seconds))
if os.environ["RANK"] != os.environ.get("ABSENT"):
    watchdog.start()
"""
"""A rank runs this before the lines of its test: `work` reports that it is ready, `collective` waits for all ranks."""

ENDS = "work(12, 3, 'backward')\nif rank == GONE: time.sleep(100)\ncollective()"


@pytest.fixture
def start_ranks(tmp_path):
    """Starts ranks that run RANK and the given lines; those still running after the test are killed."""
    ranks = []

    def start(world_size, lines, **environment):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        common |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)} | environment
        for rank in range(world_size):
            ranks.append(Forked(run_script, RANK + lines, env=common | {"RANK": str(rank)}))
        return ranks

    yield start
    for rank in ranks:
        rank.kill()
        rank.communicate()


def await_ready(ranks):
    for rank in ranks:
        line = rank.stdout.readline()
        assert line == "ready\n", line or rank.stderr.read()


def resume(*ranks):
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()


def finish(ranks):
    """Returns how the ranks ended: exit codes, infctx's lines with the rank that printed each, all standard output."""
    ends = [rank.communicate(timeout=30) for rank in ranks]
    said = [(rank, line) for rank, (_, errors) in enumerate(ends) for line in errors.splitlines() if "infctx: " in line]
    assert "Traceback" not in "".join(errors for _, errors in ends), ends
    return [rank.returncode for rank in ranks], said, [output for output, _ in ends]


def here(line):
    return line.replace("HERE", socket.gethostname())


@pytest.mark.parametrize(("world_size", "gone", "speaker"), [(2, 1, 0), (3, 2, 0), (3, 0, 1)])
def test_a_rank_that_is_killed_is_named_once_and_all_end(start_ranks, world_size, gone, speaker):
    ranks = start_ranks(world_size, ENDS.replace("GONE", str(gone)))
    await_ready(ranks)
    ranks[gone].kill()
    began = time.monotonic()
    codes, said, outputs = finish(ranks)
    assert time.monotonic() - began < 8
    assert codes == [-signal.SIGKILL if rank == gone else 1 for rank in range(world_size)]
    line = f"infctx: rank {gone} (HERE) is gone: last seen in step 12, segment 3 (backward). Run it again"
    assert said == [(speaker, here(line))]
    assert outputs == [""] * world_size


@pytest.mark.parametrize("gone", [1, 0])
def test_a_rank_that_is_stopped_is_named_while_the_others_hang_in_a_collective(start_ranks, gone):
    ranks = start_ranks(3, ENDS.replace("GONE", str(gone)))
    await_ready(ranks)
    ranks[gone].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    codes, said, _ = finish([rank for number, rank in enumerate(ranks) if number != gone])
    assert 3 < time.monotonic() - began < 12
    assert codes == [1, 1]
    line = f"infctx: rank {gone} (HERE) is gone: last seen in step 12, segment 3 (backward). Run it again"
    assert said == [(0, here(line))]


def test_a_machine_that_is_gone_with_the_store_is_named_by_the_lowest_rank_left(start_ranks):
    ranks = start_ranks(4, "work(1, 0, 'forward')\ntime.sleep(100)")
    await_ready(ranks)
    for rank in ranks[:2]:
        rank.kill()
    codes, said, _ = finish(ranks)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 1, 1]
    assert said == [(2, here("infctx: rank 0 (HERE) is gone: last seen in step 1, segment 0 (forward). Run it again"))]


def test_ranks_that_are_gone_together_are_named_together(start_ranks):
    ranks = start_ranks(3, "work(1, None, 'checkpoint')\ntime.sleep(100)")
    await_ready(ranks)
    for rank in ranks[1:]:
        rank.send_signal(signal.SIGSTOP)
    codes, said, _ = finish(ranks[:1])
    assert codes == [1]
    (line,) = [line for _, line in said]
    assert re.sub(r"rank ([12])", "rank N", line) == here(
        "infctx: rank N (HERE) is gone: last seen in step 1 (checkpoint); with it: rank N. Run it again"
    )


@pytest.mark.parametrize(("failed", "speaker"), [(1, 0), (0, 1)])
def test_a_rank_that_fails_is_named_immediately_with_its_reason(start_ranks, failed, speaker):
    lines = f"""
work(12, 3, "backward")
if rank == {failed}:
    sys.stdin.readline()
    said = watchdog.leave("no room\\n  on the disk.")
    watchdog.close()
    sys.exit(5 if said else 6)
time.sleep(100)
"""
    ranks = start_ranks(3, lines)
    await_ready(ranks)
    began = time.monotonic()
    resume(ranks[failed])
    codes, said, _ = finish(ranks)
    assert time.monotonic() - began < 3
    assert codes == [5 if rank == failed else 1 for rank in range(3)]
    line = f"infctx: rank {failed} (HERE) failed in step 12, segment 3 (backward): no room on the disk. Run it again"
    assert said == [(speaker, here(line))]


def test_if_all_ranks_fail_each_reports_for_itself(start_ranks):
    ranks = start_ranks(2, "dist.barrier()\nsaid = watchdog.leave('no room')\nwatchdog.close()\nsys.exit(6)")
    codes, said, _ = finish(ranks)
    # one may see the other's failure first
    assert (codes, said) in [([6, 6], []), ([6, 1], said[:1]), ([1, 6], said[:1])]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_that_are_done_may_end_in_any_order(start_ranks, order):
    lines = f"work(1, 0, 'step')\ntime.sleep(1.5 * {order}.index(rank))\ndone()"
    ranks = start_ranks(3, lines)
    await_ready(ranks)
    codes, said, outputs = finish(ranks)
    assert (codes, said) == ([0, 0, 0], [])
    ends = [float(output.split()[1]) for output in outputs]
    assert ends[0] > max(ends) - 0.3  # rank 0 keeps the store for the others
    others = sorted((1, 2), key=order.index)
    assert ends[others[1]] - ends[others[0]] > 1  # they wait for nobody


def test_a_rank_that_dies_while_rank_0_is_done_is_named(start_ranks):
    ranks = start_ranks(2, "work(7, 0, 'step')\nif rank == 0: done()\ntime.sleep(100)")
    await_ready(ranks)
    ranks[1].kill()
    codes, said, _ = finish(ranks)
    assert codes == [1, -signal.SIGKILL]
    assert said == [(0, here("infctx: rank 1 (HERE) is gone: last seen in step 7, segment 0 (step). Run it again"))]


def test_a_rank_that_never_comes_is_named(start_ranks):
    ranks = start_ranks(2, "time.sleep(100)", ABSENT="1")
    codes, said, _ = finish(ranks[:1])
    assert (codes, said) == ([1], [(0, "infctx: rank 1 is gone: it never reported. Run it again")])


def test_a_stall_names_the_slowest_rank(start_ranks):
    lines = """
for segment in range(5 if rank == 1 else 6):
    watchdog.mark(12, segment, "forward")
print("ready", flush=True)
sys.stdin.readline()
watchdog.mark(12, 5, "forward")
sys.stdin.readline()
done()
"""
    ranks = start_ranks(3, lines, SECONDS="dict(stall=1.0)")
    await_ready(ranks)
    behind = ranks[0].stderr.readline()
    assert behind == here(
        "no progress for 1 seconds; rank 1 (HERE) is furthest behind: step 12, segment 4 (forward); "
        "the others are in step 12, segment 5\n"
    )
    assert "no progress for 2 seconds; rank 1" in ranks[0].stderr.readline()
    resume(ranks[1])
    assert ranks[0].stderr.readline() == "no progress for 1 seconds; every rank is in step 12, segment 5 (forward)\n"
    resume(ranks[0], ranks[2], *ranks)
    codes, said, _ = finish(ranks)
    assert (codes, said) == ([0, 0, 0], [])


def test_a_rank_that_is_busy_and_a_machine_that_slept_are_not_gone(start_ranks):
    lines = """
work(1, 0, "forward")
if rank == 1:
    began = time.time()
    sum(range(60_000_000))  # holds the GIL
    assert time.time() - began > 0.6, "too short to prove anything"
print("ready", flush=True)
sys.stdin.readline()
done()
"""
    ranks = start_ranks(2, lines)
    await_ready(ranks)
    await_ready(ranks)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(4)
    resume(*ranks)
    codes, said, _ = finish(ranks)
    assert (codes, said) == ([0, 0], [])


def test_a_remedy_that_hangs_does_not_hold_up_the_end(start_ranks):
    lines = "watchdog.describe_remedy = lambda: time.sleep(100)\nwork(1, 0, 'forward')\ntime.sleep(100)"
    ranks = start_ranks(2, lines)
    await_ready(ranks)
    ranks[1].kill()
    codes, said, _ = finish(ranks)
    assert codes == [1, -signal.SIGKILL]
    assert "The run ends here" in said[0][1]

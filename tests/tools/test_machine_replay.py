"""The replay of machine code: on a few instructions whose cycles are known, and on the real kernels of small heads."""

import re

import pytest

from infctx.cuda.wkv_time import Processors

import machine_code
from machine_replay import BARRIER_LATENCY, LATENCIES, Warp, estimate, loops_of, parse, replay, turn


def encoded(stall, write_board=7, read_board=7, waits=0):
    return f"/* 0x{(stall | 1 << 4 | write_board << 5 | read_board << 8 | waits << 11) << 41:016x} */"


def listing(*lines):
    """Returns nvdisasm's text of a kernel `k`, from (instruction, control code) and labels."""
    text, address = ".text.k:\n", 0
    for line in lines:
        if isinstance(line, str):
            text += f"{line}:\n"
        else:
            text += f"        /*{address:04x}*/  {line[0]} ;  /* 0x0 */\n    {line[1]}\n"
            address += 16
    return parse(text)["k"]


def loop(*body):
    return listing(".L_x_1", *body, ("@P0 BRA `(.L_x_1)", encoded(1)), ("EXIT", encoded(1)))


def test_a_load_and_its_use_wait_for_each_other():
    code = loop(("LDS R1, [R2]", encoded(2, write_board=0)), ("FADD R2, R1, R1", encoded(5, waits=1)))
    (only,) = loops_of(code)
    path = turn(code, only)
    assert only == (0, 2) and path == [0, 1, 2] and code[0].write_board == 0 and code[1].waits == 1
    one = replay([[Warp(code, path)]])
    assert one == LATENCIES["LDS"] + 5 + 1
    two = replay([[Warp(code, path)], [Warp(code, path)]])
    assert one <= two < 1.2 * one  # the other block's wait is used


def test_copies_are_waited_for_by_group():
    body = [("LDGSTS [R1], [R2]", encoded(1)), ("LDGDEPBAR", encoded(1, write_board=0))]
    for allowed, cycles in ((0, LATENCIES["LDGSTS"]), (1, LATENCIES["LDGSTS"] / 2)):
        code = loop(*body, (f"DEPBAR.LE SB0, 0x{allowed}", encoded(1)))
        assert replay([[Warp(code, turn(code, loops_of(code)[0]))]], turns=24) == pytest.approx(cycles, rel=0.1)


def test_issue_and_the_tensor_pipe_bind():
    code = loop(*[("HMMA.1688.F32.TF32 R4, R8, R2, R4", encoded(1))] * 20)
    path = turn(code, loops_of(code)[0])
    assert replay([[Warp(code, path)]]) == pytest.approx(20 * 6.4, rel=0.05)
    assert replay([[Warp(code, path)], [Warp(code, path)]]) == pytest.approx(2 * 20 * 6.4, rel=0.05)


def test_parts_where_documents_start_are_passed_over():
    guarded = ("LDG.E.U8 R4, [R4]", encoded(1)), ("ISETP.NE.AND P2, PT, R4, RZ, PT", encoded(1))
    code = loop(*guarded, ("@!P2 BRA `(.L_x_2)", encoded(1)), ("FADD R1, R1, R1", encoded(1)), ".L_x_2")
    assert turn(code, loops_of(code)[0]) == [0, 1, 2, 4]
    code = loop(("@!P2 BRA `(.L_x_2)", encoded(1)), ("FADD R1, R1, R1", encoded(1)), ".L_x_2")
    assert turn(code, loops_of(code)[0]) == [0, 1, 2]


def test_the_slower_role_sets_the_pace_at_barriers():
    def role(number):
        return loop(*[("FADD R1, R1, R1", encoded(4))] * number, ("BAR.SYNC 0x0", encoded(1)))

    codes = [role(10), role(100)]
    warps = [Warp(code, turn(code, loops_of(code)[0])) for code in codes]
    assert replay([warps]) == pytest.approx(402 + BARRIER_LATENCY, rel=0.02)


@pytest.mark.parametrize("kernel, size", [("wkv_forward", "16"), ("wkv_backward", "64")])
def test_real_kernels(kernel, size, capsys, monkeypatch):
    monkeypatch.setattr(machine_code, "H100", Processors(132))  # few blocks have room: less to replay
    assert machine_code.main([f"{kernel}.cu", "--head-size", size, "--replay"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 and rows[0][0] == f"`{kernel}`"
    for name, instructions, products, issue, cycles in rows:
        counts = [[float(x.replace(",", "")) for x in re.split(r" \+ |, ", cell)] for cell in (instructions, products)]
        assert len(counts[0]) == {"`wkv_backward`": 4, "`wkv_forward`": 2}.get(name, 1)
        assert all(100 < count < 5000 for count in counts[0]) and all(count >= 8 for count in counts[1])
        times = [float(x.replace(",", "")) for x in cycles.split(", ")]
        assert float(issue.replace(",", "")) < times[0] <= times[-1] <= 1.1 * len(times) * times[0]


def test_code_without_a_loop_of_chunks():
    assert estimate(listing(("EXIT", encoded(1))), 4, 1, 4) is None

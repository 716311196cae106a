"""The cross-compiler's check: it lists every argument, fails where a kernel must not ship, and reads machine code."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from tools.check_kernels import __main__ as command
from tools.check_kernels import assemblers
from tools.check_kernels.allowed import ALLOWED, Allowed
from tools.check_kernels.case import Case, merged, telling
from tools.check_kernels.chips import CHIPS, resident_blocks
from tools.check_kernels.compiled import CASES, Compiled, cases_of, compile_all
from tools.check_kernels.sass import count_instructions
from tools.check_kernels.verdict import by_assembler, verdict

# What one process has run and these tests look at is not run by another.
pytestmark = pytest.mark.triton
# Most are unfit for sm_90, each in its own way. One warp holds 32 x 255 values; a 16-row tile
# is too short for HGMMA; five stages of 64 KB are more than 227 KB; nothing is called tl.nothing.
UNFIT = """
import os

import triton
import triton.language as tl

from tools.check_kernels.case import Case


@triton.jit
def normalise(x, y, COLUMNS: tl.constexpr, POWER_OF: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    value = tl.load(x + column)
    value = tl.exp2(value) if POWER_OF == "two" else tl.exp(value)
    tl.store(y + column, value / tl.sum(value))


@triton.jit
def multiply(a, b, c, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        total = tl.dot(tl.load(a + row * inner + k[None, :]), tl.load(b + k[:, None] * COLUMNS + column), total)
    tl.store(c + row * COLUMNS + column, total)


@triton.jit
def broken(x):
    tl.store(x, tl.nothing(x))


@triton.jit
def reverse_in_place(x, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(x + place, 2.0 * tl.load(x + place))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + place, tl.load(x + SIZE - 1 - place))


@triton.jit
def add_up(x, sums, rows, BARRIER: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr):
    for row in range(rows):
        if BARRIER:
            tl.debug_barrier()
        for chunk in range(CHUNKS):
            place = chunk * SIZE + tl.arange(0, SIZE)
            for part in tl.static_range(2):
                sum = sums + part * CHUNKS * SIZE + place
                tl.store(sum, tl.load(sum) + tl.load(x + row * CHUNKS * SIZE + place))


@triton.jit
def halve(x, chunks, PASSES: tl.constexpr, SIZE: tl.constexpr):
    for part in tl.static_range(PASSES):
        for chunk in tl.range(chunks, loop_unroll_factor=2):
            place = chunk * SIZE + tl.arange(0, SIZE)
            tl.store(x + place, 0.5 * tl.load(x + place))


class Fatal(dict):
    def __getitem__(self, name):
        os._exit(1)


def product(rows, inner):
    blocks = {"ROWS": rows, "COLUMNS": 128, "INNER": inner}
    return {**dict.fromkeys("abc", "*fp16:16"), "inner": "i32:16", **blocks}


def cases(every):
    for name, columns, warps in (("fits", 1024, 4), ("spills", 8192, 1)):
        arguments = {"x": "*fp32:16", "y": "*fp32:16", "COLUMNS": columns, "POWER_OF": "two"}
        yield Case(f"normalise {name}", normalise, arguments, warps)
    for name, rows, inner, stages in (("fits", 64, 64, 3), ("short", 16, 32, 3), ("staged", 128, 128, 5)):
        yield Case(f"multiply {name}", multiply, product(rows, inner), 4, stages, matrix=True)
    yield Case("broken", broken, {"x": "*fp32"}, 4)
    for barrier in (False, True):
        name = "with" if barrier else "without"
        settings = {"BARRIER": barrier, "SIZE": 256}
        yield Case(f"reverse {name} barrier", reverse_in_place, {"x": "*fp32:16", **settings}, 4)
        sums = {"x": "*fp32:16", "sums": "*fp32:16", "rows": "i32", "CHUNKS": 8}
        yield Case(f"add {name} barrier", add_up, {**sums, **settings}, 4)
    for passes, name in ((1, "halve"), (2, "quarter")):
        arguments = {"x": "*fp32:16", "chunks": "i32", "PASSES": passes, "SIZE": 256}
        yield Case(f"{name} unrolled", halve, arguments, 4)
    yield Case("fatal", broken, Fatal(x="*fp32"), 4)
    yield Case("after fatal", normalise, {"x": "*fp32", "y": "*fp32", "COLUMNS": 1024, "POWER_OF": "two"}, 4)


ALL = (cases,)
"""
SHARED = "expected at most 232448 bytes of shared memory, got "
# The case, the kind of its fault, how the explanation begins.
FAULTS = [
    ("normalise spills", "spill", "spills: "),
    ("multiply short", "tensor", "multiplies matrices, but without HGMMA"),
    ("multiply staged", "shared", SHARED),
    ("broken", "error", "does not compile: CompilationError"),
    ("reverse without barrier", "barrier", "loads what it stored without a barrier between: x"),
    ("add without barrier", "barrier", "loads what it stored without a barrier between: sums"),
    ("quarter unrolled", "barrier", "loads what it stored without a barrier between: x"),
    ("fatal", "error", "does not compile: the compiler ended its process"),
]


@pytest.fixture(scope="module")
def unfit(tmp_path_factory):
    """The module of UNFIT, importable, and an empty cache; workers inherit both."""
    folder = tmp_path_factory.mktemp("unfit")
    (folder / "unfit_cases.py").write_text(UNFIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.setenv("TRITON_INTERPRET", "1")
        yield folder


@pytest.fixture(scope="module")
def rows(unfit):
    """By Triton's own assembler and, the second list, by the other."""
    found = compile_all("unfit_cases", capabilities=(90,), workers=1)
    own = str(assemblers.own(90))
    return [row for row in found if row.assembler in ("", own)], [
        row for row in found if row.assembler not in ("", own)
    ]


def test_every_unfit_kernel_is_found(rows):
    own, other = rows
    names = ("normalise fits", "normalise spills", "multiply fits", "multiply short", "multiply staged")
    barriers = (f"{name} {kind} barrier" for kind in ("without", "with") for name in ("reverse", "add"))
    assert [row.name for row in own] == [
        *names, "broken", *barriers, "halve unrolled", "quarter unrolled", "fatal", "after fatal",
    ]  # fmt: skip
    for made in (own, other) if other else (own,):
        found = [(row.name, *fault) for row in made for fault in row.faults.items()]
        expected = [fault for fault in FAULTS if made is own or fault[1] != "error"]
        assert [fault[:2] for fault in found] == [fault[:2] for fault in expected]
        for (_, _, text), (_, _, start) in zip(found, expected, strict=True):
            assert text.startswith(start)


def test_machine_code_is_read(rows):
    # 1,024 floats in 128 threads are 8 a thread, two 16-byte loads where the address is known to be aligned.
    first, *others = filter(None, rows)
    assert all(made[2].instructions["HGMMA"] > 0 for made in others)
    assert not any(made[k].instructions for made in others for k in (0, 1, -1))
    fits, product, unaligned = (first[k].instructions for k in (0, 2, -1))
    assert (fits["LDG.128"], fits["STG.128"], unaligned["LDG.32"], unaligned["STG.32"]) == (2, 2, 8, 8)
    assert fits["MUFU"] >= 8
    assert product["HGMMA"] > 0
    assert product["LDGSTS.128"] > 0
    assert first[1].instructions["STL"] > 0


def test_a_second_run_compiles_nothing(unfit, rows, monkeypatch, capsys):
    def cached():
        return {path: path.stat().st_mtime_ns for path in (unfit / "cache").rglob("*") if path.is_file()}

    before = cached()
    words = ["check_kernels", "--cases", "unfit_cases", "--capabilities", "90", "--only", "normalise,multiply"]
    monkeypatch.setattr(sys, "argv", [*words, "--workers", "1", "--json", str(unfit / "rows.json")])
    assert command.main() == 1
    assert cached() == before
    written = json.loads((unfit / "rows.json").read_text())
    first = {(row.name, row.assembler): row for made in rows for row in made}
    for record in written:
        row = first[record["name"], record["assembler"]]
        assert record.pop("seconds") < row.seconds
        assert record.items() < row.record().items()
    printed = capsys.readouterr().out
    made = assemblers.of(90, every=True)
    assert f"{5 * len(made)} compilations" in printed
    for assembler in made:
        assert f"{assembler}: 5 kernels of sm_90; 1 spill, 0 wait for each wgmma, 0 with hazards" in printed
        assert f"normalise spills, sm_90, {assembler.name}: spills: " in printed
    # What is not an assembler's is one line.
    assert f"{2 + len(made)} failures" in printed
    for name, _, text in FAULTS[1:3]:
        assert printed.count(f"{name}, sm_90: {text}") == 1


def test_no_kernel_of_that_name(unfit):
    with pytest.raises(ValueError, match="expected a kernel with nobody in unfit_cases, got none"):
        compile_all("unfit_cases", only=("nobody",))
    with pytest.raises(ValueError, match=r"capability: expected one of 80, 86, .*, got 75"):
        compile_all("unfit_cases", capabilities=(75,))


NEW, OLD = (f"{name} 1.0" for name in reversed(assemblers.NAMES))
SPILL = Compiled("kernel", 90, OLD, num_warps=4, registers=255, stack=8)
FITS = Compiled("kernel", 90, OLD, num_warps=4, registers=64)
NOT_NEEDED = "its exception (spill) is not needed"
SPILLS = "spills: 8 bytes of stack, 0 loads and 0 stores"


@pytest.mark.parametrize(
    ("rows", "kernel", "whole", "failures"),
    [
        ([SPILL], "kernel", True, []),
        ([FITS], "kernel", False, [f"kernel, sm_90, ptxas: {NOT_NEEDED}"]),
        ([FITS], "another", False, []),
        ([FITS], "another", True, [f"another, sm_90: {NOT_NEEDED}"]),
        ([SPILL], "another", True, [f"another, sm_90: {NOT_NEEDED}", f"kernel, sm_90, ptxas: {SPILLS}"]),
        ([SPILL, replace(FITS, assembler=NEW)], "kernel", True, []),
        (
            [FITS, replace(SPILL, assembler=NEW)], "kernel", True,
            [f"kernel, sm_90, ptxas-blackwell: {SPILLS}", f"kernel, sm_90, ptxas: {NOT_NEEDED}"],
        ),
    ],
    ids=["silenced", "stale", "not compiled", "renamed", "another kernel's", "by one", "by the other"],
)  # fmt: skip
def test_exceptions(rows, kernel, whole, failures):
    allowed = [Allowed((kernel,), (90,), "spill", reason="of this test", assemblers=("ptxas",))]
    assert verdict(rows, allowed, whole) == failures


def test_an_exception_is_for_some_versions_of_triton():
    def served(**versions):
        allowed = Allowed(("kernel",), (90,), "spill", reason="of this test", **versions)
        return [triton for triton in ("3.6.0", "3.7.0", "3.7.1", "3.10.0+git1") if allowed.is_for(triton)]

    assert served() == ["3.6.0", "3.7.0", "3.7.1", "3.10.0+git1"]
    assert served(since=(3, 7)) == ["3.7.0", "3.7.1", "3.10.0+git1"]
    assert served(until=(3, 6)) == ["3.6.0"]
    assert served(since=(3, 7), until=(3, 7)) == ["3.7.0", "3.7.1"]


def test_an_exception_for_another_triton_does_not_count():
    later = [Allowed(("kernel",), (90,), "spill", reason="of this test", since=(99, 0))]
    assert verdict([SPILL], later, whole=True) == [f"kernel, sm_90, ptxas: {SPILLS}"]
    assert verdict([FITS], later, whole=True) == []


def test_what_the_assembler_and_the_scanner_say_is_a_fault():
    waits = replace(FITS, serialised="non wgmma instructions")
    touches = replace(FITS, hazards=["R8 in MOV at 0xc0, which 0xb0 still reads"])
    assert waits.faults == {"serialised": "waits for each wgmma before the next: non wgmma instructions"}
    assert touches.faults.keys() == {"hazard"}
    assert "R8 in MOV at 0xc0" in touches.faults["hazard"]
    (line,) = by_assembler([waits, touches, SPILL, replace(FITS, capability=80)])
    assert line == "ptxas 1.0: 4 kernels of sm_80, sm_90; 1 spill, 1 wait for each wgmma, 1 with hazards"


def test_a_plain_run_compiles_twins_once_and_other_chips_hungriest():
    def case(name, chips=None, dtype="bf16", **arguments):
        return Case(name, None, {"x": f"*{dtype}:16", **arguments}, 4, capabilities=chips)

    cases = [
        case("norm 1", BLOCK=1), case("norm 2", BLOCK=2), case("norm 1 fp16", dtype="fp16", BLOCK=1),
        case("norm 1 fp32", dtype="fp32", BLOCK=1), case("norm 2 fp32 weight", weight="*fp32:16", BLOCK=2),
        case("mean 1", dtype="fp32", BLOCK=1),
        case("attention 64 bias", (90, 100), DIM=64, bias="*bf16:16"), case("attention 64 plain", (90, 100), DIM=64),
        case("attention 128 bias", (90, 100), DIM=128, bias="*bf16:16"),
        case("attention 64 narrow", (80, 86)), case("attention 64 narrow fp16", (80, 86), dtype="fp16"),
        case("attention 64 narrow bias", (80, 86), bias="*bf16:16"), case("attention 128 narrow", (80, 86), DIM=128),
    ]  # fmt: skip
    chips = [(90,), (90,), (), (90,), None, None, (90,), (90,), (90, 100), (), (), (80, 86), (80, 86)]
    assert telling(cases) == chips


def test_limits_of_shared_and_tensor_memory():
    for capability, chip in CHIPS.items():
        assert not Compiled("kernel", capability, num_warps=4, shared=chip.block_shared).faults
        above = Compiled("kernel", capability, num_warps=4, shared=chip.block_shared + 1)
        assert above.faults.keys() == {"shared"}
        assert above.blocks == 0
    assert not Compiled("kernel", 100, num_warps=4, tensor_memory=512).faults
    assert Compiled("kernel", 100, num_warps=4, tensor_memory=1024).faults.keys() == {"shared"}


@pytest.mark.parametrize(
    ("capability", "num_warps", "registers", "shared", "blocks"),
    [
        (90, 4, 64, 0, 8),  # registers: 8 warps a quarter
        (90, 4, 65, 0, 7),  # 72 registers a thread are given
        (90, 8, 255, 0, 1),
        (90, 16, 130, 0, 0),  # 12 warps of the 16
        (80, 1, 16, 0, 32),  # the most blocks
        (86, 8, 32, 0, 6),  # the most warps
        (90, 4, 32, 100 * 1024, 2),  # shared memory, with 1 KB of the driver's each
        (120, 4, 32, 50 * 1024, 1),
    ],
)
def test_resident_blocks(capability, num_warps, registers, shared, blocks):
    assert resident_blocks(capability, num_warps, registers, shared) == blocks


def test_instructions_are_counted():
    code = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.EL.U16.CONSTANT R6, desc[UR4][R2.64] ;
        /*0020*/             @!UP1 UTMALDG.2D [UR8], [UR6] ;
        /*0030*/                   LDG.E.ENL2.256 R6, R8, desc[UR4][R2.64] ;
        /*0040*/                 { HGMMA.64x128x16.F32.BF16 R88, gdesc[UR8].tnspB, R88 ;
        /*0050*/              @P2 LDGSTS.E.BYPASS.LTC128B.128 [R37], desc[UR10][R4.64] }
        /*12340*/                  UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4] ;
        /*12350*/                  STG.E desc[UR4][R2.64], R8 ;
        /*12360*/                  WARPSYNC.COLLECTIVE R2, 0x10 ;
    """
    expected = {"HGMMA": 1, "LDG.16": 1, "LDG.256": 1, "LDGSTS.128": 1, "STG.32": 1, "UTCHMMA": 1, "UTMALDG": 1}
    assert count_instructions(code) == expected


def test_cases_name_every_argument():
    names = set()
    for every in (False, True):
        cases = cases_of(CASES, every)
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert set(case.arguments) == set(case.kernel.arg_names), case.name
            assert "," not in case.name
        names |= {case.name for case in cases}
    assert {name for exception in ALLOWED for name in exception.kernels} <= names


def test_cases_of_one_name_are_one_compilation():
    """What the name hides would be compiled once, as the first of them is, and never as the others are."""
    first, same = (Case("kernel", None, {"BLOCK": 64}, 4, capabilities=(chip,)) for chip in (90, 80))
    other_warps, other_block = replace(same, num_warps=8), replace(same, arguments={"BLOCK": 32})
    assert [(case.name, case.capabilities) for case in merged([first, same])] == [("kernel", (80, 90))]
    assert [case.name for case in merged([first, other_warps])] == ["kernel", "kernel 8 warps"]
    with pytest.raises(ValueError, match="differ in more than their chips"):
        list(merged([first, other_block]))

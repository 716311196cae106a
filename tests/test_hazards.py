"""The scanner of machine code for registers that asynchronous products still use: planted hazards, and clean code."""

from __future__ import annotations

import pytest

from tools.check_kernels.hazards import hazards

# As the assemblers write a loop of attention: scores of a factor in R4 to R7, waited for; sums in R24 to R27 of the
# weights in R8 to R11, which go on behind the loop's end until the next round's wait.
LOOP = """
.text.kernel:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                 { HGMMA.64x8x16.F32.BF16 R40, R4, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0050*/                   IMAD.WIDE.U32 R2, R0, 0x4, R2 }
        /*0060*/                   {early}
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, {allowed} ;
        /*0080*/                   FMUL R24, R24, R41 ;
        /*0090*/                   F2FP.BF16.F32.PACK_AB R8, R41, R40 ;
        /*00a0*/                   WARPGROUP.ARRIVE ;
        /*00b0*/                   HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR12].tnspB, R24, gsb0 ;
        /*00c0*/                   {late}
        /*00d0*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*00e0*/                   {behind}
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R24 ;
        /*0100*/                   EXIT ;
"""
CLEAN = {"early": "NOP ;", "allowed": "0x0", "late": "NOP ;", "behind": "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"}


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ({}, []),
        # Beside the factor, from memory into other registers, of uniform registers and predicates: all free.
        ({"late": "@!P0 LDG.E.128 R12, desc[UR4][R8.64] ;"}, []),
        ({"late": "ISETP.GE.AND P2, PT, R8, R9, PT ;"}, []),
        ({"late": "STS.128 [R30], R8 ;"}, []),
        ({"late": "SHFL.BFLY PT, R12, R8, 0x1, 0x1f ;"}, []),
        # The factor, within a result of four registers, behind predicates, of a pair.
        ({"late": "@!P0 LDG.E.128 R5, desc[UR4][R2.64] ;"}, ["R8 in LDG.E.128 at 0xc0, which 0xb0 still reads"]),
        ({"late": "SHFL.BFLY PT, R11, R3, 0x1, 0x1f ;"}, ["R11 in SHFL.BFLY at 0xc0, which 0xb0 still reads"]),
        ({"late": "IMAD.WIDE R10, R0, 0x4, R2 ;"}, ["R11 in IMAD.WIDE at 0xc0, which 0xb0 still reads"]),
        # Over the loop's edge, before the next round's wait.
        ({"early": "MOV R9, R0 ;"}, ["R9 in MOV at 0x60, which 0xb0 still reads"]),
        # The wait leaves the last group, not the one before it: scores are read too early, the weights are not.
        (
            {"allowed": "0x1"},
            [
                "R40 in F2FP.BF16.F32.PACK_AB at 0x90, which 0x40 still writes",
                "R41 in FMUL at 0x80, which 0x40 still writes",
            ],
        ),
        # Sums before their wait, on the one of two paths that has made any.
        ({"behind": "NOP ;"}, ["R24 in STG.E.128 at 0xf0, which 0xb0 still writes"]),
    ],
    ids=["clean", "load", "predicate", "shared", "shuffle", "quad", "second", "pair", "edge", "group", "sums"],
)  # fmt: skip
def test_planted(planted, found):
    code = LOOP
    for name, text in (CLEAN | planted).items():
        code = code.replace(f"{{{name}}}", text)
    assert sorted(hazards(code)) == found

"""Both assemblers of triton's wheel: what they make of one PTX, what they say of it, and which is missing."""

from __future__ import annotations

import pytest
from triton.runtime.errors import PTXASError

from tools.check_kernels import assemblers, sass

pytestmark = pytest.mark.triton

# Sums of a loop's products, or zeros where it has no round; a wait stands at the loop's end or behind both.
PTX = """
.version 99.9
.target sm_90a
.address_size 64

.visible .entry multiply(.param .u64 out, .param .u64 tile, .param .u32 rounds) .reqntid 128
{
    .reg .b32 %f<5>, %r<3>;
    .reg .b64 %d<3>;
    .reg .pred %p<3>;
    ld.param.b64 %d2, [out];
    ld.param.b64 %d1, [tile];
    ld.param.b32 %r1, [rounds];
    setp.eq.u32 %p1, %r1, 0;
    setp.ne.u32 %p2, %r1, 7;
    @%p1 bra EMPTY;
    mov.b32 %f0, 0;
    mov.b32 %f1, 0;
    mov.b32 %f2, 0;
    mov.b32 %f3, 0;
LOOP:
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %d1, %d1, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    add.s32 %r1, %r1, -1;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra LOOP;
    {loop}
    bra END;
EMPTY:
    mov.b32 %f0, 0;
    mov.b32 %f1, 0;
    mov.b32 %f2, 0;
    mov.b32 %f3, 0;
END:
    {both}
    st.global.v4.b32 [%d2], {%f0, %f1, %f2, %f3};
    ret;
}
"""


def ptx(**waits: str) -> str:
    text = PTX
    for place in ("loop", "both"):
        text = text.replace(f"{{{place}}}", waits.get(place, ""))
    return text


WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.fixture(params=assemblers.NAMES)
def assembler(request):
    found = assemblers.found()
    if request.param not in found:
        pytest.skip(f"triton has no {request.param}")
    return found[request.param]


def test_machine_code_and_words_are_of_one_run(assembler):
    """Whatever version the PTX names; the flags are Triton's own."""
    code = sass.read(assemblers.assemble(ptx(loop=WAIT), assembler, 90, {}))
    assert (code.instructions.keys(), code.instructions["STG.128"]) == ({"HGMMA", "STG.128"}, 1)
    assert 0 < code.registers <= 64
    assert (code.stack, code.serialised, code.hazards) == (0, "", [])


def test_why_products_wait_for_each_other_is_told(assembler):
    code = sass.read(assemblers.assemble(ptx(both=WAIT), assembler, 90, {}))
    assert code.serialised.startswith("non wgmma instructions defining accumulator registers")
    assert code.serialised.endswith("pipeline stage")
    assert code.hazards == []


def test_what_is_refused_is_raised(assembler, capfd):
    with pytest.raises(PTXASError, match=r"Unknown modifier '\.nothing'"):
        assemblers.assemble(ptx(loop="wgmma.nothing;"), assembler, 90, {})
    assert capfd.readouterr().out == ""


def test_only_sm_90_is_made_by_both():
    both = assemblers.found().values()
    for capability in (80, 86, 89, 90, 100, 120):
        own, *others = assemblers.of(capability, every=True)
        assert assemblers.of(capability, every=False) == [own]
        assert {own, *others} == (set(both) if capability == 90 else {own})


def test_a_missing_assembler_is_a_line(monkeypatch):
    assert assemblers.missing() == []
    own = assemblers.own(90)
    monkeypatch.setattr(assemblers, "found", lambda: {own.name: own})
    (line,) = assemblers.missing()
    (other,) = set(assemblers.NAMES) - {own.name}
    assert line.endswith(f"has no {other}: not checked with it")
    assert assemblers.of(90, every=True) == [own]


def test_words_of_another_are_refused():
    log = "ptxas info : Function properties\n 8 bytes stack frame, 4 bytes spill\nptxas info : Used 255 registers"
    assert assemblers.what_it_said(log) == (255, 8, "")
    with pytest.raises(RuntimeError, match="expected stack frame and registers"):
        assemblers.what_it_said("Used 3 registers")

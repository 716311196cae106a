"""The memory checker of Triton's interpreter: it finds each planted fault and names it, and accuses no sound kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import planted_kernels as planted
import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tools.interpreter import memory
from tools.interpreter.findings import Finding

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here, not in the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:tl.make_block_ptr is deprecated:UserWarning"),
]
SOURCE = Path(planted.__file__).read_text().splitlines()
ROWS, COLUMNS = 5, 12
# Triton 3.9 has none: what is of them goes with them.
HAS_BLOCK_POINTERS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def findings(launch: Callable[..., Any]) -> list[Finding]:
    with memory.checked() as checker:
        launch()
    return list(checker.findings)


def filled(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def scale(x=None, y=None):
    x = filled(35) if x is None else x
    planted.scale_kernel[(3,)](x, torch.empty(35) if y is None else y, 35, BLOCK=16)


def rows(x, masked, stride=None, block_rows=2):
    y, programs = torch.empty(ROWS, COLUMNS), -(-ROWS // block_rows)
    stride = x.stride(0) if stride is None else stride
    planted.rows_kernel[(programs,)](x, y, ROWS, COLUMNS, stride, MASKED=masked, BLOCK_ROWS=block_rows, BLOCK=16)


def handed_over():
    planted.handed_over_kernel[(4,)](torch.empty(4), torch.empty(1), 4, BLOCK=4)


def neighbours():
    planted.neighbour_kernel[(3,)](3 * filled(12), torch.empty(12), 12, BLOCK=4)


def gather(*index):
    planted.gather_kernel[(1,)](filled(8), torch.tensor(index), torch.empty(3), 3, BLOCK=4)


class Fault(NamedTuple):
    """What a launch is found to do: kind, kernel, argument and element, the line's text, programs."""

    launch: Callable[[], Any]
    kind: str
    kernel: str
    tensor: str
    what: str
    line: str
    programs: tuple[int, ...]


FAULTS = {
    "off-by-one mask": Fault(
        lambda: planted.off_by_one_kernel[(3,)](filled(35), torch.empty(35), 35, BLOCK=16),
        "out of bounds", "off_by_one_kernel", "x [35]", "reads element 35", "mask=column <= n", (2,),
    ),
    "store beyond the end": Fault(
        lambda: planted.long_store_kernel[(3,)](filled(35), torch.empty(35), 35, BLOCK=16),
        "out of bounds", "long_store_kernel", "y [35]", "writes element 35", "mask=column < n))", (2,),
    ),
    "mask of another length": Fault(
        lambda: planted.wrong_length_kernel[(COLUMNS,)](filled(COLUMNS, 5), torch.empty(COLUMNS, 5), 12, 5, BLOCK=16),
        "out of bounds", "wrong_length_kernel", "y [12, 5]", "writes element 60", "mask=column < rows", (10,),
    ),
    "missing row mask": Fault(
        lambda: rows(filled(ROWS, COLUMNS), False),
        "out of bounds", "rows_kernel", "x [5, 12]", "reads element 60", "x_stride + column", (2,),
    ),
    "row address beyond 32 bits": Fault(
        lambda: planted.every_other_row_kernel[(2,)](filled(4, 4), torch.empty(2, 4), 4, 2**30, BLOCK=4),
        "out of bounds", "every_other_row_kernel", "x [4, 4]", f"reads element -{2**31}", "row * x_stride", (1,),
    ),
    "negative index": Fault(
        lambda: planted.reversed_kernel[(1,)](filled(7), torch.empty(7), 7, FIRST=2, BLOCK=8),
        "out of bounds", "reversed_kernel", "x [7]", "reads element -1", "n - FIRST - column", (0,),
    ),
    "index from memory": Fault(
        lambda: gather(0, 8, 7),
        "out of bounds", "gather_kernel", "x [8]", "reads element 8", "x + source", (0,),
    ),
    "columns between a view's rows": Fault(
        lambda: rows(filled(ROWS, 2 * COLUMNS)[:, : COLUMNS - 1], True),
        "out of bounds", "rows_kernel", "x [5, 11]", "reads element 11", "x_stride + column", (0,),
    ),
    "beyond a view, in its storage": Fault(
        lambda: scale(filled(100)[20:54]),
        "out of bounds", "scale_kernel", "x [34]", "reads element 34", "tl.load(x + column", (2,),
    ),
    "in another argument's tensor": Fault(
        lambda: (lambda both: scale(both[:34], both[34:]))(filled(69)),
        "out of bounds", "scale_kernel", "x [34]", "reads element 34", "tl.load(x + column", (2,),
    ),
    "of an empty tensor": Fault(
        lambda: planted.one_row_kernel[(1,)](filled(0), torch.empty(3), 1, BLOCK=4),
        "out of bounds", "one_row_kernel", "x [0]", "reads element", "tl.load(x + column", (0,),
    ),
    "block pointer without a check": Fault(
        lambda: planted.block_pointer_kernel[(1,)](filled(3, 4), torch.empty(1), 3, 4, CHECKED=False, BLOCK=4),
        "out of bounds", "block_pointer_kernel", "x [3, 4]", "reads element 12", "tl.load(place)", (0,),
    ),
    "descriptor of a longer tensor": Fault(
        lambda: planted.descriptor_kernel[(1,)](
            TensorDescriptor(filled(3, 4), [4, 4], [4, 1], [4, 4]), torch.empty(1), BLOCK=4
        ),
        "out of bounds", "descriptor_kernel", "x [3, 4]", "reads element 12", "x.load", (0,),
    ),
    "word between words": Fault(
        lambda: planted.words_kernel[(1,)](torch.zeros(8, dtype=torch.int8), torch.empty(1, dtype=torch.int32), 2),
        "misaligned", "words_kernel", "x [8]", "reads element 2", "x + offset", (0,),
    ),
    "never written": Fault(
        lambda: scale(torch.empty(35)),
        "unwritten", "scale_kernel", "x [35]", "reads element 0, which nobody has written", "x + column", (0,),
    ),
    "written in part": Fault(
        lambda: (lambda x: (x[:20].fill_(1.0), scale(x)))(torch.ones(3).new_empty(35)),
        "unwritten", "scale_kernel", "x [35]", "reads element 20, which nobody has written", "x + column", (1,),
    ),
    "sum that is never begun": Fault(
        lambda: planted.own_sums_kernel[(2,)](filled(8), torch.empty(2), 8, START=False, BLOCK=4),
        "unwritten", "own_sums_kernel", "partials [2]", "reads element 0", "tl.load(partials + program)", (0,),
    ),
    "read where the order of programs has it written": Fault(
        handed_over,
        "unwritten", "handed_over_kernel", "partials [4]", "reads element 0", "partials + place", (3,),
    ),
    "two programs write one row": Fault(
        lambda: planted.one_row_kernel[(2,)](filled(7), torch.empty(7), 7, BLOCK=8),
        "race", "one_row_kernel", "y [7]", "writes element 0, which another program writes", "tl.store(y", (1, 0),
    ),
    "one program reads what another writes": Fault(
        neighbours, "race", "neighbour_kernel", "x [12]", "reads element 3, which another program writes",
        "x + column - 1", (1, 0),
    ),
    "sum over what is being written": Fault(
        handed_over, "race", "handed_over_kernel", "partials [4]", "reads element 0, which another program writes",
        "partials + place", (3, 0),
    ),
    "start of an atomic sum": Fault(
        lambda: planted.atomic_after_store_kernel[(2,)](
            torch.ones(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 8, BLOCK=4
        ),
        "race", "atomic_after_store_kernel", "total [1]", "updates atomically element 0, which another program writes",
        "tl.atomic_add", (1, 0),
    ),
    "result by the order of programs": Fault(
        neighbours, "order", "neighbour_kernel", "y [12]", "element 4 is another in reversed order", "", (1,),
    ),
    "last program wins, atomically": Fault(
        lambda: planted.last_wins_kernel[(3,)](torch.zeros(1, dtype=torch.int32)),
        "order", "last_wins_kernel", "y [1]", "element 0 is another in reversed order", "", (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_found_and_named(fault):
    found = {(finding.kind, finding.tensor): finding for finding in findings(fault.launch)}
    finding = found[fault.kind, fault.tensor]
    assert finding.kernel == fault.kernel
    assert finding.what.startswith(fault.what)
    assert finding.programs == tuple((program, 0, 0) for program in fault.programs)
    if fault.line:
        file, line, function = finding.places[0][-1]
        assert (Path(file).name, function) == ("planted_kernels.py", fault.kernel)
        assert fault.line in SOURCE[line - 1]
        assert f"tests/planted_kernels.py:{line}" in str(finding)


SOUND = {
    "copy": scale,
    "into what came unwritten, read afterwards": lambda: (lambda y: (scale(y=y), scale(y)))(torch.empty(35)),
    "rows": lambda: rows(filled(ROWS, COLUMNS), True),
    "a view's rows": lambda: rows(filled(ROWS, 3 * COLUMNS)[:, COLUMNS : 2 * COLUMNS], True),
    "one row for all": lambda: rows(filled(1, COLUMNS).expand(ROWS, COLUMNS), True),
    "one program for a row": lambda: planted.one_row_kernel[(1,)](filled(7), torch.empty(7), 7, BLOCK=8),
    "backwards": lambda: planted.reversed_kernel[(1,)](filled(7), torch.empty(7), 7, FIRST=1, BLOCK=8),
    "every other row": lambda: planted.every_other_row_kernel[(2,)](filled(4, 4), torch.empty(2, 4), 4, 4, BLOCK=4),
    "index from memory": lambda: gather(0, 3, 7),
    "block pointer": lambda: planted.block_pointer_kernel[(1,)](
        filled(3, 4), torch.empty(1), 3, 4, CHECKED=True, BLOCK=4
    ),
    "descriptor": lambda: planted.descriptor_kernel[(1,)](
        TensorDescriptor.from_tensor(filled(3, 4), [4, 4]), torch.empty(1), BLOCK=4
    ),
    "aligned word": lambda: planted.words_kernel[(1,)](
        torch.zeros(8, dtype=torch.int8), torch.empty(1, dtype=torch.int32), 4
    ),
    "sums of one's own": lambda: planted.own_sums_kernel[(2,)](filled(8), torch.empty(2), 8, START=True, BLOCK=4),
    "whole numbers, atomically": lambda: planted.atomic_sum_kernel[(2,)](
        torch.ones(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 8, BLOCK=4
    ),
    "torch reads what a kernel wrote": lambda: (lambda y: (scale(y=y), y + 1))(torch.empty(35)),
    "torch reads a copy": lambda: torch.empty(7).copy_(filled(7)) + 1,
    "torch writes where it was told": lambda: torch.add(filled(7), 1.0, out=torch.empty(7)) + 1,
    "torch adds sparse tensors": lambda: torch.eye(3).to_sparse().add_(torch.eye(3).to_sparse()),
    "torch forgets a tensor": lambda: [torch.empty(n) is None or torch.zeros(n) + 1 for n in (7, 7, 7, 7)],
}
if not HAS_BLOCK_POINTERS:
    del FAULTS["block pointer without a check"], SOUND["block pointer"]


@pytest.mark.parametrize("launch", SOUND.values(), ids=SOUND)
def test_sound_kernel_is_not_accused(launch):
    assert [str(finding) for finding in findings(launch)] == []


def test_faulty_accesses_do_not_take_place():
    both = filled(70)
    x, y = both[:35], both[40:]
    found = findings(lambda: planted.long_store_kernel[(3,)](filled(48), x, 35, BLOCK=16))
    assert [finding.kind for finding in found] == ["out of bounds"]
    assert torch.equal(y, filled(70)[40:])
    assert torch.equal(x, filled(35))


def test_results_are_those_of_the_programs_in_order():
    x, y = filled(12), torch.empty(12)
    findings(lambda: planted.neighbour_kernel[(3,)](x, y, 12, BLOCK=4))
    expected, before = filled(12), torch.empty(12)
    planted.neighbour_kernel[(3,)](expected, before, 12, BLOCK=4)
    assert torch.equal(x, expected)
    assert torch.equal(y, before)


def test_line_of_a_device_function_comes_with_its_caller():
    (finding,) = findings(lambda: planted.deep_kernel[(1,)](filled(3), torch.empty(3), 3, BLOCK=4))
    inner, outer = (
        next(n for n, text in enumerate(SOURCE, 1) if part in text) for part in ("mask=inside, other", "n + 1")
    )
    file = "tests/planted_kernels.py"
    assert str(finding).endswith(f"; {file}:{inner} in deep_load, from {file}:{outer}")


def test_elements_are_counted_once_for_all_orders():
    (finding,) = findings(FAULTS["off-by-one mask"].launch)
    assert finding.elements == 1


def test_torch_reading_what_nobody_wrote_is_found():
    (finding,) = findings(lambda: torch.empty(5)[1:] + 1)
    assert (finding.kind, finding.kernel, finding.tensor) == ("unwritten", "aten::add", "self [4]")
    assert finding.elements == 4


def test_operator_that_leaves_a_row_unwritten_is_found():
    library = torch.library.Library("planted", "FRAGMENT")
    library.define("holes(Tensor x, int step) -> Tensor")

    def holes(x, step):
        y = torch.empty_like(x)
        planted.holes_kernel[(1,)](x, y, 7, STEP=step, BLOCK=8)
        return y

    library.impl("holes", holes, "CPU")
    assert findings(lambda: torch.ops.planted.holes(filled(7), 1)) == []
    (finding,) = findings(lambda: torch.ops.planted.holes(filled(7), 2))
    assert (finding.kind, finding.kernel) == ("unwritten", "planted::holes")
    assert finding.what == "[1] is left unwritten"
    assert finding.elements == 3


def test_interpreter_is_as_it_was_afterwards():
    findings(scale)
    x, y = filled(35), torch.empty(35)
    planted.scale_kernel[(3,)](x, y, 35, BLOCK=16)
    assert torch.equal(y, 2 * x)

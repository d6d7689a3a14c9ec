"""Every kernel under the judge of `parity run kernels`, in the interpreter: examples, a handful of draws, a planted bug.

A few seconds an op of what the subject does in minutes; a kernel without cases fails here.
"""

import importlib
import os
import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

pytest.importorskip("triton")

import tessera_kernels
from tessera_kernels.cuda.build import ops as cuda_ops
from tessera_parity.kernel_fuzz import Effort, fuzz, names_of, plant_bugs
from tessera_parity.kernel_judge import judge
from tessera_parity.kernel_planting import OPERATORS, load_op, planted
from tessera_parity.loading import Patch
from tessera_shared.errors import ParityError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the compiled kernels"
)

KERNELS = Path(str(tessera_kernels.__file__)).parent
OPS = names_of()
ROPE = "tessera_kernels.triton.rope"
EFFORT = Effort(cases=4, seconds=1.5, example_seconds=3.0, repeats=1, rows=2, bug_seconds=3.0)


def test_every_kernel_has_cases_and_a_reference() -> None:
    kernels = {path.stem for path in (KERNELS / "triton").glob("*.py") if not path.stem.startswith("_")}
    references = {path.stem for path in (KERNELS / "reference").glob("*.py") if not path.stem.startswith("_")}
    assert references - set(OPS) == set()
    assert references - kernels == set()
    assert set(cuda_ops()) - references == set()
    assert set(OPS) - references == {"fast_path", "packed_decode", *(f"cuda_{name}" for name in cuda_ops())}


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_keeps_its_promises(name: str) -> None:
    op = load_op(name)
    assert op.name == name
    fuzzed = fuzz(op, device="cpu", seed=1, effort=EFFORT)
    assert fuzzed.failure == "", f"{fuzzed.failure}\n{fuzzed.failing_case}"
    assert fuzzed.compared > 0


@pytest.mark.parametrize("name", OPS)
def test_every_bug_of_a_kernel_can_be_planted(name: str) -> None:
    """All of them: the next test plants one, and the subject stops at the first whose line has gone."""
    for bug in load_op(name).bugs_on("cpu"):
        package = Path(str(importlib.import_module(bug.parts[0]).__file__)).parent
        source = package.joinpath(*bug.parts[1:]).read_text(encoding="utf-8")
        assert bug.applied_to(source) != source


@pytest.mark.parametrize("name", OPS)
def test_a_bug_planted_in_a_kernel_is_caught(name: str) -> None:
    op = load_op(name)
    assert op.bugs
    bugs = list(plant_bugs(op, device="cpu", seed=1, effort=EFFORT, most=1))  # the subject plants them all
    assert [bug.what for bug in bugs if not bug.caught] == []


@pytest.mark.parametrize("name", OPS)
def test_no_bug_for_a_gpu_takes_a_wait_away(name: str) -> None:
    """It would hang there, lose the device, or be right by its timing."""
    op = load_op(name)
    assert op.bugs_on("cuda") == op.bugs
    assert op.bugs_on("cpu") == op.bugs + op.cpu_bugs
    waits = re.compile(r"\b(barrier|group|copy|bulk)_wait\w*|\bsync_\w+|\bfence_\w+")
    for bug in op.bugs:
        if bug.file.endswith((".cu", ".cuh")):
            assert waits.findall(bug.find) == waits.findall(bug.replace), bug.find


def test_planting_leaves_the_clean_kernel_as_it_was() -> None:
    name = "rms_norm"
    op = load_op(name)
    case = op.examples[0]
    before = judge(op, case)
    with planted(name, op.bugs[0]) as bugged:
        assert bugged.kernel.__globals__ is not op.kernel.__globals__  # type: ignore[attr-defined]
    assert load_op(name) is op
    assert judge(op, case).errors == before.errors


def test_planting_registers_no_operator_under_a_clean_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps one operator of a name: another of that name frees the clean one under whoever holds it."""
    clean = importlib.import_module(ROPE)
    register = MagicMock(wraps=torch.library.custom_op)
    monkeypatch.setattr(torch.library, "custom_op", register)
    bug = load_op("fast_path").bugs[0]
    assert not bug.module.startswith("tessera_kernels")  # the kernels are imported anew although the bug is not theirs
    with planted("fast_path", bug):
        assert importlib.import_module(ROPE) is not clean
    names = [call.args[0] for call in register.call_args_list]
    assert names
    assert [name for name in names if name.startswith(OPERATORS)] == []


def test_a_patch_that_does_not_occur_exactly_once_is_refused() -> None:
    with pytest.raises(ParityError, match="occurs 0 times"), planted("fast_path", Patch(
        file="tessera_kernels/checks.py", find="no such line", replace="",
    )):  # fmt: skip
        pass

"""Every kernel under the judge of `parity run kernels`, in the interpreter: examples, a handful of draws, a planted bug.

A few seconds an op of what the subject does in minutes; a kernel without cases fails here.
"""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

import tessera_kernels
from tessera_parity.kernel_fuzz import Effort, fuzz, names_of, plant_bugs
from tessera_parity.kernel_judge import judge
from tessera_parity.kernel_planting import load_op, planted
from tessera_parity.loading import Patch
from tessera_shared.errors import ParityError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: make gpu runs the compiled kernels"
)

KERNELS = Path(str(tessera_kernels.__file__)).parent
OPS = names_of()
EFFORT = Effort(cases=4, seconds=1.5, example_seconds=3.0, repeats=1, rows=2, bug_seconds=3.0)


def test_every_kernel_has_cases_and_a_reference() -> None:
    kernels = {path.stem for path in (KERNELS / "triton").glob("*.py") if not path.stem.startswith("_")}
    references = {path.stem for path in (KERNELS / "reference").glob("*.py") if not path.stem.startswith("_")}
    assert references - set(OPS) == set()
    assert references - kernels == set()
    assert set(OPS) - references == {"fast_path"}


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_keeps_its_promises(name: str) -> None:
    op = load_op(name)
    assert op.name == name
    fuzzed = fuzz(op, device="cpu", seed=1, effort=EFFORT)
    assert fuzzed.failure == "", f"{fuzzed.failure}\n{fuzzed.failing_case}"
    assert fuzzed.compared > 0


@pytest.mark.parametrize("name", OPS)
def test_a_bug_planted_in_a_kernel_is_caught(name: str) -> None:
    op = load_op(name)
    assert op.bugs
    bugs = list(plant_bugs(op, device="cpu", seed=1, effort=EFFORT, most=1))  # the subject plants them all
    assert [bug.what for bug in bugs if not bug.caught] == []


def test_planting_leaves_the_clean_kernel_as_it_was() -> None:
    if not OPS:
        pytest.skip("no op has cases yet")
    name = "rms_norm" if "rms_norm" in OPS else OPS[0]
    op = load_op(name)
    case = op.examples[0]
    before = judge(op, case)
    with planted(name, op.bugs[0]) as bugged:
        assert bugged.kernel.__globals__ is not op.kernel.__globals__  # type: ignore[attr-defined]
    assert load_op(name) is op
    assert judge(op, case).errors == before.errors


def test_a_patch_that_does_not_occur_exactly_once_is_refused() -> None:
    with pytest.raises(ParityError, match="occurs 0 times"), planted("fast_path", Patch(
        file="tessera_kernels/checks.py", find="no such line", replace="",
    )):  # fmt: skip
        pass

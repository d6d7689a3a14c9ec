"""A repro shows the divergence in a process of its own, and stops showing it once the bug is gone."""

from pathlib import Path

import numpy as np
import pytest

from tessera_parity.cases import case_seed, model_case, op_case
from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.mutants.cases import battery_cases
from tessera_parity.mutants.shrinking import plant_on_disk
from tessera_parity.repro import replay
from tessera_parity.repro_files import confirm
from tessera_parity.repro_model import write_model_repro
from tessera_parity.repro_op import write_op_repro
from tessera_parity.repro_source import Source
from tessera_shared.errors import ParityError
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import DistilOptions, Divergence

EPS = Patch(file="tessera_torch/model/norms.py", find="keepdim=True) + eps)", replace="keepdim=True) + 1e-4)")
DETACHED = Patch(
    file="tessera_torch/model/transformer.py", find="x_BTD + mixed_BTD)", replace="x_BTD.detach() + mixed_BTD)"
)

CONSTANT_PROBS = Patch(
    file="tessera_torch/model/attention.py", find="btkgh\", probs_BKGTS, v_BSKH)",
    replace="btkgh\", probs_BKGTS.detach(), v_BSKH)",
)  # fmt: skip


@pytest.fixture(scope="module")
def oracle() -> Half:
    return load_half("numpy")


def test_a_forward_repro_fails_with_the_bug_and_passes_without(oracle: Half, tmp_path: Path) -> None:
    half = load_half("torch", patches=(EPS,))
    paths, shrunk, culprit = write_model_repro(oracle, half, battery_cases(0)[0], tmp_path, name="eps")
    assert culprit.op == "attention.norm"
    assert (shrunk.layers, shrunk.tokens) == (1, 1)
    assert [len(path.read_text().splitlines()) <= 60 for path in paths] == [True, True]
    run = confirm(paths[0], python_path=[plant_on_disk(EPS, tmp_path / "bug")])
    assert run.shown, run.line
    assert "observed" in run.line
    assert confirm(paths[0]).status == 0  # the half as it is
    assert confirm(paths[1]).shown  # the oracle still differs from what the broken half said


def test_a_gradient_repro_names_a_parameter_and_its_number(oracle: Half, tmp_path: Path) -> None:
    half = load_half("torch", patches=(DETACHED,))
    paths, shrunk, culprit = write_model_repro(oracle, half, battery_cases(0)[0], tmp_path, name="detached")
    assert culprit.op == "residual"
    assert shrunk.layers == 1
    assert "gradient of model." in paths[0].read_text()
    run = confirm(paths[1])
    assert run.shown, run.line


def test_a_gradient_that_is_wrong_only_inside_is_not_shrunk_to(oracle: Half, tmp_path: Path) -> None:
    half = load_half("torch", patches=(CONSTANT_PROBS,))
    paths, shrunk, culprit = write_model_repro(oracle, half, battery_cases(0)[0], tmp_path, name="probs")
    assert culprit.op == "attention.mix"
    assert shrunk.tokens > 1  # the softmax of one token has no slope: nothing would reach a parameter
    assert confirm(paths[1]).shown


def test_an_operation_repro_carries_its_inputs(oracle: Half, tmp_path: Path) -> None:
    half = load_half("torch", patches=(EPS,))
    sizes = {"B": 2, "T": 5, "S": 7, "X": 9, "D": 12, "F": 20, "N": 4, "K": 2, "H": 6, "V": 13}
    function = oracle.module("model.norms").rms_norm
    case = op_case("model.norms.rms_norm", function, case_seed(0, "repro", 0), sizes=sizes, style="normal")
    paths, small = write_op_repro(oracle, half, case, tmp_path, name="rms")
    assert small.inputs["x_BTD"].size < sizes["B"] * sizes["T"] * sizes["D"]
    run = confirm(paths[1])
    assert run.shown, run.line


def test_nothing_is_written_where_nothing_departs(oracle: Half, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="a repro must show one"):
        write_model_repro(oracle, load_half("torch"), battery_cases(0)[0], tmp_path, name="clean")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_replayed_is_said_and_not_left_out(oracle: Half, tmp_path: Path) -> None:
    clean = load_half("torch")
    check = {"subject": "forward", "name": "logits", "sides": ["numpy", "torch"], "verdict": "divergence"}
    checks = [
        check | {"case": None},
        check | {"case": {"kind": "something else"}},
        check | {"case": model_case(3).to_json()},
        check | {"verdict": "parity", "case": None},
    ]
    repros = list(replay(checks, {"numpy": oracle, "torch": clean}, tmp_path))
    assert [one.reproduced for one in repros] == [False, False, False]
    assert all(one.detail for one in repros)
    assert [one.command for one in repros] == ["parity run forward --seed 0 --only-half torch"] * 2 + [None]


def test_literals_make_the_same_bits_again() -> None:
    source = Source()
    values = np.random.default_rng(0).standard_normal((3, 2)) * 10.0 ** np.arange(-300, 300, 100).reshape(3, 2)
    values[0, 0] = np.nan
    again = eval(source.of(values), {"np": np})
    np.testing.assert_array_equal(again, values)
    options = DistilOptions(divergence=Divergence.SKEW_KL, temperature=0.3)
    assert source.of(options) == "DistilOptions(divergence=Divergence.SKEW_KL, temperature=0.3)"
    assert eval(source.of(FLOAT64), {"Numerics": type(FLOAT64)}) == FLOAT64
    assert any("Divergence" in line for line in source.import_lines())


def test_a_report_that_is_none_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    from tessera_parity.cli.repro import read_run

    (tmp_path / "result.json").write_text("[]")
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ParityError, match=r"report = .*try"):
            read_run(path)

"""Same rounding: planted precision bugs are red on either side, legal freedom is not."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tessera_parity.budget import gradient_limit
from tessera_parity.calibration.store import load_entry, save_entry
from tessera_parity.cli.calibrate import entry_of
from tessera_parity.compare import relative_difference
from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.result import Check, Verdict
from tessera_parity.resync import reference_values, true_gradients
from tessera_parity.rounding import Plan, judge, precision_battery
from tessera_parity.rounding_cases import POOLS, Reordering, case_rng, rounding_case
from tessera_parity.rounding_measure import Tally, collect, gradient_truth, mask_fault, relative_error
from tessera_parity.variants import Variant
from tessera_shared.numerics import BFLOAT16, FLOAT64, UNIT_ROUNDOFF

SOFTMAX_IN_BFLOAT16 = {
    "torch": Patch(
        file="tessera_torch/model/attention.py",
        find="scores_BNTS.to(dtype_of(numerics.softmax)).masked_fill",
        replace="scores_BNTS.bfloat16().masked_fill",
    ),
    "jax": Patch(
        file="tessera_jax/model/attention.py",
        find="scores_BNTS.astype(dtype_of(numerics.softmax)), -1e30)",
        replace="scores_BNTS.astype(jnp.bfloat16), jnp.bfloat16(-1e30))",
    ),
}
GAIN_BEFORE_CAST = {
    "torch": Patch(
        file="tessera_torch/model/norms.py",
        find="return unit_BTD.to(compute) * gain_D",
        replace="return (unit_BTD * gain_D.to(up)).to(compute)",
    ),
    "jax": Patch(
        file="tessera_jax/model/norms.py",
        find="return unit_BTD.astype(compute) * gain_BTD",
        replace="return (unit_BTD * wide_BTD).astype(compute)",
    ),
}
PROMOTED = {
    "torch": Patch(
        file="tessera_torch/model/mlp.py",
        find="(functional.silu(gate_BTF.to(up)) * up_BTF.to(up)).to(dtype_of(numerics.compute))",
        replace="functional.silu(gate_BTF.to(up)) * up_BTF.to(up)",
    ),
    "jax": Patch(
        file="tessera_jax/model/mlp.py",
        find="(jax.nn.silu(gate_BTF.astype(up)) * up_BTF.astype(up)).astype(dtype_of(numerics.compute))",
        replace="jax.nn.silu(gate_BTF.astype(up)) * up_BTF.astype(up)",
    ),
}

DTYPES = ("bfloat16",)
CALIBRATION_CASES = 30


@pytest.fixture(scope="session")
def oracle() -> Half:
    return load_half("numpy")


@cache
def eager(backend: str, *, reorder: bool = False) -> Variant:
    return Variant(
        name="reordered" if reorder else "eager", half=backend, about="as written", gradients=False, reorder=reorder
    )


@pytest.fixture(scope="session")
def bands(tmp_path_factory: pytest.TempPathFactory, oracle: Half) -> dict[str, Path]:
    """Small calibrations of this very machine, so that the tests hold wherever they run."""
    found = {}
    for backend in ("torch", "jax"):
        pytest.importorskip(backend)
        half, directory = load_half(backend), tmp_path_factory.mktemp(backend)
        measured = {}
        for variant in (eager(backend), eager(backend, reorder=True)):
            values = collect(
                oracle, half, variant, truth=half, dtype="bfloat16", cases=CALIBRATION_CASES, seed=77, pools=("rich",)
            )
            measured[variant.name] = (variant, {"bfloat16": values})
        save_entry(entry_of(backend, "bfloat16", "cpu", 77, measured), directory)
        found[backend] = directory
    return found


def named(checks: list[Check], verdict: Verdict) -> set[str]:
    return {check.op or check.name for check in checks if check.verdict is verdict}


def test_a_clean_half_is_in_parity(backend: str, bands: dict[str, Path], oracle: Half) -> None:
    checks = precision_battery(oracle, load_half(backend), seed=3, dtypes=DTYPES, directory=bands[backend])
    assert {check.verdict for check in checks} == {Verdict.PARITY}
    assert len(checks) > 15
    assert all(check.observed <= check.limit for check in checks)


def test_a_softmax_in_bfloat16_is_red_and_accuses_nothing_else(
    backend: str, bands: dict[str, Path], oracle: Half
) -> None:
    half = load_half(backend, patches=[SOFTMAX_IN_BFLOAT16[backend]])
    checks = precision_battery(oracle, half, seed=4, dtypes=DTYPES, directory=bands[backend])
    assert named(checks, Verdict.DIVERGENCE) == {"attention.probs"}


def test_a_more_accurate_norm_is_red_too(backend: str, bands: dict[str, Path], oracle: Half) -> None:
    half = load_half(backend, patches=[GAIN_BEFORE_CAST[backend]])
    checks = precision_battery(oracle, half, seed=5, dtypes=DTYPES, directory=bands[backend])
    norms = {"attention.norm", "attention.q_norm", "attention.k_norm", "mlp.norm", "final_norm"}
    assert named(checks, Verdict.DIVERGENCE) == norms
    red = next(check for check in checks if check.op == "mlp.norm")
    assert max(red.series["log_ratio_sorted"]) < 0.0  # below the ideal error: no one-sided rule sees it


def test_a_value_left_in_a_wider_dtype_is_red(backend: str, bands: dict[str, Path], oracle: Half) -> None:
    half = load_half(backend, patches=[PROMOTED[backend]])
    checks = precision_battery(oracle, half, seed=6, dtypes=DTYPES, directory=bands[backend])
    guard = next(check for check in checks if check.name.startswith("exact"))
    assert guard.verdict is Verdict.DIVERGENCE
    assert "computed in float32, the policy says bfloat16" in guard.detail


def test_another_order_of_summation_is_not_red(backend: str, bands: dict[str, Path], oracle: Half) -> None:
    variants = {backend: eager(backend, reorder=True)}
    checks = judge(
        oracle, [load_half(backend)], dtypes=DTYPES, seed=8, plan=Plan(gradients=False, cases=8, most=8, shift=1.0),
        variants=variants, directory=bands[backend],
    )  # fmt: skip
    assert {check.verdict for check in checks} == {Verdict.PARITY}


def test_without_a_band_the_verdict_is_uncalibrated(tmp_path: Path, oracle: Half) -> None:
    pytest.importorskip("torch")
    checks = precision_battery(oracle, load_half("torch"), cases=2, dtypes=DTYPES, directory=tmp_path)
    (judged,) = [check for check in checks if check.verdict is not Verdict.PARITY]
    assert judged.verdict is Verdict.UNCALIBRATED
    assert "parity calibrate" in judged.detail


def test_a_band_of_other_cases_is_no_band(bands: dict[str, Path], tmp_path: Path) -> None:
    entry = load_entry("torch", "bfloat16", directory=bands["torch"])
    assert entry is not None
    save_entry(replace(entry, cases_version=entry.cases_version + 1), tmp_path)
    assert load_entry("torch", "bfloat16", directory=tmp_path) is None


def test_too_few_cases_for_the_stated_shift_are_inconclusive(bands: dict[str, Path], oracle: Half) -> None:
    pytest.importorskip("torch")
    plan = Plan(gradients=False, cases=1, most=1, shift=1e-3)
    checks = judge(oracle, [load_half("torch")], dtypes=DTYPES, seed=9, plan=plan, directory=bands["torch"])
    assert Verdict.INCONCLUSIVE in {check.verdict for check in checks}
    assert all(check.verdict is not Verdict.DIVERGENCE for check in checks)


def test_exact_operations_are_counted_not_dropped(bands: dict[str, Path], oracle: Half) -> None:
    pytest.importorskip("torch")
    checks = precision_battery(oracle, load_half("torch"), cases=3, dtypes=DTYPES, directory=bands["torch"])
    guard = next(check for check in checks if check.name.startswith("exact"))
    assert "embed" in guard.detail
    assert guard.compared > 0
    tally = Tally("torch", "bfloat16")
    tally.add("rich/embed", [(np.array([1.0, 2.5]), np.array([1.0, 2.0]), np.array([1.0, 2.0]))])
    assert "an exact operation is off" in tally.faults[0]


@pytest.mark.parametrize("pool", POOLS)
def test_a_reordered_model_is_the_same_model(pool: str, oracle: Half) -> None:
    case = rounding_case(POOLS[pool], BFLOAT16, case_rng(1, pool, 0))
    order = Reordering(case.spec, case_rng(1, pool, 1))
    plain = reference_values(oracle, case, BFLOAT16)
    moved = order.taps(reference_values(oracle, order.case(case), BFLOAT16).synced, back=True)
    for name, value in plain.synced.items():
        one_step = 2.0 * UNIT_ROUNDOFF["bfloat16"]  # a tie may round either way
        assert relative_difference(value, moved[name]).value <= one_step, name
    assert order.params(order.params(case.params), back=True).keys() == case.params.keys()
    for name, value in order.params(order.params(case.params), back=True).items():
        np.testing.assert_array_equal(value, case.params[name])


def test_resynchronized_gradients_are_gradients_when_nothing_rounds(backend: str, oracle: Half) -> None:
    half, spec = load_half(backend), POOLS["rich"]
    case = rounding_case(spec, FLOAT64, case_rng(2, "rich", 0))
    observed = true_gradients(half, case, reference_values(oracle, case, FLOAT64).synced, numerics=FLOAT64)
    integers = [half.array(value) for value in (case.token_ids_BT, case.positions_BT, case.segments_BT)]
    cotangent = half.array(case.cotangent_BTV)

    def scalar(params: dict) -> object:
        forward = half.module("model.transformer").forward
        logits = forward(
            params, integers[0], spec=spec, numerics=FLOAT64, positions_BT=integers[1], segments_BT=integers[2]
        )
        return (logits * cotangent).sum()

    names = ("model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.q_norm.weight", "lm_head.weight")
    params = {name: half.array(value) for name, value in case.params.items()}
    _, plain = half.value_and_grad(lambda some: scalar({**params, **some}), {name: params[name] for name in names})
    for name in names:
        difference = relative_difference(half.numpy(plain[name]), observed.gradients[name])
        assert difference.value <= gradient_limit(spec, num_positions=case.token_ids_BT.shape[1]), name


def test_the_truth_is_a_clean_copy(backend: str) -> None:
    pytest.importorskip("torch")
    broken = load_half(backend, patches=[GAIN_BEFORE_CAST[backend]])
    assert gradient_truth(broken) is not broken


def test_errors_and_masks_are_compared_without_erasing_anything() -> None:
    truth = np.array([1.0, -np.inf, 2.0])
    assert relative_error(np.array([1.0, -np.inf, 2.0]), truth) == 0.0
    assert relative_error(np.array([0.0, 1e-30]), np.zeros(2)) == np.inf
    assert mask_fault(np.array([1.0, np.nan, 2.0]), truth) is not None
    assert mask_fault(np.array([1.0, np.inf, 2.0]), truth) is not None
    assert mask_fault(np.array([1.0, -np.inf]), truth) is not None
    assert mask_fault(truth.copy(), truth) is None

"""Must-fail twins: for each check of the harness an input that it has to reject. A harness bug is caught when a twin
passes.

Each twin takes the module under test, freshly loaded with or without a patch, and returns whether the check still
bites.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np

from tessera_parity.loading import FreshModules, Patch, load_half
from tessera_parity.localize import STATE, Culprit
from tessera_parity.mutants.cases import battery_cases
from tessera_shared.errors import ParityError

Twin = Callable[[ModuleType], bool]


def notice(patch: Patch) -> tuple[str | None, Culprit | None, str]:
    """Load the patched module, run its twins, and name the first check that no longer bites."""
    twins = TWINS.get(patch.module, ())
    module = FreshModules(patch.module, (patch,)).load(patch.module)
    for check, twin in twins:
        if not _bites(twin, module):
            culprit = Culprit(half="harness", op=check, observed=1.0, limit=0.0, direction=STATE, detail=twin.__name__)
            return "twins", culprit, (twin.__doc__ or "").strip()
    return None, None, "every twin is still rejected"


def clean_twins() -> list[str]:
    """Return the twins that the harness as it is lets pass: an empty list when every check bites."""
    loose = []
    for name, twins in TWINS.items():
        module = FreshModules(name).load(name)
        loose += [f"{check}: {twin.__name__}" for check, twin in twins if not _bites(twin, module)]
    return loose


def _bites(twin: Twin, module: ModuleType) -> bool:
    try:
        return twin(module)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False


def _nan_on_one_side(compare: ModuleType) -> bool:
    """A NaN on one side is a difference."""
    return not compare.relative_difference(np.array([1.0, np.nan]), np.array([1.0, 0.0])).value < np.inf


def _error_of_either_sign(compare: ModuleType) -> bool:
    """An error counts whichever side is larger."""
    one, two = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.5])
    forward, backward = compare.relative_difference(one, two).value, compare.relative_difference(two, one).value
    return bool(forward == backward > 0.1)


def _one_wrong_element(compare: ModuleType) -> bool:
    """One wrong element among ten thousand counts in full."""
    good = np.ones(10_000)
    bad = good.copy()
    bad[77] = 0.0
    return bool(compare.relative_difference(good, bad).value == 1.0)


def _nothing_to_compare(compare: ModuleType) -> bool:
    """Agreement about nothing is not parity."""
    try:
        compare.relative_difference(np.zeros(0), np.zeros(0))
    except ParityError:
        return True
    return False


def _transposed(compare: ModuleType) -> bool:
    """The same numbers in another shape differ."""
    ones = np.ones((2, 3))
    return bool(np.isinf(compare.relative_difference(ones, ones.T).value))


def _second_array_differs(compare: ModuleType) -> bool:
    """Every array of a result is compared, not the first."""
    one = {"a": np.ones(2), "b": np.ones(2)}
    return bool(compare.compare_results(one, one | {"b": np.zeros(2)})[1].value == 1.0)


def _float32_is_not_float64(budget: ModuleType) -> bool:
    """Arithmetic done in float32 does not pass for float64."""
    x = np.random.default_rng(0).standard_normal((8, 8))
    narrow = (x.astype(np.float32) @ x.astype(np.float32)).astype(np.float64)
    gap = float(np.max(np.abs(narrow - x @ x)) / np.max(np.abs(x @ x)))
    return bool(gap > budget.mathematics_limit(1))


def _equalities_of_nothing(exact: ModuleType) -> bool:
    """A check that compared nothing is a divergence."""
    return bool(exact.Equalities("twins", "nothing", ("numpy",)).check().verdict == "divergence")


def _one_divergence_among_many(result: ModuleType) -> bool:
    """One divergence makes the run a divergence, and no check at all is inconclusive."""
    verdicts = (result.Verdict.PARITY, result.Verdict.DIVERGENCE, result.Verdict.PARITY)
    checks = [
        result.Check(
            subject="twins", name="twin", question=result.Question.EXACT, sides=("numpy",), verdict=verdict, cases=1,
            compared=1, observed=0.0, limit=0.0,
        )
        for verdict in verdicts
    ]  # fmt: skip
    run = result.Run(lane="quick", seed=0, environment={}, checks=checks)
    return bool(
        run.verdict == "divergence" and result.Run(lane="quick", seed=0, environment={}).verdict == "inconclusive"
    )


def _patch_of_nothing(loading: ModuleType) -> bool:
    """A planted bug that does not apply stops the run."""
    patch = loading.Patch(file="tessera_shared/reference/norms.py", find="no such source", replace="")
    try:
        loading.load_half("numpy", patches=(patch,))
    except ParityError:
        return True
    return False


def _errors_do_not_travel(localize: ModuleType) -> bool:
    """After one wrong operation the next ones, fed the reference's values, are right."""
    case = battery_cases(0)[0]
    oracle = load_half("numpy")
    wrong = load_half("numpy", patches=(_BROKEN_VALUES,))
    truth = localize.record_taps(oracle, case)
    own = localize.record_taps(wrong, case, replace=truth)
    departing = [name for name in truth if not np.array_equal(truth[name], own[name])]
    return departing == [f"layers.{layer}.attention.mix" for layer in range(case.spec.num_layers)]


_BROKEN_VALUES = Patch(
    file="tessera_shared/reference/attention.py",
    find='np.einsum("bnts,bsnh->btnh", probs_BNTS, values_BSNH)',
    replace='2.0 * np.einsum("bnts,bsnh->btnh", probs_BNTS, values_BSNH)',
)


def _shrunk_case_still_fails(shrink: ModuleType) -> bool:
    """What the shrinker hands back fails, and is smaller."""
    case = replace(battery_cases(0)[1])
    found = shrink.shrink(case, lambda candidate: candidate.token_ids_BT.shape[1] >= 2, max_attempts=60)
    return bool(found.case.token_ids_BT.shape[1] == 2 and found.layers == 1)


TWINS: dict[str, tuple[tuple[str, Twin], ...]] = {
    "tessera_parity.compare": (
        ("relative_difference", _nan_on_one_side),
        ("relative_difference", _error_of_either_sign),
        ("relative_difference", _one_wrong_element),
        ("relative_difference", _nothing_to_compare),
        ("relative_difference", _transposed),
        ("compare_results", _second_array_differs),
    ),
    "tessera_parity.budget": (("mathematics_limit", _float32_is_not_float64),),
    "tessera_parity.exact": (("Equalities", _equalities_of_nothing),),
    "tessera_parity.result": (("verdict", _one_divergence_among_many),),
    "tessera_parity.loading": (("load_half", _patch_of_nothing),),
    "tessera_parity.localize": (("record_taps", _errors_do_not_travel),),
    "tessera_parity.shrink": (("shrink", _shrunk_case_still_fails),),
}
"""The twins of each module, by the check that must reject them."""

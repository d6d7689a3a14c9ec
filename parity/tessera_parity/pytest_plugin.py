"""pytest plug-in: hold arrays, or a whole pair file, to parity inside your own tests.

`parity_compare(left, right)` asserts that two arrays are the same mathematics; `parity_pair(path)` runs `parity check`;
`parity_halves` gives this project's own implementations. Options: `--parity-seed`, `--parity-cases`.
Importing this module imports no framework: pytest loads it in every session of an environment that has it installed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tessera_parity.halves import Half
    from tessera_parity.result import Run

MOST_LINES = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--parity-seed` and `--parity-cases`."""
    group = parser.getgroup("parity", "numerical parity of two implementations")
    group.addoption("--parity-seed", type=int, default=0, help="seed of generated cases (default 0)")
    group.addoption("--parity-cases", type=int, default=20, help="generated cases of a pair (default 20)")


@pytest.fixture
def parity_compare() -> Callable[..., None]:
    """Return `compare(left, right, *, depth=1, length=1, name="value")`: fail unless both are the same mathematics.

    Arrays are NumPy, torch or JAX, in float64. The limit is `budget.mathematics_limit(depth, length=length)`: `depth`
    operations in sequence, whose longest sum has `length` terms. A failure names the worst element and both values.
    """
    return compare


@pytest.fixture
def parity_pair(request: pytest.FixtureRequest) -> Callable[..., "Run"]:
    """Return `check(path, *, cases=None, seed=None)`: run `parity check`, fail with its verdict unless it is parity.

    A relative path starts at the test's own folder. Cases and seed come from the command line unless given here.
    """

    def check(path: str | Path, *, cases: int | None = None, seed: int | None = None) -> "Run":
        from tessera_parity.pair_check import check_pair

        run = check_pair(
            request.path.parent / path,
            seed=request.config.getoption("--parity-seed") if seed is None else seed,
            cases=request.config.getoption("--parity-cases") if cases is None else cases,
        )
        _fail_unless_parity(run)
        return run

    return check


@pytest.fixture(scope="session")
def parity_halves() -> Mapping[str, "Half"]:
    """Return this project's halves by name: numpy (the oracle), torch and jax as far as they are installed.

    JAX's 64-bit types are on afterwards, for the whole session.
    """
    from tessera_parity.loading import NAMES, load_half
    from tessera_shared.errors import MissingDependency

    found: dict[str, Half] = {}
    for name in NAMES:
        try:
            found[name] = load_half(name)
        except MissingDependency:
            continue  # the mapping lacks it, and a test that asks for it fails by name
    return found


def compare(left: Any, right: Any, *, depth: int = 1, length: int = 1, name: str = "value") -> None:
    """Fail the running test unless two arrays agree to `budget.mathematics_limit(depth, length=length)`."""
    __tracebackhide__ = True
    from tessera_parity import budget
    from tessera_parity.compare import relative_difference

    a, b = _as_numpy(left, "left", name), _as_numpy(right, "right", name)
    limit = budget.mathematics_limit(depth, length=length)
    found = relative_difference(a, b)
    if found.value <= limit:
        return
    where = found.position
    values = (
        "" if found.reason.startswith(("shapes", "kinds")) else f": left {a[found.where]!r}, right {b[found.where]!r}"
    )
    lines = [
        f"{name} is not the same mathematics: {found.value:.3g} of the largest magnitude apart, limit {limit:.3g}",
        f"  because {found.reason}"
        if found.reason
        else f"  {found.compared} numbers compared, largest magnitude {found.scale:.6g}",
        f"  worst at {where}{values}",
    ]
    pytest.fail("\n".join(lines), pytrace=False)


def _fail_unless_parity(run: "Run") -> None:
    __tracebackhide__ = True
    from tessera_parity.report.summary import check_message, verdict_line
    from tessera_parity.result import Verdict

    if run.verdict is not Verdict.PARITY:
        departing = [check_message(check) for check in run.checks if check.verdict is not Verdict.PARITY]
        more = [f"... {len(departing) - MOST_LINES} more"] if len(departing) > MOST_LINES else []
        pytest.fail("\n".join([verdict_line(run), *departing[:MOST_LINES], *more]), pytrace=False)


def _as_numpy(value: Any, side: str, name: str) -> Any:
    """Return a NumPy array without importing the framework it came from; float32 and narrower are refused by name."""
    import numpy as np

    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype.name not in ("float64", "bool") and array.dtype.kind not in "iu":
        pytest.fail(
            f"{side} {name} = {array.dtype}: expected float64, because the same mathematics is asked for and rounding "
            f"to {array.dtype} hides it; try computing in float64",
            pytrace=False,
        )
    return array

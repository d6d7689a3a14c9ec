import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = "pytester"

PAIR = """
frameworks = ("numpy", "numpy")
inputs = lambda rng: rng.normal(size=(3, 5))
left = lambda params, x: x @ x.T
right = lambda params, x: FACTOR * (x @ x.T)
"""
PLUGIN = ("-p", "tessera_parity.pytest_plugin", "-p", "no:cacheprovider")


@pytest.fixture
def run(pytester: pytest.Pytester, pytestconfig: pytest.Config) -> object:
    """Run pytest on what was written; by `-p` only where no installed entry point has loaded the plug-in already."""
    installed = any(
        dist.entry_points and "tessera_parity" in {e.name for e in dist.entry_points} for dist in _pytest_plugins()
    )
    arguments = PLUGIN[2:] if installed else PLUGIN

    def go(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=source)
        return pytester.runpytest_inprocess(*arguments, *options)

    return go


def _pytest_plugins() -> list:
    from importlib.metadata import distributions

    return [dist for dist in distributions() if any(e.group == "pytest11" for e in dist.entry_points)]


def test_importing_the_plugin_imports_no_framework() -> None:
    program = (
        "import sys, tessera_parity.pytest_plugin\n"
        "print([n for n in ('torch', 'jax', 'numpy', 'hypothesis', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compare_passes_what_is_the_same_mathematics_and_names_the_worst_element_of_what_is_not(run) -> None:
    result = run(
        """
        import numpy as np

        def test_same(parity_compare):
            x = np.linspace(-1, 1, 12).reshape(3, 4)
            parity_compare(x @ x.T, np.einsum("td,sd->ts", x, x), length=4)
            parity_compare(np.array([1, 2]), np.array([1, 2]))

        def test_other(parity_compare):
            x = np.linspace(-1, 1, 12).reshape(3, 4)
            y = x.copy()
            y[2, 1] += 1e-9
            parity_compare(x, y, name="logits")
        """
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*logits is not the same mathematics*", "*worst at [[]2, 1]: left *, right *"])


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ("np.zeros(3)", "np.zeros(4)", "shapes (3,) and (4,)"),
        ("np.array([np.nan])", "np.array([0.0])", "NaN on one side only"),
        ("np.zeros(3, 'float32')", "np.zeros(3)", "left value = float32: expected float64"),
        ("np.array([1, 2])", "np.array([1, 3])", "2 and 3"),
    ],
)
def test_compare_says_why_arrays_cannot_be_the_same(run, left: str, right: str, said: str) -> None:
    result = run(f"import numpy as np\n\ndef test_it(parity_compare):\n    parity_compare({left}, {right})\n")
    result.assert_outcomes(failed=1)
    assert said in result.stdout.str()


def test_compare_takes_torch_and_jax_arrays(run) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    result = run(
        """
        import numpy as np

        def test_it(parity_compare, parity_halves):
            x = np.linspace(-1, 1, 7)
            both = [parity_halves[name].array(x) for name in ("torch", "jax")]
            parity_compare(both[0].requires_grad_(), both[1])
            assert set(parity_halves) == {"numpy", "torch", "jax"}
        """
    )
    result.assert_outcomes(passed=1)


def test_a_pair_file_is_checked_beside_the_test_with_the_options_of_the_command_line(
    run, pytester: pytest.Pytester
) -> None:
    Path(pytester.path / "pair.py").write_text("FACTOR = 1.0\n" + PAIR)
    Path(pytester.path / "other.py").write_text("FACTOR = 1.001\n" + PAIR)
    result = run(
        """
        def test_same(parity_pair):
            run = parity_pair("pair.py")
            assert (run.seed, run.checks[0].cases) == (5, 3)

        def test_other(parity_pair):
            parity_pair("other.py", cases=2, seed=1)
        """,
        "--parity-seed=5",
        "--parity-cases=3",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*DIVERGENCE | pair outputs*", "*divergence: pair outputs*"])

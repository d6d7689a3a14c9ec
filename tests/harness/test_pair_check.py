"""`parity check` on small pairs written into a temporary folder, and once on the worked example in docs/examples."""

import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tessera_parity import budget
from tessera_parity.adapter import open_pair
from tessera_parity.cli.main import run_command_line
from tessera_parity.compare import relative_difference
from tessera_parity.pair_check import check_pair
from tessera_parity.pair_evidence import nudge, split_tap
from tessera_parity.report.jsonl import read_run
from tessera_parity.result import Check, Run, Verdict
from tessera_shared.errors import ParityError

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

SOFTMAX = """
import numpy as np

frameworks = ("numpy", "numpy")


def params(rng):
    return {"weight": rng.normal(size=(5, 7))}


def inputs(rng, size):
    return {"x": rng.normal(size=(size, 7))}


def left(params, inputs, tap):
    logits = tap("layers.0.logits", inputs["x"] @ params["weight"].T)
    return tap("layers.0.probs", np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))


def right(params, inputs, tap):
    logits = tap("layers.0.logits", np.einsum("td,fd->tf", inputs["x"], params["weight"]))
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return tap("layers.0.probs", shifted / shifted.sum(-1, keepdims=True))
"""


def written(folder: Path, source: str, name: str = "pair.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def changed(old: str, new: str) -> str:
    assert SOFTMAX.count(old) == 1
    return SOFTMAX.replace(old, new)


def named(run: Run, subject: str, name: str) -> Check:
    return next(check for check in run.checks if (check.subject, check.name) == (subject, name))


def test_two_ways_to_write_one_function_are_in_parity_and_every_planted_change_is_caught(tmp_path: Path) -> None:
    run = check_pair(written(tmp_path, SOFTMAX), cases=6)
    assert run.verdict is Verdict.PARITY
    assert [mutant.name for mutant in run.mutants if not mutant.killed] == []
    assert {mutant.expected_op for mutant in run.mutants} == {"layers.0.logits", "layers.0.probs", "output"}
    assert all(mutant.named_op == mutant.expected_op for mutant in run.mutants)
    assert run.false_alarm_rate == 0.0
    assert run.false_alarm_runs == 8
    assert all(check.compared > 0 for check in run.checks)


@pytest.mark.parametrize(
    ("old", "new", "op"),
    [
        ('"td,fd->tf", inputs["x"]', '"td,fd->tf", 1.000001 * inputs["x"]', "logits"),
        ("shifted / shifted.sum(-1, keepdims=True)", "shifted / (shifted.sum(-1, keepdims=True) + 1e-9)", "probs"),
        ('logits = tap("layers.0.logits", np.einsum', 'logits = -tap("layers.0.logits", np.einsum', "probs"),
    ],
)
def test_a_departure_is_named_by_its_own_tap_not_by_those_after_it(tmp_path: Path, old: str, new: str, op: str) -> None:
    run = check_pair(written(tmp_path, changed(old, new)), cases=3)
    assert run.verdict is Verdict.DIVERGENCE
    departing = {check.name for check in run.checks if check.subject == "taps" and check.verdict is Verdict.DIVERGENCE}
    assert departing == {op}, "re-synchronized taps accuse nobody for what came before them"
    outputs = named(run, "pair", "outputs")
    assert (outputs.op, outputs.layer) == (op, 0)
    assert outputs.case is not None
    assert outputs.case["size"] == 1, "shrunk to the smallest size"
    assert all(mutant.killed for mutant in run.mutants), "a departing pair is still proven able to fail"


def test_the_replay_command_shows_the_same_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = changed('"td,fd->tf", inputs["x"]', '"td,fd->tf", 2.0 * inputs["x"]')
    run = check_pair(written(tmp_path, source), cases=3)
    case = named(run, "pair", "outputs").case
    assert case is not None
    words = case["command"].split()
    assert run_command_line([*words[1:], "--report", str(tmp_path / "out")]) == 1
    assert "logits" in capsys.readouterr().out
    assert named(read_run(tmp_path / "out"), "pair", "outputs").op == "logits"


def test_the_command_writes_every_report_and_its_exit_code_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, SOFTMAX)
    assert run_command_line(["check", str(path), "--cases", "3", "--report", str(tmp_path / "out")]) == 0
    assert "PARITY" in capsys.readouterr().out.splitlines()[0]
    files = {found.name for found in (tmp_path / "out").iterdir()}
    assert files >= {"result.json", "checks.jsonl", "junit.xml", "report.html"}


OUTPUT = 'return tap("layers.0.probs", '
BROKEN = {
    "does not parse": (SOFTMAX.replace("def left(params", "def left(:"), "pair.py:15: .*SyntaxError"),
    "missing right": (SOFTMAX.replace("def right", "def other"), "right = missing"),
    "missing inputs": (SOFTMAX.replace("def inputs", "def other"), "inputs = missing"),
    "missing frameworks": (SOFTMAX.replace("frameworks", "names"), "frameworks = None"),
    "unknown framework": (SOFTMAX.replace('"numpy")', '"mxnet")'), "frameworks = .*mxnet"),
    "raises at import": ("import a_package_that_is_not_there\n", "pair.py:1: .*ModuleNotFoundError"),
    "leaves at import": ("import sys\n\nsys.exit(3)\n", "pair.py:3: .*SystemExit"),
    "raises inside": (changed("shifted = np.exp(", "shifted = np.exq("), "pair.py:22: right raised AttributeError"),
    "wrong shapes inside": (changed('"td,fd->tf"', '"td,df->tf"'), "pair.py:21: right raised ValueError"),
    "shapes differ": (changed(OUTPUT + "shifted /", OUTPUT + "shifted.T /"), "shapes|raised"),
    "output shapes differ": (changed(OUTPUT + "shifted /", "return 1 + 0 * np.sum(shifted /"), "pair.py:20: output"),
    "narrow output": (changed("frameworks =", "left = lambda p, i: i['x'].astype('float32')\nframeworks =").replace(
        "def left", "def other"), "pair.py:4: left has float32 at its output"),
    "params no dict": (changed('{"weight": rng.normal(size=(5, 7))}', "3"), "pair.py:7: params = int"),
    "inputs raises": (changed("size=(size, 7)", "size=(size, -7)"), "pair.py:12: inputs raised"),
    "too many arguments": (changed("def left(params, inputs, tap)", "def left(a, b, c, d)"), "pair.py:15: left"),
    "a tap twice": (SOFTMAX.replace('tap("layers.0.probs"', 'tap("layers.0.logits"'), "seen twice"),
    "depth": (SOFTMAX + "\ndepth = 0\n", "depth = 0"),
    "gradients of numpy": (SOFTMAX + "\ngrad = True\n", "grad = True"),
    "nothing returned": (changed(OUTPUT + "np.exp(", 'tap("p", np.exp('), "pair.py:15: left returned no array"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_pair_file_is_told_in_one_line_with_its_place_and_leaves_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    source, expected = BROKEN[what]
    path = written(tmp_path, source)
    with pytest.raises(ParityError, match=expected) as caught:
        check_pair(path, cases=2)
    assert len(str(caught.value).splitlines()) == 1
    assert "pair.py:" in str(caught.value)
    assert run_command_line(["check", str(path), "--cases", "2", "--report", str(tmp_path / "out")]) == 2
    streams = capsys.readouterr()
    assert "Traceback" not in streams.out + streams.err
    assert len(streams.err.strip().splitlines()) == 1


def test_a_missing_file_leaves_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["check", str(tmp_path / "none.py")]) == 2
    assert "expected a Python file" in capsys.readouterr().err


def test_neighbors_are_imported_and_forgotten(tmp_path: Path) -> None:
    for folder, factor in (("a", "1.0"), ("b", "2.0")):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, f"FACTOR = {factor}\n", "neighbor_of_pair.py")
        source = "import neighbor_of_pair\n" + changed("shifted = np", "shifted = neighbor_of_pair.FACTOR * np")
        path = written(tmp_path / folder, source)
        with open_pair(path) as pair:
            assert float(factor) == pair.right.function.__globals__["neighbor_of_pair"].FACTOR
            assert str(path.parent) in sys.path
    assert "neighbor_of_pair" not in sys.modules
    assert str(tmp_path / "b") not in sys.path


def test_a_reference_says_which_side_moved(tmp_path: Path) -> None:
    moved = changed("shifted = np.exp(", "shifted = 1.5 ** (") + "\nreference = left\n"
    run = check_pair(written(tmp_path, moved), cases=3)
    assert named(run, "pair", "outputs").who == "right (numpy)"
    assert named(run, "reference", "left").verdict is Verdict.PARITY
    assert named(run, "reference", "right").verdict is Verdict.DIVERGENCE


def test_without_common_taps_outputs_are_still_compared_and_the_gap_is_said(tmp_path: Path) -> None:
    source = (
        changed("shifted = np.exp(", "shifted = 1.5 ** (")
        .replace(", tap)", ")")
        .replace("tap(", "str and (lambda _, v: v)(")
    )
    run = check_pair(written(tmp_path, source), cases=3)
    assert run.verdict is Verdict.DIVERGENCE
    assert named(run, "pair", "outputs").op is None
    assert any(item.startswith("localization") for item in run.left_out)


def test_a_tap_on_one_side_only_is_a_divergence(tmp_path: Path) -> None:
    source = changed('logits = tap("layers.0.logits", np.einsum', 'logits = tap("layers.0.scores", np.einsum')
    run = check_pair(written(tmp_path, source), cases=2)
    assert named(run, "taps", "names").observed == 2.0
    assert run.verdict is Verdict.DIVERGENCE


def test_a_side_that_contradicts_itself_is_a_false_alarm_and_turns_the_run_red(tmp_path: Path) -> None:
    source = changed("shifted = np.exp(", "shifted = (1 + 1e-6 * np.random.default_rng().random()) ** logits * np.exp(")
    run = check_pair(written(tmp_path, source), cases=3)
    assert run.false_alarm_rate == 0.5
    assert named(run, "harness", "each side against itself").verdict is Verdict.DIVERGENCE


def test_nan_on_one_side_is_a_divergence_and_on_both_is_not(tmp_path: Path) -> None:
    both = SOFTMAX.replace('inputs["x"]', 'np.where(inputs["x"] > 0.5, np.nan, inputs["x"])')
    assert check_pair(written(tmp_path, both), cases=3).verdict is Verdict.PARITY
    one = changed('"td,fd->tf", inputs["x"]', '"td,fd->tf", np.where(inputs["x"] > 0.5, np.nan, inputs["x"])')
    run = check_pair(written(tmp_path, one), cases=3)
    assert named(run, "pair", "outputs").observed == math.inf


def test_gradients_go_through_the_weight_mapping_and_a_wrong_one_is_seen(tmp_path: Path) -> None:
    source = """
        import torch

        frameworks = ("torch", "torch")
        grad = True
        params = lambda rng: {"weight": rng.normal(size=(3, 4)), "count": rng.integers(1, 5, 2)}
        inputs = lambda rng: (rng.normal(size=(2, 4)), 0.5)
        to_right = lambda params: {**params, "weight": params["weight"].T}


        def left(params, inputs):
            return {"y": torch.tanh(inputs[0] @ params["weight"].T * inputs[1]), "count": params["count"]}


        def right(params, inputs):
            logits = torch.einsum("td,df->tf", inputs[0], params["weight"])
            return {"y": torch.tanh(logits * inputs[1]), "count": params["count"]}
    """
    run = check_pair(written(tmp_path, source), cases=3)
    assert run.verdict is Verdict.PARITY
    assert named(run, "pair", "gradients").compared == 3 * 12
    stopped = source.replace('params["weight"].T}', 'params["weight"].detach().T}')
    run = check_pair(written(tmp_path, stopped), cases=3)
    assert named(run, "pair", "outputs").verdict is Verdict.PARITY
    assert named(run, "pair", "gradients").verdict is Verdict.DIVERGENCE
    assert "weight" in named(run, "pair", "gradients").detail


@given(
    value=arrays.arrays(np.float64, arrays.array_shapes(min_dims=0, max_dims=3), elements=st.floats(-1e6, 1e6)),
    seed=st.integers(0, 99),
    depth=st.integers(1, 40),
)
def test_a_planted_change_is_just_outside_the_budget_whatever_the_array(
    value: np.ndarray, seed: int, depth: int
) -> None:
    limit = budget.mathematics_limit(depth)
    apart = relative_difference(value, nudge(value, limit, np.random.default_rng(seed))).value
    assert limit < apart
    assert apart <= 12 * limit or not np.any(value)


@pytest.mark.parametrize(
    "value", [np.array([True, False]), np.array([3, 4]), np.array([np.nan]), np.array([[-np.inf]])]
)
def test_a_planted_change_is_seen_in_integers_booleans_and_what_is_not_finite(value: np.ndarray) -> None:
    changed_value = nudge(value, budget.mathematics_limit(), np.random.default_rng(0))
    assert relative_difference(value, changed_value).value == math.inf


def test_a_tap_name_is_split_at_its_number() -> None:
    assert split_tap("layers.3.attention.q_rope") == (3, "attention.q_rope")
    assert split_tap("blocks.12") == (12, "blocks")
    assert split_tap("final_norm") == (None, "final_norm")


def test_the_worked_example_finds_the_planted_rope_bug_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    monkeypatch.chdir(tmp_path)
    path = EXAMPLES / "gpt_pair_interleaved.py"
    assert run_command_line(["check", str(path), "--case", "0", "--size", "2", "--report", "out"]) == 1
    assert "attention.q_rope" in capsys.readouterr().out
    run = read_run(tmp_path / "out")
    outputs = named(run, "pair", "outputs")
    assert (outputs.op, outputs.layer) == ("attention.q_rope", 0)
    assert named(run, "taps", "attention.probs").verdict is Verdict.PARITY
    assert run.kill_rate == 1.0


def test_the_worked_example_is_in_parity_and_its_pair_file_has_at_most_thirty_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    assert len((EXAMPLES / "gpt_pair.py").read_text().splitlines()) <= 30
    switched_on = jax.config.jax_enable_x64
    run = check_pair(EXAMPLES / "gpt_pair.py", cases=2, size=2)
    assert run.verdict is Verdict.PARITY
    assert run.kill_rate == 1.0
    assert len(run.mutants) >= 24
    assert jax.config.jax_enable_x64 == switched_on, "other tests of the process keep their switch"

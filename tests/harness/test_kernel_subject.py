"""The subject `kernels`: what a worker says becomes checks; a crash, a missed bug and an idle configuration are red."""

import io
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("torch")

from tessera_parity.kernel_fuzz import Bug, Fuzzed, names_of
from tessera_parity.kernel_watch import Report
from tessera_parity.report import write_reports
from tessera_parity.result import EXIT_CODES, Check, Run, Verdict
from tessera_parity.runner import chosen_subjects
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK
from tessera_parity.subjects.kernels import checks_of, outcomes
from tessera_parity.terminal import print_run


def fuzzed(**changes: object) -> dict[str, object]:
    told = {
        "op": "rope",
        "cases": 9,
        "compared": 900,
        "observed": 0.4,
        "worst": "q of Case()",
        "errors": {"q": (0.1, 0.1)},
    }
    return asdict(Fuzzed(**(told | changes)))  # type: ignore[arg-type]


def bug(number: int, by: str) -> dict[str, object]:
    return asdict(Bug(op="rope", number=number, what="'a' -> 'b'", caught=bool(by), by=by, seconds=0.5))


def verdicts(report: Report) -> dict[str, Verdict]:
    return {check.name.partition(": ")[2]: check.verdict for check in checks_of(report, "cpu")}


def test_a_clean_op_whose_bugs_are_caught_is_parity() -> None:
    report = Report(op="rope", fuzzed=fuzzed(), bugs=[bug(1, "q: largest error"), bug(2, "k: mean error")])
    assert verdicts(report) == {"generated cases": Verdict.PARITY, "planted bugs are caught": Verdict.PARITY}


@pytest.mark.parametrize(
    ("report", "name", "verdict"),
    [
        (Report(op="rope", ended="exit status -11: no message", last="Case(rows=3)"), "finishes", Verdict.DIVERGENCE),
        (
            Report(op="rope", fuzzed=fuzzed(failure="q: largest error", failing_case="Case()", observed=2.0)),
            "generated cases",
            Verdict.DIVERGENCE,
        ),
        (
            Report(op="rope", fuzzed=fuzzed(configs_run={"a": 3, "b": 0}), bugs=[bug(1, "x")]),
            "every configuration",
            Verdict.DIVERGENCE,
        ),
        (
            Report(op="rope", fuzzed=fuzzed(), bugs=[bug(1, "x"), bug(2, "")]),
            "planted bugs are caught",
            Verdict.INCONCLUSIVE,
        ),
        (Report(op="rope", fuzzed=fuzzed()), "planted bugs are caught", Verdict.INCONCLUSIVE),
    ],
)
def test_what_is_wrong_is_red(report: Report, name: str, verdict: Verdict) -> None:
    assert verdicts(report)[name] is verdict
    assert EXIT_CODES[verdict] != 0


def test_a_failing_case_stands_in_its_check_for_parity_repro() -> None:
    report = Report(op="rope", fuzzed=fuzzed(failure="q: largest error", failing_case="Case(rows=1)", observed=2.0))
    (check,) = checks_of(report, "cpu")
    assert check.case == {"kind": "kernel", "op": "rope", "case": "Case(rows=1)", "device": "cpu"}
    assert check.detail == "q: largest error"


def test_planted_bugs_enter_the_kill_rate_and_every_report(tmp_path: Path) -> None:
    checks: list[Check] = list(checks_of(Report(op="rope", fuzzed=fuzzed(), bugs=[bug(1, "x"), bug(2, "")]), "cpu"))
    run = Run(lane="default", seed=0, environment={}, checks=checks, mutants=outcomes(checks))
    assert run.kill_rate == 0.5
    assert [mutant.name for mutant in run.mutants] == ["rope bug 1", "rope bug 2"]
    write_reports(run, tmp_path)
    shown = io.StringIO()
    print_run(run, tmp_path, Console(file=shown, width=160))
    assert "rope" in shown.getvalue()


@pytest.mark.parametrize("lane", [QUICK, DEFAULT, FULL])
def test_kernels_run_by_name_and_every_lane_says_so(lane: str) -> None:
    chosen, left_out = chosen_subjects([], lane=lane, against_hf=False)
    assert "kernels" not in [subject.name for subject in chosen]
    assert any(line.startswith("subject kernels: runs by name alone") for line in left_out)
    named, left_out = chosen_subjects(["kernels"], lane=lane, against_hf=False)
    assert [subject.name for subject in named] == ["kernels"]
    assert not left_out


def test_every_op_with_cases_is_found() -> None:
    assert {"fast_path", "packed_decode"} <= set(names_of())
    assert "case" not in names_of()

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessera_parity.budget import gamma
from tessera_parity.report import verdict_line, write_reports
from tessera_parity.report.annotations import annotations, print_annotations
from tessera_parity.report.heatmap import shade
from tessera_parity.report.html import page
from tessera_parity.report.jsonl import append_check, read_checks, read_run, to_plain, write_result
from tessera_parity.report.junit import junit
from tessera_parity.report.pictures import EDGE, Axis, Line, line_chart, quantile_pairs, ticks
from tessera_parity.report.summary import format_percent, over_limit, worst_check
from tessera_parity.result import Check, MutantOutcome, Question, Run, Verdict
from tessera_shared.errors import FormatError, ParityError

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
SERIES = ["error_by_layer", "limit_by_layer", "log_ratio", "log_ratio_calibration", "calibration_quantiles", "step"]
KEYS = st.sampled_from([*SERIES, "loss_torch", "loss_jax", "moment_a", "drift_a", "limit_drift_a", "limit", "other"])
TEXT = st.text(max_size=24)  # surrogates and control characters included
WORDS = st.text(st.characters(codec="utf-8"), max_size=24)


@st.composite
def checks(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT) -> Check:
    return Check(
        subject=draw(st.sampled_from(["forward", "gradients", "<b>&"])), name=draw(text),
        question=draw(st.sampled_from(Question)), sides=draw(st.sampled_from([("numpy", "torch"), ("torch",)])),
        verdict=draw(st.sampled_from(Verdict)), cases=draw(st.integers(0, 99)), compared=draw(st.integers(0, 10**12)),
        observed=draw(ANY_FLOAT), limit=draw(ANY_FLOAT), op=draw(st.none() | text),
        layer=draw(st.none() | st.integers(0, 90)), position=draw(st.none() | text), detail=draw(text),
        case=draw(st.none() | st.dictionaries(text, st.integers() | text, max_size=3)),
        series=draw(st.dictionaries(KEYS, st.lists(ANY_FLOAT, max_size=9), max_size=4)),
    )  # fmt: skip


@st.composite
def runs(draw: st.DrawFn, text: st.SearchStrategy[str] = TEXT) -> Run:
    mutant = MutantOutcome(
        name=draw(text), half="jax", kind="index", killed=draw(st.booleans()), killed_by="forward",
        expected_op="attention.q_rope", named_op=draw(st.sampled_from(["attention.q_rope", None, "out"])),
    )  # fmt: skip
    return Run(
        lane="quick", seed=draw(st.integers(0, 2**32)),
        environment={"os": draw(text), "torch": {"v": 1}, "jax": {"v": 2}, "differences": ["v: torch 1, jax 2"]},
        checks=draw(st.lists(checks(text), max_size=4)), mutants=[mutant] * draw(st.integers(0, 2)),
        left_out=draw(st.lists(text, max_size=2)), false_alarm_rate=0.0, false_alarm_runs=draw(st.integers(0, 9)),
    )  # fmt: skip


def sample(**changes: Any) -> Check:
    kept: dict[str, Any] = {
        "subject": "forward", "name": "attention.q_rope", "question": Question.MATHEMATICS, "sides": ("numpy", "jax"),
        "verdict": Verdict.DIVERGENCE, "cases": 40, "compared": 1200, "observed": 0.003, "limit": 1e-12,
        "op": "attention.q_rope", "layer": 1, "position": "row 1, token 5", "case": {"seed": 3},
    }  # fmt: skip
    return Check(**(kept | changes))


class Reader(HTMLParser):
    """Collects what a page would run or fetch, and whether its tags nest."""

    VOID = ("meta", "link", "input", "br", "path", "line", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")], "inline handlers would be injected code"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@settings(max_examples=60)
@given(run=runs())
@example(run=Run(lane="quick", seed=0, environment={}))
def test_any_run_renders_as_one_well_nested_page_that_fetches_nothing(run: Run) -> None:
    text = page(run, run_directory="parity-runs/x")
    reader = read(text)
    assert reader.scripts == 1
    assert reader.addresses == ["data:,"]
    assert "@import" not in text
    text.encode("utf-8")


@given(run=runs(WORDS))
def test_a_run_comes_back_from_its_json(run: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("run")
    write_result(run, directory)
    again = read_run(directory)
    assert to_plain(again.to_json()) == to_plain(run.to_json())
    assert [to_plain(check.series) for check in read_checks(directory)] == [
        to_plain(check.series) for check in run.checks
    ]
    assert (
        json.loads((directory / "result.json").read_text("utf-8"), parse_constant=pytest.fail)["verdict"] == run.verdict
    )


@given(run=runs())
def test_junit_has_one_test_case_a_check_and_one_failure_a_divergence(run: Run) -> None:
    suite = ElementTree.fromstring(ElementTree.tostring(junit(run)))[0]
    cases = suite.findall("testcase")
    assert len(cases) == len(run.checks) == int(suite.attrib["tests"])
    for check, case in zip(run.checks, cases, strict=True):
        assert [child.tag for child in case] == {Verdict.DIVERGENCE: ["failure"], Verdict.PARITY: []}.get(
            check.verdict, ["error"]
        )
        assert all("\n" not in child.attrib["message"] for child in case)


@given(run=runs())
def test_annotations_are_one_line_each_and_silent_about_parity(run: Run) -> None:
    lines = annotations(run)
    undecided = sum(check.verdict is not Verdict.PARITY for check in run.checks)
    assert len(lines) == undecided + sum(not mutant.killed for mutant in run.mutants)
    for line in lines:
        assert len(line.splitlines()) == 1
        title = line.split("title=", 1)[1].split("::", 1)[0]
        assert ":" not in title
        assert "," not in title


def test_annotations_are_printed_only_for_a_runner(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(lane="quick", seed=0, environment={}, checks=[sample()])
    print_annotations(run, {})
    assert capsys.readouterr().out == ""
    print_annotations(run, {"GITHUB_ACTIONS": "true"})
    assert capsys.readouterr().out.startswith("::error title=parity%3A forward attention.q_rope::divergence: forward")


def test_write_reports_leaves_four_files_and_the_verdict_in_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    run = Run(lane="quick", seed=0, environment={}, checks=[sample()])
    write_reports(run, tmp_path / "a" / "b")
    written = {path.name: path.read_text("utf-8") for path in (tmp_path / "a" / "b").iterdir()}
    assert written.keys() == {"result.json", "checks.jsonl", "junit.xml", "report.html"}
    assert all("divergence" in text and "attention.q_rope" in text for text in written.values())


def test_an_unusable_report_directory_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParityError, match=r"report directory = .*file: expected a writable folder"):
        write_reports(Run(lane="quick", seed=0, environment={}), tmp_path / "file")


def test_checks_survive_an_interrupted_run_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    append_check(tmp_path, sample(observed=math.inf))
    append_check(tmp_path, sample(name="mlp.act"))
    with (tmp_path / "checks.jsonl").open("a") as file:
        file.write('{"subject": "forw')
    found = read_checks(tmp_path)
    assert [check.name for check in found] == ["attention.q_rope", "mlp.act"]
    assert found[0].observed == math.inf


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"format_version": 2}', '{"format_version": 1}', '{"format_version": 1, "checks": [{}]}']
)
def test_a_damaged_result_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "result.json").write_text(damage)
    with pytest.raises(FormatError):
        read_run(tmp_path)


def test_text_of_a_run_is_escaped_wherever_it_appears() -> None:
    nasty = "</title><script>alert(1)</script>\"'&"
    check = sample(
        subject=nasty,
        name=nasty,
        op=nasty,
        position=nasty,
        detail=nasty,
        case={nasty: nasty},
        dtype=nasty,
        device=nasty,
    )
    layered = sample(subject=nasty, name=nasty, series={"error_by_layer": [1.0], nasty: [1.0, 2.0], "log_ratio": [0.1]})
    mutant = MutantOutcome(
        name=nasty, half=nasty, kind=nasty, killed=False, killed_by=nasty, expected_op=nasty, named_op=nasty
    )
    environment = {nasty: nasty, "torch": {nasty: nasty}}
    run = Run(
        lane=nasty,
        seed=0,
        environment=environment,
        checks=[check, layered],
        mutants=[mutant],
        left_out=[nasty],
        started=nasty,
    )
    reader = read(page(run, run_directory=nasty))
    assert reader.scripts == 1
    assert "".join(reader.text).count(nasty) >= 12


def test_a_pooled_ratio_lends_its_limit_to_no_error() -> None:
    pooled = sample(question=Question.ROUNDING, series={"error_by_layer": [0.1, 0.2]}, verdict=Verdict.PARITY)
    text = page(Run(lane="quick", seed=0, environment={}, checks=[pooled]), run_directory="x")
    assert 'class="heat"' not in text
    assert "Error against depth" in text
    assert ">limit</li>" not in text


def test_what_was_left_out_for_one_reason_is_counted_and_every_name_is_kept() -> None:
    left_out = [f"mutant m{index}: for lack of time" for index in range(7)] + ["gpu subjects: no accelerator"]
    text = "".join(read(page(Run(lane="quick", seed=0, environment={}, left_out=left_out), run_directory="x")).text)
    assert "7 × for lack of time" in text
    assert all(f"mutant m{index}" in text for index in range(7))
    assert "gpu subjects: no accelerator" in text


def test_the_worst_check_is_a_localized_divergence_and_nan_is_over_every_limit() -> None:
    found = worst_check(
        Run(
            lane="quick", seed=0, environment={},
            checks=[
                sample(verdict=Verdict.PARITY, observed=9.0), sample(op=None, observed=math.inf), sample(observed=0.1),
            ],
        )
    )  # fmt: skip
    assert found is not None
    assert found.observed == 0.1
    assert over_limit(sample(observed=math.nan)) == math.inf
    assert over_limit(sample(observed=1e-300, limit=0.0)) == math.inf
    assert over_limit(sample(observed=0.0, limit=0.0)) == 0.0
    assert over_limit(sample(observed=-2.0, limit=1.0)) == 2.0, "two-sided: too accurate is over the limit too"


def test_the_verdict_line_says_what_was_not_measured_and_never_rounds_a_loss_away() -> None:
    line = verdict_line(Run(lane="quick", seed=7, environment={}, checks=[sample()]))
    assert line.startswith("DIVERGENCE | forward attention.q_rope at attention.q_rope, layer 1, row 1, token 5 | kill")
    assert "kill rate not measured" in line
    assert "false alarms not measured" in line
    assert line.endswith("seed 7")
    assert format_percent(9999 / 10000) == "99.99 %"
    assert format_percent(1.0) == "100 %"
    assert format_percent(1e-5) == "0.001 %"


@given(ratio=st.floats(0.0, 1e30))
def test_colors_of_the_heat_map_grow_with_the_error_and_change_hue_at_the_limit(ratio: float) -> None:
    assert shade(ratio) <= shade(2 * ratio)
    assert (shade(ratio) >= 7) == (ratio > 1)
    assert shade(math.inf) == shade(math.nan) == 9
    assert [shade(10.0**power) for power in (-7, -5, -3.5, -2.5, -1.5, -0.5, 0.5, 2, 4)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9, unique=True), log=st.booleans())
def test_ticks_are_few_rising_and_inside_their_axis(values: list[float], log: bool) -> None:
    low, high = min(values), max(values)
    if log:
        low, high = 10.0 ** math.floor(low / 1e5), 10.0 ** math.ceil(high / 1e5 + 1)
    found = ticks(Axis(low, high, 0.0, 100.0, log), most=6)
    assert 0 < len(found) <= 8
    assert found == sorted(found)
    margin = EDGE * (high - low) + gamma(4) * max(abs(low), abs(high))
    assert all(low - margin <= value <= high + margin for value in found)


def test_a_spike_survives_thinning_and_what_is_not_finite_is_crossed() -> None:
    ys = [1.0] * 5000
    ys[1234], ys[4321] = 50.0, math.nan
    chart = line_chart([Line(name="loss", xs=list(map(float, range(5000))), ys=ys)], x_label="step", y_label="loss")
    assert chart.count('class="cross"') == 1
    assert chart.count("L") < 300
    heights = {
        round(float(pair.split()[1]), 1) for pair in chart.split('d="M')[1].split('"')[0].replace("L", "|").split("|")
    }
    assert len(heights) > 1, "the spike is drawn"


@given(sample_size=st.integers(1, 60), calibration_size=st.integers(0, 60))
def test_quantiles_of_a_sample_against_itself_lie_on_the_diagonal(sample_size: int, calibration_size: int) -> None:
    values = np.random.default_rng(sample_size).normal(size=sample_size).tolist()
    xs, ys = quantile_pairs(values, values)
    # the place of a quantile rounds, and is multiplied by a gap of at most twice the largest
    limit = gamma(4 * sample_size) * max(map(abs, ys))
    assert all(abs(x - y) <= 2.0 * limit for x, y in zip(xs, ys, strict=True))
    xs, ys = quantile_pairs(values, np.random.default_rng(calibration_size).normal(size=calibration_size).tolist())
    assert len(xs) == len(ys) == sample_size
    assert xs == sorted(xs)

import io
import json
from pathlib import Path

import pytest

from tessera_parity import runner, store
from tessera_parity.report.jsonl import read_checks
from tessera_parity.result import Check, MutantOutcome, Question, Run, Verdict
from tessera_parity.runner import chosen_subjects, execute, false_alarms, make_context, subjects_named
from tessera_parity.store import Settings
from tessera_parity.subjects.context import QUICK, Subject
from tessera_parity.terminal import headline, print_run
from tessera_shared.errors import FormatError, MissingDependency, ParityError


def a_check(subject="one", verdict=Verdict.PARITY, observed=0.0):
    return Check(
        subject=subject,
        name="thing",
        question=Question.MATHEMATICS,
        sides=("numpy", "torch"),
        verdict=verdict,
        cases=3,
        compared=30,
        observed=observed,
        limit=1e-12,
        op="attention.q_rope" if verdict is Verdict.DIVERGENCE else None,
        layer=1 if verdict is Verdict.DIVERGENCE else None,
        case={"seed": [0]},
    )


@pytest.fixture
def fake_subjects(monkeypatch):
    calls = []

    def subject(name, checks, fail=None):
        def run(context):
            calls.append(name)
            yield from checks
            if fail is not None:
                raise fail

        return Subject(name=name, about=name, run=run)

    def install(*subjects):
        monkeypatch.setattr(runner, "SUBJECTS", tuple(subjects))
        monkeypatch.setattr(runner, "make_context", lambda settings, advance: (_Context(), []))
        monkeypatch.setattr(runner.environment, "describe", lambda torch, jax: {})
        return calls

    return subject, install


class _Context:
    torch = jax = None


def quiet(what):
    del what


def test_an_interrupted_run_keeps_its_checks_and_resumes_without_repeating_finished_subjects(tmp_path, fake_subjects):
    subject, install = fake_subjects
    one, two = subject("one", [a_check()]), subject("two", [a_check("two")], fail=KeyboardInterrupt())
    calls = install(one, two)
    opened = store.create(tmp_path / "run", Settings(subjects=("one", "two")))
    with pytest.raises(KeyboardInterrupt):
        execute(opened, advance=quiet, proof=False)
    assert [check.subject for check in read_checks(tmp_path / "run")] == ["one", "two"]
    install(one, subject("two", [a_check("two")]))
    again = store.reopen(tmp_path / "run")
    assert [check.subject for check in again.checks] == ["one"]
    run = execute(again, advance=quiet, proof=False)
    assert [check.subject for check in run.checks] == ["one", "two"]
    assert calls == ["one", "two", "two"]


def test_a_subject_without_checks_is_an_error_and_not_parity(tmp_path, fake_subjects):
    subject, install = fake_subjects
    install(subject("empty", []))
    opened = store.create(tmp_path, Settings(subjects=("empty",)))
    with pytest.raises(ParityError, match="gave 0 checks"):
        execute(opened, advance=quiet, proof=False)


def test_a_missing_package_is_left_out_by_name_or_an_error_when_asked_for(tmp_path, fake_subjects):
    subject, install = fake_subjects
    install(subject("one", [a_check()]), subject("two", [], fail=MissingDependency("transformers = not installed")))
    run = execute(store.create(tmp_path / "a", Settings(subjects=("one", "two"))), advance=quiet, proof=False)
    assert run.left_out == ["subject two: transformers = not installed"]
    with pytest.raises(MissingDependency):
        execute(store.create(tmp_path / "b", Settings(subjects=("two",))), advance=quiet, proof=False, explicit=True)


def test_an_unwritable_directory_is_refused_before_any_work():
    with pytest.raises(ParityError, match="expected a writable directory") as caught:
        store.create(Path("/proc/nobody/writes/here"), Settings(subjects=("ops",)))
    assert "\n" not in str(caught.value)


def test_two_runs_are_never_mixed_and_a_missing_run_is_not_resumed(tmp_path):
    store.create(tmp_path, Settings(subjects=("ops",)))
    with pytest.raises(ParityError, match="try --resume"):
        store.create(tmp_path, Settings(subjects=("ops",)))
    with pytest.raises(ParityError, match=r"expected a directory with state\.json"):
        store.reopen(tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"flavor": 1}, "finished": []}', "{"])
def test_a_torn_state_is_told_in_one_line(tmp_path, text):
    (tmp_path / store.STATE_FILE).write_text(text)
    with pytest.raises(FormatError, match="expected the state of a run"):
        store.reopen(tmp_path)


def test_settings_survive_the_state_file(tmp_path):
    settings = Settings(subjects=("ops", "block"), lane=QUICK, seed=7, cases=3, only_half="jax", left_out=("a: b",))
    store.create(tmp_path, settings)
    assert store.reopen(tmp_path).settings == settings
    assert json.loads((tmp_path / store.STATE_FILE).read_text())["finished"] == []


def test_an_unknown_subject_gets_a_suggestion():
    with pytest.raises(ParityError, match="try gradients") as caught:
        subjects_named(["gradient"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ParityError, match="without --model"):
        chosen_subjects(["model"], lane=QUICK, against_hf=False)


def test_what_the_quick_lane_leaves_out_is_said_and_can_be_asked_for():
    chosen, left_out = chosen_subjects([], lane=QUICK, against_hf=False)
    assert "witness" not in [subject.name for subject in chosen]
    assert any("witness" in line for line in left_out)
    chosen, left_out = chosen_subjects([], lane=QUICK, against_hf=True, model="nano")
    assert {"witness", "model"} <= {subject.name for subject in chosen}
    assert [line.partition(":")[0] for line in left_out] == ["subject kernels"]


def test_no_framework_at_all_is_an_environment_error(monkeypatch):
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="halves = none") as caught:
        make_context(Settings(subjects=("ops",)), quiet)
    assert caught.value.exit_code == 4


def test_only_one_half_says_that_the_other_was_left_out():
    pytest.importorskip("torch")
    settings = Settings(subjects=("ops",), only_half="torch")
    context = make_context(settings, quiet)
    assert context.jax is None
    assert context.torch is not None
    assert runner.installed_halves(settings) == (["torch"], ["half jax: --only-half torch"])


@pytest.mark.parametrize(("observed", "rate"), [(0.0, 0.0), (1.0, 1.0)])
def test_false_alarms_are_counted_over_other_seeds(monkeypatch, observed, rate):
    seeds = []

    def run(context):
        seeds.append(context.seed)
        yield a_check(observed=observed)

    monkeypatch.setattr(runner, "SUBJECTS", tuple(Subject(name=n, about=n, run=run) for n in runner.RERUN))
    monkeypatch.setitem(runner.RERUN_LIMIT, QUICK, 5)
    context = make_context(Settings(subjects=("ops",), only_half="torch", lane=QUICK), quiet)
    assert false_alarms(context, Settings(subjects=(), lane=QUICK), seconds=60.0) == (5, rate)
    assert len(set(seeds)) == 5
    assert 0 not in seeds


def a_run(checks):
    return Run(lane=QUICK, seed=0, environment={}, checks=checks, false_alarm_rate=0.0, false_alarm_runs=12)


def test_the_summary_fits_a_screen_and_starts_with_the_verdict():
    from rich.console import Console

    subjects = [a_check(subject.name, observed=1e-14) for subject in runner.SUBJECTS]
    red = [a_check(f"red{index}", Verdict.DIVERGENCE, 1.0) for index in range(9)]
    console = Console(width=80, record=True, file=io.StringIO())
    print_run(a_run(subjects + red), Path("run"), console)
    lines = console.export_text().splitlines()
    assert lines[0].startswith("DIVERGENCE · kill rate not measured")
    assert "false alarms 0/12" in lines[0]
    assert len(lines) <= 45
    assert any("attention.q_rope, layer 1" in line for line in lines)
    assert any("slack" in line for line in lines)
    assert any("parity repro" in line for line in lines)


def test_a_run_without_checks_is_inconclusive():
    assert headline(a_run([])).startswith("INCONCLUSIVE")


def test_the_quick_lane_gives_proof_and_reruns_what_is_left_and_never_nothing():
    assert runner.proof_seconds(QUICK, 10.0) == 12.0
    assert runner.proof_seconds(QUICK, 1000.0) == 5.0
    assert runner.proof_seconds("full", 1000.0) is None
    assert runner.rerun_seconds(QUICK, 10.0) == 4.0
    assert runner.rerun_seconds(QUICK, 1000.0) < 0.0
    context = make_context(Settings(subjects=("ops",), only_half="torch", lane=QUICK), quiet)
    assert false_alarms(context, Settings(subjects=(), lane=QUICK), seconds=-1.0) == (1, 0.0)


def test_two_workers_find_what_one_finds(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    settings = Settings(subjects=("streams", "files"), lane=QUICK, cases=2)
    alone = execute(store.create(tmp_path / "one", settings), advance=quiet, proof=False)
    together = execute(store.create(tmp_path / "two", settings), advance=quiet, proof=False, num_workers=2)
    seen = [[(c.subject, c.name, c.sides, c.compared, c.observed) for c in run.checks] for run in (alone, together)]
    assert seen[0] == seen[1]
    assert sorted(store.reopen(tmp_path / "two").finished) == ["files", "streams"]


@pytest.mark.parametrize(("num_missed", "verdict"), [(0, "parity"), (1, "parity"), (2, "inconclusive")])
def test_a_run_that_misses_what_was_planted_is_not_parity(num_missed, verdict):
    outcomes = [
        MutantOutcome(
            name=f"bug {index}", half="torch", kind="algebra", killed=index >= num_missed, killed_by=None,
            expected_op=None, named_op=None,
        )
        for index in range(20)
    ]  # fmt: skip
    assert runner._caught(outcomes).verdict == verdict
    assert runner._caught([]).verdict == "inconclusive"
    assert runner._applied(outcomes, ["moved away"]).verdict == "divergence"
    assert runner._applied([], []).verdict == "divergence"

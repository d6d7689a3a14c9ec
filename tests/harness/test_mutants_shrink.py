"""Caught bugs become files that tell the bug from its absence; what has no smaller form says why."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tessera_parity.loading import load_half
from tessera_parity.mutants import shrinking
from tessera_parity.mutants.battery import program_of
from tessera_parity.mutants.cases import battery_cases, prepared_logits
from tessera_parity.mutants.diagnose import QUESTIONS, every_probe
from tessera_parity.mutants.shrinking import Shrinking, figures, read_results, shrink_all
from tessera_parity.repro_files import Confirmed
from tessera_parity.repro_program import departure, evaluate
from tessera_parity.repro_rounded import RoundedLogSoftmax, RoundedTap
from tessera_parity.subjects.context import Context
from tessera_shared.errors import ParityError

pytest.importorskip("torch")

NAMES = ["torch-top-k-keeps-one-more", "reference-ignored-labels-count", "shared-warmup-from-zero"]


def context() -> Context:
    return Context(numpy=load_half("numpy"), torch=load_half("torch"), jax=None)


def test_caught_bugs_are_shrunk_written_run_and_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shrink_all(context(), tmp_path, names=NAMES)
    assert [one.killed for one in found] == [True] * 3
    assert [one.reproduced for one in found] == [True, True, False]
    assert all(one.tokens == 1 for one in found[:2])
    assert "its own smallest case" in found[2].reason
    assert all((tmp_path / file).exists() for one in found for file in one.files)
    monkeypatch.setattr(shrinking, "shrink_one", lambda *given: pytest.fail("done already"))
    assert shrink_all(context(), tmp_path, names=NAMES) == found == read_results(tmp_path)
    lines = figures(found)
    assert lines[0].startswith("all: killed 3 of 3, shrinkable 2, reproduced 2; median 1, most 1 tokens")
    assert any(line.startswith("no repro for 1: ") for line in lines)


def test_a_file_that_is_red_without_the_bug_too_reproduces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrinking, "confirm", lambda path, python_path=(): Confirmed(True, "observed 1", 1))
    found = shrink_all(context(), tmp_path, names=NAMES[:1])
    assert [(one.red, one.other_red, one.green) for one in found] == [(True, True, False)]
    assert not found[0].reproduced
    assert figures(found)[-1].startswith("NOT reproduced: torch-top-k-keeps-one-more")


def test_a_torn_line_and_a_changed_patch_are_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = Shrinking(name=NAMES[0], half="torch", kind="sampling", patch=("file", "find", "other"), killed=True)
    monkeypatch.setattr(shrinking, "shrink_one", lambda bench, mutant, out: replace(
        blank, patch=(mutant.file, mutant.find, mutant.replace), detail="again"
    ))  # fmt: skip
    (tmp_path / shrinking.RESULTS).write_text('{"name": "torn')
    assert read_results(tmp_path) == []
    assert shrink_all(context(), tmp_path, names=NAMES[:1])[0].detail == "again"
    assert len(read_results(tmp_path)) == 1


def test_every_probe_that_localization_may_name_is_a_program_that_clean_halves_pass() -> None:
    oracle, torch = load_half("numpy"), load_half("torch")
    subjects = {subject for subject, asked in QUESTIONS.items() if subject in asked} - {"forward", "rounding"}
    seen = set()
    for probe in every_probe(0):
        if probe.subject in subjects and not (
            probe.subject == "decode" and probe.program is None and probe.op == "cache"
        ):
            program = program_of(oracle, probe)
            assert program is not None, (probe.subject, probe.op)
            if probe.subject in ("gradients", "training"):  # the oracle takes a complex step for every number
                program = next(program.smaller())[1]
            assert departure(oracle, torch, program) is None, (probe.subject, probe.op)
            seen.add(probe.subject)
    assert seen == subjects
    for op in ("attention.norm", "attention.probs", "logits"):
        assert departure(oracle, torch, RoundedTap(oracle=oracle, case=battery_cases(0)[1], op=op)) is None
    logits_BTV = prepared_logits(0)[0].astype(np.float32).astype(np.float64)
    log_softmax = RoundedLogSoftmax(oracle=oracle, logits_BTV=logits_BTV)
    assert departure(oracle, torch, log_softmax) is None
    assert evaluate(oracle, log_softmax) == 0.0


def test_a_package_that_is_not_there_cannot_be_planted(tmp_path: Path) -> None:
    from tessera_parity.loading import Patch

    with pytest.raises(ParityError, match=r"package = 'tessera_nowhere'"):
        shrinking.plant_on_disk(Patch(file="tessera_nowhere/a.py", find="a", replace="b"), tmp_path)


def test_shrinking_is_not_for_the_quick_lane(capsys: pytest.CaptureFixture[str]) -> None:
    from tessera_parity.cli.main import run_command_line

    assert run_command_line(["mutants", "--shrink", "--quick"]) == 2
    assert "--shrink with --quick" in capsys.readouterr().err

"""A report's divergences, one of every kind: their files are red with the bug on disk, green without it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tessera_parity import repro, runner
from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.mutants.engine import catalogue
from tessera_parity.mutants.shrinking import plant_on_disk
from tessera_parity.report.jsonl import to_plain
from tessera_parity.repro import Repro, replay, rerun_command
from tessera_parity.repro_files import Confirmed
from tessera_parity.result import Verdict
from tessera_parity.store import Settings
from tessera_parity.subjects import SUBJECTS
from tessera_parity.subjects.context import QUICK, Context

pytest.importorskip("torch")

RAISING = Patch(
    file="tessera_torch/model/mlp.py", find="gate_BTF.to(up)", replace="gate_BTF.to(up).reshape(-1, 5, 7, 11)"
)

TREES: dict[str, tuple[str, ...]] = {
    "model": ("torch-norm-eps-1e-6", "torch-documents-see-each-other"),
    "state": (
        "torch-divergence-gradient-without-tau",
        "torch-bias-correction-off-by-one",
        "torch-mean-of-micro-means",
        "torch-top-p-drops-the-crossing-token",
    ),
    "gradient": ("torch-residual-detached",),
    "rounding": ("torch-norm-gain-before-cast", "torch-logits-in-compute-dtype"),
}
"""Bugs that are planted together, each seen by a subject of its own; a tree on disk costs a process."""

KINDS: tuple[tuple[str, str, int, str], ...] = (
    # tree, subject, cases, start of the check's name
    ("model", "ops", 2, "model.norms.rms_norm"),
    ("model", "forward", 1, "attention.norm"),
    ("model", "block", 6, "attention_block"),
    ("model", "decode", 1, "teacher-forced logits"),
    ("model", "laws", 1, "packing"),
    ("state", "losses", 2, "forward_kl slope"),
    ("state", "optimizer", 2, "params"),
    ("state", "optimizer", 2, "train_step"),
    ("gradient", "gradients", 1, "model.embed_tokens.weight"),
    ("rounding", "rounding", 6, "rich attention.norm"),
    ("rounding", "rounding", 6, "exact operations"),
)

RUN_ALL = """
import contextlib, io, json, runpy, sys
found, default = {}, sys.excepthook
for path in sys.argv[1:]:
    said, status, sys.excepthook = io.StringIO(), 0, default
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as left:
            status = left.code
        except Exception as error:
            status = 1
            sys.excepthook(type(error), error, None)
    found[path] = [status, said.getvalue().strip().splitlines()]
print(json.dumps(found))
"""
"""Runs many files in one process, so that a framework is imported once."""


def planted(tree: str) -> tuple[Patch, ...]:
    if tree == "raising":
        return (RAISING,)
    patches = {mutant.name: mutant.patch for mutant in catalogue()}
    return tuple(patches[name] for name in TREES[tree])


def on_disk(patches: Sequence[Patch], folder: Path) -> Path:
    plant_on_disk(patches[0], folder)
    for patch in patches[1:]:
        patch.plant_in(folder)
    return folder


def run_files(files: Sequence[Path], first: Path | None = None) -> dict[str, tuple[int, list[str]]]:
    path = [str(entry) for entry in ([first] if first else []) + [entry for entry in sys.path if entry]]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *map(str, files)], capture_output=True, text=True, check=True,
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    return {name: (status, lines) for name, (status, lines) in json.loads(done.stdout).items()}


def first_red(half: Half, subject: str, cases: int, start: str = "") -> dict[str, Any]:
    """Return a subject's first divergence whose name starts so; what would come after it is not run."""
    context = Context(numpy=load_half("numpy"), torch=half, jax=None, lane=QUICK, cases=cases, seed=0)
    run = next(one for one in SUBJECTS if one.name == subject).run
    for check in run(context):
        if check.verdict is Verdict.DIVERGENCE and check.name.startswith(start):
            found: dict[str, Any] = to_plain(asdict(check))
            return found
    pytest.fail(f"{subject} {start}: nothing departs")


def settings_of(subject: str, cases: int) -> Settings:
    return Settings(subjects=(subject,), lane=QUICK, cases=cases, only_half="torch")


@pytest.fixture
def unconfirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are run all together by the test instead."""
    monkeypatch.setattr(repro, "confirm", lambda path, python_path=(): Confirmed(True, "not run yet", 1))


@pytest.fixture(scope="module")
def halves() -> Mapping[str, Half]:
    return {tree: load_half("torch", patches=planted(tree)) for tree in (*TREES, "raising")}


def replays_of(half: Half, checks: list[dict[str, Any]], out: Path, settings: Settings) -> Iterator[Repro]:
    return replay(checks, {"numpy": load_half("numpy"), "torch": half}, out, settings=settings)


@pytest.mark.usefixtures("unconfirmed")
def test_every_kind_of_divergence_has_files_that_are_red_with_the_bug_and_green_without(
    halves: Mapping[str, Half], tmp_path: Path
) -> None:
    files: dict[str, list[Path]] = {tree: [] for tree in TREES}
    for tree, subject, cases, start in KINDS:
        red = first_red(halves[tree], subject, cases, start)
        found = next(replays_of(halves[tree], [red], tmp_path / tree / start, settings_of(subject, cases)))
        assert found.files, (subject, start, found.detail)
        assert found.layers in (None, 1), (subject, start)
        assert (found.tokens or 0) <= 24, (subject, start)  # a law's own tokens are not cut
        files[tree] += found.files
    for tree, written in files.items():
        bug = run_files(written, on_disk(planted(tree), tmp_path / tree / "disk"))
        assert {name: status for name, (status, _) in bug.items() if status != 1} == {}, bug
        assert all(len(lines) == 1 and "observed" in lines[0] for _, lines in bug.values()), bug
    every = [path for written in files.values() for path in written]
    clean = run_files(every)
    wrong = {name: lines for name, (status, lines) in clean.items() if status != int(name.endswith("_numpy.py"))}
    assert wrong == {}  # the oracle's file still differs from what the broken half said


@pytest.mark.usefixtures("unconfirmed")
def test_a_half_that_raises_has_a_file_that_says_so_in_one_line(halves: Mapping[str, Half], tmp_path: Path) -> None:
    red = first_red(halves["raising"], "forward", 1)
    found = next(replays_of(halves["raising"], [red], tmp_path, settings_of("forward", 1)))
    assert (found.layers, found.tokens) == (1, 1)
    bug = run_files(found.files, on_disk(planted("raising"), tmp_path / "disk"))
    assert [status for status, _ in bug.values()] == [1, 1]
    for _, lines in bug.values():
        assert len(lines) == 1
        assert "RuntimeError" in lines[0]
    assert run_files(found.files[:1])[str(found.files[0])][0] == 0


@pytest.mark.usefixtures("unconfirmed")
def test_whole_runs_are_replayed_on_what_they_are_made_of(halves: Mapping[str, Half], tmp_path: Path) -> None:
    checks: list[tuple[str, dict[str, Any], str]] = [
        ("state", {"subject": "trajectory", "name": "float64: one run", "sides": ["torch", "jax"]}, "distil.losses"),
        ("state", {"subject": "decode", "name": "sampled tokens", "sides": ["torch", "jax"]}, "serve.sampling.sample"),
        ("model", {"subject": "witness", "name": "llama logits", "sides": ["transformers", "torch"],
                   "case": {"family": "llama", "seed": [0, 17, 0, 0]}}, "attention.norm"),
    ]  # fmt: skip
    for tree, check, culprit in checks:
        found = next(replays_of(halves[tree], [_red(check)], tmp_path, Settings(subjects=())))
        assert found.reproduced
        assert culprit in found.detail
        assert len(found.files) == 2


def test_what_is_its_own_smallest_case_says_the_command_that_shows_it_again(tmp_path: Path) -> None:
    checks = [
        {"subject": "files", "name": "arrays in and out", "sides": ["numpy", "torch"]},
        {"subject": "text", "name": "packing", "sides": ["rows", "documents"]},
        {"subject": "native", "name": "logits", "sides": ["torch", "torch native"]},
        {
            "subject": "ops",
            "name": "mirrored signatures",
            "sides": ["numpy", "torch", "jax"],
            "detail": "rms_norm(...)",
        },
        {"subject": "witness", "name": "llama directories, bits both ways", "sides": ["transformers", "files"]},
        {"subject": "mutants", "name": "clean torch under the battery", "sides": ["numpy", "torch"]},
    ]
    settings = Settings(subjects=("files",), lane=QUICK, seed=7, cases=2)
    found = list(replays_of(load_half("torch"), [_red(check) for check in checks], tmp_path, settings))
    assert [one.command for one in found] == [
        "parity run files --seed 7 --quick --cases 2 --only-half torch",
        "parity run text --seed 7 --quick --cases 2",
        "parity run native --seed 7 --quick --cases 2 --only-half torch",
        "parity run ops --seed 7 --quick --cases 2",
        "parity run witness --seed 7 --quick --cases 2",
        "parity mutants --seed 7 --half=torch",
    ]
    assert all("nothing smaller than the subject itself" in one.detail and not one.files for one in found)


def test_a_run_of_one_half_is_repeated_with_it_and_a_trajectory_with_both() -> None:
    check = {"subject": "trajectory", "sides": ["torch", "jax"]}
    assert rerun_command(check, Settings(subjects=(), model="nano")) == "parity run trajectory --seed 0 --model nano"
    alone = Settings(subjects=(), only_half="jax", dtype="bfloat16", lane="full")
    check = {"subject": "text", "sides": ["rows", "documents"]}
    assert rerun_command(check, alone) == "parity run text --seed 0 --full --dtype bfloat16 --only-half jax"


def test_the_command_line_goes_from_a_report_to_files_that_were_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tessera_parity import store
    from tessera_parity.cli import repro as command
    from tessera_parity.cli.main import run_command_line
    from tessera_parity.report import write_reports

    patch = planted("model")[:1]
    broken, oracle = load_half("torch", patches=patch), load_half("numpy")
    monkeypatch.setattr(runner, "load_half", lambda name, device="cpu": broken if name == "torch" else oracle)
    directory = tmp_path / "run"
    settings = Settings(subjects=("forward",), lane=QUICK, cases=1, only_half="torch")
    result = runner.execute(store.create(directory, settings), advance=runner.quiet, proof=False)
    write_reports(result, directory)
    monkeypatch.setattr(
        command, "installed_context",
        lambda lane, seed, device: Context(numpy=oracle, torch=broken, jax=None, lane=lane, seed=seed),
    )  # fmt: skip
    monkeypatch.syspath_prepend(str(on_disk(patch, tmp_path / "disk")))
    assert run_command_line(["repro", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "reproduced, 1 layers, 1 tokens: attention.norm of layer 0" in said
    assert said.count("    python ") == 2  # every later tap departs at the same operation and shares its files
    assert "the same files as forward_attention-norm" in said
    monkeypatch.undo()
    assert run_command_line(["repro", str(directory)]) == 1  # the half as it is: nothing departs any more
    assert "NOT reproduced" in capsys.readouterr().out


def _red(check: Mapping[str, Any]) -> dict[str, Any]:
    return {"verdict": "divergence", "case": None, "cases": 1, "detail": "", "dtype": "float64", **check}

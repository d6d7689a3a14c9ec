"""`parity repro`: replay each divergence of a report, shrink it, write one file a side, and run them.

A file needs NumPy, tessera_shared and that one half; the other side's number is written into it. Small arrays stand in
the file, parameters that a seed makes again are made again, the rest lies in an `.npz` beside it. A law has one side
and so one file; a pooled rounding stream has one, which asks this package for its cases. What cannot be made smaller
than its subject (bytes of files, text, native faces, whole trajectories whose parts all agree) has no file but the
command that shows it again.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tessera_parity.cases import ModelCase
from tessera_parity.halves import Half
from tessera_parity.kernel_repro import repro_lines
from tessera_parity.localize import SURPRISES
from tessera_parity.repro_files import confirm
from tessera_parity.repro_find import PARTS, Setting, own_candidates, parts
from tessera_parity.repro_law import write_law_repro
from tessera_parity.repro_model import Located, locate, write_located
from tessera_parity.repro_pooled import write_fault_repro, write_stream_repro
from tessera_parity.repro_program import Departure, Program, departure, write_program_repro
from tessera_parity.repro_state import Forward
from tessera_parity.store import Settings
from tessera_shared.errors import ParityError

FAULTS = "exact operations, masks and dtypes"
"""Name of `rounding`'s check that counts instead of pooling."""


@dataclass(frozen=True, kw_only=True)
class Repro:
    """The files of one divergence and whether each, run by itself, showed it again."""

    name: str
    files: tuple[Path, ...]
    reproduced: bool
    layers: int | None = None
    tokens: int | None = None
    detail: str = ""
    command: str | None = None  # nothing is smaller than the subject itself: this shows it again
    same_as: str | None = None  # the divergence whose files show this one too


def replay(
    checks: Sequence[Mapping[str, Any]],
    halves: Mapping[str, Half],
    out: Path,
    *,
    python_path: Sequence[Path | str] = (),
    settings: Settings | None = None,
) -> Iterator[Repro]:
    """Replay each divergence among a report's checks, shrink it, write its files and run them; yield as they come.

    A divergence that cannot be replayed (no case, a side that is missing, nothing departs any more) is yielded all the
    same, with `reproduced` False and the reason, or with the command that runs its subject again. One that departs at
    the same operation of the same half as an earlier one shares that one's files.
    """
    replayer = _Replayer(checks, halves, out, python_path, settings or Settings(subjects=()))
    for check in checks:
        if check["verdict"] == "divergence":
            yield replayer.one(check)


class _Replayer:
    def __init__(
        self,
        checks: Sequence[Mapping[str, Any]],
        halves: Mapping[str, Half],
        out: Path,
        python_path: Sequence[Path | str],
        settings: Settings,
    ) -> None:
        self.halves, self.out, self.python_path, self.settings = halves, out, python_path, settings
        self.setting = Setting(seed=settings.seed, lane=settings.lane, model=settings.model)
        self.streams = sum(check["subject"] == "rounding" for check in checks)
        self.done: dict[tuple[str, str, str], Repro] = {}

    def one(self, check: Mapping[str, Any]) -> Repro:
        name = _name_of(check)
        if (check.get("case") or {}).get("kind") == "kernel":
            return self._kernel(check["case"], name)
        suspects = [self.halves[side] for side in check["sides"] if side != "numpy" and side in self.halves]
        reasons: list[str] = []
        for half in suspects:
            for search in (self._special, self._general):
                try:
                    found = search(check, half, name)
                except ParityError as error:
                    reasons.append(str(error))
                    continue
                if found is not None:
                    return found
        return self._nothing(check, name, suspects, reasons)

    def _kernel(self, case: Mapping[str, str], name: str) -> Repro:
        """One program that judges the case that Hypothesis shrank."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{name}.py"
        path.write_text("\n".join(repro_lines(case["op"], case["case"], case["device"])) + "\n", encoding="utf-8")
        return self._confirmed(name, [path], (None, None), f"{case['op']} in {case['case']}")

    def _special(self, check: Mapping[str, Any], half: Half, name: str) -> Repro | None:
        """Laws and rounding: one side, one file."""
        case = check.get("case") or {}
        if "law" in case:
            paths, shrunk = write_law_repro(half, case, self.out, name=name, lane=self.setting.lane)
            return self._confirmed(name, paths, (shrunk.layers, shrunk.tokens), f"the law {case['law']}")
        if check["subject"] != "rounding":
            return None
        most = int(check["cases"])
        if case.get("kind") == "rounding":
            tensor = str(check["name"]).removeprefix(f"{case['pool']} ").removesuffix(" (jit)")
            paths, cases = write_stream_repro(
                half, case, tensor, self.out, name=name, most=most, num_streams=self.streams
            )
            return self._confirmed(name, paths, (None, None), f"{tensor} in {case['dtype']}, {cases} of {most} cases")
        if check["name"] == FAULTS:
            paths = write_fault_repro(half, check["dtype"], self.setting.seed, self.out, name=name, most=most)
            return self._confirmed(name, paths, (None, None), f"{FAULTS}: {check.get('detail', '')}")
        return None

    def _general(self, check: Mapping[str, Any], half: Half, name: str) -> Repro | None:
        """The check's own case first, then what its subject is made of."""
        oracle = self.halves["numpy"]
        for candidates, note in ((own_candidates, ""), (parts, "a part of it departs by itself: ")):
            for candidate in candidates(check, oracle, self.setting):
                if isinstance(candidate, ModelCase):
                    found = self._model(half, candidate, name, note)
                else:
                    found = self._program(half, candidate, name, note)
                if found is not None:
                    return found
        return None

    def _model(self, half: Half, case: ModelCase, name: str, note: str) -> Repro | None:
        oracle = self.halves["numpy"]
        try:
            located = locate(oracle, half, case)
        except SURPRISES:  # it raises where the oracle answers: a program shows that, a tap cannot
            return self._program(half, Forward(case=case), name, note)
        if located is None:
            return None
        key = half.name, located.question, located.culprit.op
        if key in self.done:
            return self._again(name, key)
        paths, shrunk, culprit = write_located(oracle, half, case, located, self.out, name=name)
        found = self._confirmed(name, paths, (shrunk.layers, shrunk.tokens), note + _where(located, culprit.layer))
        return self.done.setdefault(key, found)

    def _program(self, half: Half, program: Program, name: str, note: str) -> Repro | None:
        oracle = self.halves["numpy"]
        left = departure(oracle, half, program)
        if left is None:
            return None
        key = half.name, program.about, _outline(left)
        if key in self.done:
            return self._again(name, key)
        paths, small = write_program_repro(oracle, half, program, self.out, name=name)
        return self.done.setdefault(key, self._confirmed(name, paths, small.size, note + program.about))

    def _again(self, name: str, key: tuple[str, str, str]) -> Repro:
        first = self.done[key]
        return replace(first, name=name, same_as=first.name)

    def _confirmed(self, name: str, paths: Sequence[Path], size: tuple[int | None, int | None], what: str) -> Repro:
        results = [confirm(path, python_path=self.python_path) for path in paths]
        reproduced = all(run.shown for run in results)
        lines = "; ".join(run.line for run in results)
        if self.settings.device != "cpu":
            lines += f"; the files run on the CPU, the report's device is {self.settings.device}"
        return Repro(
            name=name, files=tuple(paths), reproduced=reproduced, layers=size[0], tokens=size[1],
            detail=what if reproduced else f"{what}: {lines}",
        )  # fmt: skip

    def _nothing(self, check: Mapping[str, Any], name: str, suspects: Sequence[Half], reasons: Sequence[str]) -> Repro:
        again = rerun_command(check, self.settings)
        if _has_case(check) and suspects:
            detail = reasons[0] if reasons else (
                f"nothing departs on the report's case any more, in {' or '.join(half.name for half in suspects)}; "
                f"the whole subject: {again}"
            )  # fmt: skip
            return Repro(name=name, files=(), reproduced=False, detail=detail)
        missing = [side for side in check["sides"] if side in ("torch", "jax") and side not in self.halves]
        if missing and not suspects:
            detail = f"{' and '.join(missing)} cannot be loaded here, and only a half is replayed; there: {again}"
            return Repro(name=name, files=(), reproduced=False, detail=detail)
        looked = " and what it is made of agrees by itself" if PARTS.get(check["subject"]) and suspects else ""
        said = f" ({check['detail']})" if check.get("detail") else ""
        detail = f"nothing smaller than the subject itself shows this{looked}{said}; again: {again}"
        return Repro(name=name, files=(), reproduced=False, detail=detail, command=again)


def rerun_command(check: Mapping[str, Any], settings: Settings) -> str:
    """Return the command that runs a check's subject again as the report's run did, one half alone where that is
    enough."""
    subject = str(check["subject"])
    if subject == "mutants":
        halves = [side for side in check["sides"] if side in ("torch", "jax")]
        return shlex.join(["parity", "mutants", "--seed", str(settings.seed), *(f"--half={half}" for half in halves)])
    words = ["parity", "run", subject, "--seed", str(settings.seed)]
    words += ["--quick"] if settings.lane == "quick" else ["--full"] if settings.lane == "full" else []
    words += ["--cases", str(settings.cases)] if settings.cases is not None else []
    words += ["--dtype", settings.dtype] if settings.dtype is not None else []
    words += ["--device", settings.device] if settings.device != "cpu" else []
    words += ["--model", settings.model] if settings.model is not None else []
    halves = [side for side in ("torch", "jax") if side in check["sides"]]
    alone = settings.only_half or (halves[0] if len(halves) == 1 and subject != "trajectory" else None)
    return shlex.join([*words, *(["--only-half", alone] if alone else [])])


def _name_of(check: Mapping[str, Any]) -> str:
    """Return a file name that no other check of a run has: subject, name, sides, and the dtype that is not float64."""
    dtype = str(check.get("dtype", "float64"))
    parts = [check["subject"], check["name"], "-".join(check["sides"]), *([dtype] if dtype != "float64" else [])]
    return "_".join(_plain(part) for part in parts)


def _has_case(check: Mapping[str, Any]) -> bool:
    case = check.get("case") or {}
    return case.get("kind") in ("model", "op", "optimizer", "rounding") or "law" in case


def _where(located: Located, layer: int | None) -> str:
    return located.culprit.op + ("" if layer is None else f" of layer {layer}")


def _outline(left: Departure) -> str:
    """Return what tells two departures of one program apart: the array, or what was raised."""
    return left.raised or left.name


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text).strip("-")

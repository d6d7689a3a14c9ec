"""`parity repro`: replay the worst case of each divergence of a report, shrink it, write one file a side, and run them.

A file needs NumPy, tessera_shared and that one half; the other side's number is written into it. Small arrays stand in
the file, parameters that a seed makes again are made again, the rest lies in an `.npz` beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera_parity.cases import model_case_from_json, op_case
from tessera_parity.halves import Half
from tessera_parity.repro_files import confirm
from tessera_parity.repro_model import write_model_repro
from tessera_parity.repro_op import write_op_repro
from tessera_shared.errors import ParityError


@dataclass(frozen=True, kw_only=True)
class Repro:
    """The files of one divergence and whether each, run by itself, showed it again."""

    name: str
    files: tuple[Path, ...]
    reproduced: bool
    layers: int | None = None
    tokens: int | None = None
    detail: str = ""


def replay(
    checks: Sequence[Mapping[str, Any]],
    halves: Mapping[str, Half],
    out: Path,
    *,
    python_path: Sequence[Path | str] = (),
) -> list[Repro]:
    """Replay the worst case of each divergence among a report's checks, shrink it, write its files and run them.

    A divergence that cannot be replayed (no case, a kind without a writer, a side that is missing, nothing departs
    any more) is in the list all the same, with `reproduced` False and the reason.
    """
    found = []
    for check in checks:
        if check["verdict"] == "divergence":
            name = "_".join(_plain(part) for part in (check["subject"], check["name"], check["sides"][-1]))
            try:
                found.append(_replay(check, halves, out, name, python_path))
            except ParityError as error:
                found.append(Repro(name=name, files=(), reproduced=False, detail=str(error)))
    return found


def _replay(
    check: Mapping[str, Any], halves: Mapping[str, Half], out: Path, name: str, python_path: Sequence[Path | str]
) -> Repro:
    case, half = check.get("case") or {}, halves.get(check["sides"][-1])
    if case.get("kind") not in ("model", "op") or half is None or half.name == "numpy":
        sides = " and ".join(check["sides"])
        raise ParityError(
            f"case of {name} = {case.get('kind')!r} of {sides}: expected a model or an operation "
            "of an installed half against the oracle, because only those are replayed alone; try parity run --subject "
            f"{check['subject']}"
        )
    oracle = halves["numpy"]
    if case["kind"] == "model":
        paths, shrunk, culprit = write_model_repro(oracle, half, model_case_from_json(case), out, name=name)
        where = "" if culprit.layer is None else f" of layer {culprit.layer}"
        return _confirmed(name, paths, python_path, shrunk.layers, shrunk.tokens, f"{culprit.op}{where}")
    path, _, function = case["function"].rpartition(".")
    drawn = op_case(
        case["function"], getattr(oracle.module(path), function), case["seed"], sizes=case["sizes"], style=case["style"]
    )
    paths, small = write_op_repro(oracle, half, drawn, out, name=name)
    return _confirmed(name, paths, python_path, None, small.sizes["B"] * small.sizes["T"], case["function"])


def _confirmed(
    name: str, paths: Sequence[Path], python_path: Sequence[Path | str], layers: int | None, tokens: int, what: str
) -> Repro:
    results = [confirm(path, python_path=python_path) for path in paths]
    reproduced = all(shown for shown, _ in results)
    lines = "; ".join(line for _, line in results)
    return Repro(
        name=name, files=tuple(paths), reproduced=reproduced, layers=layers, tokens=tokens,
        detail=what if reproduced else f"{what}: {lines}",
    )  # fmt: skip


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text).strip("-")

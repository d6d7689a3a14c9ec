"""From a caught bug to two repro files that were run: with the bug on disk they must be red, without it green."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.localize import BACKWARD, FORWARD, SURPRISES
from tessera_parity.mutants.diagnose import Bench, Finding, diagnose, program_of_finding
from tessera_parity.mutants.engine import check_choice, first_notice
from tessera_parity.mutants.mutant import Mutant
from tessera_parity.repro_files import confirm
from tessera_parity.repro_model import DECODE, Located, write_located
from tessera_parity.repro_program import write_program_repro
from tessera_parity.subjects.context import Context
from tessera_shared.errors import ParityError

RESULTS = "shrunk.jsonl"

LAW = "a law or known answer of one function of numbers broke: it is its own smallest case"
TWIN = "the harness's own twin broke: it is a call on literals, nothing to cut"
QUESTIONS = {"forward": FORWARD, "backward": BACKWARD, "cache": DECODE}
"""Questions of the battery, as `repro_model` calls them."""


@dataclass(frozen=True, kw_only=True)
class Shrinking:
    """What became of one planted bug: caught, cut to a repro, and whether the files tell the bug from its absence."""

    name: str
    half: str
    kind: str
    patch: tuple[str, str, str]
    question: str = ""  # which question named it
    killed: bool = False
    reason: str = ""  # why there is no repro
    layers: int | None = None
    tokens: int | None = None
    red: bool = False  # the suspect's file, the bug on disk: exit status 1
    other_red: bool = False  # the other side's file, on clean code: still not what the suspect said
    green: bool = False  # the suspect's file on clean code: exit status 0
    detail: str = ""
    files: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def shrinkable(self) -> bool:
        """Was there anything to cut?"""
        return self.killed and not self.reason

    @property
    def reproduced(self) -> bool:
        """Do both files show the bug, and does the suspect's show nothing without it?"""
        return self.red and self.other_red and self.green


def shrink_all(
    context: Context,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    halves: Sequence[str] | None = None,
    advance: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Shrinking]:
    """Catch, shrink, write and run, one bug after the other; what `out` already holds of the same patch is kept.

    An interrupted call goes on where it was. Bugs of a half that is not installed are left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    whole = read_results(out)
    lines = "".join(json.dumps(asdict(one)) + "\n" for one in whole)
    (out / RESULTS).write_text(lines, encoding="utf-8")  # without a torn last line
    kept = {(one.name, one.patch): one for one in whole}
    present = {half.name for half in context.halves} | {"reference", "shared", "harness"}
    chosen = [mutant for mutant in check_choice(names, halves) if mutant.half in present]
    bench, found = Bench(context), []
    for index, mutant in enumerate(chosen):
        advance(mutant.name, index, len(chosen))
        key = (mutant.name, _patch_of(mutant))
        if key not in kept:
            kept[key] = shrink_one(bench, mutant, out)
            with (out / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(kept[key])) + "\n")
        found.append(kept[key])
    advance("", len(chosen), len(chosen))
    return found


def read_results(out: Path) -> list[Shrinking]:
    """Return what a directory holds; a torn last line is dropped."""
    path = out / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = []
    for line in lines:
        if line.endswith("\n"):
            fields = json.loads(line)
            found.append(Shrinking(**fields | {"patch": tuple(fields["patch"]), "files": tuple(fields["files"])}))
    return found


def shrink_one(bench: Bench, mutant: Mutant, out: Path) -> Shrinking:
    """Plant one bug, catch it, cut what caught it, write the files and run them."""
    started = time.perf_counter()
    blank = Shrinking(name=mutant.name, half=mutant.half, kind=mutant.kind, patch=_patch_of(mutant))
    if mutant.half in ("shared", "harness"):
        from tessera_parity.mutants import laws, twins

        killed = (laws if mutant.half == "shared" else twins).notice(mutant.patch)[0] is not None
        return replace(blank, killed=killed, reason=LAW if mutant.half == "shared" else TWIN)
    name = "numpy" if mutant.half == "reference" else mutant.half
    half = load_half(name, device="cpu", patches=(mutant.patch,))
    seen = first_notice(bench, half, hints=mutant.hints)
    if seen is None:
        return replace(blank, reason="not caught")
    try:
        finding = diagnose(bench, half, seen[0])
    except SURPRISES as error:
        return replace(blank, killed=True, reason=f"localization raised {type(error).__name__}: {error}")
    if finding is None:
        return replace(blank, killed=True, reason="caught, but no operation was named")
    caught = replace(blank, killed=True, question=finding.question)
    try:
        paths, size = write_finding(bench, half, finding, out, name=mutant.name)
    except ParityError as error:
        return replace(caught, reason=str(error), seconds=time.perf_counter() - started)
    shown = replace(caught, layers=size[0], tokens=size[1], files=tuple(path.name for path in paths))
    return replace(_run(shown, mutant.patch, paths), seconds=time.perf_counter() - started)


def write_finding(
    bench: Bench, half: Half, finding: Finding, out: Path, *, name: str
) -> tuple[list[Path], tuple[int | None, int | None]]:
    """Write the repro of what localization found; return the files, and layers and tokens left.

    Raises `ParityError` where there is nothing to write.
    """
    truth = bench.judge_of(half)
    if finding.case is not None:
        located = Located(culprit=finding.culprit, question=QUESTIONS[finding.question])
        paths, shrunk, _ = write_located(truth, half, finding.case, located, out, name=name)
        return paths, (shrunk.layers, shrunk.tokens)
    program = program_of_finding(bench, finding)
    if program is None:
        raise ParityError(
            f"repro of {name}: expected a call or a model, because only those are written as a file, but "
            f"{finding.question} is neither; try parity mutants {name}"
        )
    paths, small = write_program_repro(truth, half, program, out, name=name)
    return paths, small.size


def plant_on_disk(patch: Patch, folder: Path) -> Path:
    """Copy the package of a patch into `folder`, patched, so that a process of its own meets the bug."""
    root = patch.module.split(".", 1)[0]
    found = find_spec(root)
    if found is None or not found.submodule_search_locations:
        raise ParityError(f"package = {root!r}: expected it installed, because its source is copied; try make setup")
    shutil.copytree(found.submodule_search_locations[0], folder / root, ignore=shutil.ignore_patterns("__pycache__"))
    patch.plant_in(folder)
    return folder


def _run(shown: Shrinking, patch: Patch, paths: Sequence[Path]) -> Shrinking:
    with tempfile.TemporaryDirectory() as folder:
        planted = confirm(paths[0], python_path=[plant_on_disk(patch, Path(folder))])
    other, clean = confirm(paths[1]), confirm(paths[0])
    good = planted.shown, other.shown, clean.status == 0
    wrong = [run.line for run, fine in zip((planted, other, clean), good, strict=True) if not fine]
    detail = "; ".join(wrong) or planted.line
    return replace(shown, red=good[0], other_red=good[1], green=good[2], detail=detail)


def _patch_of(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.file, mutant.find, mutant.replace


def figures(found: Sequence[Shrinking]) -> list[str]:
    """Return the lines of `parity mutants --shrink`: counts and medians, by half and kind, then what has no repro."""
    lines = [_counts("all", found)]
    for what in ("half", "kind"):
        for value in sorted({str(getattr(one, what)) for one in found}):
            lines.append(_counts(f"{what} {value}", [one for one in found if getattr(one, what) == value]))
    reasons = sorted({one.reason for one in found if one.reason})
    for reason in reasons:
        names = [one.name for one in found if one.reason == reason]
        lines.append(f"no repro for {len(names)}: {reason}: {', '.join(names)}")
    lines += [f"NOT reproduced: {one.name}: {one.detail}" for one in found if one.shrinkable and not one.reproduced]
    return lines


def _counts(what: str, found: Sequence[Shrinking]) -> str:
    shrinkable = [one for one in found if one.shrinkable]
    layers = [one.layers for one in shrinkable if one.layers is not None]
    tokens = [one.tokens for one in shrinkable if one.tokens is not None]
    sizes = [
        f"median {median(values):g}, most {max(values)} {word} ({len(values)} repros with {word})"
        for values, word in ((layers, "layers"), (tokens, "tokens"))
        if values
    ]
    counts = (
        f"{what}: killed {sum(one.killed for one in found)} of {len(found)}, shrinkable {len(shrinkable)}, "
        f"reproduced {sum(one.reproduced for one in shrinkable)}"
    )
    return "; ".join([counts, *sizes])

"""Repro files of one operation: its inputs with shrunk sizes, one call, the worst number."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import OpCase, bring, op_case
from tessera_parity.compare import compare_results, flatten
from tessera_parity.halves import Half
from tessera_parity.localize import FORWARD, Culprit
from tessera_parity.repro_files import point_of, write_file
from tessera_parity.repro_source import Source, module_of
from tessera_shared.errors import ParityError


def write_op_repro(oracle: Half, half: Half, case: OpCase, out: Path, *, name: str) -> tuple[list[Path], OpCase]:
    """Shrink the sizes of a failing operation's inputs and write both files. Raises `ParityError` when nothing
    departs."""
    path, _, function = case.function.rpartition(".")
    signature = getattr(oracle.module(path), function)

    def results(inputs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        sides = (half, oracle)
        own, truth = (flatten(s, getattr(s.module(path), function)(**bring(s.array, inputs))) for s in sides)
        return own, truth

    def limits(found: OpCase) -> tuple[float, float]:
        floor = budget.cancellation_floor(found.function, found.inputs)
        return budget.mathematics_limit(1, length=max(found.sizes.values())), floor

    def fails(found: OpCase) -> bool:
        limit, floor = limits(found)
        return compare_results(*results(found.inputs), floor=floor)[1].value > limit

    if not fails(case):
        raise ParityError(
            f"repro of {name}: expected a divergence of {half.name} in {case.function}, because a repro must show one; "
            "try the version and machine that wrote the report"
        )
    case = _shrink_sizes(case, fails, lambda sizes: op_case(
        case.function, signature, case.seed, sizes=sizes, style=case.style
    ))  # fmt: skip
    limit, floor = limits(case)
    own, truth = results(case.inputs)
    which, gap = compare_results(own, truth, floor=floor)
    culprit = Culprit(half=half.name, op=case.function, observed=gap.value, limit=limit, direction=FORWARD)
    paths = []
    for side in (half.name, "numpy"):
        source = Source()
        source.imports.setdefault(module_of(side, path), set()).add(function)
        lines = ["inputs = {"]
        lines += [f"    {key!r}: {source.of(value, key)}," for key, value in case.inputs.items()]
        lines += ["}", *_BRING, f"result = {function}(**bring(inputs))"]
        pick = "result" + "".join(f"[{part}]" if part.isdigit() else f"[{part!r}]" for part in which.split(".")[1:])
        pick += f"[{gap.where}]" if gap.where else ""
        whole = gap.where or (0,) * own[which].ndim
        point = point_of(
            f"{case.function} {which}{list(gap.where)}",
            pick,
            own[which][whole],
            truth[which][whole],
            gap.scale,
            culprit,
        )
        paths.append(write_file(out, name, side, source, lines, point, culprit))
    return paths, case


_BRING = [
    "",
    "",
    "def bring(value):",
    "    if isinstance(value, np.ndarray):",
    "        return array(value)",
    "    return {name: bring(item) for name, item in value.items()} if isinstance(value, dict) else value",
    "",
    "",
]


def _shrink_sizes(case: OpCase, fails: Callable[[OpCase], bool], draw: Callable[[dict[str, int]], OpCase]) -> OpCase:
    changed = True
    while changed:
        changed = False
        for letter, size in case.sizes.items():
            for smaller in sorted({1, 2, size // 2} & set(range(1, size))):
                sizes = dict(case.sizes) | {letter: smaller}
                if sizes["N"] % sizes["K"] or sizes["H"] % 2:
                    continue
                found = draw(sizes)
                if fails(found):
                    case, changed = found, True
                    break
    return case

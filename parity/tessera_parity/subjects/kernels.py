"""Kernels against their references: generated cases by the three-way rule, memory, repeats, rows alone, planted bugs.

Each op is fuzzed by a process of its own (`kernel_watch`), so that a crash is one red line. On a CPU the kernels run in
Triton's interpreter on small shapes; with `--device cuda` compiled, on large ones, in every configuration.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

from tessera_parity.kernel_watch import Report, work
from tessera_parity.result import Check, MutantOutcome, Question, Verdict
from tessera_parity.subjects.context import Context, Subject
from tessera_shared.errors import MissingDependency

SIDE_BY_SIDE = {"cpu": 2, "cuda": max(2, min(12, (os.cpu_count() or 2) - 4))}
"""Processes at once. Many share one GPU: most of a case's time is compilation, on the host."""

SLOW = (
    "cuda_flash_attention", "cuda_linear_distillation", "cuda_quant_matmul", "fast_path", "flash_attention", "linear_distillation",
    "sample",
)  # fmt: skip
"""Ops that take a minute and more on a CPU begin first, so that none is left running alone at the end."""

RULE = "share of 2x the plain implementation's error and the rounding floor"
PLANTED = "planted bugs are caught"


def run(context: Context) -> Iterator[Check]:
    """Yield for every op: its rule, its configurations (on a GPU), its planted bugs; then the fast path against the
    oracle.

    Raises `MissingDependency` where torch or triton is not installed.
    """
    from tessera_parity.kernel_fast import fast_checks
    from tessera_parity.kernel_fuzz import names_of

    if context.torch is None or find_spec("triton") is None:
        raise MissingDependency(
            "triton = not installed, or the torch half left out: expected both, because the kernels are written in them; "
            "try installing tessera-testbed[torch] on Linux"
        )
    kind = context.device.partition(":")[0]
    names = names_of()
    with ThreadPoolExecutor(SIDE_BY_SIDE[kind]) as pool:
        one = partial(work, device=context.device, lane=context.lane, seed=context.seed, cases=context.cases)
        pending = {name: pool.submit(one, name) for name in sorted(names, key=_comes_late)}
        for name in names:
            context.advance(f"kernels: {name}")
            yield from checks_of(pending[name].result(), context.device)
    yield from fast_checks(context)


def _comes_late(name: str) -> bool:
    return name not in SLOW


def checks_of(report: Report, device: str) -> Iterator[Check]:
    """Return the checks of one op."""
    fuzzed = report.fuzzed
    if fuzzed is None or report.ended:
        yield _check(report.op, "finishes", device, False, 1, 1, 1.0, 0.0, "processes that ended early", report.last,
                     f"{report.ended} at {report.last}")  # fmt: skip
    if fuzzed is None:
        return
    broken = bool(fuzzed["failure"])
    detail = fuzzed["failure"] or (
        f"left out: {fuzzed['left_out']}" if fuzzed["left_out"] else _errors(fuzzed["errors"])
    )
    yield _check(
        report.op, "generated cases", device, not broken, fuzzed["cases"], fuzzed["compared"], fuzzed["observed"], 1.0,
        RULE, fuzzed["failing_case"] or fuzzed["worst"], detail,
    )  # fmt: skip
    if fuzzed["configs_run"]:
        idle = [name for name, count in fuzzed["configs_run"].items() if count == 0]
        yield _check(
            report.op, "every configuration", device, not idle and not broken, sum(fuzzed["configs_run"].values()),
            fuzzed["compared"], float(len(idle)), 0.0, "configurations that no case could use", "",
            ", ".join(idle[:3]) or f"{len(fuzzed['configs_run'])} configurations",
        )  # fmt: skip
    if not broken and not report.ended:
        yield _bugs(report, device)


def outcomes(checks: list[Check]) -> list[MutantOutcome]:
    """Return what became of the bugs planted in kernels, for the run's kill rate."""
    found = []
    for check in checks:
        if check.subject == "kernels" and check.case and check.case.get("kind") == "planted":
            found += [
                MutantOutcome(
                    name=f"{bug['op']} bug {bug['number']}",
                    half="kernels",
                    kind="kernel",
                    killed=bug["caught"],
                    killed_by="kernels" if bug["caught"] else None,
                    expected_op=bug["op"],
                    named_op=bug["op"] if bug["caught"] else None,
                    seconds=bug["seconds"],
                    detail=f"{bug['what']}; {bug['by'] or 'no case noticed'}",
                )
                for bug in check.case["bugs"]
            ]
    return found


def _bugs(report: Report, device: str) -> Check:
    missed = [bug["what"] for bug in report.bugs if not bug["caught"]]
    return Check(
        subject="kernels",
        name=f"{report.op}: {PLANTED}",
        question=Question.EXACT,
        sides=("harness",),
        verdict=Verdict.PARITY if report.bugs and not missed else Verdict.INCONCLUSIVE,
        cases=len(report.bugs),
        compared=len(report.bugs),
        observed=float(len(missed)),
        limit=0.0,
        unit="planted bugs that no case noticed",
        device=device,
        op=report.op,
        case={"kind": "planted", "bugs": report.bugs},
        detail="; ".join(missed[:2]) or ("" if report.bugs else "no bug was planted"),
    )


def _check(
    op: str, name: str, device: str, kept: bool, cases: int, compared: int, observed: float, limit: float, unit: str,
    case: str, detail: str,
) -> Check:  # fmt: skip
    return Check(
        subject="kernels",
        name=f"{op}: {name}",
        question=Question.ROUNDING,
        sides=("reference", "kernel"),
        verdict=Verdict.PARITY if kept else Verdict.DIVERGENCE,
        cases=cases,
        compared=compared,
        observed=observed,
        limit=limit,
        unit=unit,
        dtype="float16, bfloat16, float32",
        device=device,
        op=op,
        case={"kind": "kernel", "op": op, "case": case, "device": device},
        detail=detail,
    )


def _errors(errors: dict[str, list[float]]) -> str:
    return "largest error and the plain one's: " + ", ".join(
        f"{name} {own:.2g} ({plain:.2g})" for name, (own, plain) in list(errors.items())[:4]
    )


SUBJECT = Subject(
    name="kernels",
    about="Triton kernels against float64 and the plain same-dtype implementation, generated shapes, planted bugs",
    run=run,
)
"""The subject."""

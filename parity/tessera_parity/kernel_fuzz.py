"""Generated cases of one kernel: explicit examples, then Hypothesis by the run's seed, then planted bugs.

Nothing here knows a kernel. A failing case is shrunk by Hypothesis; its repr, handed to `kernel_repro.repro_lines`, is the repro.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

from tessera_parity import kernel_cases
from tessera_parity.kernel_cases.case import KernelOp
from tessera_parity.kernel_judge import Judged, KernelFault, judge
from tessera_parity.kernel_planting import planted
from tessera_parity.loading import Patch
from tessera_parity.localize import SURPRISES
from tessera_shared.errors import KernelError

BUG_DRAWS = 12
"""Generated cases that a planted bug meets when the examples did not notice it."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long and how hard one op is looked at."""

    cases: int  # generated cases at most
    seconds: float  # for generated cases; one that is begun is finished
    example_seconds: float  # for examples: a guard against what hangs, they are meant to run all
    repeats: int  # further runs of every example, which must give the same bits
    rows: int  # rows run alone
    config_seconds: float = 0.0  # for every configuration over the examples; one case each is always run
    bug_seconds: float = 20.0  # for one planted bug


@dataclass(kw_only=True)
class Fuzzed:
    """What came of one op's cases."""

    op: str
    cases: int = 0
    compared: int = 0
    observed: float = 0.0  # largest share of its limit that any output used
    worst: str = ""  # repr of the case where, and the output
    failure: str = ""  # the first broken promise, after shrinking; empty = none
    failing_case: str = ""  # its repr
    left_out: str = ""  # what time did not allow
    configs_run: dict[str, int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # output: largest error, and the plain one's

    def add(self, case: Any, judged: Judged) -> None:
        """Count one case that kept every promise."""
        self.cases += 1
        self.compared += judged.compared
        if judged.observed >= self.observed:
            self.observed, self.worst = judged.observed, f"{judged.where} of {case!r}"
        for name, (own, plain) in judged.errors.items():
            before = self.errors.get(name, (0.0, 0.0))
            self.errors[name] = (max(own, before[0]), max(plain, before[1]))

    def fail(self, case: Any, error: BaseException) -> None:
        """Remember the first broken promise."""
        if not self.failure:
            self.failing_case, self.failure = repr(case), _line(error)
            self.observed = max(self.observed, 2.0)


def clock_of(device: str) -> Callable[[], float]:
    """Return what efforts are measured by: this process's own seconds in the interpreter, so that a busy machine does
    not shorten a run; the wall's on a GPU, where compilers run in processes of their own."""
    return time.process_time if device == "cpu" else time.perf_counter


def kernel_errors() -> tuple[type[Exception], ...]:
    """Return what a wrong kernel raises, the compiler's refusals included."""
    from triton import TritonError

    return (*SURPRISES, KernelFault, TritonError, AssertionError, NotImplementedError, OSError)


def fuzz(
    op: KernelOp, *, device: str, seed: int, effort: Effort, say: Callable[[str], None] = lambda line: None
) -> Fuzzed:
    """Judge the examples, then generated cases, then (where asked) every configuration. Stops at the first failure."""
    now = clock_of(device)
    fuzzed, clock, errors = Fuzzed(op=op.name), now(), kernel_errors()
    for index, case in enumerate(op.examples):
        if index and now() - clock > effort.example_seconds:
            fuzzed.left_out = f"{len(op.examples) - index} of {len(op.examples)} examples"
            break
        say(repr(case))
        try:
            fuzzed.add(case, judge(op, case, device=device, repeats=effort.repeats, rows=effort.rows))
        except errors as error:
            fuzzed.fail(case, error)
            return fuzzed
    until = now() + effort.seconds
    _generate(op, fuzzed, device=device, seed=seed, effort=effort, until=until, say=say)
    if effort.config_seconds > 0.0 and not fuzzed.failure:
        _each_config(op, fuzzed, device=device, seconds=effort.config_seconds, say=say)
    return fuzzed


def _generate(
    op: KernelOp, fuzzed: Fuzzed, *, device: str, seed: int, effort: Effort, until: float, say: Callable[[str], None]
) -> None:
    """Let Hypothesis look for a failing case and shrink it. Once time is up a new case passes unseen."""
    now = clock_of(device)
    seen: dict[Any, BaseException | None] = {}
    smallest: list[tuple[Any, BaseException]] = []

    def one(case: Any) -> None:
        if case not in seen:
            if now() > until + (effort.seconds if smallest else 0.0):
                return
            say(repr(case))
            seen[case] = None
            try:
                fuzzed.add(case, judge(op, case, device=device, repeats=min(1, effort.repeats), rows=effort.rows))
            except kernel_errors() as error:
                seen[case] = error
        found = seen[case]
        if found is not None:
            smallest.append((case, found))
            raise found

    errors: tuple[type[Exception], ...] = (*kernel_errors(), hypothesis.errors.HypothesisException)
    try:
        _driven(one, op.cases(device != "cpu"), effort.cases, seed)
    except errors:
        if not smallest:
            raise
        fuzzed.fail(*smallest[-1])


def _driven(one: Callable[[Any], None], cases: Any, count: int, seed: int) -> None:
    if count == 0:
        return
    settings = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,  # the run's seed decides
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    seeded: Callable[[Any], Callable[[], None]] = hypothesis.seed(seed)
    seeded(settings(hypothesis.given(cases)(one)))()  # type: ignore[no-untyped-call]


def _each_config(op: KernelOp, fuzzed: Fuzzed, *, device: str, seconds: float, say: Callable[[str], None]) -> None:
    """Run every configuration over the examples, in turn; one that no case could use is a failure."""
    now, errors = clock_of(device), kernel_errors()
    clock = now()
    for config in op.configs():
        fuzzed.configs_run[repr(config)] = 0
    for case in op.examples:
        for config in op.configs():
            if fuzzed.configs_run[repr(config)] and now() - clock > seconds:
                continue
            chosen = replace(case, config=config)
            say(repr(chosen))
            try:
                fuzzed.add(chosen, judge(op, chosen, device=device, repeats=1))
                fuzzed.configs_run[repr(config)] += 1
            except KernelError:
                continue  # it says that it does not fit this case
            except errors as error:
                fuzzed.fail(chosen, error)
                return
    idle = [name for name, count in fuzzed.configs_run.items() if count == 0]
    if idle:
        fuzzed.failing_case, fuzzed.failure = idle[0], f"{len(idle)} configurations fit no example, {idle[0]} first"


@dataclass(frozen=True, kw_only=True)
class Bug:
    """What became of one planted bug."""

    op: str
    number: int
    what: str  # the changed line
    caught: bool
    by: str  # the broken promise that showed it
    seconds: float


def plant_bugs(
    op: KernelOp,
    *,
    device: str,
    seed: int,
    effort: Effort,
    say: Callable[[str], None] = lambda line: None,
    after: int = 0,
    most: int | None = None,
) -> Iterator[Bug]:
    """Plant each bug (or those from number `after` + 1 to `most`) of a clean op and say whether a case noticed. Raises
    `ParityError` for one that does not apply."""
    for number, patch in list(enumerate(op.bugs_on(device), 1))[after:most]:
        clock = time.perf_counter()
        say(f"bug {number}: {patch.replace.strip()[:60]}")
        by = _noticed(op.name, patch, device=device, seed=seed + number, seconds=effort.bug_seconds)
        yield Bug(
            op=op.name,
            number=number,
            what=f"{patch.file.rpartition('/')[2]}: {patch.find.strip()!r} -> {patch.replace.strip()!r}",
            caught=bool(by),
            by=by,
            seconds=time.perf_counter() - clock,
        )


def _noticed(name: str, patch: Patch, *, device: str, seed: int, seconds: float) -> str:
    now = clock_of(device)
    clock = now()
    with planted(name, patch) as op:
        for case in op.cases_for(patch):
            if now() - clock > seconds:
                return ""
            if by := _broken(op, case, device):
                return by
        found: list[str] = []

        def one(case: Any) -> None:
            if not found and now() - clock < seconds and (by := _broken(op, case, device)):
                found.append(by)

        _driven(one, op.cases(False), BUG_DRAWS, seed)
        return found[0] if found else ""


def _broken(op: KernelOp, case: Any, device: str) -> str:
    try:
        judge(op, case, device=device, repeats=1, rows=2)
    except kernel_errors() as error:
        return _line(error)
    return ""


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:600].removeprefix("KernelFault: ")


def names_of() -> list[str]:
    """Return every op that has cases here, in alphabetical order."""
    folder = Path(str(kernel_cases.__file__)).parent
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "case"))

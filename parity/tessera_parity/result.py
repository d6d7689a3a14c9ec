"""The one result schema. A subject yields `Check`s; every report (terminal, HTML, JSONL, JUnit, annotations) is drawn
from them.

A check says what it compared, how many, what it saw next to its limit, and when. There is no "skipped" verdict: what is
left out is said in `Run.left_out`, by name and with its reason.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Ordered from best to worst by `SEVERITY`."""

    PARITY = "parity"
    UNCALIBRATED = "uncalibrated"  # nothing to judge rounding by on this machine: run `parity calibrate`
    INCONCLUSIVE = "inconclusive"  # too few cases for the stated power
    DIVERGENCE = "divergence"


SEVERITY = {Verdict.PARITY: 0, Verdict.INCONCLUSIVE: 1, Verdict.UNCALIBRATED: 2, Verdict.DIVERGENCE: 3}
EXIT_CODES = {Verdict.PARITY: 0, Verdict.DIVERGENCE: 1, Verdict.UNCALIBRATED: 3, Verdict.INCONCLUSIVE: 3}


class Question(StrEnum):
    """What a check asks."""

    MATHEMATICS = "same mathematics"  # float64 on every side
    ROUNDING = "same rounding"  # working dtype against float64, pooled and two-sided
    EXACT = "same bits"  # integers, bytes, names
    LAW = "metamorphic law"  # one side against itself
    WITNESS = "third witness"  # Hugging Face transformers


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison, judged. `observed` and `limit` are in the same `unit`; a verdict is never stored without both."""

    subject: str  # "forward", "gradients", ...
    name: str  # what was compared inside the subject: an op, a tap class, a parameter, a law
    question: Question
    sides: tuple[str, ...]  # ("numpy", "torch"), ("torch",) for a law
    verdict: Verdict
    cases: int  # generated cases that went in
    compared: int  # numbers (or bytes, tokens) compared
    observed: float  # worst or pooled value seen
    limit: float  # what the error budget allows; 0.0 where only equality will do
    unit: str = "relative to the tensor's largest magnitude"
    dtype: str = "float64"
    device: str = "cpu"
    op: str | None = None  # first departing operation, when localized: "attention.q_rope"
    layer: int | None = None
    position: str | None = None  # "row 1, token 5, head 0"
    who: str | None = None  # which side moved, by the third witness
    case: dict[str, Any] | None = None  # the worst case, replayable by `parity repro`
    detail: str = ""  # one line for people
    series: dict[str, list[float]] = field(default_factory=dict)  # for pictures: {"error_by_layer": [...], ...}
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MutantOutcome:
    """What became of one planted bug."""

    name: str
    half: str  # torch | jax | reference | harness | shared
    kind: str  # algebra | mask | index | precision | optimizer | reduction | cache | sampling | loss | harness ...
    killed: bool
    killed_by: str | None  # subject that saw it
    expected_op: str | None
    named_op: str | None  # what localization put at rank 1
    repro_layers: int | None = None
    repro_tokens: int | None = None
    seconds: float = 0.0
    detail: str = ""


@dataclass(kw_only=True)
class Run:
    """A whole run: environment first, then checks, then the proof that it can fail."""

    lane: str  # quick | default | full
    seed: int
    environment: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    mutants: list[MutantOutcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    false_alarm_rate: float | None = None  # clean re-runs flagged / clean re-runs, of this run's own clean cases
    false_alarm_runs: int = 0
    started: str = ""
    seconds: float = 0.0
    format_version: int = 1

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of any check; a run with no check is inconclusive."""
        if not self.checks:
            return Verdict.INCONCLUSIVE
        return max((check.verdict for check in self.checks), key=SEVERITY.__getitem__)

    @property
    def kill_rate(self) -> float | None:
        """Share of planted bugs that were caught, or None when none was planted."""
        return sum(m.killed for m in self.mutants) / len(self.mutants) if self.mutants else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types, verdict and rates included."""
        return asdict(self) | {"verdict": self.verdict, "kill_rate": self.kill_rate}

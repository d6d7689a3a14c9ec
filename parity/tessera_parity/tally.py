"""Counts what was compared and keeps the worst, until it becomes one `Check`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tessera_parity.compare import Difference
from tessera_parity.result import Check, Question, Verdict
from tessera_shared.errors import MissingDependency, ParityError

RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""What a half may raise on a legal input when it is broken. Raising where the other side answers is a divergence."""


@dataclass(kw_only=True)
class Tally:
    """All comparisons of one thing between two sides. Worst is where observed / limit is largest, not where observed
    is."""

    subject: str
    name: str
    sides: tuple[str, ...]
    question: Question = Question.MATHEMATICS
    dtype: str = "float64"
    device: str = "cpu"
    op: str | None = None
    cases: int = 0
    compared: int = 0
    observed: float = 0.0
    limit: float = 0.0
    layer: int | None = None
    position: str | None = None
    case: dict[str, Any] | None = None
    detail: str = ""
    by_layer: list[float] = field(default_factory=list)

    def add(
        self,
        difference: Difference,
        limit: float,
        *,
        case: dict[str, Any],
        new_case: bool = True,
        layer: int | None = None,
        detail: str = "",
    ) -> None:
        """Count one comparison under its own limit."""
        self.cases += new_case
        self.compared += difference.compared
        if layer is not None:
            self.by_layer += [0.0] * (layer + 1 - len(self.by_layer))
            self.by_layer[layer] = max(self.by_layer[layer], difference.value)
        if self.case is None or _ratio(difference.value, limit) > _ratio(self.observed, self.limit):
            self.observed, self.limit, self.case, self.layer = difference.value, limit, case, layer
            self.position = difference.position if difference.value > 0.0 else None
            self.detail = "; ".join(part for part in (detail, difference.reason) if part)

    def check(self) -> Check:
        """Return the judgement. Raises `ParityError` when nothing was compared: that is an error and never parity."""
        if self.compared == 0 or self.cases == 0:
            raise ParityError(
                f"{self.subject}/{self.name}: compared = 0 numbers in {self.cases} cases: expected at least one, because "
                "agreement about nothing is not parity; try more cases"
            )
        agrees = self.observed <= self.limit
        return Check(
            subject=self.subject,
            name=self.name,
            question=self.question,
            sides=self.sides,
            verdict=Verdict.PARITY if agrees else Verdict.DIVERGENCE,
            cases=self.cases,
            compared=self.compared,
            observed=self.observed,
            limit=self.limit,
            dtype=self.dtype,
            device=self.device,
            op=None if agrees else self.op,
            layer=None if agrees else self.layer,
            position=None if agrees else self.position,
            case=self.case,
            detail=self.detail,
            series={"error_by_layer": list(self.by_layer)} if self.by_layer else {},
        )


def attempt(call: Callable[[], Any]) -> tuple[Any, Difference | None]:
    """Return (result, None), or (None, an infinite difference that says what was raised)."""
    try:
        return call(), None
    except (ParityError, MissingDependency):
        raise
    except RAISED as error:
        line = str(error).strip().splitlines()
        said = f"raised {type(error).__name__}: {line[0] if line else ''}"
        return None, Difference(value=float("inf"), where=(), scale=float("nan"), compared=1, reason=said)


def _ratio(observed: float, limit: float) -> float:
    if observed != observed:
        return float("inf")
    return observed / limit if limit > 0.0 else (0.0 if observed == 0.0 else float("inf"))

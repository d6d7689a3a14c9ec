"""Checks where only equality will do: bits, bytes, names, token ids. What differs is counted and the first difference
is told."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from tessera_parity.result import Check, Question, Verdict


class Equalities:
    """Collects comparisons of one check; `check()` turns them into a verdict. Nothing compared is a divergence, never
    parity."""

    def __init__(self, subject: str, name: str, sides: tuple[str, ...]) -> None:
        self._subject, self._name, self._sides = subject, name, sides
        self._cases = self._compared = self._unequal = 0
        self._first = ""

    def arrays(self, left: np.ndarray[Any, Any], right: np.ndarray[Any, Any], what: str) -> None:
        """Compare dtype, shape and bytes (a NaN equals the NaN with the same bits)."""
        left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        self._cases += 1
        self._compared += max(left.size, 1)
        if left.dtype != right.dtype or left.shape != right.shape:
            self._differs(f"{what}: {left.dtype} {left.shape} against {right.dtype} {right.shape}")
        elif left.tobytes() != right.tobytes():
            where = (
                np.flatnonzero(left.view(np.uint8).ravel() != right.view(np.uint8).ravel())[0] // left.dtype.itemsize
            )
            self._differs(f"{what}: element {where}: {left.ravel()[where]} against {right.ravel()[where]}")

    def values(self, left: object, right: object, what: str) -> None:
        """Compare two plain values with `==`."""
        self._cases += 1
        self._compared += 1
        if left != right:
            self._differs(f"{what}: {str(left)[:80]} against {str(right)[:80]}")

    def sequences(self, left: Iterable[object], right: Iterable[object], what: str) -> None:
        """Compare two sequences element by element and in length."""
        left, right = list(left), list(right)
        self._cases += 1
        self._compared += max(len(left), len(right), 1)
        if left != right:
            where = next(
                (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
            )
            self._differs(f"{what}: element {where} of {len(left)} and {len(right)}")

    def check(self, detail: str = "") -> Check:
        """Return the verdict on everything compared."""
        nothing = "" if self._cases else "nothing was compared"
        return Check(
            subject=self._subject,
            name=self._name,
            question=Question.EXACT,
            sides=self._sides,
            verdict=Verdict.DIVERGENCE if self._unequal or nothing else Verdict.PARITY,
            cases=self._cases,
            compared=self._compared,
            observed=float(self._unequal),
            limit=0.0,
            unit="unequal values",
            detail=self._first or nothing or detail,
        )

    def _differs(self, what: str) -> None:
        self._unequal += 1
        self._first = self._first or what

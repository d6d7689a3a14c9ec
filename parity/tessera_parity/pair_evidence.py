"""What the cases of a pair check have shown: worst differences, the first departing tap, planted changes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.adapter import Pair
from tessera_parity.compare import Difference, relative_difference
from tessera_parity.pair_runs import Observation, PairCase, check_shapes, gradients, observe
from tessera_parity.result import MutantOutcome

TWIN_SIZE = 10.0
"""A planted change is this many limits large: a check must see what is just outside its budget, not only the huge."""
MOST_TWINS = 24


@dataclass(kw_only=True)
class Seen:
    """Worst difference of one compared thing over all cases."""

    depth: int = 1
    length: int = 1
    worst: Difference | None = None
    case: PairCase | None = None
    cases: int = 0
    compared: int = 0
    by_layer: dict[int, float] = field(default_factory=dict)
    layer: int | None = None
    note: str = ""

    @property
    def limit(self) -> float:
        """What the error budget allows."""
        return budget.mathematics_limit(self.depth, length=self.length)

    @property
    def departs(self) -> bool:
        """Whether the worst difference is outside the budget."""
        return self.worst is not None and not self.worst.value <= self.limit

    def add(self, difference: Difference, case: PairCase, *, layer: int | None = None, note: str = "") -> None:
        """Take one comparison in."""
        self.compared += difference.compared
        if layer is not None:
            self.by_layer[layer] = max(self.by_layer.get(layer, 0.0), difference.value)
        if self.worst is None or difference.value > self.worst.value:
            self.worst, self.case, self.layer, self.note = difference, case, layer, note


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A case that departs and, where taps tell, the first tap that does."""

    case: PairCase
    tap: str | None = None
    order: int = 0  # of the tap, in forward order
    position: str = ""


@dataclass(kw_only=True)
class Evidence:
    """Everything that the cases of one check have shown."""

    pair: Pair
    things: dict[tuple[str, str], Seen] = field(default_factory=dict)  # (subject, name)
    lone_taps: dict[str, str] = field(default_factory=dict)  # tap -> the side that has it
    first: Departure | None = None  # the earliest departing tap of all cases
    taps: list[str] = field(default_factory=list)
    compiled: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def seen(self, subject: str, name: str, *, depth: int, length: int) -> Seen:
        """Return the record of one compared thing, made on first use; limits follow the largest case."""
        found = self.things.setdefault((subject, name), Seen())
        found.depth, found.length = max(found.depth, depth), max(found.length, length)
        return found


def compare_case(evidence: Evidence, case: PairCase) -> None:
    """Run both sides on one case and add what differs: outputs, re-synchronized taps, gradients, the reference."""
    pair = evidence.pair
    left, right = observe(pair, pair.left, case), observe(pair, pair.right, case)
    check_shapes(pair, left, right)
    common = [name for name in left.taps if name in right.taps]
    evidence.taps = common
    evidence.lone_taps |= {name: "left" for name in left.taps if name not in right.taps}
    evidence.lone_taps |= {name: "right" for name in right.taps if name not in left.taps}
    depth, length = pair.depth or max(1, len(common)), _longest(case, left)
    outputs = evidence.seen("pair", "outputs", depth=depth, length=length)
    _add_all(outputs, left.outputs, right.outputs, case)
    departing = _compare_taps(evidence, case, left, depth, length)
    if departing is not None and (evidence.first is None or departing.order < evidence.first.order):
        evidence.first = departing
    if pair.grad:
        _add_gradients(evidence, evidence.seen("pair", "gradients", depth=2 * depth, length=length), case, left)
    if pair.reference is not None:
        truth = observe(pair, pair.reference, case)
        for side, found in ((pair.left, left), (pair.right, right)):
            check_shapes(pair, truth, found)
            _add_all(
                evidence.seen("reference", side.role, depth=depth, length=length), truth.outputs, found.outputs, case
            )


def plant_twins(evidence: Evidence, case: PairCase) -> list[MutantOutcome]:
    """Prove on this very run that the check can fail: change the right side by a few limits, one place at a time.

    Each change is judged against the left side, or where the pair departs by itself against the unchanged right side.
    """
    pair = evidence.pair
    clean = observe(pair, pair.right, case)
    agree = not any(seen.departs for seen in evidence.things.values())
    truth = observe(pair, pair.left, case) if agree else clean
    rng = np.random.default_rng([case.seed, case.index, 3])
    common = [name for name in truth.taps if name in clean.taps]
    chosen = rng.permutation(len(common))[:MOST_TWINS]
    each = pair.depth or max(1, len(common))
    length = _longest(case, truth)
    outcomes = []
    for name in (common[index] for index in sorted(chosen)):
        limit = budget.mathematics_limit(math.ceil(each / len(common)), length=length)
        plant = (name, partial(nudge, limit=limit, rng=rng))
        changed = observe(pair, pair.right, case, truth=truth.taps, plant=plant)
        found = next((tap for tap in common if not _apart(truth.taps[tap], changed.taps[tap]) <= limit), None)
        outcomes.append(_twin(f"change at {name}", name, found))
    limit = budget.mathematics_limit(each, length=length)
    for name, value in clean.outputs.items():
        caught = not _apart(truth.outputs[name], nudge(value, limit, rng)) <= limit
        outcomes.append(_twin(f"change in {name}", name, name if caught else None))
    return outcomes


def nudge(value: np.ndarray, limit: float, rng: np.random.Generator) -> np.ndarray:
    """Return a copy with one element moved by `TWIN_SIZE` limits of the largest magnitude; integers by one."""
    changed = np.array(value)
    where = tuple(int(rng.integers(length)) for length in changed.shape)
    if changed.dtype.kind == "b":
        changed[where] = not changed[where]
    elif changed.dtype.kind in "iu":
        changed[where] += 1
    else:
        finite = changed[np.isfinite(changed)]
        step = TWIN_SIZE * limit * float(np.max(np.abs(finite), initial=0.0))
        changed[where] = changed[where] + (step or 1.0) if math.isfinite(changed[where]) else 0.0
    return changed


def split_tap(name: str) -> tuple[int | None, str]:
    """Return layer and tap class: `layers.3.attention.q_rope` is (3, "attention.q_rope")."""
    words = name.split(".")
    numbered = next((index for index, word in enumerate(words) if word.isdecimal()), None)
    if numbered is None:
        return None, name
    return int(words[numbered]), ".".join(words[numbered + 1 :]) or ".".join(words[:numbered])


def _compare_taps(evidence: Evidence, case: PairCase, left: Observation, depth: int, length: int) -> Departure | None:
    """Feed the left side's values into the right side's next operation; return the first tap that departs."""
    if not evidence.taps:
        return None
    resynced = observe(evidence.pair, evidence.pair.right, case, truth=left.taps)
    first = None
    for order, name in enumerate(evidence.taps):
        layer, kind = split_tap(name)
        seen = evidence.seen("taps", kind, depth=math.ceil(depth / len(evidence.taps)), length=length)
        difference = relative_difference(left.taps[name], resynced.taps[name])
        seen.add(difference, case, layer=layer, note=name)
        if first is None and not difference.value <= seen.limit:
            first = Departure(case=case, tap=name, order=order, position=difference.position)
    for kind in {split_tap(name)[1] for name in evidence.taps}:
        evidence.things["taps", kind].cases += 1
    return first


def _add_all(seen: Seen, a: dict[str, np.ndarray], b: dict[str, np.ndarray], case: PairCase) -> None:
    for name in a:
        seen.add(relative_difference(a[name], b[name]), case, note=name)
    seen.cases += 1


def _add_gradients(evidence: Evidence, seen: Seen, case: PairCase, outputs: Observation) -> None:
    """Compare by parameter. What is zero by structure has no size of its own: the largest gradient is the floor."""
    pair = evidence.pair
    left, right = (gradients(pair, side, case, outputs.outputs, evidence.compiled) for side in (pair.left, pair.right))
    floor = max((float(np.max(np.abs(value), initial=0.0)) for value in left.values()), default=0.0)
    for name in left:
        seen.add(relative_difference(left[name], right[name], floor=floor), case, note=name)
    seen.cases += 1


def _twin(name: str, expected: str, found: str | None) -> MutantOutcome:
    return MutantOutcome(
        name=name, half="harness", kind="harness", killed=found == expected, killed_by="pair" if found else None,
        expected_op=expected, named_op=found, detail=f"one element of the right side moved by {TWIN_SIZE:.0f} limits",
    )  # fmt: skip


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return relative_difference(a, b).value


def _longest(case: PairCase, seen: Observation) -> int:
    """Return the longest axis of any weight, tap or output: no sum of the pair can be longer than what it sums over."""
    arrays = [*case.params.values(), *seen.taps.values(), *seen.outputs.values()]
    return max((length for array in arrays for length in array.shape), default=1)

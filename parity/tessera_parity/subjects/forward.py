"""Forward: the whole pass on generated models, every tapped activation compared by its name, float64."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase, case_seed, model_case
from tessera_parity.compare import Difference, relative_difference
from tessera_parity.halves import Array, Half
from tessera_parity.result import Check
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_parity.tally import Tally, attempt
from tessera_shared.numerics import FLOAT64, Numerics

_LAYER = re.compile(r"^layers\.(\d+)\.")


def run(context: Context) -> Iterator[Check]:
    """Yield one check per tap class (`attention.q_rope` over all layers) and half, with error by layer."""
    for half in context.halves:
        tallies: dict[str, Tally] = {}
        for index in range(context.budget(quick=12, default=80, full=260)):
            context.advance(f"forward: {half.name}, case {index + 1}")
            case = model_case(case_seed(context.seed, "forward", index), pool=1 if context.lane == QUICK else 5)
            compare_taps(context, half, case, tallies)
        for tally in tallies.values():
            yield tally.check()


def compare_taps(
    context: Context, half: Half, case: ModelCase, tallies: dict[str, Tally], *, subject: str = "forward"
) -> None:
    """Add one case's tapped values to `tallies`, by tap class."""
    limit = budget.model_limit(case.spec, num_positions=case.token_ids_BT.shape[1])
    truth = tapped_forward(context.numpy, case)
    found, raised = attempt(lambda: tapped_forward(half, case))
    seen: set[str] = set()
    for name in truth if raised else [*truth, *(name for name in found if name not in truth)]:
        layer, tap_class = split_tap(name)
        if tap_class not in tallies:
            tallies[tap_class] = Tally(
                subject=subject, name=tap_class, sides=("numpy", half.name), device=context.device, op=tap_class
            )
        difference = raised or _tap_difference(truth, found, name)
        tallies[tap_class].add(difference, limit, case=case.to_json(), new_case=tap_class not in seen, layer=layer)
        seen.add(tap_class)


def _tap_difference(truth: dict[str, np.ndarray], found: dict[str, np.ndarray], name: str) -> Difference:
    if name in truth and name in found:
        return relative_difference(truth[name], found[name])
    side = "the oracle" if name in truth else "the half"
    return Difference(value=float("inf"), where=(), scale=float("nan"), compared=1, reason=f"only {side} taps {name}")


def tapped_forward(half: Half, case: ModelCase, *, numerics: Numerics = FLOAT64) -> dict[str, np.ndarray]:
    """Return every tapped value of one forward pass by name, in forward order, as NumPy; the last is `logits`."""
    seen: dict[str, np.ndarray] = {}

    def tap(name: str, value: Array) -> Array:
        seen[name] = half.numpy(value)
        return value

    params: dict[str, Any] = half.module("model.params").params_from_numpy(
        case.params, dtype=numerics.param, device=half.device
    )
    half.module("model.transformer").forward(
        params,
        half.array(case.token_ids_BT),
        spec=case.spec,
        numerics=numerics,
        positions_BT=half.array(case.positions_BT),
        segments_BT=half.array(case.segments_BT),
        tap=tap,
    )
    return seen


def split_tap(name: str) -> tuple[int | None, str]:
    """Return (layer, class) of a tap: `layers.3.attention.q_rope` -> (3, "attention.q_rope"), `logits` -> (None,
    "logits")."""
    match = _LAYER.match(name)
    return (None, name) if match is None else (int(match[1]), name[match.end() :])


SUBJECT = Subject(name="forward", about="whole forward passes of generated models, tap by tap, float64", run=run)

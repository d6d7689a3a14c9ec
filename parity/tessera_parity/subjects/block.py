"""Block: attention, MLP and whole layers, each fed the oracle's activations, so that no error is carried from layer to
layer."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase, case_seed, model_case
from tessera_parity.compare import relative_difference
from tessera_parity.halves import Half
from tessera_parity.result import Check
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_parity.tally import Tally, attempt
from tessera_shared.numerics import FLOAT64

FUNCTIONS = {"attention_block": "model.attention", "mlp_block": "model.mlp", "block": "model.transformer"}


def run(context: Context) -> Iterator[Check]:
    """Yield one check per function and half."""
    tallies = {
        (name, half.name): Tally(
            subject="block", name=name, sides=("numpy", half.name), device=context.device, op=f"{path}.{name}"
        )
        for name, path in FUNCTIONS.items()
        for half in context.halves
    }
    for index in range(context.budget(quick=6, default=40, full=150)):
        context.advance(f"block: case {index + 1}")
        case = model_case(case_seed(context.seed, "block", index), pool=1 if context.lane == QUICK else 5)
        _one_case(context, case, tallies)
    for tally in tallies.values():
        yield tally.check()


def _one_case(context: Context, case: ModelCase, tallies: dict[tuple[str, str], Tally]) -> None:
    x_BTD = case.params["model.embed_tokens.weight"][case.token_ids_BT]
    for layer in range(case.spec.num_layers):
        truth = {name: outputs(context.numpy, case, x_BTD, layer, name) for name in FUNCTIONS}
        for (name, side), tally in tallies.items():
            half = next(half for half in context.halves if half.name == side)
            found, raised = attempt(lambda h=half, n=name, x=x_BTD, i=layer: outputs(h, case, x, i, n))  # type: ignore[misc]
            difference = raised or relative_difference(truth[name], found)
            limit = budget.mathematics_limit(budget.OPS_PER_LAYER, length=budget.longest_sum(case.spec, x_BTD.shape[1]))
            tally.add(difference, limit, case=case.to_json() | {"at_layer": layer}, new_case=layer == 0, layer=layer)
        x_BTD = truth["block"]


def outputs(half: Half, case: ModelCase, x_BTD: np.ndarray, layer: int, name: str) -> np.ndarray:
    """Return what a half's function makes of the given activations, as NumPy."""
    spec = case.spec
    positions_BT, segments_BT = half.array(case.positions_BT), half.array(case.segments_BT)
    params = {key: half.array(value) for key, value in case.params.items()}
    function = getattr(half.module(FUNCTIONS[name]), name)
    x = half.array(x_BTD)
    if name == "mlp_block":
        return half.numpy(function(params, x, layer=layer, spec=spec, numerics=FLOAT64))
    tables: Any = half.module("model.rope").rope_tables(positions_BT, spec=spec, numerics=FLOAT64)
    mask_BTS = half.module("model.attention").attention_mask(
        positions_BT, positions_BT, segments_BT, segments_BT, window=spec.window_of(layer)
    )
    return half.numpy(function(params, x, *tables, mask_BTS, layer=layer, spec=spec, numerics=FLOAT64))


SUBJECT = Subject(name="block", about="attention, MLP and layer, each fed the oracle's activations, float64", run=run)

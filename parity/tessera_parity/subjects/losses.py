"""Losses: every function and option, float64: values against the oracle, gradients between the halves and by its
slope."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import OpCase, bring
from tessera_parity.compare import NEVER, relative_difference
from tessera_parity.half_numpy import NumpyHalf
from tessera_parity.halves import Array, Half
from tessera_parity.pairs import Pair, collect_pairs
from tessera_parity.result import Check
from tessera_parity.subjects.context import Context, Subject
from tessera_parity.subjects.ops import check_pair, generated, halves_of
from tessera_parity.tally import Tally, attempt

DIFFERENTIABLE = ("student_BTV", "logits_BTV", "student_BTD", "projection_FD")
"""Arguments that receive gradients; the teacher's do not."""

WIDEST = ("distillation_loss", "training_loss")
"""Functions that dispatch over all options, so they get more cases."""


def run(context: Context) -> Iterator[Check]:
    """Yield value and gradient checks per function."""
    halves = halves_of(context)
    pairs, _ = collect_pairs(halves)  # `ops` reports what is not mirrored
    for pair in pairs:
        if pair.module == "distil.losses" and "numpy" in pair.functions:
            context.advance(f"losses: {pair.name}")
            yield from check_pair(context, pair, halves, subject="losses")
            yield from _gradients(context, pair, halves)


def _gradients(context: Context, pair: Pair, halves: dict[str, Half]) -> Iterator[Check]:
    """Both halves elementwise, and each along one direction against the oracle."""
    sides = [half.name for half in context.halves]
    tallies = {side: _tally(context, pair, ("numpy", side), "slope") for side in sides}
    if len(sides) == 2:
        tallies["both"] = _tally(context, pair, ("torch", "jax"), "gradient")
    widest = pair.name in WIDEST
    cases = context.budget(quick=3, default=18, full=42) if widest else context.budget(quick=2, default=6, full=14)
    for index in range(cases):
        _one_case(context, pair, generated(context, pair, index, subject="losses"), halves, tallies)
    for tally in tallies.values():
        yield tally.check()


def _tally(context: Context, pair: Pair, sides: tuple[str, ...], what: str) -> Tally:
    name = f"{pair.name} {what}"
    return Tally(subject="losses", name=name, sides=sides, device=context.device, op=pair.path)


def _one_case(context: Context, pair: Pair, case: OpCase, halves: dict[str, Half], tallies: dict[str, Tally]) -> None:
    rng = np.random.default_rng((*case.seed, 1))
    moving = {name: case.inputs[name] for name in DIFFERENTIABLE if case.inputs.get(name) is not None}
    direction = {name: rng.standard_normal(value.shape) for name, value in moving.items()}
    weight_BT = rng.standard_normal((case.sizes["B"], case.sizes["T"]))
    floor = budget.loss_gradient_floor(pair.path, case.inputs, weight_BT)
    limit = budget.mathematics_limit(2, length=max(case.sizes.values()) ** 2)
    oracle = halves["numpy"]
    assert isinstance(oracle, NumpyHalf)
    loss = weighted_loss(pair, oracle, case.inputs, weight_BT)
    truth = oracle.directional_derivative(loss, moving, direction)
    found: dict[str, dict[str, np.ndarray]] = {}
    for half in context.halves:
        function = weighted_loss(pair, half, case.inputs, weight_BT)
        grads, raised = attempt(lambda h=half, f=function: gradients(h, f, moving))  # type: ignore[misc]
        if raised:
            tallies[half.name].add(raised, limit, case=case.to_json())
            continue
        found[half.name] = grads
        slope = sum(float(np.sum(grads[name] * direction[name])) for name in moving)
        terms = sum(float(np.sum(np.abs(grads[name] * direction[name]))) for name in moving)
        difference = relative_difference(np.array(truth), np.array(slope), floor=max(terms, floor))
        tallies[half.name].add(difference, limit, case=case.to_json())
    if len(found) == 2:
        for count, name in enumerate(moving):
            difference = relative_difference(found["torch"][name], found["jax"][name], floor=floor)
            tallies["both"].add(difference, limit, case=case.to_json(), new_case=count == 0, detail=f"d/d {name}")
    elif "both" in tallies:
        tallies["both"].add(NEVER, limit, case=case.to_json(), detail="one half raised")


def weighted_loss(
    pair: Pair, half: Half, inputs: Mapping[str, Any], weight_BT: np.ndarray
) -> Callable[[Mapping[str, Array]], Array]:
    """Return the loss as a scalar function of its differentiable arguments: a loss sum, or tokens summed by random
    weights."""
    brought, weights = bring(half.array, inputs), half.array(weight_BT)

    def loss(moving: Mapping[str, Array]) -> Array:
        result = pair.functions[half.name](**{**brought, **moving})
        return result[0] if isinstance(result, tuple) else (result * _shaped(weights, result)).sum()

    return loss


def gradients(
    half: Half, loss: Callable[[Mapping[str, Array]], Array], moving: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return a half's gradients by argument, as NumPy."""
    _, grads = half.value_and_grad(loss, {name: half.array(value) for name, value in moving.items()})
    return {name: half.numpy(grad) for name, grad in grads.items()}


def _shaped(weights_BT: Array, result: Array) -> Array:
    """Weights of the result's rank: log-softmax answers BTV, the divergences BT."""
    return weights_BT if result.ndim == 2 else weights_BT[..., None]


SUBJECT = Subject(
    name="losses", about="losses and divergences with all options, values and gradients, float64", run=run
)

"""Run one side of a pair on one case: bring arrays in, watch or replace taps, bring outputs and gradients out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera_parity.adapter import Pair, Side, blame, line_of, shown
from tessera_parity.compare import flatten
from tessera_shared.errors import ParityError

Tap = Callable[[str, Any], Any]
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class PairCase:
    """Weights and inputs of one generated case, in NumPy; the same seed, index and size draw the same case."""

    seed: int
    index: int
    size: int | None
    params: dict[str, np.ndarray]
    inputs: Any


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one side made of a case: outputs by name and taps by name in forward order, all NumPy."""

    outputs: dict[str, np.ndarray]
    taps: dict[str, np.ndarray]


def draw_case(pair: Pair, *, seed: int, index: int, size: int | None) -> PairCase:
    """Call the pair's `params` and `inputs` with generators seeded by (seed, index)."""
    params: Any = {}
    if pair.params is not None:
        with blame(pair.path, "params"):
            params = pair.params(np.random.default_rng([seed, index, 0]))
        if not isinstance(params, Mapping) or not all(isinstance(value, np.ndarray) for value in params.values()):
            raise ParityError(
                f"{line_of(pair.params, pair.path)}: params = {type(params).__name__}: expected a dict of NumPy "
                "arrays, because both sides get the same weights; try to_left and to_right for other layouts"
            )
    generator = np.random.default_rng([seed, index, 1])
    with blame(pair.path, "inputs"):
        inputs = pair.inputs(generator, size) if pair.takes_size else pair.inputs(generator)
    return PairCase(seed=seed, index=index, size=size, params=dict(params), inputs=inputs)


def observe(
    pair: Pair,
    side: Side,
    case: PairCase,
    *,
    truth: Mapping[str, np.ndarray] | None = None,
    plant: tuple[str, Change] | None = None,
) -> Observation:
    """Run a side. Taps that `truth` holds are replaced by its values after being recorded: re-synchronization.

    `plant` = (tap name, change) alters what the side computed at one tap, before it is recorded: a planted bug.
    """
    taps: dict[str, np.ndarray] = {}

    def tap(name: str, value: Any) -> Any:
        found = _outside(side, pair, name, value)
        if name in taps:
            raise ParityError(
                f"{line_of(side.function, pair.path)}: tap {name!r} of {side.role} seen twice: expected each name "
                "once, because names pair the sides"
            )
        taps[name] = plant[1](found) if plant and plant[0] == name else found
        given = taps[name] if truth is None else truth.get(name, taps[name])
        return value if given is found or given.shape != found.shape else side.half.array(given.astype(found.dtype))

    arrays, structure = _taken_apart(case.inputs)
    inputs = _put_together(structure, [side.half.array(array) for array in arrays])
    result = _call(pair, side, bring_params(side, case), inputs, tap)
    outputs = {name.removeprefix("output."): value for name, value in _flat(side, pair, result).items()}
    return Observation(outputs=outputs, taps=taps)


def gradients(
    pair: Pair, side: Side, case: PairCase, outputs: Mapping[str, np.ndarray], compiled: dict[str, Callable[..., Any]]
) -> dict[str, np.ndarray]:
    """Return d(sum of outputs weighted by fixed random numbers)/d(parameter), by the common layout's names.

    Mappings are differentiated through. The weights are drawn from (seed, index) and shaped like `outputs`: equal on
    both sides. JAX's gradient is compiled, once a shape (eager, every primitive compiles by itself): `compiled` keeps
    the functions between cases.
    """
    generator = np.random.default_rng([case.seed, case.index, 2])
    weights = [generator.standard_normal(value.shape) for value in outputs.values()]
    arrays, structure = _taken_apart(case.inputs)
    brought = bring_params(side, case)
    floating = {name: value for name, value in brought.items() if case.params[name].dtype.kind == "f"}
    rest = {name: value for name, value in brought.items() if name not in floating}
    key = f"{side.role} {structure!r}"
    if key not in compiled:
        compiled[key] = side.half.compiled(_gradient_function(pair, side, structure))
    with blame(pair.path, f"the gradient of {side.role}"):
        given = [[side.half.array(array) for array in group] for group in (arrays, weights)]
        grads = compiled[key](floating, rest, *given)
    return {name: side.half.numpy(value) for name, value in grads.items()}


def _gradient_function(pair: Pair, side: Side, structure: Any) -> Callable[..., Any]:
    def gradient(floating: Any, rest: Any, arrays: list[Any], weights: list[Any]) -> Any:
        def objective(params: Mapping[str, Any]) -> Any:
            result = _call(pair, side, {**rest, **params}, _put_together(structure, arrays), lambda _name, value: value)
            pairs = zip(_leaves(result), weights, strict=True)
            total: Any = sum((value * weight).sum() for value, weight in pairs if "float" in str(value.dtype))
            return total

        return side.half.value_and_grad(objective, floating)[1]

    return gradient


def bring_params(side: Side, case: PairCase) -> dict[str, Any]:
    """Return the common weights as arrays of this side."""
    return {name: side.half.array(value) for name, value in case.params.items()}


def _call(pair: Pair, side: Side, params: dict[str, Any], inputs: Any, tap: Tap) -> Any:
    if side.mapping is not None:
        with blame(pair.path, f"to_{side.role}"):
            params = side.mapping(params)
    with blame(pair.path, side.role):
        return side.function(params, inputs, tap) if side.takes_tap else side.function(params, inputs)


@dataclass(frozen=True)
class _Slot:
    """Where an array was taken out of a nested value."""

    number: int


def _taken_apart(value: Any, start: int = 0) -> tuple[list[np.ndarray], Any]:
    """Return the arrays of nested inputs, and the inputs with slots for them."""
    if isinstance(value, np.ndarray):
        return [value], _Slot(start)
    if isinstance(value, Mapping | tuple | list):
        arrays: list[np.ndarray] = []
        kept = []
        for item in value.values() if isinstance(value, Mapping) else value:
            found, structure = _taken_apart(item, start + len(arrays))
            arrays += found
            kept.append(structure)
        return arrays, dict(zip(value, kept, strict=True)) if isinstance(value, Mapping) else tuple(kept)
    return [], value


def _put_together(structure: Any, arrays: list[Any]) -> Any:
    if isinstance(structure, _Slot):
        return arrays[structure.number]
    if isinstance(structure, dict):
        return {key: _put_together(item, arrays) for key, item in structure.items()}
    return tuple(_put_together(item, arrays) for item in structure) if isinstance(structure, tuple) else structure


def _flat(side: Side, pair: Pair, result: Any) -> dict[str, np.ndarray]:
    for value in _leaves(result):
        _outside(side, pair, "its output", value)
    found = flatten(side.half, result, "output")
    if not found:
        raise ParityError(
            f"{line_of(side.function, pair.path)}: {side.role} returned no array: expected one at least; try return"
        )
    return found


def _leaves(result: Any) -> list[Any]:
    if result is None:
        return []
    if isinstance(result, Mapping):
        return [leaf for key in sorted(result) for leaf in _leaves(result[key])]
    return [leaf for item in result for leaf in _leaves(item)] if isinstance(result, tuple | list) else [result]


def _outside(side: Side, pair: Pair, name: str, value: Any) -> np.ndarray:
    """Return a value as NumPy; narrower floats than float64 are the adapter's mistake, not a divergence."""
    dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    if "float" in dtype and dtype not in ("float64", "float"):
        raise ParityError(
            f"{line_of(side.function, pair.path)}: {side.role} has {dtype} at {name}: expected float64, because the "
            "question is the same mathematics; try not casting, or building the model in the dtype of its params"
        )
    with blame(pair.path, f"reading {name} of {side.role}"):
        return side.half.numpy(value)


def check_shapes(pair: Pair, left: Observation, right: Observation) -> None:
    """Raise `ParityError` where outputs of both sides, or taps of one name, have other names or shapes."""
    if left.outputs.keys() != right.outputs.keys():
        named = f"{', '.join(left.outputs)} and {', '.join(right.outputs)}"
        raise ParityError(
            f"{shown(pair.path)}:1: outputs = {named}: expected the same names, because they are paired by name"
        )
    both = [("output", name, left.outputs[name], right.outputs[name]) for name in left.outputs]
    both += [("tap", name, left.taps[name], right.taps[name]) for name in left.taps if name in right.taps]
    for what, name, a, b in both:
        if a.shape != b.shape:
            raise ParityError(
                f"{line_of(pair.right.function, pair.path)}: {what} {name} = shapes {a.shape} (left) and {b.shape} "
                "(right): expected equal shapes, because numbers are compared one by one; try reshaping one side"
            )

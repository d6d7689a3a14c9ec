"""Localization through the key/value cache: step by step, from the oracle's cache and the oracle's taps."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.compare import relative_difference
from tessera_parity.halves import Array, Half
from tessera_parity.localize import FORWARD, STATE, Culprit, op_limit, position_of, split_tap
from tessera_shared.numerics import FLOAT64


def localize_decode(oracle: Half, half: Half, case: ModelCase) -> Culprit | None:
    """Return what departs first when a case is prefilled and then decoded token by token through the cache (float64).

    Every step starts from the oracle's cache and every operation from the oracle's values. What the half wrote into
    its cache is judged before what it read: `cache.positions`, `cache.k`, `cache.v`, else the tapped operation.
    """
    rows, length = case.token_ids_BT.shape
    given, empty = _empty(oracle, case), _empty(half, case)
    limit = op_limit(case)
    bounds = [0, *range(prefill_of(case), length + 1)]
    for name, value in given.items():
        if name not in empty or not relative_difference(empty[name], value).value <= limit:
            return _blame(half, "cache.empty", None, f"{name} before the first token", float("inf"), limit, STATE)
    for start, stop in pairwise(bounds):
        positions_BT = np.tile(np.arange(start, stop, dtype=np.int32), (rows, 1))
        tokens_BT = case.token_ids_BT[:, start:stop]
        truth, after = _step(oracle, case, tokens_BT, positions_BT, given, None)
        own, written = _step(half, case, tokens_BT, positions_BT, given, truth)
        blamed = _judge_cache(half, after, written, limit, start) or _judge_taps(half, truth, own, limit, start)
        if blamed is not None:
            return blamed
        given = after
    return None


def prefill_of(case: ModelCase) -> int:
    """Return how many tokens are fed at once: four, and fewer where no token would be left to decode."""
    return max(1, min(4, int(case.token_ids_BT.shape[1]) - 1))


def decoded_logits(half: Half, case: ModelCase) -> np.ndarray:
    """Return all logits, the prompt's at once and the others one by one through the cache (float64)."""
    return half.numpy(
        half.module("serve.decode").teacher_forced_logits(
            {name: half.array(value) for name, value in case.params.items()},
            half.array(case.token_ids_BT),
            spec=case.spec,
            numerics=FLOAT64,
            prefill=prefill_of(case),
        )
    )


def _empty(half: Half, case: ModelCase) -> dict[str, np.ndarray]:
    params = {name: half.array(value) for name, value in case.params.items()}
    rows, length = case.token_ids_BT.shape
    cache = half.module("model.cache").empty_cache(
        params, spec=case.spec, numerics=FLOAT64, batch=rows, capacity=length
    )
    return {name: half.numpy(value) for name, value in cache.items()}


def _step(
    half: Half,
    case: ModelCase,
    tokens_BT: np.ndarray,
    positions_BT: np.ndarray,
    cache: Mapping[str, np.ndarray],
    replace: Mapping[str, np.ndarray] | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the taps of one cached call and the cache after it."""
    seen: dict[str, np.ndarray] = {}

    def tap(name: str, value: Array) -> Array:
        seen[name] = np.array(half.numpy(value))
        if replace is None or name not in replace or replace[name].shape != seen[name].shape:
            return value
        return half.array(replace[name])

    _, after = half.module("model.cache").forward_cached(
        {name: half.array(value) for name, value in case.params.items()},
        half.array(tokens_BT),
        {name: half.array(value) for name, value in cache.items()},
        spec=case.spec,
        numerics=FLOAT64,
        positions_BT=half.array(positions_BT),
        tap=tap,
    )
    return seen, {name: np.array(half.numpy(value)) for name, value in after.items()}


def _judge_cache(
    half: Half, truth: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], limit: float, start: int
) -> Culprit | None:
    for name, value in truth.items():
        difference = relative_difference(own[name], value)
        if difference.value > limit:
            layer, part = split_tap(name)
            op = "cache." + part.removesuffix("_BS")
            where = f"{name}{difference.position} after token {start}"
            return _blame(half, op, layer, where, difference.value, limit, STATE)
    return None


def _judge_taps(
    half: Half, truth: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], limit: float, start: int
) -> Culprit | None:
    for name, value in truth.items():
        difference = relative_difference(own[name], value)
        if difference.value > limit:
            layer, op = split_tap(name)
            place = position_of(name, difference.where)
            return _blame(half, op, layer, place, difference.value, limit, FORWARD, f"decoding from token {start}")
    return None


def _blame(
    half: Half,
    op: str,
    layer: int | None,
    position: str | None,
    observed: float,
    limit: float,
    direction: str,
    detail: str = "through the cache",
) -> Culprit:
    return Culprit(
        half=half.name, op=op, layer=layer, position=position, observed=observed, limit=limit, direction=direction,
        detail=detail,
    )  # fmt: skip

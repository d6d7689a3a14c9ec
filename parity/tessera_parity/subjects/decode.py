"""Decode: through the cache, one token a step. Logits and cache contents in float64; tokens in the working dtype.

Teacher-forced logits must equal the full forward's, and all three caches must hold the same keys, values and positions.
Free-running tokens are taken from trained weights, where logits are peaked like a real model's and repeat like one;
each flip between the halves must be explained by the near-tie rule (`flips.py`) against float64.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tessera_parity.budget import model_limit, token_budget
from tessera_parity.compare import relative_difference
from tessera_parity.families import family_spec, random_weights
from tessera_parity.flips import Sampling, greedy_gap, sampled_gap
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_parity.trained import TrainedModel, trained_model
from tessera_shared import randomness
from tessera_shared.numerics import FLOAT64, numerics_for
from tessera_shared.spec import ARCHITECTURES, ModelSpec

_ROWS, _POSITIONS, _PROMPT = 2, 9, 16
_WAYS = (
    ("greedy", Sampling()),
    ("sampled", Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01)),
)


def run(context: Context) -> Iterator[Check]:
    """Yield teacher-forced logits and cache contents for each half, then the free-running tokens."""
    for half in context.halves:
        yield from _teacher_forced(context, half)
    if context.torch is not None and context.jax is not None:
        yield from _free_running(context, context.torch, context.jax)


def _teacher_forced(context: Context, half: Half) -> Iterator[Check]:
    cases = context.budget(quick=2, default=6, full=16)
    worst = {"teacher-forced logits": (0.0, 0.0, 0), "cache contents": (0.0, 0.0, 0)}
    for index in range(cases):
        context.advance(f"decode: {half.name}, teacher-forced {index + 1}/{cases}")
        rng = np.random.default_rng((context.seed, 41, index))
        spec = family_spec(ARCHITECTURES[index % 4], rng)
        if context.lane == QUICK and index:  # one of several layers is enough to see layers mixed up
            spec = replace(spec, num_layers=1, window_from_layer=0)
        arrays = random_weights(spec, rng)
        ids_BT = rng.integers(0, spec.vocab_size, (_ROWS, _POSITIONS)).astype(np.int32)
        limit = model_limit(spec, num_positions=_POSITIONS)
        sides = [_stepped(side, spec, arrays, ids_BT, prefill=1 + index % 4) for side in (context.numpy, half)]
        truth_BTV = _full(context.numpy, spec, arrays, ids_BT)
        _keep(worst, "teacher-forced logits", truth_BTV, sides[1][0], limit)
        for name in sides[0][1]:
            _keep(worst, "cache contents", sides[0][1][name], sides[1][1][name], limit)
    for name, (observed, limit, compared) in worst.items():
        yield Check(
            subject="decode",
            name=name,
            question=Question.MATHEMATICS,
            sides=("numpy", half.name),
            verdict=Verdict.PARITY if compared and observed <= limit else Verdict.DIVERGENCE,
            cases=cases,
            compared=compared,
            observed=observed,
            limit=limit,
            device=context.device,
            op="cache" if observed > limit else None,
        )


def _keep(worst: dict[str, tuple[float, float, int]], name: str, a: Any, b: Any, limit: float) -> None:
    observed, kept_limit, compared = worst[name]
    value = relative_difference(a, b).value
    if kept_limit == 0.0 or not value / limit <= observed / kept_limit:
        observed, kept_limit = value, limit
    worst[name] = (observed, kept_limit, compared + np.size(a))


def _full(half: Half, spec: ModelSpec, arrays: dict[str, Any], ids_BT: Any) -> np.ndarray[Any, Any]:
    module, params = half.module("model.transformer"), {name: half.array(value) for name, value in arrays.items()}
    forward = half.compiled(lambda params, ids: module.forward(params, ids, spec=spec, numerics=FLOAT64))
    return half.numpy(forward(params, half.array(ids_BT)))


def _stepped(
    half: Half, spec: ModelSpec, arrays: dict[str, Any], ids_BT: Any, *, prefill: int
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Return logits of every position, taken through the cache, and what the cache holds at the end (one slot left
    empty)."""
    module = half.module("model.cache")
    params = {name: half.array(value) for name, value in arrays.items()}
    rows, length = ids_BT.shape
    cache = module.empty_cache(params, spec=spec, numerics=FLOAT64, batch=rows, capacity=length + 1)
    forward = half.compiled(
        lambda params, ids, cache, positions: module.forward_cached(
            params, ids, cache, spec=spec, numerics=FLOAT64, positions_BT=positions
        )
    )
    parts, start = [], 0
    while start < length:
        stop = prefill if start == 0 else start + 1
        positions_BT = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (rows, stop - start)).copy()
        logits_BTV, cache = forward(params, half.array(ids_BT[:, start:stop]), cache, half.array(positions_BT))
        parts.append(half.numpy(logits_BTV))
        start = stop
    return np.concatenate(parts, axis=1), {name: half.numpy(value) for name, value in cache.items()}


def _free_running(context: Context, torch: Half, jax: Half) -> Iterator[Check]:
    steps = context.budget(quick=30, default=100, full=200) if context.cases is None else 100
    model = trained_model(context, steps=steps)
    wanted = {"quick": 1_000, "default": 4_000, "full": 10_000}[context.lane]
    length = 64
    for dtype in (context.dtype,) if context.dtype else ("float32",):
        for name, how in _WAYS:
            context.advance(f"decode: {wanted} tokens, {name}, {dtype}")
            yield _tokens(
                context, (torch, jax), model, name, how, rows=-(-wanted // length), length=length, dtype=dtype
            )


def _tokens(
    context: Context, halves: tuple[Half, Half], model: TrainedModel, name: str, how: Sampling, *, rows: int, length: int, dtype: str
) -> Check:  # fmt: skip
    prompts_BT = model.prompts(rows, _PROMPT, seed=context.seed)
    key_2 = randomness.stream_key(context.seed, "parity decode uniforms")
    uniforms_BT = randomness.uniforms(key_2, 0, rows * length, dtype="float32").reshape(rows, length)
    left_BT, right_BT = (generated(half, model, prompts_BT, uniforms_BT, how, dtype) for half in halves)
    compared, legal, illegal, first = 0, 0, 0, ""
    worst = 0.0
    for row in np.flatnonzero((left_BT != right_BT).any(axis=1)):
        step = int(np.argmax(left_BT[row] != right_BT[row]))
        compared -= length - step - 1  # beyond a flip the two rows read different texts
        prefix_1T = np.concatenate([prompts_BT[row], left_BT[row, :step]])[None]
        logits_V = _full(context.numpy, model.spec, model.arrays, prefix_1T)[0, -1]
        budget = token_budget(model.spec, num_positions=prefix_1T.size, dtype=dtype, logits=logits_V)
        tokens = int(left_BT[row, step]), int(right_BT[row, step])
        excess = _excess(logits_V, float(uniforms_BT[row, step]), tokens, how, budget)
        worst = max(worst, excess)
        legal, illegal = legal + (excess <= 0.0), illegal + (excess > 0.0)
        if excess > 0.0 and not first:
            first = f"row {row}, step {step}: {tokens[0]} against {tokens[1]}"
    return Check(
        subject="decode",
        name=f"{name} tokens",
        question=Question.ROUNDING,
        sides=(halves[0].name, halves[1].name),
        verdict=Verdict.DIVERGENCE if illegal else Verdict.PARITY,
        cases=rows,
        compared=compared + left_BT.size,
        observed=float(illegal),
        limit=0.0,
        unit="unexplained flips",
        dtype=dtype,
        device=context.device,
        op=("sampling" if how.temperature else "logits") if illegal else None,
        position=first or None,
        detail=f"{legal} flips at near-ties, {illegal} unexplained; weights trained for {model.steps} steps on the corpus",
    )


def _excess(logits_V: Any, uniform: float, tokens: tuple[int, int], how: Sampling, budget: float) -> float:
    if how.temperature == 0.0:
        return greedy_gap(logits_V, *tokens) - 2.0 * budget
    return sampled_gap(logits_V, uniform, *tokens, how=how, logit_error=budget)


def generated(
    half: Half, model: TrainedModel, prompts_BT: Any, uniforms_BT: Any, how: Sampling, dtype: str
) -> np.ndarray[Any, Any]:
    """Return the tokens that a half writes after `prompts_BT`."""
    numerics = numerics_for(dtype)
    params = {name: half.array(value, numerics.param) for name, value in model.arrays.items()}
    out = half.module("serve.decode").generate(
        params, half.array(prompts_BT), spec=model.spec, numerics=numerics, num_tokens=uniforms_BT.shape[1],
        uniforms_BT=half.array(uniforms_BT, "float32") if how.temperature else None,
        temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p,
    )  # fmt: skip
    return half.numpy(out)


SUBJECT = Subject(
    name="decode",
    about="prefill and single tokens through the cache: logits, cache contents, greedy and sampled tokens from trained weights",
    run=run,
)

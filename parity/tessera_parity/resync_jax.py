"""`resync` for JAX: identities with a backward rule of their own.

A zero `probe` beside each value takes the arriving cotangent out: it is the gradient by that probe.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tessera_parity.halves import Array, Half
from tessera_parity.resync import EAGER, STRICT, Observation
from tessera_parity.rounding_cases import RoundingCase, tap_dtype
from tessera_shared.numerics import Numerics
from tessera_shared.spec import ModelSpec

Arrays = dict[str, Array]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _swap(value: Array, replacement: Array, onward: Array, probe: Array, rounded_to: str | None) -> Array:
    """Return `replacement`. Backwards: `probe` gets the arriving cotangent, `value` gets `onward`, or the same
    rounded.
    """
    del value, onward, probe, rounded_to
    return replacement


def _swap_forward(
    value: Array, replacement: Array, onward: Array, probe: Array, rounded_to: str | None
) -> tuple[Array, Array]:
    del value, probe, rounded_to
    return replacement, onward


def _swap_backward(rounded_to: str | None, onward: Array, cotangent: Array) -> tuple[Array, Array, Array, Array]:
    sent = onward if rounded_to is None else _rounded(cotangent, rounded_to)
    nothing = jnp.zeros_like(cotangent)
    return sent, nothing, nothing, cotangent


def _rounded(value: Array, dtype: str) -> Array:
    """Round once, as the oracle does; a cast from float64 to bfloat16 may go through float32 and round twice."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(value, int(info.nexp), int(info.nmant))


_swap.defvjp(_swap_forward, _swap_backward)


def observe_values(
    half: Half, case: RoundingCase, synced: Mapping[str, np.ndarray], numerics: Numerics, mode: str
) -> Observation:
    """See `resync.observe_values`."""
    params, integers, replacements = _inputs(half, case, synced, numerics)
    run = _built_values(half, case.spec, numerics, mode)  # type: ignore[arg-type]  # halves hash by identity
    values = run(params, integers, replacements)
    return Observation(_out(half, values), _dtypes(values), {}, {})


def observe_gradients(
    half: Half,
    case: RoundingCase,
    synced: Mapping[str, np.ndarray],
    onward: Mapping[str, np.ndarray] | None,
    numerics: Numerics,
    policy: Numerics,
    mode: str,
) -> Observation:
    """Run in `numerics`; cotangents go on as `onward` says, or without it as they came, rounded as `policy` says."""
    params, integers, replacements = _inputs(half, case, synced, numerics)
    sent = replacements if onward is None else _floats(half, onward, numerics)
    rounded = None if onward is not None else policy
    run = _built_gradients(half, case.spec, numerics, rounded, mode)  # type: ignore[arg-type]
    values, (gradients, cotangents) = run(
        params, integers, replacements, sent, half.array(case.cotangent_BTV, numerics.logits)
    )
    return Observation(_out(half, values), _dtypes(values), _out(half, cotangents), _out(half, gradients))


def _values(half: Half, spec: ModelSpec, numerics: Numerics) -> Callable[..., Arrays]:
    forward = half.module("model.transformer").forward

    def run(params: Arrays, integers: tuple[Array, Array, Array], replacements: Arrays) -> Arrays:
        values: Arrays = {}

        def tap(name: str, value: Array) -> Array:
            values[name] = value
            return replacements[name]

        token_ids_BT, positions_BT, segments_BT = integers
        forward(
            params, token_ids_BT, spec=spec, numerics=numerics, positions_BT=positions_BT, segments_BT=segments_BT,
            tap=tap,
        )  # fmt: skip
        return values

    return run


def _gradients(half: Half, spec: ModelSpec, numerics: Numerics, policy: Numerics | None) -> Callable[..., Any]:
    forward = half.module("model.transformer").forward

    def run(
        params: Arrays, integers: tuple[Array, Array, Array], replacements: Arrays, onward: Arrays, cotangent: Array
    ) -> Any:
        token_ids_BT, positions_BT, segments_BT = integers

        def logits(params: Arrays, probes: Arrays) -> tuple[Array, Arrays]:
            values: Arrays = {}

            def tap(name: str, value: Array) -> Array:
                values[name] = value
                rounded_to = None if policy is None else tap_dtype(name, policy)
                return _swap(value, replacements[name], onward[name], probes[name], rounded_to)

            out = forward(
                params, token_ids_BT, spec=spec, numerics=numerics, positions_BT=positions_BT,
                segments_BT=segments_BT, tap=tap,
            )  # fmt: skip
            return out, values

        probes = {name: jnp.zeros_like(value) for name, value in replacements.items()}
        _, pull, values = jax.vjp(logits, params, probes, has_aux=True)
        return values, pull(cotangent)

    return run


def compiled(run: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Return `run` as a mode says: as it is, or jitted; strict forbids XLA to skip roundings that `run` asks for."""
    if mode == EAGER:
        return run
    options = {"xla_allow_excess_precision": False} if mode == STRICT else {}
    return jax.jit(run, compiler_options=options)


@lru_cache(maxsize=32)
def _built_values(half: Half, spec: ModelSpec, numerics: Numerics, mode: str) -> Callable[..., Arrays]:
    return compiled(_values(half, spec, numerics), mode)


@lru_cache(maxsize=32)
def _built_gradients(
    half: Half, spec: ModelSpec, numerics: Numerics, policy: Numerics | None, mode: str
) -> Callable[..., Any]:
    return compiled(_gradients(half, spec, numerics, policy), mode)


def _inputs(
    half: Half, case: RoundingCase, synced: Mapping[str, np.ndarray], numerics: Numerics
) -> tuple[Arrays, tuple[Array, ...], Arrays]:
    params = {name: half.array(value, numerics.param) for name, value in case.params.items()}
    integers = tuple(map(half.array, (case.token_ids_BT, case.positions_BT, case.segments_BT)))
    return params, integers, _floats(half, synced, numerics)


def _floats(half: Half, values: Mapping[str, np.ndarray], numerics: Numerics) -> Arrays:
    return {name: half.array(value, tap_dtype(name, numerics)) for name, value in values.items()}


def _out(half: Half, values: Arrays) -> dict[str, np.ndarray]:
    return {name: half.numpy(value) for name, value in values.items()}


def _dtypes(values: Arrays) -> dict[str, str]:
    return {name: str(value.dtype) for name, value in values.items()}

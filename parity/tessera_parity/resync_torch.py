"""`resync` for torch: an autograd function that swaps the value on the way there and the cotangent on the way back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera_parity.halves import Half
from tessera_parity.resync import FUSED, Observation
from tessera_parity.rounding_cases import RoundingCase, tap_dtype
from tessera_shared.numerics import Numerics
from tessera_shared.reference.rounding import round_to

Swap = Callable[[Tensor], Tensor]


class _Swap(torch.autograd.Function):
    """y = replacement; the backward pass hands the arriving cotangent to `onward` and passes on what that returns."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, replacement: Tensor, onward: Swap) -> Tensor:
        del value
        ctx.onward = onward
        return replacement.view_as(replacement)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return ctx.onward(cotangents[0]), None, None


def observe_values(
    half: Half, case: RoundingCase, synced: Mapping[str, np.ndarray], numerics: Numerics, mode: str
) -> Observation:
    """See `resync.observe_values`."""
    inputs = {name: half.array(value, numerics.param) for name, value in case.params.items()}
    replacements = {name: half.array(value, tap_dtype(name, numerics)) for name, value in synced.items()}
    integers = tuple(map(half.array, (case.token_ids_BT, case.positions_BT, case.segments_BT)))
    build = _compiled if mode == FUSED else _runner
    run = build(half, case.spec, numerics)  # type: ignore[arg-type]  # halves hash by identity
    with torch.no_grad(), _full_products(), _no_dynamo_limit() if mode == FUSED else nullcontext():
        values = run(inputs, integers, replacements)
    return Observation(
        {name: half.numpy(value) for name, value in values.items()},
        {name: _dtype(value) for name, value in values.items()},
        {},
        {},
    )


def observe_gradients(
    half: Half,
    case: RoundingCase,
    synced: Mapping[str, np.ndarray],
    onward: Mapping[str, np.ndarray] | None,
    numerics: Numerics,
    policy: Numerics,
) -> Observation:
    """Run in `numerics`; cotangents go on as `onward` says, or without it as they came, rounded as `policy` says."""
    params = {name: half.array(value, numerics.param).requires_grad_() for name, value in case.params.items()}
    values: dict[str, Tensor] = {}
    cotangents: dict[str, Tensor] = {}

    def swap(name: str, dtype: str) -> Swap:
        def send(cotangent: Tensor) -> Tensor:
            cotangents[name] = cotangent
            if onward is not None:
                return half.array(onward[name], dtype)  # type: ignore[no-any-return]
            once = round_to(
                half.numpy(cotangent), tap_dtype(name, policy)
            )  # torch's own cast rounds twice, via float32
            return half.array(once, dtype)  # type: ignore[no-any-return]

        return send

    def tap(name: str, value: Tensor) -> Tensor:
        values[name] = value
        dtype = tap_dtype(name, numerics)
        out: Tensor = _Swap.apply(value, half.array(synced[name], dtype), swap(name, dtype))  # type: ignore[no-untyped-call]
        return out

    token_ids_BT, positions_BT, segments_BT = map(half.array, (case.token_ids_BT, case.positions_BT, case.segments_BT))
    with _full_products():
        logits_BTV = half.module("model.transformer").forward(
            params, token_ids_BT, spec=case.spec, numerics=numerics, positions_BT=positions_BT, segments_BT=segments_BT,
            tap=tap,
        )  # fmt: skip
        grads = torch.autograd.grad(
            logits_BTV, list(params.values()), half.array(case.cotangent_BTV, numerics.logits), allow_unused=True
        )
    gradients = {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
    return Observation(
        {name: half.numpy(value) for name, value in values.items()},
        {name: _dtype(value) for name, value in values.items()},
        {name: half.numpy(value) for name, value in cotangents.items()},
        {name: half.numpy(value) for name, value in gradients.items()},
    )


def _runner(half: Half, spec: Any, numerics: Numerics) -> Callable[..., dict[str, Tensor]]:
    forward = half.module("model.transformer").forward

    def run(
        params: dict[str, Tensor], integers: tuple[Tensor, Tensor, Tensor], replacements: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}

        def tap(name: str, value: Tensor) -> Tensor:
            values[name] = value
            return replacements[name]

        token_ids_BT, positions_BT, segments_BT = integers
        forward(
            params, token_ids_BT, spec=spec, numerics=numerics, positions_BT=positions_BT, segments_BT=segments_BT,
            tap=tap,
        )  # fmt: skip
        return values

    return run


@lru_cache(maxsize=16)
def _compiled(half: Half, spec: Any, numerics: Numerics) -> Callable[..., dict[str, Tensor]]:
    compiled: Callable[..., dict[str, Tensor]] = torch.compile(_runner(half, spec, numerics), dynamic=False)
    return compiled


@contextmanager
def _full_products() -> Iterator[None]:
    """No TF32 and no bfloat16 sums across splits: the half leaves these switches to its caller (`model.linear`)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


def _no_dynamo_limit() -> Any:
    return torch._dynamo.config.patch(recompile_limit=64)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")

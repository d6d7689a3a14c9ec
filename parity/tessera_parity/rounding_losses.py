"""Rounding of what a training step adds to the model: losses with their gradients, and one update of AdamW.

All of it is computed in the policy's loss and parameter dtypes, float32 in every working policy, so it is measured
once. Students are teachers plus noise of 10^-3 to 1 in each case: near agreement is where a careless divergence loses
its digits.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from tessera_parity.halves import Array, Half
from tessera_parity.rounding_cases import ROWS, TOKENS
from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.objectives import AdamWOptions
from tessera_shared.reference.rounding import round_to

VOCABULARY, WEIGHTS = 101, 4000
STEP, LEARNING_RATE, OPTIONS = 6, 3e-3, AdamWOptions()

DIVERGENCES: dict[str, dict[str, float]] = {
    "forward_kl": {"temperature": 2.0},
    "reverse_kl": {"temperature": 1.0},
    "generalized_jsd": {"temperature": 1.0, "beta": 0.3},
    "skew_kl": {"temperature": 1.0, "alpha": 0.1},
    "soft_cross_entropy": {"temperature": 2.0},
    "total_variation": {"temperature": 1.0},
}


class LossCase(NamedTuple):
    """Inputs of every loss and of one update, values of float32."""

    student_BTV: np.ndarray
    teacher_BTV: np.ndarray
    labels_BT: np.ndarray
    weights_BT: np.ndarray  # of the per-token losses in the scalar that is differentiated
    optimizer: dict[str, np.ndarray]  # param, grad, first, second


def loss_case(numerics: Numerics, rng: np.random.Generator) -> LossCase:
    """Draw one case."""
    teacher = rng.standard_normal((ROWS, TOKENS, VOCABULARY)) * 2.0 ** rng.uniform(0.0, 2.0)
    student = teacher + rng.standard_normal(teacher.shape) * 10.0 ** rng.uniform(-3.0, 0.0)
    grad = rng.standard_normal(WEIGHTS) * 10.0 ** rng.uniform(-4.0, 0.0)
    state = {
        "param": rng.standard_normal(WEIGHTS),
        "grad": grad,
        "first": 0.5 * grad + 0.3 * np.std(grad) * rng.standard_normal(WEIGHTS),
        "second": 0.3 * np.square(grad) + 0.1 * np.var(grad) * rng.random(WEIGHTS),
    }
    return LossCase(
        round_to(student, numerics.loss),
        round_to(teacher, numerics.loss),
        rng.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32),
        round_to(rng.uniform(0.5, 1.5, (ROWS, TOKENS)), numerics.loss),
        {name: round_to(value, numerics.param) for name, value in state.items()},
    )


def reference_losses(
    oracle: Half, case: LossCase, numerics: Numerics
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the oracle's values: the truth, and rounded where the policy casts (updates: rounded once)."""
    truth, ideal = (_values(oracle, case.student_BTV, case.teacher_BTV, policy) for policy in (FLOAT64, numerics))
    updated = _update(oracle, {name: np.asarray(value) for name, value in case.optimizer.items()})
    return truth | updated, ideal | {name: round_to(value, numerics.param) for name, value in updated.items()}


def observe_losses(half: Half, case: LossCase, numerics: Numerics, *, mode: str) -> dict[str, np.ndarray]:
    """Return a half's losses (`loss x`), their gradients by the student's logits (`grad x`), and one update (`adamw
    x`).
    """
    run = _built(half, numerics, mode)  # type: ignore[arg-type]  # halves hash by identity
    arrays = [half.array(value, numerics.loss) for value in (case.student_BTV, case.teacher_BTV, case.weights_BT)]
    optimizer = {name: half.array(value, numerics.param) for name, value in case.optimizer.items()}
    out = run(*arrays, half.array(case.labels_BT), optimizer)
    return {name: half.numpy(value) for name, value in out.items()}


def _runner(half: Half, numerics: Numerics) -> Callable[..., dict[str, Array]]:
    def run(
        student: Array, teacher: Array, weights: Array, labels: Array, optimizer: dict[str, Array]
    ) -> dict[str, Array]:
        out = _values(half, student, teacher, numerics)
        for name, function in _scalars(half, teacher, weights, labels, numerics).items():
            _, grads = half.value_and_grad(function, {"student": student})
            out["grad " + name] = grads["student"]
        return out | _update(half, optimizer)

    return run


def _values(half: Half, student: Array, teacher: Array, numerics: Numerics) -> dict[str, Array]:
    losses = half.module("distil.losses")
    out = {"loss log_softmax": losses.log_softmax(student, numerics=numerics)}
    for name, options in DIVERGENCES.items():
        out["loss " + name] = getattr(losses, name)(student, teacher, numerics=numerics, **options)
    return out


def _scalars(
    half: Half, teacher: Array, weights: Array, labels: Array, numerics: Numerics
) -> dict[str, Callable[[Mapping[str, Array]], Array]]:
    losses = half.module("distil.losses")

    def cross_entropy(named: Mapping[str, Array]) -> Array:
        return losses.cross_entropy(named["student"], labels, z_loss=1e-2, numerics=numerics)[0]

    def weighted(name: str, named: Mapping[str, Array]) -> Array:
        value = getattr(losses, name)(named["student"], teacher, numerics=numerics, **DIVERGENCES[name])
        return (value * weights).sum()

    scalars: dict[str, Callable[[Mapping[str, Array]], Array]] = {"cross_entropy": cross_entropy}
    return scalars | {name: partial(weighted, name) for name in DIVERGENCES}


def _update(half: Half, given: Mapping[str, Array]) -> dict[str, Array]:
    optim = half.module("train.optim")
    state = optim.state_from_moments({"w": given["first"]}, {"w": given["second"]}, STEP, options=OPTIONS)
    params, state = optim.adamw_update(
        {"w": given["param"]}, {"w": given["grad"]}, state, lr=LEARNING_RATE, options=OPTIONS, decay_mask={"w": True}
    )
    first, second, _ = optim.moments(state)
    return {"adamw param": params["w"], "adamw first": first["w"], "adamw second": second["w"]}


@lru_cache(maxsize=8)
def _built(half: Half, numerics: Numerics, mode: str) -> Callable[..., dict[str, Array]]:
    run = _runner(half, numerics)
    if half.name == "torch":
        return run
    from tessera_parity.resync_jax import compiled

    return compiled(run, mode)

"""A training step without differentiation: a loss, its slope along a direction, the update by given gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objective_checks import check_objective
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.reference.losses import training_loss
from tessera_shared.reference.optim import (
    AdamWState,
    Arrays,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    global_norm,
)
from tessera_shared.reference.transformer import forward
from tessera_shared.spec import ModelSpec

_STEP = 1e-30  # of the complex step: its square vanishes, so that no truncation error is left


class Teacher(NamedTuple):
    """A model with its own spec and numerics policy; only its vocabulary must be the student's."""

    params: Arrays
    spec: ModelSpec
    numerics: Numerics


class TrainState(NamedTuple):
    """Weights, moments and the number of updates made."""

    params: Arrays
    optimizer: AdamWState
    step: int


def init_state(params: Arrays, *, options: AdamWOptions) -> TrainState:
    """Return the state before the first update."""
    return TrainState(params, adamw_init(params, options=options), 0)


def teacher_logits(teacher: Teacher, batch: Batch) -> np.ndarray:
    """Return the teacher's logits; a constant."""
    return _logits(teacher.params, batch, teacher.spec, teacher.numerics).real


def batch_loss(
    params: Arrays,
    batch: Batch,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    teacher: Teacher | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the objective's loss sum over a batch and its denominator. Parameters may be complex."""
    check_objective(objective, has_teacher=teacher is not None)
    targets_BTV = None if teacher is None else teacher_logits(teacher, batch)
    logits_BTV = _logits(params, batch, spec, numerics)
    return training_loss(logits_BTV, targets_BTV, batch.labels_BT, objective=objective, numerics=numerics)


def directional_derivative(loss_of_params: Callable[[Arrays], np.ndarray], params: Arrays, direction: Arrays) -> float:
    """Return the derivative of a real loss along `direction`, exact to rounding.

    f(p + i h d) = f(p) + i h f'(p) d + O(h^2), so the imaginary part over h is the slope without any cancellation
    (Squire & Trapp 1998, doi 10.1137/S003614459631241X). Names missing from `direction` do not move.
    """
    moved = {
        name: param + 1j * _STEP * direction[name] if name in direction else param for name, param in params.items()
    }
    return float(np.imag(loss_of_params(moved)) / _STEP)


def apply_gradients(
    state: TrainState, grads: Arrays, *, lr: float, options: AdamWOptions, decay_mask: Mapping[str, bool]
) -> tuple[TrainState, np.ndarray]:
    """Clip mean gradients, update the weights, count the step; return the state and the norm before clipping."""
    if options.clip_norm is None:
        norm = global_norm(grads)
    else:
        grads, norm = clip_by_global_norm(grads, max_norm=options.clip_norm)
    params, optimizer = adamw_update(
        state.params, grads, state.optimizer, lr=lr, options=options, decay_mask=decay_mask
    )
    return TrainState(params, optimizer, state.step + 1), norm


def adamw_steps(
    params: Arrays,
    gradients: Sequence[Arrays],
    *,
    learning_rates: Sequence[float],
    options: AdamWOptions,
    decay_mask: Mapping[str, bool],
) -> TrainState:
    """Return the state after one update by each of the given gradients."""
    state = init_state(params, options=options)
    for grads, lr in zip(gradients, learning_rates, strict=True):
        state, _ = apply_gradients(state, grads, lr=lr, options=options, decay_mask=decay_mask)
    return state


def _logits(params: Arrays, batch: Batch, spec: ModelSpec, numerics: Numerics) -> np.ndarray:
    return forward(
        params,
        batch.token_ids_BT,
        spec=spec,
        numerics=numerics,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
    )

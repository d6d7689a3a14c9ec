"""One training step: gradients of loss sums over micro-batches, divided once, clipped, applied. State in, state out.

Everything here can be jitted with `spec`, `numerics`, `objective`, `options` and `recompute` static; checks look at
those and at shapes only.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tessera_jax.distil.losses import training_loss
from tessera_jax.distil.teacher import Teacher, teacher_logits
from tessera_jax.model.dtypes import dtype_of
from tessera_jax.model.transformer import forward
from tessera_jax.train.optim import (
    AdamWState,
    Arrays,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    global_norm,
)
from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objective_checks import check_micro_batches, check_objective, check_vocabularies
from tessera_shared.objectives import IGNORE_INDEX, AdamWOptions, Objective
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table

_Sums = tuple[Array, Array, dict[str, Array]]


class TrainState(NamedTuple):
    """Weights, moments and the number of updates made (an int32 scalar)."""

    params: Arrays
    optimizer: AdamWState
    step: Array


def init_state(params: Arrays, *, options: AdamWOptions) -> TrainState:
    """Return the state before the first update."""
    return TrainState(params, adamw_init(params, options=options), jnp.zeros((), jnp.int32))


def loss_and_grads(
    params: Arrays,
    batch: Batch,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[Array, Array, dict[str, Array]]:
    """Return a micro-batch's loss sum, its denominator, and the gradients of the sum in the reduction dtype."""
    check_objective(objective, has_teacher=teacher is not None)
    if teacher is not None:
        check_vocabularies(spec, teacher.spec, objective)
    token_ids_BT, labels_BT, positions_BT, segments_BT = (jnp.asarray(field) for field in batch)
    targets_BTV = None if teacher is None else teacher_logits(teacher, batch)

    def loss_of(params: Arrays) -> tuple[Array, Array]:
        logits_BTV = forward(
            params,
            token_ids_BT,
            spec=spec,
            numerics=numerics,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            recompute=recompute,
        )
        return training_loss(logits_BTV, targets_BTV, labels_BT, objective=objective, numerics=numerics)

    (loss_sum, denominator), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    dtype = dtype_of(numerics.grad_reduce)
    return loss_sum, denominator, {name: grad.astype(dtype) for name, grad in grads.items()}


def apply_gradients(
    state: TrainState, grads: Arrays, *, lr: float | Array, options: AdamWOptions, decay_mask: Mapping[str, bool]
) -> tuple[TrainState, Array]:
    """Clip mean gradients, update the weights, count the step; return the state and the norm before clipping."""
    if options.clip_norm is None:
        norm = global_norm(grads)
    else:
        grads, norm = clip_by_global_norm(grads, max_norm=options.clip_norm)
    params, optimizer = adamw_update(
        state.params, grads, state.optimizer, lr=lr, options=options, decay_mask=decay_mask
    )
    return TrainState(params, optimizer, state.step + jnp.ones((), jnp.int32)), norm


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    *,
    lr: float | Array,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    options: AdamWOptions,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """Make one update from a sequence of micro-batches; return the new state and `loss, grad_norm, num_tokens, lr`.

    Sums of losses and of gradients are added over the micro-batches and divided once by the sum of denominators, so
    that how a batch is cut does not matter. Where nothing counts the gradient is 0. Micro-batches of one shape are
    scanned, so that compilation does not grow with their number.
    """
    check_micro_batches(len(batches))
    loss_sum, denominator, grads = _accumulate(
        state.params, batches, spec=spec, numerics=numerics, objective=objective, teacher=teacher, recompute=recompute
    )
    divisor = jnp.maximum(denominator, 1)
    grads = {name: grad / divisor.astype(grad.dtype) for name, grad in grads.items()}
    decay_mask = {name: info.decay for name, info in tensor_table(spec).items()}
    state, norm = apply_gradients(state, grads, lr=lr, options=options, decay_mask=decay_mask)
    counts = [(jnp.asarray(batch.labels_BT) != IGNORE_INDEX).sum(dtype=jnp.int32) for batch in batches]
    metrics = {
        "loss": loss_sum / divisor.astype(loss_sum.dtype),
        "grad_norm": norm,
        "num_tokens": jnp.stack(counts).sum(dtype=jnp.int32),
        "lr": jnp.asarray(lr, loss_sum.dtype),
    }
    return state, metrics


def _accumulate(
    params: Arrays,
    batches: Sequence[Batch],
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    teacher: Teacher | None,
    recompute: bool,
) -> _Sums:
    """Return `loss_and_grads` summed over the micro-batches, in order."""

    def sums_of(batch: Batch) -> _Sums:
        return loss_and_grads(
            params, batch, spec=spec, numerics=numerics, objective=objective, teacher=teacher, recompute=recompute
        )

    def add(sums: _Sums, batch: Batch) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, sums, sums_of(batch)), None

    sums = sums_of(batches[0])
    rest = batches[1:]
    if len(rest) > 1 and len({batch.token_ids_BT.shape for batch in rest}) == 1:
        stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *rest)
        return jax.lax.scan(add, sums, stacked)[0]
    for batch in rest:
        sums, _ = add(sums, batch)
    return sums

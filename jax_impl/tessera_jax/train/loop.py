"""The loop behind `tessera train`: schedule, batches and steps; nothing is remembered outside the state."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import Array

from tessera_jax.distil.losses import cross_entropy
from tessera_jax.distil.teacher import Teacher
from tessera_jax.model.params import Params
from tessera_jax.model.transformer import forward
from tessera_jax.train.step import TrainState, train_step
from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.packing import split_rows
from tessera_shared.schedule import Schedule, learning_rate
from tessera_shared.spec import ModelSpec

OnStep = Callable[[int, TrainState, dict[str, Array]], bool]
"""(step, state after it, its metrics) -> whether to go on. The state may be given to the next step: copy what to keep."""

_compiled_step = jax.jit(
    train_step,
    static_argnames=("spec", "numerics", "objective", "options", "recompute"),
    donate_argnames=("state",),
)


def train(
    state: TrainState,
    batches_at: Callable[[int], Batch],
    *,
    num_steps: int,
    spec: ModelSpec,
    numerics: Numerics,
    schedule: Schedule,
    options: AdamWOptions,
    objective: Objective,
    accumulation: int = 1,
    teacher: Teacher | None = None,
    recompute: bool = False,
    compiled: bool = False,
    on_step: OnStep | None = None,
) -> TrainState:
    """Make up to `num_steps` updates from where `state` is; return the state after the last.

    Step s takes `batches_at(s)`, cut into `accumulation` micro-batches, and the schedule's rate at s, so the result
    depends on the state and the arguments alone. With `compiled`, the framework's compiler makes one program of a step,
    and each step writes over the state before it: what came in as `state` cannot be used afterwards.
    """
    step_function = _compiled_step if compiled else train_step
    state = state._replace(step=jnp.array(state.step))  # it may be the optimizer's own count, and is given away once
    start_step = int(state.step)
    for step in range(start_step, start_step + num_steps):
        state, metrics = step_function(
            state,
            split_rows(batches_at(step), accumulation),
            lr=learning_rate(schedule, step),
            spec=spec,
            numerics=numerics,
            objective=objective,
            options=options,
            teacher=teacher,
            recompute=recompute,
        )
        if on_step is not None and not on_step(step, state, metrics):
            break
    return state


def held_out_loss(
    params: Params, batches: Iterable[Batch], *, spec: ModelSpec, numerics: Numerics
) -> tuple[float, int]:
    """Return the mean cross-entropy in nats a token over all batches, and the number of tokens. Without any: (0, 0)."""
    loss_sum, num_tokens = 0.0, 0
    for batch in batches:
        loss, count = _batch_loss(params, batch, spec=spec, numerics=numerics)
        loss_sum, num_tokens = loss_sum + float(loss), num_tokens + int(count)
    return loss_sum / max(num_tokens, 1), num_tokens


def _loss_of_batch(params: Params, batch: Batch, *, spec: ModelSpec, numerics: Numerics) -> tuple[Array, Array]:
    token_ids_BT, labels_BT, positions_BT, segments_BT = (jnp.asarray(field) for field in batch)
    logits_BTV = forward(
        params, token_ids_BT, spec=spec, numerics=numerics, positions_BT=positions_BT, segments_BT=segments_BT
    )
    return cross_entropy(logits_BTV, labels_BT, numerics=numerics)


_batch_loss = jax.jit(_loss_of_batch, static_argnames=("spec", "numerics"))

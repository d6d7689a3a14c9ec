"""The loop behind `tessera train --kernels`: as `tessera_torch.train.loop`, over the fused step."""

from collections.abc import Callable, Iterable

import torch

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.packing import split_rows
from tessera_shared.schedule import Schedule, learning_rate
from tessera_shared.spec import ModelSpec
from tessera_torch.distil.teacher import Teacher
from tessera_torch.fast.loss import held_out_sum
from tessera_torch.fast.step import FastState, fast_state, train_step
from tessera_torch.kernels import Ops
from tessera_torch.model.params import Params, compute_params
from tessera_torch.train.loop import OnStep
from tessera_torch.train.step import TrainState


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
    ops: Ops,
    accumulation: int = 1,
    teacher: Teacher | None = None,
    recompute: bool = False,
    compiled: bool = False,  # noqa: ARG001 - the plain loop's signature; `choose` refuses it
    on_step: OnStep | None = None,
) -> TrainState:
    """Make up to `num_steps` updates from where `state` is; return the state after the last.

    `on_step` sees a state whose tensors the next step overwrites.
    """
    fast = fast_state(state.params, state.optimizer, spec=spec, numerics=numerics)
    start_step = int(state.step)
    for step in range(start_step, start_step + num_steps):
        fast, metrics = train_step(
            fast, split_rows(batches_at(step), accumulation), lr=learning_rate(schedule, step), spec=spec,
            numerics=numerics, objective=objective, options=options, ops=ops, teacher=teacher, recompute=recompute,
        )  # fmt: skip
        if on_step is not None and not on_step(step, as_train_state(fast), metrics):
            break
    return as_train_state(fast)


def held_out_loss(
    params: Params, batches: Iterable[Batch], *, spec: ModelSpec, numerics: Numerics, ops: Ops
) -> tuple[float, int]:
    """Return the mean cross-entropy in nats a token over all batches, and the number of tokens. Without any: (0, 0)."""
    params = compute_params(params, numerics=numerics)
    loss_sum, num_tokens = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            loss, count = held_out_sum(params, batch, spec=spec, numerics=numerics, ops=ops)
            loss_sum, num_tokens = loss_sum + float(loss), num_tokens + int(count)
    return loss_sum / max(num_tokens, 1), num_tokens


def as_train_state(state: FastState) -> TrainState:
    """Return the plain state whose tensors are views of the buffers."""
    return TrainState(state.params, state.optimizer, state.step)

"""The loop behind `tessera train`: schedule, batches and steps; nothing is remembered outside the state."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.packing import split_rows
from tessera_shared.schedule import Schedule, learning_rate
from tessera_shared.spec import ModelSpec
from tessera_torch.distil.losses import cross_entropy
from tessera_torch.distil.teacher import Teacher
from tessera_torch.model.params import Params
from tessera_torch.model.transformer import forward
from tessera_torch.train.step import TrainState, train_step

OnStep = Callable[[int, TrainState, dict[str, Tensor]], bool]
"""(step, state after it, its metrics) -> whether to go on."""


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
    depends on the state and the arguments alone. With `compiled`, the framework's compiler makes one program of a step.
    """
    step_function = torch.compile(train_step) if compiled else train_step
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
    device = next(iter(params.values())).device
    loss_sum, num_tokens = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            token_ids_BT, labels_BT, positions_BT, segments_BT = (torch.as_tensor(x, device=device) for x in batch)
            logits_BTV = forward(
                params,
                token_ids_BT,
                spec=spec,
                numerics=numerics,
                positions_BT=positions_BT,
                segments_BT=segments_BT,
            )
            loss, count = cross_entropy(logits_BTV, labels_BT, numerics=numerics)
            loss_sum, num_tokens = loss_sum + float(loss), num_tokens + int(count)
    return loss_sum / max(num_tokens, 1), num_tokens

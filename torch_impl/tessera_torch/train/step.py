"""One training step: gradients of loss sums over micro-batches, divided once, clipped, applied. State in, state out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objective_checks import check_micro_batches, check_objective, check_vocabularies
from tessera_shared.objectives import IGNORE_INDEX, AdamWOptions, Objective
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table
from tessera_torch.distil.losses import training_loss
from tessera_torch.distil.teacher import Teacher, teacher_logits
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.model.transformer import forward
from tessera_torch.train.optim import (
    AdamWState,
    Tensors,
    adamw_init,
    adamw_update,
    clip_by_global_norm,
    global_norm,
)


class TrainState(NamedTuple):
    """Weights, moments and the number of updates made."""

    params: Tensors
    optimizer: AdamWState
    step: int


def init_state(params: Tensors, *, options: AdamWOptions) -> TrainState:
    """Return the state before the first update."""
    return TrainState(params, adamw_init(params, options=options), 0)


def loss_and_grads(
    params: Tensors,
    batch: Batch,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a micro-batch's loss sum, its denominator, and the gradients of the sum in the reduction dtype."""
    check_objective(objective, has_teacher=teacher is not None)
    if teacher is not None:
        check_vocabularies(spec, teacher.spec, objective)
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    device = next(iter(params.values())).device
    token_ids_BT, labels_BT, positions_BT, segments_BT = (torch.as_tensor(field, device=device) for field in batch)
    targets_BTV = None if teacher is None else teacher_logits(teacher, batch)
    with torch.enable_grad():
        logits_BTV = forward(
            leaves,
            token_ids_BT,
            spec=spec,
            numerics=numerics,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            recompute=recompute,
        )
        loss_sum, denominator = training_loss(
            logits_BTV, targets_BTV, labels_BT, objective=objective, numerics=numerics
        )
        grads = torch.autograd.grad(loss_sum, list(leaves.values()), materialize_grads=True)
    dtype = dtype_of(numerics.grad_reduce)
    return loss_sum.detach(), denominator, {name: g.to(dtype) for name, g in zip(leaves, grads, strict=True)}


def apply_gradients(
    state: TrainState, grads: Tensors, *, lr: float | Tensor, options: AdamWOptions, decay_mask: Mapping[str, bool]
) -> tuple[TrainState, Tensor]:
    """Clip mean gradients, update the weights, count the step; return the state and the norm before clipping."""
    if options.clip_norm is None:
        norm = global_norm(grads)
    else:
        grads, norm = clip_by_global_norm(grads, max_norm=options.clip_norm)
    params, optimizer = adamw_update(
        state.params, grads, state.optimizer, lr=lr, options=options, decay_mask=decay_mask
    )
    return TrainState(params, optimizer, state.step + 1), norm


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    *,
    lr: float | Tensor,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    options: AdamWOptions,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[TrainState, dict[str, Tensor]]:
    """Make one update from a sequence of micro-batches; return the new state and `loss, grad_norm, num_tokens, lr`.

    Sums of losses and of gradients are added over the micro-batches and divided once by the sum of denominators, so
    that how a batch is cut does not matter. Where nothing counts the gradient is 0. The old state's tensors are left as
    they are.
    """
    check_micro_batches(len(batches))
    loss_sum, denominator, grads = _accumulate(
        state.params, batches, spec=spec, numerics=numerics, objective=objective, teacher=teacher, recompute=recompute
    )
    divisor = denominator.clamp(min=1)
    grads = {name: grad / divisor.to(grad.dtype) for name, grad in grads.items()}
    decay_mask = {name: info.decay for name, info in tensor_table(spec).items()}
    state, norm = apply_gradients(state, grads, lr=lr, options=options, decay_mask=decay_mask)
    num_tokens = sum(int((torch.as_tensor(batch.labels_BT) != IGNORE_INDEX).sum()) for batch in batches)
    metrics = {
        "loss": loss_sum / divisor.to(loss_sum.dtype),
        "grad_norm": norm,
        "num_tokens": torch.tensor(num_tokens, dtype=torch.int32),
        "lr": torch.as_tensor(lr, dtype=loss_sum.dtype),
    }
    return state, metrics


def _accumulate(
    params: Tensors,
    batches: Sequence[Batch],
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    teacher: Teacher | None,
    recompute: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return `loss_and_grads` summed over the micro-batches, in order."""
    sums: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None
    for batch in batches:
        loss, denominator, grads = loss_and_grads(
            params,
            batch,
            spec=spec,
            numerics=numerics,
            objective=objective,
            teacher=teacher,
            recompute=recompute,
        )
        if sums is not None:
            loss, denominator = sums[0] + loss, sums[1] + denominator
            grads = {name: sums[2][name] + grad for name, grad in grads.items()}
        sums = loss, denominator, grads
    assert sums is not None, "checked by check_micro_batches"
    return sums

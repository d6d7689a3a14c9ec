"""Losses from hidden states: the unembedding is part of them, no logits of a whole batch exist."""

import numpy as np
import torch
from torch import Tensor

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objectives import IGNORE_INDEX, Denominator, DistilOptions, Objective, TemperatureScale
from tessera_shared.spec import ModelSpec
from tessera_torch.distil.teacher import Teacher
from tessera_torch.fast.layout import Layout, layout_of
from tessera_torch.fast.transformer import hidden_states, unembedding
from tessera_torch.kernels import Ops
from tessera_torch.model.params import Params


def training_loss(
    params: Params,
    batch: Batch,
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    ops: Ops,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's loss sum and its denominator (int32); `params` are in the compute dtype, on the device.

    `tessera_torch.kernels.obstacles` says which objectives can be computed this way; others must not come here.
    """
    device = params[next(iter(params))].device
    ids_BT, labels_BT = (torch.as_tensor(field).to(device, non_blocking=True) for field in batch[:2])
    layout = layout_of(np.asarray(batch.positions_BT), np.asarray(batch.segments_BT), device=device)
    hidden_BTD = hidden_states(params, ids_BT, layout, spec=spec, numerics=numerics, ops=ops, recompute=recompute)
    hidden_XD, labels_X = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    head_VD = unembedding(params, spec)
    if objective.distil is None or teacher is None:
        loss_sum, num_tokens = ops.linear_cross_entropy(
            hidden_XD, head_VD, labels_X, ignore_index=IGNORE_INDEX, z_loss=objective.z_loss, softcap=spec.logit_softcap
        )
        return loss_sum, num_tokens
    loss_sum, num_tokens = _distillation(
        hidden_XD, head_VD, labels_X, teacher, ids_BT, layout, options=objective.distil, z_loss=objective.z_loss,
        ops=ops,
    )  # fmt: skip
    if objective.distil.denominator is Denominator.ROWS:
        num_tokens = (labels_BT != IGNORE_INDEX).any(-1).sum(dtype=torch.int32)
    return loss_sum, num_tokens


def held_out_sum(
    params: Params, batch: Batch, *, spec: ModelSpec, numerics: Numerics, ops: Ops
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of a batch and how many labels count."""
    return training_loss(params, batch, spec=spec, numerics=numerics, objective=Objective(), ops=ops)


def _distillation(
    hidden_XD: Tensor,
    head_VD: Tensor,
    labels_X: Tensor,
    teacher: Teacher,
    ids_BT: Tensor,
    layout: Layout,
    *,
    options: DistilOptions,
    z_loss: float,
    ops: Ops,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        theirs_BTF = hidden_states(
            teacher.params, ids_BT, layout, spec=teacher.spec, numerics=teacher.numerics, ops=ops
        )
    loss_sum, num_tokens = ops.linear_distillation(
        hidden_XD, head_VD, theirs_BTF.flatten(0, 1), unembedding(teacher.params, teacher.spec), labels_X,
        divergence=options.divergence.value, temperature=options.temperature,
        temperature_squared=options.temperature_scale is TemperatureScale.SQUARED, beta=options.beta,
        alpha=options.alpha, label_weight=options.hard_weight, z_loss=z_loss, ignore_index=IGNORE_INDEX,
        vocab_size=options.real_vocab_size,
    )  # fmt: skip
    return loss_sum, num_tokens

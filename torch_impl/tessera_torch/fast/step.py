"""One training step on flat buffers, in place: fused loss, gradients into one buffer, one AdamW launch a decay group.

What changes beside `tessera_torch.train.step`: the old state is gone after a step, and rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera_shared.batch import Batch
from tessera_shared.numerics import Numerics
from tessera_shared.objective_checks import check_micro_batches, check_objective, check_vocabularies
from tessera_shared.objectives import IGNORE_INDEX, AdamWOptions, Objective
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table
from tessera_torch.distil.teacher import Teacher
from tessera_torch.fast.flat import Flat, flat_copy, flat_like
from tessera_torch.fast.loss import training_loss
from tessera_torch.kernels import Ops
from tessera_torch.model.dtypes import dtype_of
from tessera_torch.train.optim import AdamWState


@dataclass(frozen=True, kw_only=True)
class Group:
    """Flat buffers of the parameters that decay, or of those that do not, in the reduction dtype."""

    weights: Flat
    first: Flat
    second: Flat
    grads: Flat
    compute: Flat  # the weights in the compute dtype: written by the update; `weights` itself where it is theirs


@dataclass(kw_only=True)
class FastState:
    """Looks like `TrainState` from outside: `params`, `optimizer` and `step`; written in place by `train_step`."""

    groups: tuple[Group, ...]  # decaying, then not
    step: int
    step_count: Tensor  # int64, on the device: the updates made

    @property
    def params(self) -> dict[str, Tensor]:
        """Weights by name, in the reduction dtype, views of the buffers."""
        return {name: view for group in self.groups for name, view in group.weights.views.items()}

    @property
    def optimizer(self) -> AdamWState:
        """Moments by name, views of the buffers."""
        first = {name: view for group in self.groups for name, view in group.first.views.items()}
        second = {name: view for group in self.groups for name, view in group.second.views.items()}
        return AdamWState(first, second, self.step)

    @property
    def compute(self) -> dict[str, Tensor]:
        """Weights by name in the compute dtype."""
        return {name: view for group in self.groups for name, view in group.compute.views.items()}


def fast_state(
    params: Mapping[str, Tensor], optimizer: AdamWState, *, spec: ModelSpec, numerics: Numerics
) -> FastState:
    """Return flat buffers with copies of the weights and moments."""
    decays = {name: info.decay for name, info in tensor_table(spec).items()}
    device = next(iter(params.values())).device
    groups = []
    for decay in (True, False):
        names = [name for name in params if decays[name] is decay]
        if names:
            groups.append(_group({name: params[name] for name in names}, optimizer, numerics))
    count = torch.tensor(optimizer.step, dtype=torch.int64, device=device)
    return FastState(groups=tuple(groups), step=int(optimizer.step), step_count=count)


def train_step(
    state: FastState,
    batches: Sequence[Batch],
    *,
    lr: float,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    options: AdamWOptions,
    ops: Ops,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[FastState, dict[str, Tensor]]:
    """Make one update in place; return the state and `loss, grad_norm, num_tokens, lr`. Nothing waits for the device."""
    check_micro_batches(len(batches))
    loss_sum, denominator = accumulate(
        state, batches, spec=spec, numerics=numerics, objective=objective, ops=ops, teacher=teacher, recompute=recompute
    )
    divisor = denominator.clamp(min=1).to(state.groups[0].grads.buffer.dtype)
    norm = torch.stack([torch.linalg.vector_norm(group.grads.buffer) for group in state.groups]).norm() / divisor
    scale = divisor.reciprocal()
    if options.clip_norm is not None:
        scale = scale * (options.clip_norm / norm.clamp(min=options.clip_norm))
    rate = torch.full((), lr, dtype=divisor.dtype, device=divisor.device)
    _update(state, rate, scale, options=options, decays=_decays(state, spec), ops=ops)
    num_tokens = sum(int((torch.as_tensor(batch.labels_BT) != IGNORE_INDEX).sum()) for batch in batches)
    metrics = {
        "loss": loss_sum / divisor,
        "grad_norm": norm,
        "num_tokens": torch.tensor(num_tokens, dtype=torch.int32),
        "lr": rate,
    }
    return state, metrics


def accumulate(
    state: FastState,
    batches: Sequence[Batch],
    *,
    spec: ModelSpec,
    numerics: Numerics,
    objective: Objective,
    ops: Ops,
    teacher: Teacher | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the loss sums, added over micro-batches, in the state's buffers; return loss sum and
    denominator."""
    check_objective(objective, has_teacher=teacher is not None)
    if teacher is not None:
        check_vocabularies(spec, teacher.spec, objective)
    views = {name: view for group in state.groups for name, view in group.grads.views.items()}
    leaves = {name: weight.detach().requires_grad_() for name, weight in state.compute.items()}
    sums: tuple[Tensor, Tensor] | None = None
    for batch in batches:
        with torch.enable_grad():
            loss_sum, denominator = training_loss(
                leaves, batch, spec=spec, numerics=numerics, objective=objective, ops=ops, teacher=teacher,
                recompute=recompute,
            )  # fmt: skip
            grads = torch.autograd.grad(loss_sum, list(leaves.values()), materialize_grads=True)
        targets = [views[name] for name in leaves]
        with torch.no_grad():
            if sums is None:
                torch._foreach_copy_(targets, grads)
            else:
                torch._foreach_add_(
                    targets, [grad.to(target.dtype) for grad, target in zip(grads, targets, strict=True)]
                )
        loss_sum = loss_sum.detach()
        sums = (loss_sum, denominator) if sums is None else (sums[0] + loss_sum, sums[1] + denominator)
    assert sums is not None, "checked by check_micro_batches"
    return sums


def _group(params: Mapping[str, Tensor], optimizer: AdamWState, numerics: Numerics) -> Group:
    up, compute = dtype_of(numerics.grad_reduce), dtype_of(numerics.compute)
    weights = flat_copy(params, dtype=up)
    shapes = {name: tensor.shape for name, tensor in params.items()}
    grads = flat_like(shapes, dtype=up, device=weights.buffer.device)
    first, second = (
        flat_copy({name: moments[name] for name in params}, dtype=up) for moments in (optimizer.first, optimizer.second)
    )
    copy = weights if compute is up else flat_copy(params, dtype=compute)
    return Group(weights=weights, first=first, second=second, grads=grads, compute=copy)


def _decays(state: FastState, spec: ModelSpec) -> list[bool]:
    table = tensor_table(spec)
    return [table[next(iter(group.weights.views))].decay for group in state.groups]


@torch.no_grad()
def _update(
    state: FastState, rate: Tensor, scale: Tensor, *, options: AdamWOptions, decays: Sequence[bool], ops: Ops
) -> None:
    for group, decay in zip(state.groups, decays, strict=True):
        ops.adamw_flat_(
            group.weights.buffer, group.grads.buffer, group.first.buffer, group.second.buffer, step=state.step_count,
            lr=rate, beta1=options.beta1, beta2=options.beta2, eps=options.eps,
            weight_decay=options.weight_decay if decay else 0.0,
            copy=None if group.compute is group.weights else group.compute.buffer, grad_scale=scale,
        )  # fmt: skip
    state.step_count += 1  # what the kernels read is the number of updates made before
    state.step += 1

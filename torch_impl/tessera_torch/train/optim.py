"""AdamW with clipping by global norm, to the formula of `docs/training.md`, section 2. Nothing is written in place."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_shared.objectives import AdamWOptions

Tensors = Mapping[str, Tensor]


class AdamWState(NamedTuple):
    """Both moments by parameter name, at least float32, and the number of updates made."""

    first: Tensors
    second: Tensors
    step: int


def global_norm(grads: Tensors) -> Tensor:
    """Return the root of the sum of all squares, a scalar, summed in at least float32."""
    squares = [_lifted(grad).square().sum() for grad in grads.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def clip_by_global_norm(grads: Tensors, *, max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Return gradients scaled by max_norm / max(norm, max_norm), and the norm before. No epsilon enters."""
    norm = global_norm(grads)
    scale = max_norm / norm.clamp(min=max_norm)
    return {name: (_lifted(grad) * scale).to(grad.dtype) for name, grad in grads.items()}, norm


def adamw_init(params: Tensors, *, options: AdamWOptions) -> AdamWState:  # noqa: ARG001 - the twins' signature
    """Return zero moments at step 0, where each parameter is."""
    zeros = [{name: torch.zeros_like(_lifted(param)) for name, param in params.items()} for _ in range(2)]
    return AdamWState(zeros[0], zeros[1], 0)


@torch.no_grad()
def adamw_update(
    params: Tensors,
    grads: Tensors,
    state: AdamWState,
    *,
    lr: float | Tensor,
    options: AdamWOptions,
    decay_mask: Mapping[str, bool],
) -> tuple[dict[str, Tensor], AdamWState]:
    """Make one update, t = step + 1 (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    lr is the paper's schedule times its rate alpha; wd is its lambda over alpha, so that lr scales the decay too.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    p -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + wd p), the last term where the mask says decay.
    Computed in the moments' dtype; the parameter keeps its own.
    """
    b1, b2, t = options.beta1, options.beta2, state.step + 1
    new_params, first, second = {}, {}, {}
    for name, param in params.items():
        old_first, old_second = state.first[name], state.second[name]
        grad, value = grads[name].to(old_first.dtype), param.to(old_first.dtype)
        first[name] = b1 * old_first + (1 - b1) * grad
        second[name] = b2 * old_second + (1 - b2) * grad.square()
        change = (first[name] / (1 - b1**t)) / ((second[name] / (1 - b2**t)).sqrt() + options.eps)
        if decay_mask[name]:
            change = change + options.weight_decay * value
        new_params[name] = (value - lr * change).to(param.dtype)
    return new_params, AdamWState(first, second, t)


def moments(state: AdamWState) -> tuple[Tensors, Tensors, int]:
    """Return first and second moments by name, and the number of updates made."""
    return state.first, state.second, state.step


def state_from_moments(
    first: Tensors,
    second: Tensors,
    step: int,
    *,
    options: AdamWOptions,  # noqa: ARG001 - the twins' signature
) -> AdamWState:
    """Return the state that `moments` took apart."""
    return AdamWState(dict(first), dict(second), int(step))


def _lifted(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))

"""AdamW with clipping by global norm, in float64 from the formula of `docs/training.md`, section 2."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tessera_shared.objectives import AdamWOptions

Arrays = Mapping[str, np.ndarray]


class AdamWState(NamedTuple):
    """Both moments by parameter name, and the number of updates made."""

    first: Arrays
    second: Arrays
    step: int


def global_norm(grads: Arrays) -> np.ndarray:
    """Return the root of the sum of all squares."""
    squares = [float(np.square(grad).sum()) for grad in grads.values()]
    return np.asarray(np.sqrt(sum(squares)))


def clip_by_global_norm(grads: Arrays, *, max_norm: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return gradients scaled by max_norm / max(norm, max_norm), and the norm before."""
    norm = global_norm(grads)
    scale = max_norm / np.maximum(norm, max_norm)
    return {name: grad * scale for name, grad in grads.items()}, norm


def adamw_init(params: Arrays, *, options: AdamWOptions) -> AdamWState:  # noqa: ARG001 - the twins' signature
    """Return zero moments at step 0."""
    return AdamWState(
        {name: np.zeros(param.shape) for name, param in params.items()},
        {name: np.zeros(param.shape) for name, param in params.items()},
        0,
    )


def adamw_update(
    params: Arrays,
    grads: Arrays,
    state: AdamWState,
    *,
    lr: float,
    options: AdamWOptions,
    decay_mask: Mapping[str, bool],
) -> tuple[dict[str, np.ndarray], AdamWState]:
    """Make one update, t = step + 1 (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    lr is the paper's schedule times its rate alpha; wd is its lambda over alpha, so that lr scales the decay too.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    p -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + wd p), the last term where the mask says decay.
    """
    b1, b2, t = options.beta1, options.beta2, state.step + 1
    new_params, first, second = {}, {}, {}
    for name, param in params.items():
        first[name] = b1 * state.first[name] + (1 - b1) * grads[name]
        second[name] = b2 * state.second[name] + (1 - b2) * grads[name] ** 2
        change = first[name] / (1 - b1**t) / (np.sqrt(second[name] / (1 - b2**t)) + options.eps)
        if decay_mask[name]:
            change = change + options.weight_decay * param
        new_params[name] = param - lr * change
    return new_params, AdamWState(first, second, t)


def moments(state: AdamWState) -> tuple[Arrays, Arrays, int]:
    """Return first and second moments by name, and the number of updates made."""
    return state.first, state.second, state.step


def state_from_moments(
    first: Arrays,
    second: Arrays,
    step: int,
    *,
    options: AdamWOptions,  # noqa: ARG001 - the twins' signature
) -> AdamWState:
    """Return the state that `moments` took apart."""
    return AdamWState(dict(first), dict(second), int(step))

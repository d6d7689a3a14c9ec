"""AdamW with clipping by global norm, as an Optax transformation, to the formula of `docs/training.md`, section 2."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from tessera_shared.objectives import AdamWOptions

Arrays = Mapping[str, Array]


class AdamWState(NamedTuple):
    """The state of Optax's own Adam, both moments at least float32, and nothing else."""

    adam: Any  # optax.ScaleByAdamState


def global_norm(grads: Arrays) -> Array:
    """Return the root of the sum of all squares, a scalar, summed in at least float32."""
    squares = [jnp.square(_lifted(grad)).sum() for grad in grads.values()]
    return jnp.sqrt(jnp.stack(squares).sum()) if squares else jnp.zeros((), jnp.float32)


def clip_by_global_norm(grads: Arrays, *, max_norm: float) -> tuple[dict[str, Array], Array]:
    """Return gradients scaled by max_norm / max(norm, max_norm), and the norm before. No epsilon enters."""
    norm = global_norm(grads)
    scale = max_norm / jnp.maximum(norm, max_norm)
    return {name: (_lifted(grad) * scale).astype(grad.dtype) for name, grad in grads.items()}, norm


def _scale_by_adam(options: AdamWOptions) -> optax.GradientTransformation:
    """Return Optax's `scale_by_adam` with the bias correction 1 - b^t = -expm1(t log b).

    Optax raises b to the power t in float32 and subtracts it from one: at b2 = 0.999 the first update is then off by
    1.5e-5. The state is Optax's, so a run can change between the two.
    """
    stock = optax.scale_by_adam(b1=options.beta1, b2=options.beta2, eps=options.eps)

    def init(params: Arrays) -> Any:
        return stock.init({name: _lifted(param) for name, param in params.items()})

    def update(grads: Arrays, state: Any, params: Arrays | None = None) -> tuple[dict[str, Array], Any]:
        del params
        grads = {name: grad.astype(state.mu[name].dtype) for name, grad in grads.items()}
        first = optax.tree.update_moment(grads, state.mu, options.beta1, 1)
        second = optax.tree.update_moment(grads, state.nu, options.beta2, 2)
        step = state.count + jnp.ones((), jnp.int32)
        change = {
            name: _unbiased(first[name], options.beta1, step)
            / (jnp.sqrt(_unbiased(second[name], options.beta2, step)) + options.eps)
            for name in grads
        }
        return change, optax.ScaleByAdamState(count=step, mu=first, nu=second)

    return optax.GradientTransformation(init, update)


def adamw(lr: Any, *, options: AdamWOptions, decay_mask: Mapping[str, bool]) -> optax.GradientTransformation:
    """Return the whole optimizer as an `optax.GradientTransformation`: clip, Adam, decay, learning rate.

    `lr` is a number or an Optax schedule. For an Optax training loop; its moments are those of `adamw_update`.
    """
    clip = optax.identity() if options.clip_norm is None else optax.clip_by_global_norm(options.clip_norm)
    decay = optax.add_decayed_weights(options.weight_decay, mask=dict(decay_mask))
    return optax.chain(clip, _scale_by_adam(options), decay, optax.scale_by_learning_rate(lr))


def adamw_init(params: Arrays, *, options: AdamWOptions) -> AdamWState:
    """Return zero moments at step 0."""
    return AdamWState(_scale_by_adam(options).init(params))


def adamw_update(
    params: Arrays,
    grads: Arrays,
    state: AdamWState,
    *,
    lr: float | Array,
    options: AdamWOptions,
    decay_mask: Mapping[str, bool],
) -> tuple[dict[str, Array], AdamWState]:
    """Make one update, t = step + 1 (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    lr is the paper's schedule times its rate alpha; wd is its lambda over alpha, so that lr scales the decay too.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    p -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + wd p), the last term where the mask says decay.
    Computed in the moments' dtype; the parameter keeps its own.
    """
    lifted = {name: _lifted(param) for name, param in params.items()}
    change, adam = _scale_by_adam(options).update(grads, state.adam, lifted)
    decay = optax.add_decayed_weights(options.weight_decay, mask={name: decay_mask[name] for name in params})
    change, _ = decay.update(change, decay.init(lifted), lifted)
    new_params = {
        name: (value - jnp.asarray(lr, value.dtype) * change[name]).astype(params[name].dtype)
        for name, value in lifted.items()
    }
    return new_params, AdamWState(adam)


def moments(state: AdamWState) -> tuple[Arrays, Arrays, Array]:
    """Return first and second moments by name, and the number of updates made (an int32 scalar)."""
    return state.adam.mu, state.adam.nu, state.adam.count


def state_from_moments(
    first: Arrays,
    second: Arrays,
    step: int | Array,
    *,
    options: AdamWOptions,  # noqa: ARG001 - the twins' signature
) -> AdamWState:
    """Return the state that `moments` took apart."""
    return AdamWState(optax.ScaleByAdamState(count=jnp.asarray(step, jnp.int32), mu=dict(first), nu=dict(second)))


def _unbiased(moment: Array, beta: float, step: Array) -> Array:
    if beta == 0.0:
        return moment
    return moment / -jnp.expm1(step.astype(moment.dtype) * math.log(beta))


def _lifted(value: Array) -> Array:
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))

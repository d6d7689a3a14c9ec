"""AdamW and clipping: the formula to its last digit, the same on both sides and in the oracle."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import gamma, mathematics_limit, optimizer_limit
from tessera_parity.compare import relative_difference
from tessera_shared.objectives import AdamWOptions
from tessera_shared.reference import optim as oracle
from tessera_shared.reference.step import adamw_steps

SHAPES = {"matrix": (3, 5), "gain": (5,), "bias": (1,)}
DECAY = {"matrix": True, "gain": False, "bias": False}
Arrays = dict[str, np.ndarray]


class Half:
    """One side's optimizer on NumPy arrays."""

    def __init__(self, name: str) -> None:
        if name == "torch":
            import torch

            from tessera_torch.train import optim

            self.array: Any = torch.tensor
        else:
            import jax.numpy as jnp

            from tessera_jax.train import optim

            self.array = jnp.asarray
        self.optim: ModuleType = optim

    def arrays(self, values: Arrays) -> dict[str, Any]:
        return {name: self.array(value) for name, value in values.items()}

    def run(self, params: Arrays, gradients: list[Arrays], *, lr: float, options: AdamWOptions) -> tuple[Any, Any]:
        """Update by each gradient in turn; return weights and state."""
        new = self.arrays(params)
        state = self.optim.adamw_init(new, options=options)
        for grads in gradients:
            new, state = self.optim.adamw_update(
                new, self.arrays(grads), state, lr=lr, options=options, decay_mask=DECAY
            )
        return new, state


@pytest.fixture
def half(wide_backend: str) -> Half:
    return Half(wide_backend)


def draw(seed: int, scale: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) * scale for name, shape in SHAPES.items()}


def close(left: Any, right: Any, limit: float) -> None:
    difference = relative_difference(np.asarray(left), np.asarray(right))
    assert difference.value <= limit, str(difference)


OPTIONS = [
    AdamWOptions(),
    AdamWOptions(beta1=0.0, beta2=0.999, eps=1e-3, weight_decay=0.5),
    AdamWOptions(beta1=0.5, beta2=0.0, weight_decay=0.0, eps=0.0),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_ten_updates_equal_the_oracle(half: Half, options: AdamWOptions) -> None:
    params, gradients = draw(0), [draw(1 + i, scale=10.0 ** (i % 5 - 3)) for i in range(10)]
    new, state = half.run(params, gradients, lr=0.03, options=options)
    free = AdamWOptions(
        beta1=options.beta1, beta2=options.beta2, eps=options.eps, weight_decay=options.weight_decay, clip_norm=None
    )
    reference = adamw_steps(params, gradients, learning_rates=[0.03] * 10, options=free, decay_mask=DECAY)
    first, second, step = half.optim.moments(state)
    assert int(step) == 10
    for name in SHAPES:
        close(new[name], reference.params[name], optimizer_limit(10))
        close(first[name], reference.optimizer.first[name], optimizer_limit(10))
        close(second[name], reference.optimizer.second[name], optimizer_limit(10))


@pytest.mark.parametrize("side", ["oracle", "torch", "jax"])
def test_the_first_update_is_the_formula_by_hand(side: str) -> None:
    """After bias correction the first update is g / (|g| + eps): epsilon outside the root, no factor of either beta."""
    options = AdamWOptions(beta1=0.9, beta2=0.999, eps=0.25, weight_decay=0.5)
    grads = {"matrix": np.array([[0.25, -0.75]], np.float32)}
    params = {"matrix": np.array([[2.0, -4.0]], np.float32)}
    settings = {"lr": 0.5, "options": options}
    by_hand = params["matrix"] - 0.5 * (np.array([[0.5, -0.75]]) + 0.5 * params["matrix"])
    if side == "oracle":
        start = oracle.adamw_init(params, options=options)
        new, _ = oracle.adamw_update(params, grads, start, decay_mask={"matrix": True}, **settings)
    else:
        half = Half(side)
        ours = half.arrays(params)
        start = half.optim.adamw_init(ours, options=options)
        new, _ = half.optim.adamw_update(ours, half.arrays(grads), start, decay_mask={"matrix": True}, **settings)
    assert np.asarray(new["matrix"]).dtype == (np.float64 if side == "oracle" else np.float32)
    close(np.asarray(new["matrix"], np.float64), by_hand, gamma(8, "float32"))


def test_decay_follows_the_mask_and_not_the_gradient(half: Half) -> None:
    params, zero = draw(2), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    new, _ = half.run(params, [zero], lr=0.1, options=AdamWOptions(weight_decay=0.3))
    for name in SHAPES:
        close(new[name], params[name] * (1 - 0.1 * 0.3 if DECAY[name] else 1), mathematics_limit())


def test_an_update_leaves_its_arguments_as_they_were(half: Half) -> None:
    params, grads = half.arrays(draw(3)), half.arrays(draw(4))
    state = half.optim.adamw_init(params, options=OPTIONS[0])
    half.optim.adamw_update(params, grads, state, lr=0.1, options=OPTIONS[0], decay_mask=DECAY)
    first, second, step = half.optim.moments(state)
    assert int(step) == 0
    for name in SHAPES:
        assert np.array_equal(np.asarray(params[name]), draw(3)[name])
        assert not np.asarray(first[name]).any()
        assert not np.asarray(second[name]).any()


def test_a_state_survives_its_moments(half: Half) -> None:
    params, gradients = draw(5), [draw(6), draw(7)]
    new, state = half.run(params, gradients[:1], lr=0.1, options=OPTIONS[0])
    first, second, step = half.optim.moments(state)
    again = half.optim.state_from_moments(
        half.arrays({name: np.asarray(value) for name, value in first.items()}),
        half.arrays({name: np.asarray(value) for name, value in second.items()}),
        int(step),
        options=OPTIONS[0],
    )
    resumed, _ = half.optim.adamw_update(
        new, half.arrays(gradients[1]), again, lr=0.1, options=OPTIONS[0], decay_mask=DECAY
    )
    straight, _ = half.run(params, gradients, lr=0.1, options=OPTIONS[0])
    for name in SHAPES:
        assert np.array_equal(np.asarray(resumed[name]), np.asarray(straight[name]))


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]), max_norm=st.sampled_from([1e-6, 1.0]))
def test_clipping_scales_to_the_limit_and_never_up(backend: str, seed: int, scale: float, max_norm: float) -> None:
    grads = {name: value.astype(np.float32) for name, value in draw(seed, scale).items()}
    half = Half(backend)
    clipped, norm = half.optim.clip_by_global_norm(half.arrays(grads), max_norm=max_norm)
    exact, exact_norm = oracle.clip_by_global_norm(
        {name: value.astype(np.float64) for name, value in grads.items()}, max_norm=max_norm
    )
    limit = gamma(32, "float32")
    close(float(norm), float(exact_norm), limit)
    for name in SHAPES:
        close(np.asarray(clipped[name], np.float64), exact[name], limit)
        if exact_norm < max_norm:
            assert np.array_equal(np.asarray(clipped[name]), grads[name])
    if exact_norm > max_norm:  # an epsilon of 1e-6 in the norm would halve this where the limit is 1e-6
        close(float(half.optim.global_norm(clipped)), max_norm, limit)


def test_a_gradient_of_zero_is_clipped_to_zero(half: Half) -> None:
    clipped, norm = half.optim.clip_by_global_norm(half.arrays({"bias": np.zeros(1)}), max_norm=1.0)
    assert float(norm) == 0.0
    assert not np.asarray(clipped["bias"]).any()


def test_bias_correction_keeps_its_digits_in_float32(backend: str) -> None:
    """1 - 0.999^t loses four digits when the power is taken in float32; the first update would be off by 1.5e-5."""
    options = AdamWOptions(beta2=0.999, weight_decay=0.0)
    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    gradients = [{name: value.astype(np.float32) for name, value in draw(8).items()}] * 3
    for steps in (1, 3):
        new, _ = Half(backend).run(params, gradients[:steps], lr=1.0, options=options)
        wide = [{name: value.astype(np.float64) for name, value in grads.items()} for grads in gradients[:steps]]
        free = AdamWOptions(beta2=0.999, weight_decay=0.0, clip_norm=None)
        exact = adamw_steps(params, wide, learning_rates=[1.0] * steps, options=free, decay_mask=DECAY)
        for name in SHAPES:
            close(np.asarray(new[name], np.float64), exact.params[name], gamma(16, "float32"))


def test_moments_of_bfloat16_weights_are_float32(backend: str) -> None:
    half = Half(backend)
    if backend == "torch":
        import torch

        weight: Any = torch.ones(3, dtype=torch.bfloat16)
    else:
        import jax.numpy as jnp

        weight = jnp.ones(3, jnp.bfloat16)
    state = half.optim.adamw_init({"gain": weight}, options=OPTIONS[0])
    new, state = half.optim.adamw_update(
        {"gain": weight}, {"gain": weight}, state, lr=0.5, options=OPTIONS[0], decay_mask=DECAY
    )
    assert new["gain"].dtype == weight.dtype
    assert "float32" in str(half.optim.moments(state)[1]["gain"].dtype)


def test_the_optax_face_makes_the_same_updates() -> None:
    pytest.importorskip("jax")
    import jax.numpy as jnp
    import optax

    from tessera_jax.train import optim

    options = AdamWOptions(clip_norm=0.5)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in draw(9).items()}
    grads = {name: jnp.asarray(value, jnp.float32) for name, value in draw(10).items()}
    transformation = optim.adamw(0.1, options=options, decay_mask=DECAY)
    theirs, state = params, transformation.init(params)
    ours, ours_state = params, optim.adamw_init(params, options=options)
    for _ in range(3):
        change, state = transformation.update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, change)
        clipped, _ = optim.clip_by_global_norm(grads, max_norm=0.5)
        ours, ours_state = optim.adamw_update(ours, clipped, ours_state, lr=0.1, options=options, decay_mask=DECAY)
    for name in SHAPES:
        close(np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64), gamma(32, "float32"))

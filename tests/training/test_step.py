"""One training step: gradients against the oracle's complex step, accumulation, the teacher, jit, purity."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tessera_parity.budget import directional_limit, gamma, gradient_limit, optimizer_limit
from tessera_parity.compare import relative_difference
from tessera_shared.batch import Batch
from tessera_shared.errors import DataError, SpecError
from tessera_shared.numerics import BFLOAT16, FLOAT32, FLOAT64
from tessera_shared.objectives import (
    IGNORE_INDEX,
    AdamWOptions,
    Denominator,
    DistilOptions,
    Divergence,
    Objective,
    TopKForm,
)
from tessera_shared.reference import step as oracle
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table

SPEC = ModelSpec(
    vocab_size=13, num_layers=1, width=6, ffn_width=10, num_heads=2, num_kv_heads=1, head_width=4, max_positions=32
)
TEACHER_SPEC = dataclasses.replace(SPEC, width=10, tie_embeddings=True)
POSITIONS = 5
DISTIL = Objective(
    distil=DistilOptions(divergence=Divergence.GENERALIZED_JSD, temperature=2.0, hard_weight=0.3), z_loss=1e-3
)
OBJECTIVES = [
    Objective(z_loss=1e-2),
    DISTIL,
    Objective(distil=DistilOptions(top_k=4, top_k_form=TopKForm.TAIL, denominator=Denominator.ROWS)),
]


def weights(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=info.shape) * 0.4 + (0.0 if info.decay else 1.0)
        for name, info in tensor_table(spec).items()
    }


def batch(seed: int, rows: int) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, SPEC.vocab_size, size=(2, rows, POSITIONS)).astype(np.int32)
    labels = np.where(rng.random((rows, POSITIONS)) < 0.4, IGNORE_INDEX, ids[1]).astype(np.int32)
    positions = np.tile(np.arange(POSITIONS, dtype=np.int32), (rows, 1))
    return Batch(ids[0], labels, positions, np.zeros_like(positions))


def split(whole: Batch, rows: int) -> list[Batch]:
    return [Batch(*(field[start : start + rows] for field in whole)) for start in range(0, len(whole[0]), rows)]


class Half:
    """One side's step on NumPy arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "torch":
            import torch

            from tessera_torch.distil import teacher
            from tessera_torch.train import optim, step

            self.array: Any = torch.tensor
        else:
            import jax
            import jax.numpy as jnp

            from tessera_jax.distil import teacher
            from tessera_jax.train import optim, step

            self.array = jnp.asarray
        self.step: Any = step
        static = ("spec", "numerics", "objective", "recompute")
        compiled = name == "jax"  # eager JAX would compile every operation by itself
        self.loss_and_grads: Any = (
            jax.jit(step.loss_and_grads, static_argnames=static) if compiled else step.loss_and_grads
        )
        self.train_step: Any = (
            jax.jit(step.train_step, static_argnames=(*static, "options")) if compiled else step.train_step
        )
        self.optim: Any = optim
        self.teacher_module: Any = teacher

    def arrays(self, values: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: self.array(value) for name, value in values.items()}

    def teacher(self, objective: Objective) -> Any:
        if objective.distil is None:
            return None
        return self.teacher_module.Teacher(self.arrays(weights(TEACHER_SPEC, 1)), TEACHER_SPEC, FLOAT64)

    def train(
        self, state: Any, batches: Sequence[Batch], objective: Objective, *, lr: float = 1e-2, recompute: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        settings = {"spec": SPEC, "numerics": FLOAT64, "objective": objective, "options": AdamWOptions(clip_norm=0.5)}
        teacher = self.teacher(objective)
        return self.train_step(state, tuple(batches), lr=lr, teacher=teacher, recompute=recompute, **settings)

    def start(self, seed: int = 0) -> Any:
        return self.step.init_state(self.arrays(weights(SPEC, seed)), options=AdamWOptions(clip_norm=0.5))


@pytest.fixture
def half(wide_backend: str) -> Half:
    return Half(wide_backend)


def close(left: Any, right: Any, limit: float) -> None:
    difference = relative_difference(np.asarray(left), np.asarray(right))
    assert difference.value <= limit, str(difference)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_the_oracles_complex_step(half: Half, objective: Objective) -> None:
    params, data = weights(SPEC, 0), batch(2, 2)
    settings = {"spec": SPEC, "numerics": FLOAT64, "objective": objective}
    teacher = None if objective.distil is None else oracle.Teacher(weights(TEACHER_SPEC, 1), TEACHER_SPEC, FLOAT64)
    loss, denominator, grads = half.loss_and_grads(
        half.arrays(params), data, teacher=half.teacher(objective), **settings
    )
    reference, reference_denominator = oracle.batch_loss(params, data, teacher=teacher, **settings)
    close(loss, reference, gradient_limit(SPEC, num_positions=10))
    assert int(denominator) == reference_denominator
    direction = {name: np.random.default_rng(3).normal(size=value.shape) for name, value in params.items()}
    slope = oracle.directional_derivative(
        lambda p: oracle.batch_loss(p, data, teacher=teacher, **settings)[0], params, direction
    )
    ours = {name: np.asarray(grad) for name, grad in grads.items()}
    scale = sum(np.abs(ours[name] * direction[name]).sum() for name in params)
    assert abs(sum((ours[name] * direction[name]).sum() for name in params) - slope) <= scale * directional_limit(
        SPEC, num_positions=10
    )


def test_the_complex_step_is_a_derivative() -> None:
    slope = oracle.directional_derivative(
        lambda p: (p["x"] ** 3).sum() * p["y"],
        {"x": np.array([1.0, 2.0]), "y": np.array(5.0)},
        {"x": np.array([1.0, -1.0])},
    )
    close(slope, 5.0 * (3.0 - 12.0), gamma(16, "float64"))


def test_how_a_batch_is_cut_into_micro_batches_does_not_matter(half: Half) -> None:
    """1 x 8 = 2 x 4 = 8 x 1 rows with ragged labels, one row without any: the gradient sees only sums."""
    whole = batch(4, 8)
    whole.labels_BT[5] = IGNORE_INDEX
    reference, metrics = half.train(half.start(), [whole], DISTIL)
    limit = optimizer_limit(1) + gradient_limit(SPEC, num_positions=40)
    first, _, _ = half.optim.moments(reference.optimizer)
    for rows in (4, 1):
        state, other = half.train(half.start(), split(whole, rows), DISTIL)
        close(other["loss"], metrics["loss"], limit)
        assert int(other["num_tokens"]) == int(metrics["num_tokens"]) == (whole.labels_BT != IGNORE_INDEX).sum()
        for name, moment in half.optim.moments(state.optimizer)[0].items():
            close(moment, first[name], limit)  # after one step the first moment is the gradient, up to a factor


def test_micro_batches_of_unequal_shapes_are_summed_too(half: Half) -> None:
    whole = batch(4, 4)
    pieces = [Batch(*(field[rows] for field in whole)) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    state, metrics = half.train(half.start(), pieces, DISTIL)
    settings = {"spec": SPEC, "numerics": FLOAT64, "objective": DISTIL, "teacher": half.teacher(DISTIL)}
    loss, count, _ = half.loss_and_grads(half.start().params, whole, **settings)
    close(metrics["loss"], float(loss) / int(count), gradient_limit(SPEC, num_positions=20))
    assert int(metrics["num_tokens"]) == int(count)
    assert int(state.step) == 1


def test_training_steps_equal_the_oracles_updates_by_the_same_gradients(half: Half) -> None:
    options = AdamWOptions(clip_norm=0.5)
    decay_mask = {name: info.decay for name, info in tensor_table(SPEC).items()}
    state, reference = half.start(), oracle.init_state(weights(SPEC, 0), options=options)
    settings = {"spec": SPEC, "numerics": FLOAT64, "objective": DISTIL, "teacher": half.teacher(DISTIL)}
    for index in range(3):
        data, lr = batch(10 + index, 2), 0.03 / (1 + index)
        _, count, grads = half.loss_and_grads(state.params, data, **settings)
        mean = {name: np.asarray(grad) / int(count) for name, grad in grads.items()}
        reference, norm = oracle.apply_gradients(reference, mean, lr=lr, options=options, decay_mask=decay_mask)
        state, metrics = half.train(state, [data], DISTIL, lr=lr)
        close(metrics["grad_norm"], norm, gradient_limit(SPEC, num_positions=10))
        close(metrics["lr"], lr, 0.0)
    assert int(state.step) == reference.step == 3
    for name, value in state.params.items():
        close(value, reference.params[name], optimizer_limit(3) + gradient_limit(SPEC, num_positions=10))


def test_a_step_returns_new_state_and_leaves_the_old_as_it_was(half: Half) -> None:
    state = half.start()
    after, metrics = half.train(state, [batch(5, 2)], DISTIL)
    assert set(metrics) == {"loss", "grad_norm", "num_tokens", "lr"}
    assert int(state.step) == 0
    for name, value in weights(SPEC, 0).items():
        assert np.array_equal(np.asarray(state.params[name]), value)
        assert not np.array_equal(np.asarray(after.params[name]), value)
        assert not np.asarray(half.optim.moments(state.optimizer)[0][name]).any()


def test_a_step_without_any_label_has_gradient_zero_and_only_decays(half: Half) -> None:
    data = batch(6, 2)
    data.labels_BT[:] = IGNORE_INDEX
    state, metrics = half.train(half.start(), [data], DISTIL)
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["num_tokens"])) == (0.0, 0.0, 0)
    for name, info in tensor_table(SPEC).items():
        close(state.params[name], weights(SPEC, 0)[name] * (1 - 1e-2 * 0.1 if info.decay else 1.0), optimizer_limit(1))


def test_recomputing_activations_changes_nothing(half: Half) -> None:
    plain, _ = half.train(half.start(), [batch(7, 2)], DISTIL)
    recomputed, _ = half.train(half.start(), [batch(7, 2)], DISTIL, recompute=True)
    for name, value in plain.params.items():
        close(recomputed.params[name], value, gradient_limit(SPEC, num_positions=10))


def test_no_gradient_reaches_the_teacher(half: Half) -> None:
    teacher = half.teacher(DISTIL)
    if half.name == "torch":
        leaves = {name: value.requires_grad_() for name, value in teacher.params.items()}
        logits = half.teacher_module.teacher_logits(teacher._replace(params=leaves), batch(8, 2))
        assert not logits.requires_grad
        return
    import jax

    def total(params: Any) -> Any:
        return half.teacher_module.teacher_logits(teacher._replace(params=params), batch(8, 2)).sum()

    grads = jax.jit(jax.grad(total))(teacher.params)
    assert not any(np.asarray(grad).any() for grad in grads.values())


def test_gradients_of_a_bfloat16_policy_come_in_float32(backend: str) -> None:
    half = Half(backend)
    params = half.arrays({name: value.astype(np.float32) for name, value in weights(SPEC, 0).items()})
    settings = {"spec": SPEC, "objective": OBJECTIVES[0]}
    loss, _, grads = half.loss_and_grads(params, batch(9, 2), numerics=BFLOAT16, **settings)
    assert "float32" in str(loss.dtype)
    assert {str(grad.dtype).removeprefix("torch.") for grad in grads.values()} == {"float32"}


def refused(half: Half, objective: Objective, teacher: Any) -> None:
    half.loss_and_grads(
        half.arrays(weights(SPEC, 0)), batch(0, 1), spec=SPEC, numerics=FLOAT64, objective=objective, teacher=teacher
    )


def test_a_teacher_of_another_vocabulary_is_refused(half: Half) -> None:
    teacher = half.teacher(DISTIL)
    other = teacher._replace(spec=dataclasses.replace(TEACHER_SPEC, vocab_size=14))
    with pytest.raises(SpecError, match=r"student vocabulary = 13, teacher vocabulary = 14"):
        refused(half, DISTIL, other)
    with pytest.raises(SpecError, match="both or neither"):
        refused(half, DISTIL, None)
    with pytest.raises(SpecError, match="both or neither"):
        refused(half, OBJECTIVES[0], teacher)


def test_a_step_without_micro_batches_is_refused(half: Half) -> None:
    with pytest.raises(DataError, match="micro-batches = 0"):
        half.train(half.start(), [], OBJECTIVES[0])


def test_a_jitted_step_takes_new_rates_and_steps_without_compiling_again() -> None:
    pytest.importorskip("jax")
    import jax

    from tessera_jax.train import step

    traced = []

    def watched(state: Any, batches: Any, lr: Any) -> Any:
        traced.append(1)
        return step.train_step(
            state, batches, lr=lr, spec=SPEC, numerics=FLOAT32, objective=OBJECTIVES[0], options=AdamWOptions()
        )

    jitted = jax.jit(watched)
    params = {name: jax.numpy.asarray(value, "float32") for name, value in weights(SPEC, 0).items()}
    state = step.init_state(params, options=AdamWOptions())
    for index in range(3):
        state, _ = jitted(state, (batch(index, 2),), jax.numpy.float32(1e-2 / (1 + index)))
    assert len(traced) == 1
    assert int(state.step) == 3

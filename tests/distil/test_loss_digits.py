"""Losses in float32 and bfloat16: digits near convergence, finite numbers far from it."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from tessera_parity.budget import gamma
from tessera_shared.numerics import BFLOAT16, FLOAT32, FLOAT64
from tessera_shared.objectives import (
    DistilOptions,
    Objective,
)
from tessera_shared.reference import losses as oracle

from .divergences import DIVERGENCES, Half, logits


@pytest.mark.parametrize(
    "name", ["forward", "reverse", "jsd_3", "skew", "skew_reverse", "total_variation", "both", "tail"]
)
@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
def test_float32_keeps_six_digits_of_loss_and_gradient_near_convergence(backend: str, name: str, gap: float) -> None:
    """Sixteen roundings, 1e-6, whatever the size of the loss; differences of logarithms lose all digits at 1e-4."""
    limit = gamma(16, "float32")
    half, (student, teacher) = Half(backend), (side.astype(np.float32) for side in logits(9, gap=gap))
    student += np.float32(0.5)
    function, options = DIVERGENCES[name]
    options = {**options, "temperature": 1.0}
    truth = getattr(oracle, function)(student.astype(float), teacher.astype(float), numerics=FLOAT64, **options)
    loss = half.call(function, student, teacher, numerics=FLOAT32, **options)
    assert loss.dtype == np.float32
    assert np.max(np.abs(loss / truth - 1)) <= limit
    import torch

    leaf = torch.tensor(student.astype(float), requires_grad=True)
    exact = getattr(Half("torch").losses, function)(
        leaf, torch.tensor(teacher.astype(float)), numerics=FLOAT64, **options
    )
    exact = torch.autograd.grad(exact.sum(), leaf)[0].numpy()
    grad = half.grads(function, np.ones((2, 3)), student, teacher, numerics=FLOAT32, **options)[0]
    assert np.linalg.norm(grad - exact) <= limit * np.linalg.norm(exact)


def test_a_large_vocabulary_loses_no_small_terms_when_compiled(backend: str) -> None:
    rng = np.random.default_rng(9)  # four positions: the shape for which XLA's fused loop adds one by one
    teacher = (rng.normal(size=(1, 4, 32768)) * 3.0).astype(np.float32)
    student = (teacher + rng.normal(size=teacher.shape) * 1e-2).astype(np.float32)
    options = {"beta": 0.5, "temperature": 1.0}
    half = Half(backend)
    if backend == "torch":
        loss = half.call("generalized_jsd", student, teacher, numerics=FLOAT32, **options)
    else:
        loss = half.frame.jit(partial(half.losses.generalized_jsd, numerics=FLOAT32, **options))(student, teacher)
    import torch

    sides = (torch.tensor(side.astype(float)) for side in (student, teacher))
    truth = Half("torch").losses.generalized_jsd(*sides, numerics=FLOAT64, **options).numpy()
    assert np.max(np.abs(np.asarray(loss) / truth - 1)) <= gamma(16, "float32")


def test_plain_float32_logarithms_would_not_have_six_digits() -> None:
    """The must-fail twin of the test above: its limit is one that the textbook formula misses by far."""
    student, teacher = (side.astype(np.float32) for side in logits(9, vocab=513, gap=1e-4))
    truth = oracle.forward_kl(student.astype(float), teacher.astype(float), temperature=1.0, numerics=FLOAT64)
    log_p, log_q = (side - np.log(np.exp(side).sum(-1, keepdims=True)) for side in (teacher, student))
    plain = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert np.max(np.abs(plain / truth - 1)) > 100 * gamma(16, "float32")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_apart_distributions_stay_finite(backend: str, name: str) -> None:
    teacher = np.zeros((2, 3, 11), np.float32)
    teacher[0, 0, :2], teacher[0, 1, 5], teacher[0, 2, 3], teacher[1, 0] = (900.0, -900.0), 1e4, -1e4, 99.0
    student = np.ascontiguousarray(-teacher)
    function, options = DIVERGENCES[name]
    options = {**options, "temperature": 1.0, "numerics": FLOAT32}
    half = Half(backend)
    assert np.isfinite(half.call(function, student, teacher, **options)).all()
    for grad in half.grads(function, np.ones((2, 3)), student, teacher, **options):
        assert np.isfinite(grad).all()


def test_losses_of_bfloat16_logits_are_computed_in_float32(backend: str) -> None:
    if backend == "torch":
        import torch

        bfloat16: Any = torch.bfloat16
    else:
        import jax.numpy as jnp

        bfloat16 = jnp.bfloat16
    half = Half(backend)
    student, teacher = (np.round(side * 4) / 4 for side in logits(18))  # exact in bfloat16
    labels = np.zeros((2, 3), np.int32)
    sides = [half._in(side.astype(np.float32)) for side in (student, teacher)]
    small = [side.to(bfloat16) if backend == "torch" else side.astype(bfloat16) for side in sides]
    objective = Objective(distil=DistilOptions(hard_weight=0.5))
    loss = half.losses.training_loss(*small, half._in(labels), objective=objective, numerics=BFLOAT16)[0]
    reference = half.losses.training_loss(*sides, half._in(labels), objective=objective, numerics=FLOAT32)[0]
    assert half._out(loss).dtype == np.float32
    assert half._out(loss) == half._out(reference)

"""Every divergence by a short name, a half's losses called with NumPy arrays, and logits to hand them."""

from types import ModuleType
from typing import Any

import numpy as np

from tessera_parity.budget import mathematics_limit
from tessera_parity.compare import relative_difference
from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.objectives import (
    TopKForm,
)

LIMIT = mathematics_limit()

DIVERGENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "forward": ("forward_kl", {}),
    "reverse": ("reverse_kl", {}),
    "jsd_0": ("generalized_jsd", {"beta": 0.0}),
    "jsd_3": ("generalized_jsd", {"beta": 0.3}),
    "jsd_5_detached": ("generalized_jsd", {"beta": 0.5, "detach_mixture": True}),
    "jsd_1": ("generalized_jsd", {"beta": 1.0}),
    "skew": ("skew_kl", {"alpha": 0.1}),
    "skew_0": ("skew_kl", {"alpha": 0.0}),
    "skew_reverse": ("skew_reverse_kl", {"alpha": 0.1}),
    "skew_reverse_detached": ("skew_reverse_kl", {"alpha": 0.3, "detach_mixture": True}),
    "total_variation": ("total_variation", {}),
    "both": ("top_k_kl", {"k": 4, "form": TopKForm.BOTH_RENORMALIZED}),
    "teacher": ("top_k_kl", {"k": 4, "form": TopKForm.TEACHER_RENORMALIZED}),
    "tail": ("top_k_kl", {"k": 4, "form": TopKForm.TAIL}),
    "truncated": ("top_k_kl", {"k": 4, "form": TopKForm.TRUNCATED}),
    "soft": ("soft_cross_entropy", {}),
}


class Half:
    """One side's losses called with NumPy arrays, and its own differentiation."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "torch":
            import torch

            from tessera_torch.distil import losses

            self.frame: ModuleType = torch
        else:
            import jax

            from tessera_jax.distil import losses

            self.frame = jax
        self.losses: ModuleType = losses

    def call(self, function: str, *arrays: Any, **options: Any) -> Any:
        value = getattr(self.losses, function)(*(self._in(array) for array in arrays), **options)
        return tuple(self._out(part) for part in value) if isinstance(value, tuple) else self._out(value)

    def grads(self, function: str, weight: Any, *arrays: Any, wrt: int = 2, **options: Any) -> list[np.ndarray]:
        """Gradients by the first `wrt` arrays of the weighted sum of what `function` returns."""
        rest = [self._in(array) for array in arrays[wrt:]]

        def total(*leaves: Any) -> Any:
            value = getattr(self.losses, function)(*leaves, *rest, **options)
            value = value[0] if isinstance(value, tuple) else value
            return (value * self._in(np.asarray(weight, arrays[0].dtype))).sum()

        if self.name == "torch":
            leaves = [self._in(array).requires_grad_() for array in arrays[:wrt]]
            found = self.frame.autograd.grad(total(*leaves), leaves, materialize_grads=True)
        else:
            found = self.frame.grad(total, argnums=tuple(range(wrt)))(*(self._in(array) for array in arrays[:wrt]))
        return [self._out(grad) for grad in found]

    def _in(self, array: Any) -> Any:
        if array is None:
            return None
        return self.frame.tensor(array) if self.name == "torch" else self.frame.numpy.asarray(array)

    def _out(self, value: Any) -> np.ndarray:
        return value.detach().numpy() if self.name == "torch" else np.asarray(value)


def logits(seed: int, *, vocab: int = 11, scale: float = 3.0, gap: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Student and teacher logits `[2, 3, V]`, with a tie among the teacher's."""
    rng = np.random.default_rng(seed)
    teacher = rng.normal(size=(2, 3, vocab)) * scale
    if vocab > 7:
        teacher[0, 0, [2, 5, 7]] = teacher[0, 0].max()
    return teacher + gap * rng.normal(size=teacher.shape), teacher


def close(left: Any, right: Any, *, scale: float = 0.0, limit: float = LIMIT) -> None:
    """Assert that two arrays agree to `limit` relative to their largest magnitude or `scale`."""
    if scale:
        assert np.max(np.abs(np.asarray(left) - np.asarray(right)), initial=0.0) <= limit * scale
        return
    difference = relative_difference(np.asarray(left), np.asarray(right))
    assert difference.value <= limit, str(difference)


def call(
    half: Any, name: str, student: np.ndarray, teacher: np.ndarray, *, tau: float = 1.0, numerics: Numerics = FLOAT64
) -> Any:
    function, options = DIVERGENCES[name]
    return half.call(function, student, teacher, temperature=tau, numerics=numerics, **options)

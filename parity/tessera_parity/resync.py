"""Run a half with every operation fed the reference's tensors, forwards and backwards, and record what it made of them.

At a tap the half's own value is recorded and the reference's goes on in its place, so no operation inherits an error.
On the way back the arriving cotangent is recorded and the reference's goes on, so every vector-Jacobian product is
judged alone as well. The one place where the frameworks differ is how a value is swapped inside differentiation:
`resync_torch`, `resync_jax`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tessera_parity.halves import Half
from tessera_parity.rounding_cases import RoundingCase, tap_dtype
from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.reference.rounding import round_to

EAGER, STRICT, FUSED = "eager", "strict", "fused"
"""How a half is run. Strict: compiled, but rounding wherever the program says so (XLA: no excess precision). Fused:
compiled as users compile, where the compiler may keep more digits between operations that it merges.
"""


class Observation(NamedTuple):
    """What a half made of each operation, as float64."""

    values: dict[str, np.ndarray]  # by tap
    dtypes: dict[str, str]  # by tap: what the half computed in
    cotangents: dict[str, np.ndarray]  # by tap: gradient that its consumers sent back
    gradients: dict[str, np.ndarray]  # by parameter


class Reference(NamedTuple):
    """Every operation's true result on the rounded inputs, what an ideal half makes of them, and what goes on."""

    truth: dict[str, np.ndarray]
    ideal: dict[str, np.ndarray]
    synced: dict[str, np.ndarray]


def reference_values(oracle: Half, case: RoundingCase, numerics: Numerics) -> Reference:
    """Run the oracle twice: in float64 on rounded inputs (the truth), and rounding where the policy casts (the
    yardstick).
    """
    truth: dict[str, np.ndarray] = {}
    ideal: dict[str, np.ndarray] = {}
    synced: dict[str, np.ndarray] = {}

    def record(name: str, value: np.ndarray) -> np.ndarray:
        truth[name] = value
        synced[name] = round_to(value, tap_dtype(name, numerics))
        return synced[name]

    def follow(name: str, value: np.ndarray) -> np.ndarray:
        ideal[name] = value
        return synced[name]

    _forward(oracle, case, FLOAT64, record)
    _forward(oracle, case, numerics, follow)
    return Reference(truth, ideal, synced)


def _forward(
    oracle: Half, case: RoundingCase, numerics: Numerics, tap: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    oracle.module("model.transformer").forward(
        case.params, case.token_ids_BT, spec=case.spec, numerics=numerics, positions_BT=case.positions_BT,
        segments_BT=case.segments_BT, tap=tap,
    )  # fmt: skip


def observe_values(
    half: Half, case: RoundingCase, synced: Mapping[str, np.ndarray], *, numerics: Numerics, mode: str = EAGER
) -> Observation:
    """Run the half's forward pass on the reference's tensors."""
    if half.name == "torch":
        from tessera_parity import resync_torch

        return resync_torch.observe_values(half, case, synced, numerics, mode)
    from tessera_parity import resync_jax

    return resync_jax.observe_values(half, case, synced, numerics, mode)


def observe_gradients(
    half: Half,
    case: RoundingCase,
    synced: Mapping[str, np.ndarray],
    onward: Mapping[str, np.ndarray],
    *,
    numerics: Numerics,
    mode: str = EAGER,
) -> Observation:
    """Run forwards and backwards on the reference's tensors and cotangents (`onward`, by tap)."""
    if half.name == "torch":
        from tessera_parity import resync_torch

        return resync_torch.observe_gradients(half, case, synced, onward, numerics, numerics)
    from tessera_parity import resync_jax

    return resync_jax.observe_gradients(half, case, synced, onward, numerics, numerics, mode)


def true_gradients(
    half: Half, case: RoundingCase, synced: Mapping[str, np.ndarray], *, numerics: Numerics
) -> Observation:
    """Return each operation's float64 vector-Jacobian product, cotangents going on rounded to the tap's dtype.

    The oracle has no reverse differentiation, so the half in float64 is the truth here: question 1 holds it to the
    oracle's complex-step derivative, many orders below any error measured with this.
    """
    if half.name == "torch":
        from tessera_parity import resync_torch

        return resync_torch.observe_gradients(half, case, synced, None, FLOAT64, numerics)
    from tessera_parity import resync_jax

    return resync_jax.observe_gradients(half, case, synced, None, FLOAT64, numerics, STRICT)

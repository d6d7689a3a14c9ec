"""What a half made of every operation, as log ratios of errors: the measuring half of question 2 (`rounding` judges).

`prepare` computes what is true of a case once; `add_model` and `add_losses` run a half on it and add one value per
stream.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from tessera_parity.halves import Half
from tessera_parity.loading import load_half
from tessera_parity.resync import (
    Observation,
    Reference,
    observe_gradients,
    observe_values,
    reference_values,
    true_gradients,
)
from tessera_parity.rounding_cases import (
    ALL_POOLS,
    POOLS,
    Reordering,
    RoundingCase,
    case_rng,
    held_wide,
    rounding_case,
    tap_dtype,
    tensor_class,
)
from tessera_parity.rounding_losses import LossCase, loss_case, observe_losses, reference_losses
from tessera_parity.variants import Variant, quiet
from tessera_shared.errors import ParityError
from tessera_shared.numerics import FLOAT64, UNIT_ROUNDOFF, Numerics, numerics_for
from tessera_shared.reference.rounding import round_to

LOSSES = "losses"
"""Name of the pool of losses and updates; measured with float32 only, the loss dtype of every working policy."""


class Prepared(NamedTuple):
    """One case with what is true of it."""

    pool: str
    number: int  # of the case
    seed: int
    case: RoundingCase
    reference: Reference
    gradients: Observation | None


class PreparedLosses(NamedTuple):
    """One case of losses with what is true of it."""

    case: LossCase
    truth: dict[str, np.ndarray]
    ideal: dict[str, np.ndarray]


@dataclass
class Tally:
    """What one half has shown so far in one dtype."""

    half: str
    dtype: str
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by stream, by case
    numbers: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by stream, of one case
    exact: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # numbers that had to be equal and were
    faults: list[str] = field(default_factory=list)
    by_layer: dict[str, list[list[float]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # errors, by case and layer
    cases: int = 0

    def add(self, stream: str, pairs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Add one case of a stream: (half, truth, ideal) of each layer."""
        ours = ideals = counted = 0.0
        count, layers, least = 0, [], least_error(stream, numerics_for(self.dtype))
        for half, truth, ideal in pairs:
            reason = mask_fault(half, truth)
            if reason:
                self.faults.append(f"{stream}: {reason}")
                return
            error = relative_error(half, truth)
            ours, ideals, count = ours + error**2, ideals + relative_error(ideal, truth) ** 2, count + truth.size
            counted += max(error, least) ** 2
            layers.append(error)
        self.numbers[stream] = count
        if ideals == 0.0:
            if ours != 0.0:
                self.faults.append(f"{stream}: an exact operation is off by {np.sqrt(ours):.3g}")
            else:
                self.exact[stream] += count
            return
        with np.errstate(divide="ignore"):
            self.values[stream].append(float(0.5 * np.log(counted / ideals)))
        self.by_layer[stream].append(layers)


def least_error(stream: str, numerics: Numerics) -> float:
    """Return the smallest relative error that counts: one rounding in the dtype that a policy accumulates in.

    A compiler that keeps an accumulator's digits where the policy rounds them off is often exact by luck (a sum of few
    bfloat16 numbers fits in float32), and the logarithm of zero says nothing. Values that stay in the wide dtype have
    no narrower rounding to lose: there nothing is raised.
    """
    if numerics.softmax == numerics.compute or held_wide(stream):
        return 0.0
    return UNIT_ROUNDOFF[numerics.softmax]


def relative_error(value: np.ndarray, truth: np.ndarray) -> float:
    """Return |value - truth| / |truth| in the 2-norm over finite places; infinite where only the truth is zero."""
    finite = np.isfinite(truth)
    if not finite.all():
        value, truth = value[finite], truth[finite]
    size, gap = float(np.square(truth).sum()), float(np.square(value - truth).sum())
    if size == 0.0:
        return 0.0 if gap == 0.0 else np.inf
    return float(np.sqrt(gap / size))


def mask_fault(value: np.ndarray, truth: np.ndarray) -> str | None:
    """Return what forbids a comparison: other shapes, or NaN and infinity in other places than the truth's."""
    if value.shape != truth.shape:
        return f"shape {value.shape}, expected {truth.shape}"
    for name, mask_of in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        unequal = mask_of(value) != mask_of(truth)
        if unequal.any():
            return f"{name} in {int(unequal.sum())} places where the truth has none, or the reverse"
    return None


@lru_cache(maxsize=2)
def _clean(name: str, device: str) -> Half:
    return load_half(name, device=device)


def gradient_truth(half: Half) -> Half:
    """Return the half whose float64 gradients are the truth for `half`: torch, or JAX where torch is missing.

    Question 1 holds both halves to the oracle's complex-step derivatives, far below any error measured here; torch
    needs no compilation. It is always a clean copy, so a planted bug does not move its own truth.
    """
    return _clean("torch" if find_spec("torch") is not None else half.name, half.device)


def prepare(oracle: Half, truth: Half | None, pool: str, numerics: Numerics, *, seed: int, index: int) -> Prepared:
    """Draw a case and compute what is true of it; gradients only when `truth` is given."""
    case = rounding_case(ALL_POOLS[pool], numerics, case_rng(seed, pool, index))
    reference = reference_values(oracle, case, numerics)
    gradients = None if truth is None else true_gradients(truth, case, reference.synced, numerics=numerics)
    return Prepared(pool, index, seed, case, reference, gradients)


def prepare_losses(oracle: Half, truth: Half, numerics: Numerics, *, seed: int, index: int) -> PreparedLosses:
    """Draw a case of losses and compute what is true of it."""
    case = loss_case(numerics, case_rng(seed, LOSSES, index))
    values, ideal = reference_losses(oracle, case, numerics)
    true = observe_losses(truth, case, FLOAT64, mode="strict")
    grads = {name: value for name, value in true.items() if name.startswith("grad ")}
    return PreparedLosses(
        case, values | grads, ideal | {name: round_to(value, numerics.loss) for name, value in grads.items()}
    )


def add_model(tally: Tally, half: Half, variant: Variant, prepared: Prepared, numerics: Numerics) -> None:
    """Run a half on a prepared case and add what it made of every operation."""
    observed = _observe(half, variant, prepared, numerics)
    pool, reference = prepared.pool, prepared.reference
    for name, dtype in observed.dtypes.items():
        if dtype != tap_dtype(name, numerics):
            tally.faults.append(
                f"{pool}/{tensor_class(name)}: computed in {dtype}, the policy says {tap_dtype(name, numerics)}"
            )
    missing = sorted(reference.truth.keys() ^ observed.values.keys())
    if missing:
        tally.faults.append(f"{pool}/{missing[0]}: tapped on one side only")
    _add_group(tally, f"{pool}/", observed.values, reference.truth, reference.ideal)
    if prepared.gradients is None or not variant.gradients:
        return
    cotangents, gradients = prepared.gradients.cotangents, prepared.gradients.gradients
    once = {name: round_to(value, tap_dtype(name, numerics)) for name, value in cotangents.items()}
    _add_group(tally, f"{pool}/grad ", observed.cotangents, cotangents, once)
    once = {name: round_to(value, numerics.compute) for name, value in gradients.items()}
    _add_group(tally, f"{pool}/grad ", observed.gradients, gradients, once)


def add_losses(tally: Tally, half: Half, variant: Variant, prepared: PreparedLosses, numerics: Numerics) -> None:
    """Run a half on a prepared case of losses and one update, and add what it made of each."""
    observed = observe_losses(half, prepared.case, numerics, mode=variant.mode)
    _add_group(tally, f"{LOSSES}/", observed, prepared.truth, prepared.ideal)


def _add_group(
    tally: Tally,
    prefix: str,
    observed: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    ideal: Mapping[str, np.ndarray],
) -> None:
    classes: dict[str, list[str]] = defaultdict(list)
    for name in truth:
        classes[tensor_class(name)].append(name)
    for kind, names in classes.items():
        lost = [name for name in names if name not in observed]
        if lost:
            tally.faults.append(f"{prefix}{kind}: no value of {lost[0]}")
            continue
        tally.add(prefix + kind, [(observed[name], truth[name], ideal[name]) for name in names])


def _observe(half: Half, variant: Variant, prepared: Prepared, numerics: Numerics) -> Observation:
    case, synced = prepared.case, prepared.reference.synced
    order = None
    if variant.reorder:
        order = Reordering(case.spec, case_rng(prepared.seed, prepared.pool + " order", prepared.number))
        case, synced = order.case(case), order.taps(synced)
    if prepared.gradients is None or not variant.gradients:
        seen = observe_values(half, case, synced, numerics=numerics, mode=variant.mode)
    else:
        cotangents = prepared.gradients.cotangents
        onward = {name: round_to(value, tap_dtype(name, numerics)) for name, value in cotangents.items()}
        onward = order.taps(onward) if order is not None else onward
        seen = observe_gradients(half, case, synced, onward, numerics=numerics, mode=variant.mode)
    if order is None:
        return seen
    return Observation(
        order.taps(seen.values, back=True),
        seen.dtypes,
        order.taps(seen.cotangents, back=True),
        order.params(seen.gradients, back=True),
    )


def collect(
    oracle: Half,
    half: Half,
    variant: Variant,
    *,
    truth: Half,
    dtype: str,
    cases: int,
    seed: int,
    pools: Sequence[str] = tuple(POOLS),
    losses: bool = True,
    advance: Callable[[str], None] = quiet,
) -> dict[str, list[float]]:
    """Return every stream's log ratios over `cases` cases: what calibration stores. Faults raise ParityError."""
    numerics, tally = numerics_for(dtype), Tally(variant.half, dtype)
    for index in range(cases):
        for pool in pools:
            prepared = prepare(oracle, truth if variant.gradients else None, pool, numerics, seed=seed, index=index)
            add_model(tally, half, variant, prepared, numerics)
        if losses and dtype == numerics.loss and variant.gradients:
            add_losses(tally, half, variant, prepare_losses(oracle, truth, numerics, seed=seed, index=index), numerics)
        advance(f"{variant.half} {variant.name} {dtype} {index + 1}/{cases}")
    if tally.faults:
        raise ParityError(
            f"variant = {variant.half} {variant.name}: expected no fault, because it is held to be legal, but "
            f"{tally.faults[0]}; try parity run"
        )
    return dict(tally.values)

"""Trajectory: both halves train `nano` on real text from the same weights, and are compared all along the way.

Three questions, because a training run feeds its own rounding back into itself:

- in float64, are the two runs one run? Losses, weights and moments at every recorded step.
- in the working dtype with the *same* gradients (open loop), do the moments stay in their flat band and do the weights
  drift no
  faster than AdamW's own rounding allows? A systematic bias, such as decay rounded in the wrong place, is a steeper
  line.
- in the working dtype each on its own (closed loop), do the two runs part no faster than one half parts from itself
  when the rows
  of its batches are put in another order? That measures, in the same run, how this stretch of training amplifies
  rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import Context, Subject
from tessera_parity.trained import OPTIONS, Arrays, RealText, Stepper, real_text, schedule, start, stepper
from tessera_shared.batch import Batch
from tessera_shared.errors import MissingDependency
from tessera_shared.init import initial_weights
from tessera_shared.presets import preset
from tessera_shared.schedule import learning_rate
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table

_DTYPE = "float32"


@dataclass
class _Track:
    """What one run left: a loss a step; weights and moments at the recorded steps; every clipped gradient when asked
    for."""

    losses: list[float] = field(default_factory=list)
    weights: list[Arrays] = field(default_factory=list)
    first: list[Arrays] = field(default_factory=list)
    second: list[Arrays] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)


def run(context: Context) -> Iterator[Check]:
    """Yield the float64 comparison, the open loop of each half, and the closed loop of the two.

    Raises `MissingDependency` where a half is missing: one run has nothing to be compared with.
    """
    if context.torch is None or context.jax is None:
        raise MissingDependency(
            f"halves = {', '.join(half.name for half in context.halves)}: expected torch and jax, because a trajectory "
            "is one half's run beside the other's; try without --only-half, or install both"
        )
    steps = context.budget(quick=15, default=60, full=200) if context.cases is None else max(2, context.cases)
    spec = preset(context.model) if context.model in ("nano", "tiny") else preset("nano")
    text, weights = real_text(spec.vocab_size), initial_weights(spec, seed=context.seed)
    runs = _Runs(context, spec, text, weights, steps)
    exact = {half.name: runs.go(half, "float64", gradients=half is context.torch) for half in context.halves}
    yield _same_run(exact["torch"], exact["jax"], runs.recorded, context.device)
    for half in context.halves:
        yield _open_loop(context, half, spec, weights, exact["torch"].gradients, steps)
    working = {half.name: runs.go(half, _DTYPE) for half in context.halves}
    reordered = [runs.go(half, _DTYPE, reverse_rows=True) for half in context.halves]
    yield _closed_loop(working, exact["torch"], reordered, runs.recorded, context.device)


@dataclass(frozen=True)
class _Runs:
    """Everything that runs of one comparison share."""

    context: Context
    spec: ModelSpec
    text: RealText
    weights: Arrays
    steps: int
    steppers: dict[tuple[str, str], Stepper] = field(default_factory=dict)  # compiled once for each half and dtype

    @property
    def recorded(self) -> list[int]:
        """Steps (updates made) at which weights are kept: about twenty, the last one among them."""
        stride = max(1, self.steps // 20)
        return [step for step in range(1, self.steps + 1) if step % stride == 0 or step == self.steps]

    def go(self, half: Half, dtype: str, *, reverse_rows: bool = False, gradients: bool = False) -> _Track:
        """Train and return the track."""
        if (half.name, dtype) not in self.steppers:
            self.steppers[half.name, dtype] = stepper(half, self.spec, dtype)
        state, step = start(half, self.weights, dtype), self.steppers[half.name, dtype]
        optim, rates, track = half.module("train.optim"), schedule(self.steps), _Track()
        previous: Arrays = {}
        for index in range(self.steps):
            self.context.advance(f"trajectory: {half.name} {dtype}, step {index + 1}/{self.steps}")
            batch = self.text.batch(index, self.context.seed)
            batch = Batch(*(rows[::-1].copy() for rows in batch)) if reverse_rows else batch
            state, loss = step(state, batch, learning_rate(rates, index))
            track.losses.append(loss)
            keep = index + 1 in self.recorded
            if not (keep or gradients):
                continue
            first, second, _ = optim.moments(state.optimizer)
            first = _numpy(half, first)
            if keep:
                track.weights.append(_numpy(half, state.params))
                track.first.append(first)
                track.second.append(_numpy(half, second))
            if gradients:
                track.gradients.append(_clipped_gradient(previous, first))
                previous = first
        return track


def _numpy(half: Half, arrays: Any) -> Arrays:
    return {name: half.numpy(value) for name, value in arrays.items()}


def _clipped_gradient(previous: Arrays, first: Arrays) -> Arrays:
    """Return the gradient that turned one first moment into the next: (m_t - b1 m_(t-1)) / (1 - b1)."""
    beta = OPTIONS.beta1
    return {name: (value - beta * previous.get(name, np.zeros(()))) / (1.0 - beta) for name, value in first.items()}


def _apart(left: Arrays, right: Arrays) -> float:
    """Return the largest difference of any weight, relative to its tensor's largest magnitude; infinite where one has a
    NaN."""
    worst = 0.0
    for name, value in left.items():
        gap = float(np.max(np.abs(value - right[name])) / np.max(np.abs(right[name])))
        worst = max(worst, gap) if np.isfinite(gap) else np.inf
    return worst


def _apart_rms(left: Arrays, right: Arrays) -> float:
    """Return the root-mean-square difference over all weights, relative to the weights' own."""
    gap = sum(float(np.sum(np.square(value - right[name]))) for name, value in left.items())
    size = sum(float(np.sum(np.square(value))) for value in right.values())
    ratio = float(np.sqrt(gap / size))
    return ratio if np.isfinite(ratio) else np.inf


def _same_run(left: _Track, right: _Track, recorded: list[int], device: str) -> Check:
    limits = [budget.trajectory_limit(step) for step in recorded]
    drift = [_apart_rms(a, b) for a, b in zip(left.weights, right.weights, strict=True)]
    moments = [max(_apart_rms(a, b), _apart_rms(c, d)) for a, b, c, d in zip(
        left.first, right.first, left.second, right.second, strict=True)]  # fmt: skip
    losses = [abs(a - b) / abs(b) for a, b in zip(left.losses, right.losses, strict=True)]
    over = max(max(d, m) / limit for d, m, limit in zip(drift, moments, limits, strict=True))
    over = max(over, max(losses) / limits[-1])
    return Check(
        subject="trajectory",
        name="float64: one run",
        question=Question.MATHEMATICS,
        sides=("torch", "jax"),
        verdict=Verdict.PARITY if over <= 1.0 else Verdict.DIVERGENCE,
        cases=len(left.losses),
        compared=sum(value.size for arrays in left.weights for value in arrays.values()) * 3 + len(losses),
        observed=over * limits[-1],
        limit=limits[-1],
        unit="relative, root mean square over weights; losses by step",
        device=device,
        detail=f"after {recorded[-1]} steps on the corpus: weights {drift[-1]:.1e}, moments {moments[-1]:.1e}, losses {max(losses):.1e}",
        series={
            "step": [float(step) for step in recorded],
            "drift_float64": drift,
            "moment_float64": moments,
            "limit": limits,
        },
    )


def _open_loop(
    context: Context, half: Half, spec: ModelSpec, weights: Arrays, gradients: list[Arrays], steps: int
) -> Check:
    """Feed one gradient sequence to a half's AdamW in the working dtype and to the oracle's in float64."""
    decay = {name: info.decay for name, info in tensor_table(spec).items()}
    rounded = [{name: value.astype(_DTYPE).astype(np.float64) for name, value in step.items()} for step in gradients]
    rates = [float(np.float32(learning_rate(schedule(steps), index))) for index in range(steps)]
    sides = [_Updates(context.numpy, "float64", weights, decay), _Updates(half, _DTYPE, weights, decay)]
    drift: list[float] = []
    band_first: list[float] = []
    band_second: list[float] = []
    largest = dict.fromkeys(("first", "second"), 0.0)
    for index in range(steps):
        kept = [side.take(rounded[index], rates[index]) for side in sides]
        drift.append(_apart(kept[1][0], kept[0][0]))
        for which, series, position in (("first", band_first, 1), ("second", band_second, 2)):
            largest[which] = max(largest[which], max(float(np.max(np.abs(v))) for v in kept[0][position].values()))
            gap = max(float(np.max(np.abs(kept[1][position][n] - v))) for n, v in kept[0][position].items())
            series.append(gap / largest[which])
    return _open_loop_check(context, half, weights, rates, drift, band_first, band_second)


class _Updates:
    """AdamW of one side on gradients that are given."""

    def __init__(self, half: Half, dtype: str, weights: Arrays, decay: dict[str, bool]) -> None:
        optim = half.module("train.optim")
        self._half, self._dtype, self._moments = half, dtype, optim.moments
        self._params: Any = {name: half.array(value, dtype) for name, value in weights.items()}
        self._state: Any = optim.adamw_init(self._params, options=OPTIONS)
        self._update = half.compiled(
            lambda params, grads, state, lr: optim.adamw_update(
                params, grads, state, lr=lr, options=OPTIONS, decay_mask=decay
            )
        )

    def take(self, gradient: Arrays, rate: float) -> tuple[Arrays, Arrays, Arrays]:
        """Make one update; return weights and both moments."""
        grads = {name: self._half.array(value, self._dtype) for name, value in gradient.items()}
        lr = self._half.array(np.asarray(rate), self._dtype)
        self._params, self._state = self._update(self._params, grads, self._state, lr)
        first, second, _ = self._moments(self._state)
        return _numpy(self._half, self._params), _numpy(self._half, first), _numpy(self._half, second)


def _open_loop_check(
    context: Context, half: Half, weights: Arrays, rates: list[float], drift: list[float], first: list[float], second: list[float]
) -> Check:  # fmt: skip
    smallest_scale = min(float(np.max(np.abs(value))) for value in weights.values())
    slope = budget.drift_bounds(
        rates, beta1=OPTIONS.beta1, beta2=OPTIONS.beta2, largest_weight=smallest_scale, dtype=_DTYPE
    )
    bands = (budget.moment_band(OPTIONS.beta1, 3, _DTYPE), budget.moment_band(OPTIONS.beta2, 4, _DTYPE))
    over = max(max(d / s for d, s in zip(drift, slope, strict=True)), max(first) / bands[0], max(second) / bands[1])
    return Check(
        subject="trajectory",
        name="AdamW on the run's gradients",
        question=Question.ROUNDING,
        sides=("numpy", half.name),
        verdict=Verdict.PARITY if over <= 1.0 else Verdict.DIVERGENCE,
        cases=len(rates),
        compared=3 * len(rates) * sum(value.size for value in weights.values()),
        observed=over,
        limit=1.0,
        unit="share of the bound: moments' flat band, weights' predicted slope",
        dtype=_DTYPE,
        device=context.device,
        op="optimizer" if not over <= 1.0 else None,
        detail=f"drift {drift[-1]:.1e} of {slope[-1]:.1e}; moments {max(first):.1e} of {bands[0]:.1e}, {max(second):.1e} of {bands[1]:.1e}",
        series={
            "step": [float(index + 1) for index in range(len(rates))],
            "drift_weights": drift,
            "limit_drift_weights": slope,
            "moment_first": first,
            "limit_moment_first": [bands[0]] * len(rates),
            "moment_second": second,
            "limit_moment_second": [bands[1]] * len(rates),
        },
    )


def _closed_loop(
    working: dict[str, _Track], exact: _Track, reordered: list[_Track], recorded: list[int], device: str
) -> Check:
    torch, jax = working["torch"], working["jax"]
    between = [_apart_rms(a, b) for a, b in zip(torch.weights, jax.weights, strict=True)]
    legal = np.maximum.accumulate(
        [
            max(
                _apart_rms(a, b)
                for a, b in zip((torch.weights[i], jax.weights[i]), (r.weights[i] for r in reordered), strict=True)
            )
            for i in range(len(recorded))
        ]
    )
    limits = [float(budget.SLACK * value) for value in legal]
    over = max(value / limit if limit > 0.0 else np.inf * value for value, limit in zip(between, limits, strict=True))
    return Check(
        subject="trajectory",
        name=f"{_DTYPE}: two runs",
        question=Question.ROUNDING,
        sides=("torch", "jax"),
        verdict=Verdict.PARITY if over <= 1.0 else Verdict.DIVERGENCE,
        cases=len(torch.losses),
        compared=sum(value.size for arrays in torch.weights for value in arrays.values()),
        observed=between[-1],
        limit=limits[-1],
        unit="relative, root mean square over weights",
        dtype=_DTYPE,
        device=device,
        detail=f"losses {torch.losses[0]:.3f} to {torch.losses[-1]:.4f} and {jax.losses[-1]:.4f}; "
        f"limit = {budget.SLACK:g} times what reordered rows do",
        series={
            "step": [float(step) for step in recorded],
            "loss_torch": [torch.losses[step - 1] for step in recorded],
            "loss_jax": [jax.losses[step - 1] for step in recorded],
            "loss_float64": [exact.losses[step - 1] for step in recorded],
            "drift_weights": between,
            "limit_drift_weights": limits,
        },
    )


SUBJECT = Subject(
    name="trajectory",
    about="training nano on real text: float64 runs as one, moments in their band, drift under its slope",
    run=run,
)

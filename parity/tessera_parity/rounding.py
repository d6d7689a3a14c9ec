"""Question 2, *same rounding?*: every operation's error in units of the error that an ideal legal implementation makes.

Each operation is fed the reference's tensors, rounded to what the policy stores (`resync`), so none inherits an
error. With f the float64 result on those inputs, a half's error is e_half = |half - f| / |f| (2-norms over the
tensor, root of the sum of squares over layers). The yardstick e_ideal is the error of the oracle under the same
policy: float64 arithmetic, rounded where the policy casts. Cotangents and gradients have no casts of their own in a
policy; their yardstick is one rounding of f to the tensor's dtype. One case gives one value per tensor class:
log(e_half / e_ideal).

Values of a stream (half, dtype, pool, tensor class) are pooled and tested on both sides against the band of legal
variants (`calibration`, `variants`) by a test that may be looked at after every case (`sequential`). All streams of a
run share one false-alarm probability.

Where e_ideal is zero the operation is exact (a gather, a copy, a masked place): then e_half must be zero too, and the
numbers that were compared so are counted. Masks of NaN and infinity must be the truth's, dtypes the policy's. No case
is dropped.

*Power.* How small a shift n cases can show is proportional to a stream's scatter from case to case, which calibration
measured. A plan states a shift of the error and the scatter up to which it must be seen; of a noisier stream
proportionally more is asked. Every check says the shift past the legal band that it would have seen, and is
inconclusive when that is more than it was asked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tessera_parity.calibration.store import DATA, Entry, load_entry, machine
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.resync import EAGER
from tessera_parity.rounding_measure import (
    LOSSES,
    Tally,
    add_losses,
    add_model,
    gradient_truth,
    prepare,
    prepare_losses,
)
from tessera_parity.sequential import RUN_FALSE_ALARMS, SHARE_CASE, Band, Standing, alpha_per_stream, case_limit, stand
from tessera_parity.variants import FAITHFUL, Variant, quiet, usual
from tessera_shared.numerics import numerics_for

UNIT = "log error ratio, from the middle of the legal band"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much a run looks at, and what it must be able to see."""

    pools: tuple[str, ...] = ("rich",)
    losses: bool = False
    gradients: bool = True
    cases: int = 28  # planned
    most: int = 32  # at most, while the stated shift could not be seen yet
    shift: float = 0.25  # stated: a change of the error by this fraction
    scatter: float = 0.15  # of a stream's cases (sub-Gaussian scale of the log ratio) up to which `shift` must be seen

    def required(self, sigma: float) -> float:
        """Return the log ratio that a stream of this scatter must be able to show."""
        return math.log1p(self.shift) * max(1.0, sigma / self.scatter)


@dataclass
class Side:
    """One half in one dtype: how it runs, what it has shown, what is legal."""

    half: Half
    variant: Variant
    dtype: str
    entry: Entry | None
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = Tally(self.half.name, self.dtype)


def judge(
    oracle: Half,
    halves: Sequence[Half],
    *,
    dtypes: Sequence[str],
    seed: int,
    plan: Plan,
    device: str = "cpu",
    variants: Mapping[str, Variant] | None = None,
    directory: Path = DATA,
    false_alarms: float = RUN_FALSE_ALARMS,
    advance: Callable[[str], None] = quiet,
) -> list[Check]:
    """Run every half on the same cases and judge every stream: at most `false_alarms` for legal halves, all checks
    together.

    `variants` says how each half is run (default: `variants.usual`). Cases go on past the plan while a stream cannot
    see the stated shift, up to `plan.most`.
    """
    sides = [
        Side(half, (variants or {}).get(half.name, usual(half.name)), dtype, _entry(half, dtype, device, directory))
        for dtype in dtypes
        for half in halves
    ]
    alpha = alpha_per_stream(max(1, sum(_num_streams(side, plan) for side in sides)), false_alarms)
    for dtype in dtypes:
        ours = [side for side in sides if side.dtype == dtype]
        bands = [_bands(side, alpha) for side in ours]
        for index in range(plan.most):
            _one_case(oracle, ours, plan, dtype, seed, index)
            advance(f"rounding {dtype} case {index + 1}")
            if index + 1 >= plan.cases and all(_sees(*pair, plan, alpha) for pair in zip(ours, bands, strict=True)):
                break
    return [check for side in sides for check in _checks(side, plan, alpha, seed, device)]


def precision_battery(
    oracle: Half,
    half: Half,
    *,
    seed: int = 0,
    cases: int = 6,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    directory: Path = DATA,
) -> list[Check]:
    """Judge a half's forward pass, operation by operation as written: what planted precision bugs must not survive.

    Under a second once a framework has met the shapes. Streams, and with them alpha, are this call's own.
    """
    plan = Plan(gradients=False, cases=cases, most=cases, shift=1.0)  # a doubled error, in so few cases
    eager = Variant(name="eager", half=half.name, about="as written", mode=EAGER, gradients=False)
    return judge(
        oracle, [half], dtypes=dtypes, seed=seed, plan=plan, device=half.device, variants={half.name: eager},
        directory=directory,
    )  # fmt: skip


def _entry(half: Half, dtype: str, device: str, directory: Path) -> Entry | None:
    return load_entry(half.name, dtype, device=device, directory=directory)


def _wanted(stream: str, plan: Plan) -> bool:
    pool, _, tensor = stream.partition("/")
    if pool == LOSSES:
        return plan.losses
    return pool in plan.pools and (plan.gradients or not tensor.startswith("grad "))


def _num_streams(side: Side, plan: Plan) -> int:
    if side.entry is None:
        return 0
    return sum(_wanted(stream, plan) for stream in side.entry.streams(side.variant.family))


def _bands(side: Side, alpha: float) -> dict[str, Band]:
    if side.entry is None:
        return {}
    family = side.variant.family
    found = {stream: side.entry.band(stream, family, alpha=alpha) for stream in side.entry.streams(family)}
    return {stream: band for stream, band in found.items() if band is not None}


def _one_case(oracle: Half, sides: Sequence[Side], plan: Plan, dtype: str, seed: int, index: int) -> None:
    numerics = numerics_for(dtype)
    truth = gradient_truth(sides[0].half)
    for pool in plan.pools:
        prepared = prepare(oracle, truth if plan.gradients else None, pool, numerics, seed=seed, index=index)
        for side in sides:
            add_model(side.tally, side.half, side.variant, prepared, numerics)
    if plan.losses and dtype == numerics.loss:
        losses = prepare_losses(oracle, truth, numerics, seed=seed, index=index)
        for side in sides:
            add_losses(side.tally, side.half, side.variant, losses, numerics)
    for side in sides:
        side.tally.cases = index + 1


def _sees(side: Side, bands: Mapping[str, Band], plan: Plan, alpha: float) -> bool:
    return all(
        stand(values, bands[stream], alpha=alpha, planned=plan.cases).smallest_shift
        <= plan.required(bands[stream].sigma)
        for stream, values in side.tally.values.items()
        if stream in bands
    )


def _checks(side: Side, plan: Plan, alpha: float, seed: int, device: str) -> list[Check]:
    bands = _bands(side, alpha)
    checks = [_guards(side, device)]
    strangers = sorted(stream for stream in side.tally.values if stream not in bands)
    if strangers:
        checks.append(_uncalibrated(side, strangers, device))
    for stream, values in side.tally.values.items():
        if stream in bands:
            standing = stand(values, bands[stream], alpha=alpha, planned=plan.cases)
            checks.append(_pooled(side, stream, bands[stream], standing, plan, alpha, seed, device))
    return checks


def _pooled(
    side: Side, stream: str, band: Band, standing: Standing, plan: Plan, alpha: float, seed: int, device: str
) -> Check:
    values = side.tally.values[stream]
    half_width = 0.5 * (band.high - band.low)
    if standing.gross is None:
        observed, limit = abs(standing.mean - band.middle), half_width + standing.width
    else:
        observed = abs(values[standing.gross] - band.middle)
        limit = half_width + case_limit(standing.gross + 1, sigma=band.sigma, alpha=alpha * SHARE_CASE)
    required = plan.required(band.sigma)
    verdict = Verdict.PARITY
    if standing.alarm or standing.gross is not None:
        verdict = Verdict.DIVERGENCE
    elif standing.smallest_shift > required:
        verdict = Verdict.INCONCLUSIVE
    pool, _, tensor = stream.partition("/")
    return Check(
        subject="rounding", name=f"{pool} {tensor}", question=Question.ROUNDING, sides=("float64", side.half.name),
        verdict=verdict, cases=standing.n, compared=standing.n * side.tally.numbers[stream], observed=observed,
        limit=limit, unit=UNIT, dtype=side.dtype, device=device, op=tensor.removeprefix("grad "),
        case={
            "kind": "rounding", "pool": pool, "seed": seed, "index": standing.gross or 0, "dtype": side.dtype,
            "half": side.half.name, "variant": side.variant.name,
        },
        detail=_detail(side, band, standing, required), series=_series(side, stream),
    )  # fmt: skip


def _detail(side: Side, band: Band, standing: Standing, required: float) -> str:
    """Say the pooled error ratio, the legal band, and what could have been seen, in multiples of the ideal error."""
    ratio = f"error {math.exp(standing.mean):.4g} x ideal" if standing.n else "no finite error ratio"
    text = (
        f"{ratio}, legal {math.exp(band.low):.4g} to {math.exp(band.high):.4g}, n = {standing.n}, sees a shift of "
        f"{percent(standing.smallest_shift)} past the band"
    )
    if standing.gross is not None:
        text += f"; case {standing.gross} is grossly off by itself"
    elif standing.smallest_shift > required:
        text += f", {percent(required)} is asked: more cases"
    if side.entry is not None and side.entry.device == "cpu" and side.entry.machine.get("cpu") != machine()["cpu"]:
        text += f"; band measured on {side.entry.machine.get('cpu')}"
    return text


def percent(shift: float) -> str:
    """Return a shift in log ratio as a change of the error: `7.9 %`, `43 %`, or a factor where it is above twofold."""
    if shift > math.log(2.0):
        return f"{math.exp(shift):.3g} x"
    change = 100.0 * math.expm1(shift)
    return f"{change:.2g} %" if change < 10.0 else f"{change:.0f} %"


def _series(side: Side, stream: str) -> dict[str, list[float]]:
    finite = [value for value in side.tally.values[stream] if math.isfinite(value)]
    series = {"log_ratio_sorted": sorted(finite)}
    if side.entry is not None and side.variant.family == FAITHFUL and stream in side.entry.quantiles:
        series["calibration_quantiles"] = side.entry.quantiles[stream]
    layers = side.tally.by_layer.get(stream, [])
    if layers and all(len(row) == len(layers[0]) for row in layers):
        series["error_by_layer"] = [float(value) for value in np.sqrt(np.mean(np.square(layers), axis=0))]
    return series


def _guards(side: Side, device: str) -> Check:
    """Exact operations, masks of NaN and infinity, dtypes: no statistics, one fault is a divergence."""
    tally = side.tally
    compared = sum(tally.exact.values()) + sum(tally.numbers.values())
    names = ", ".join(sorted(stream.partition("/")[2] for stream in tally.exact))
    first = tally.faults[0] if tally.faults else ""
    return Check(
        subject="rounding", name="exact operations, masks and dtypes", question=Question.ROUNDING,
        sides=("float64", side.half.name), verdict=Verdict.DIVERGENCE if tally.faults else Verdict.PARITY,
        cases=tally.cases, compared=compared, observed=float(len(tally.faults)), limit=0.0, unit="faults",
        dtype=side.dtype, device=device, op=first.partition(":")[0].partition("/")[2].removeprefix("grad ") or None,
        detail=first or f"{sum(tally.exact.values())} numbers of exact operations equal: {names}",
    )  # fmt: skip


def _uncalibrated(side: Side, strangers: Sequence[str], device: str) -> Check:
    what = "no calibration for this device and version" if side.entry is None else f"no band for {strangers[0]}"
    values = [value for stream in strangers for value in side.tally.values[stream]]
    return Check(
        subject="rounding", name=f"{len(strangers)} tensor classes without a band", question=Question.ROUNDING,
        sides=("float64", side.half.name), verdict=Verdict.UNCALIBRATED, cases=side.tally.cases,
        compared=sum(side.tally.numbers[stream] * len(side.tally.values[stream]) for stream in strangers),
        observed=max((abs(value) for value in values), default=0.0), limit=0.0, unit="log error ratio; no band to judge it by",
        dtype=side.dtype, device=device, detail=f"{what}: run parity calibrate --device {device} --dtype {side.dtype}",
    )  # fmt: skip

"""The statistics behind *same rounding*: is the mean of a stream of log error ratios inside the band of legal ones?

Values x_1, x_2, ... of one stream are independent (one per generated case) with unknown mean m. A legal
implementation has m in [lo, hi]; calibration measured that band. Three things can alarm, and the error probability is
divided among them.

*The mean.* Let sigma be such that every legal stream is sigma-sub-Gaussian: E exp(s (x - m)) <= exp(s^2 sigma^2 / 2)
for the s that matter. With S_n = sum (x_i - m), the mixture over s ~ Normal(0, 1 / (rho sigma^2)) of exp(s S_n - n
s^2 sigma^2 / 2) is a non-negative supermartingale that starts at 1, so by Ville's inequality, for every n at once
with probability >= 1 - alpha,

    |S_n| <= sigma sqrt((n + rho) (log((n + rho) / rho) + 2 log(1 / alpha)))

(Robbins 1970, Annals of Mathematical Statistics 41; Howard, Ramdas, McAuliffe & Sekhon 2021, Annals of Statistics 49,
two-sided mixture). One may therefore look after every case and stop when one likes. The stream diverges when [mean - w_n, mean +
w_n] and the band are disjoint: on either side, because more accurate is different too.

*The scale.* A normal sigma would be too small where tails are heavier than a Gaussian's, and alphas are near 1e-7. So
sigma is the smallest number for which the *measured* moment generating function stays below the sub-Gaussian one, for
the |s| that the boundary uses, times the upper confidence factor of a variance with as many degrees of freedom.

*One case.* A single value may leave the band by t_n at most. A log-concave law has P(|x - m| >= t sigma) <= exp(1 -
t) (Borell's lemma in the form of Lovasz & Vempala 2007, lemma 5.17), and sum 1/(n(n+1)) = 1 spends alpha over all n:
t_n = sigma (1 + log(n (n + 1) / alpha)). About twenty sigma: a guard against gross errors that a pooled mean would
need several cases to see.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tessera_shared.errors import ParityError

RUN_FALSE_ALARMS = 1e-4
"""Largest probability that any stream of a whole run of legal implementations alarms."""

DETECTION = 0.95
"""Probability with which a shift called visible is seen."""

SHARE_MEAN, SHARE_CASE, SHARE_BAND = 0.5, 0.25, 0.25
"""How a stream's alpha is divided: running mean, single cases, estimates of the band itself."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Where the mean of a legal stream may lie, and how far its cases scatter."""

    low: float
    high: float
    sigma: float  # sub-Gaussian scale of one case

    @property
    def middle(self) -> float:
        """Half way between the two limits."""
        return 0.5 * (self.low + self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a stream says after n cases."""

    n: int
    mean: float
    width: float  # half-width of the confidence sequence at n
    alarm: bool
    smallest_shift: float  # shift past the band's edge that this n shows with probability DETECTION, in log ratio
    gross: int | None  # index of the first single case that no legal implementation makes


def alpha_per_stream(num_streams: int, total: float = RUN_FALSE_ALARMS) -> float:
    """Return each stream's share of the run's false-alarm probability (Bonferroni: no independence is needed)."""
    if num_streams < 1:
        raise ParityError(f"streams = {num_streams}: expected at least 1, because alpha is divided over them; try 1")
    return total / num_streams


def best_rho(n: int, alpha: float) -> float:
    """Return the mixture's rho that makes the boundary about narrowest at n cases (Howard et al. 2021)."""
    log_alpha = 2.0 * math.log(1.0 / alpha)
    return max(n, 1) / (log_alpha + math.log(1.0 + log_alpha))


def boundary(n: int, *, sigma: float, alpha: float, rho: float) -> float:
    """Return w_n, the half-width of the confidence sequence for the mean after n >= 1 cases."""
    total = (n + rho) * (math.log((n + rho) / rho) + 2.0 * math.log(1.0 / alpha))
    return sigma * math.sqrt(total) / n


def case_limit(n: int, *, sigma: float, alpha: float) -> float:
    """Return t_n, how far the n-th single case may lie outside the band."""
    return sigma * (1.0 + math.log(n * (n + 1) / alpha))


def sub_gaussian_scale(values: Sequence[float]) -> float:
    """Return sigma as measured on one stream's calibration cases (without the confidence factor).

    The empirical generating function is looked at up to s = 2 / standard deviation: the boundary at n cases uses
    s = w_n / sigma^2 < 2 / sigma for the n (ten and more) at which anything is judged.
    """
    x = np.asarray(values, np.float64)
    if x.size < 3:
        raise ParityError(
            f"calibration cases = {x.size}: expected at least 3, because a scale is estimated; try --cases 100"
        )
    centered, deviation = x - x.mean(), float(x.std(ddof=1))
    if deviation == 0.0:
        return 0.0
    scales = [deviation]
    for sign in (-1.0, 1.0):
        for step in np.linspace(0.25, 2.0, 8):
            s = sign * step / deviation
            log_mgf = float(np.log(np.mean(np.exp(s * centered))))
            scales.append(math.sqrt(max(2.0 * log_mgf, 0.0)) / abs(s))
    return max(scales)


def variance_factor(freedom: int, *, alpha: float) -> float:
    """Return sqrt(k / chi2_alpha(k)), which makes an estimated standard deviation an upper bound.

    The quantile is Wilson & Hilferty's (1931), kept away from zero where few degrees of freedom would take it there.
    """
    part = 2.0 / (9.0 * freedom)
    root = 1.0 - part + _NORMAL.inv_cdf(alpha) * math.sqrt(part)
    return float(max(root, 0.1) ** -1.5)


def legal_band(
    means: Sequence[float], counts: Sequence[int], *, sigma: float, alpha: float, floor: float = 0.0
) -> Band:
    """Return the band of means from the variants' calibrated means.

    Each mean is uncertain by z sigma / sqrt(count), Bonferroni over variants and sides. The range of k variants
    underestimates the range of all legal ones: of k draws from a uniform law, unbiased estimates of the endpoints lie
    range / (k - 1) outside the extremes (order statistics: E range = (k - 1) / (k + 1) of the width), so each side is
    moved by that. `floor` widens both sides by what no variant needs to have shown to be legal.
    """
    k = len(means)
    z = -_NORMAL.inv_cdf(alpha / (2.0 * k))
    low = min(mean - z * sigma / math.sqrt(count) for mean, count in zip(means, counts, strict=True))
    high = max(mean + z * sigma / math.sqrt(count) for mean, count in zip(means, counts, strict=True))
    different = len({round(mean, 9) for mean in means})  # a switch that changed nothing is no further draw
    reach = (max(means) - min(means)) / (different - 1) if different > 1 else 0.0
    return Band(low=low - reach - floor, high=high + reach + floor, sigma=sigma)


def stand(values: Sequence[float], band: Band, *, alpha: float, planned: int) -> Standing:
    """Judge a stream after its values so far. `planned` is where the boundary is narrowest; any n may be looked at.

    An infinite value (an error of exactly zero, or a NaN on one side) is gross by itself and left out of the mean.
    """
    x = np.asarray(values, np.float64)
    gross = _first_gross(x, band, alpha * SHARE_CASE)
    finite = x[np.isfinite(x)]
    n = int(finite.size)
    if n == 0:
        return Standing(n=0, mean=math.nan, width=math.inf, alarm=False, smallest_shift=math.inf, gross=gross)
    share = alpha * SHARE_MEAN
    rho = best_rho(planned, share)
    means = np.cumsum(finite) / np.arange(1, n + 1)
    widths = np.array([boundary(i, sigma=band.sigma, alpha=share, rho=rho) for i in range(1, n + 1)])
    outside = (means - widths > band.high) | (means + widths < band.low)
    power = _NORMAL.inv_cdf(DETECTION) * band.sigma / math.sqrt(n)
    return Standing(
        n=n,
        mean=float(means[-1]),
        width=float(widths[-1]),
        alarm=bool(outside.any()),
        smallest_shift=float(widths[-1]) + power,
        gross=gross,
    )


def _first_gross(x: np.ndarray, band: Band, alpha: float) -> int | None:
    for index, value in enumerate(x.tolist()):
        limit = case_limit(index + 1, sigma=band.sigma, alpha=alpha)
        if not band.low - limit <= value <= band.high + limit:
            return index
    return None

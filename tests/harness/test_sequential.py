"""The sequential test: honest about legal streams at every n, and able to see what it says it can."""

import math

import numpy as np
import pytest

from tessera_parity.budget import gamma
from tessera_parity.sequential import (
    RUN_FALSE_ALARMS,
    Band,
    alpha_per_stream,
    best_rho,
    boundary,
    case_limit,
    legal_band,
    stand,
    sub_gaussian_scale,
    variance_factor,
)
from tessera_shared.errors import ParityError

ALPHA = 0.05  # large, so that a simulation can see whether it is kept; runs use 1e-4 over hundreds of streams
BAND = Band(low=-0.02, high=0.03, sigma=0.1)


def streams(seed: int, mean: float, count: int, cases: int, sigma: float = 0.1) -> np.ndarray:
    return mean + sigma * np.random.default_rng(seed).standard_normal((count, cases))


@pytest.mark.parametrize("mean", [BAND.low, 0.0, BAND.high])
def test_a_legal_stream_alarms_rarely_however_often_one_looks(mean: float) -> None:
    alarms = sum(stand(row, BAND, alpha=ALPHA, planned=24).alarm for row in streams(1, mean, 400, 200))
    assert alarms / 400 <= ALPHA


def test_legal_streams_never_alarm_at_the_alpha_that_runs_use() -> None:
    alpha = alpha_per_stream(250)
    assert not any(stand(row, BAND, alpha=alpha, planned=24).alarm for row in streams(2, BAND.high, 500, 100))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_shift_of_25_percent_is_found_on_either_side(sign: float) -> None:
    alpha = alpha_per_stream(250)
    edge = BAND.high if sign > 0 else BAND.low
    rows = streams(3, edge + sign * math.log(1.25), 200, 28)
    standings = [stand(row, BAND, alpha=alpha, planned=28) for row in rows]
    assert standings[0].smallest_shift <= math.log(1.25)
    assert np.mean([one.alarm for one in standings]) >= 0.95


def test_the_smallest_shift_stated_is_seen_as_often_as_stated() -> None:
    alpha, cases = alpha_per_stream(250), 40
    shift = stand(streams(4, 0.0, 1, cases)[0], BAND, alpha=alpha, planned=cases).smallest_shift
    rows = streams(5, BAND.high + shift, 400, cases)
    assert np.mean([stand(row, BAND, alpha=alpha, planned=cases).alarm for row in rows]) >= 0.93
    rows = streams(6, BAND.high + 0.4 * shift, 400, cases)
    assert np.mean([stand(row, BAND, alpha=alpha, planned=cases).alarm for row in rows]) <= 0.5


def test_the_boundary_narrows_with_cases_and_widens_with_streams() -> None:
    widths = [boundary(n, sigma=1.0, alpha=1e-7, rho=best_rho(24, 1e-7)) for n in (1, 4, 24, 240)]
    assert widths == sorted(widths, reverse=True)
    assert boundary(24, sigma=1.0, alpha=1e-8, rho=1.0) > boundary(24, sigma=1.0, alpha=1e-7, rho=1.0)
    assert abs(alpha_per_stream(200) * 200 - RUN_FALSE_ALARMS) <= gamma(2) * RUN_FALSE_ALARMS


@pytest.mark.parametrize("value", [5.0, -5.0, math.inf, -math.inf, math.nan])
def test_one_gross_case_is_seen_at_once(value: float) -> None:
    standing = stand([0.0, 0.01, value], BAND, alpha=alpha_per_stream(250), planned=24)
    assert standing.gross == 2


def test_a_case_within_its_limit_is_not_gross() -> None:
    limit = case_limit(1, sigma=BAND.sigma, alpha=alpha_per_stream(250) * 0.25)
    assert stand([BAND.high + 0.99 * limit], BAND, alpha=alpha_per_stream(250), planned=24).gross is None


def test_heavy_tails_and_few_cases_make_the_scale_larger() -> None:
    rng = np.random.default_rng(7)
    normal, heavy = rng.standard_normal(400), rng.standard_t(3, 400)
    assert sub_gaussian_scale(heavy) / heavy.std() > sub_gaussian_scale(normal) / normal.std()
    assert variance_factor(20, alpha=1e-7) > variance_factor(200, alpha=1e-7) > 1.0
    with pytest.raises(ParityError, match="at least 3"):
        sub_gaussian_scale([1.0, 2.0])


def test_the_upper_scale_covers_the_true_one() -> None:
    rows = np.random.default_rng(8).standard_normal((300, 60))
    estimates = [sub_gaussian_scale(row) * variance_factor(59, alpha=0.05) for row in rows]
    assert np.mean(np.array(estimates) >= 1.0) >= 0.95


def test_the_band_covers_every_variant_and_reaches_past_them() -> None:
    band = legal_band([0.1, 0.2, 0.4], [100, 100, 100], sigma=0.1, alpha=1e-7)
    assert band.low < 0.1 - 0.15  # range / (k - 1)
    assert band.high > 0.4 + 0.15
    doubled = legal_band([0.1, 0.2, 0.4, 0.4], [100] * 4, sigma=0.1, alpha=1e-7)
    assert doubled.high >= band.high  # a switch that changes nothing does not narrow it


def test_an_empty_stream_says_nothing() -> None:
    standing = stand([], BAND, alpha=1e-7, planned=24)
    assert (standing.n, standing.alarm, standing.smallest_shift) == (0, False, math.inf)

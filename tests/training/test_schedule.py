"""Learning-rate schedules: their shape, their ends, and what they refuse."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera_parity.budget import gamma
from tessera_shared.errors import SpecError
from tessera_shared.schedule import KINDS, Schedule, learning_rate


@st.composite
def schedules(draw: Any) -> Schedule:
    kind = draw(st.sampled_from(KINDS))
    total = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, total - 1))
    peak = draw(st.floats(1e-6, 1.0))
    return Schedule(
        kind=kind,
        peak=peak,
        total_steps=total,
        warmup_steps=warmup,
        final=peak * draw(st.floats(0.0, 1.0)),
        decay_steps=draw(st.integers(1, total - warmup)) if kind == "wsd" else 0,
    )


@given(schedule=schedules())
def test_the_rate_rises_to_the_peak_and_never_rises_again(schedule: Schedule) -> None:
    rates = [learning_rate(schedule, step) for step in range(schedule.total_steps + 2)]
    before, after = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert rates[0] > 0.0
    assert all(low < high for low, high in itertools.pairwise(before))
    assert all(rate < schedule.peak for rate in before)
    assert abs(after[0] - schedule.peak) <= gamma(3) * schedule.peak  # peak - final, times 1, + final
    assert all(high >= low for high, low in itertools.pairwise(after))


@given(schedule=schedules())
def test_the_rate_ends_at_the_final_one_and_stays_there(schedule: Schedule) -> None:
    end = schedule.peak if schedule.kind == "constant" else schedule.final
    assert learning_rate(schedule, schedule.total_steps) == end
    assert learning_rate(schedule, schedule.total_steps + 1000) == end


def test_known_values_half_way() -> None:
    cosine = Schedule(kind="cosine", peak=1.0, total_steps=110, warmup_steps=10, final=0.5)
    assert learning_rate(cosine, 60) == 0.75
    assert abs(learning_rate(cosine, 35) - (0.75 + 0.25 * math.sqrt(0.5))) <= gamma(8)  # eight roundings of numbers < 1
    assert learning_rate(cosine, 4) == 5 / 11
    assert learning_rate(replace(cosine, kind="linear"), 35) == 0.875
    wsd = replace(cosine, kind="wsd", decay_steps=40)
    assert [learning_rate(wsd, step) for step in (10, 69, 70, 80)] == [1.0, 1.0, 1.0, 0.75]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "step"},
        {"peak": 0.0},
        {"peak": float("nan")},
        {"peak": float("inf")},
        {"final": -1.0},
        {"final": 2.0},
        {"total_steps": 0},
        {"warmup_steps": 10},
        {"warmup_steps": -1},
        {"decay_steps": 3},
        {"kind": "wsd"},
        {"kind": "wsd", "decay_steps": 11},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"^schedule\..*expected.*because") as caught:
        Schedule(**{"kind": "cosine", "peak": 1.0, "total_steps": 10} | wrong)
    assert "\n" not in str(caught.value)


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(SpecError, match="step = -1"):
        learning_rate(Schedule(peak=1.0, total_steps=10), -1)

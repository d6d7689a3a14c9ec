"""Learning rate as a written formula of an explicit step, in float64; both halves receive the number."""

import math
from dataclasses import dataclass

from tessera_shared.errors import SpecError

KINDS = ("constant", "cosine", "linear", "wsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A learning-rate schedule. `learning_rate` has the formulas."""

    kind: str = "cosine"  # constant | cosine | linear | wsd (warm-up, stable, decay)
    peak: float  # learning rate after warm-up
    total_steps: int  # updates of the whole run, warm-up included; from here on the rate is `final`
    warmup_steps: int = 0  # updates below the peak at the start
    final: float = 0.0  # learning rate at step total_steps (constant: not used)
    decay_steps: int = 0  # wsd only: length of the decay that ends at total_steps

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(
                f"schedule.kind = {self.kind!r}: expected one of {', '.join(KINDS)}, because each is a written "
                "formula; try 'cosine'"
            )
        if not (math.isfinite(self.peak) and self.peak > 0.0):
            raise SpecError(
                f"schedule.peak = {self.peak}: expected a finite rate > 0, because it scales every update; try 1e-3"
            )
        if not 0.0 <= self.final <= self.peak:
            raise SpecError(
                f"schedule.final = {self.final}: expected 0 to peak = {self.peak}, because the rate decays; try 0.0"
            )
        if self.total_steps < 1:
            raise SpecError(
                f"schedule.total_steps = {self.total_steps}: expected >= 1, because a run has a step; try 100"
            )
        if not 0 <= self.warmup_steps < self.total_steps:
            raise SpecError(
                f"schedule.warmup_steps = {self.warmup_steps}: expected 0 to total_steps - 1 = {self.total_steps - 1}, "
                "because the peak must be reached; try 0"
            )
        stable = self.total_steps - self.warmup_steps
        if self.kind == "wsd" and not 1 <= self.decay_steps <= stable:
            raise SpecError(
                f"schedule.decay_steps = {self.decay_steps}: expected 1 to total_steps - warmup_steps = {stable}, "
                f"because wsd decays after warm-up; try {max(1, self.total_steps // 5)}"
            )
        if self.kind != "wsd" and self.decay_steps:
            raise SpecError(
                f"schedule.decay_steps = {self.decay_steps}: expected 0 with kind {self.kind!r}, because only wsd has "
                "a separate decay; try kind='wsd'"
            )


def learning_rate(schedule: Schedule, step: int) -> float:
    """Return the rate of the update `step`, counted from 0 = the first update.

    Warm-up (step < warmup_steps): peak * (step + 1) / (warmup_steps + 1), so rate(0) > 0 and rate(warmup_steps) = peak.
    Then, with x = (step - warmup_steps) / (total_steps - warmup_steps) and d = peak - final:
    constant: peak. cosine: final + d * (1 + cos(pi x)) / 2 (Loshchilov & Hutter, 1608.03983, one period).
    linear: final + d * (1 - x). wsd (MiniCPM, 2404.06395): peak until total_steps - decay_steps, then, as Haegele et al.
    (2405.18392, section 3) have it, final + d * (1 - sqrt(y)) with y = (step - total_steps + decay_steps) / decay_steps.
    At and after total_steps: final (constant: peak).
    """
    if step < 0:
        raise SpecError(f"step = {step}: expected >= 0, because updates are counted from 0; try 0")
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return schedule.peak
    if step >= schedule.total_steps:
        return schedule.final
    return schedule.final + (schedule.peak - schedule.final) * _remaining(schedule, step)


def _remaining(schedule: Schedule, step: int) -> float:
    """Return the share of the way from final to peak that is left, 1 at the peak."""
    done = (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
    if schedule.kind == "cosine":
        return (1.0 + math.cos(math.pi * done)) / 2.0
    if schedule.kind == "linear":
        return 1.0 - done
    decayed = max(0, step - schedule.total_steps + schedule.decay_steps) / schedule.decay_steps
    return 1.0 - math.sqrt(decayed)

"""From "something departs" to "this operation does": the localizer's questions in the order of what depends on what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.compare import Difference
from tessera_parity.halves import Half
from tessera_parity.localize import (
    STATE,
    SURPRISES,
    Culprit,
    localize_backward,
    localize_forward,
    record_taps,
)
from tessera_parity.localize_decode import localize_decode
from tessera_parity.mutants.battery import Observed, Probe, program_of
from tessera_parity.mutants.cases import battery_cases, prepared_logits
from tessera_parity.mutants.probes_model import decode_probes, forward_probes, gradient_probes, loss_probes
from tessera_parity.mutants.probes_ops import op_probes
from tessera_parity.mutants.probes_rounding import rounding_probes
from tessera_parity.mutants.probes_state import (
    optimizer_probes,
    randomness_probes,
    sampling_probes,
    training_probes,
)
from tessera_parity.repro_program import Program
from tessera_parity.repro_rounded import RoundedLogSoftmax, RoundedTap
from tessera_parity.subjects.context import Context

QUESTIONS: dict[str, tuple[str, ...]] = {
    "ops": ("forward", "ops"),
    "forward": ("forward",),
    "gradients": ("forward", "losses", "backward", "gradients"),
    "losses": ("losses",),
    "optimizer": ("optimizer",),
    "training": ("forward", "losses", "backward", "optimizer", "training"),
    "decode": ("forward", "cache", "sampling", "decode"),
    "sampling": ("sampling",),
    "randomness": ("randomness",),
    "rounding": ("rounding",),
}
"""What is asked, in order, when a subject departs: first everything that it is made of, itself last."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The culprit, the question that named it, and the model case it was found on, where there is one."""

    culprit: Culprit
    question: str
    case: ModelCase | None
    probe: Probe | None = None  # the one that departs by itself, where no model case does


class Bench:
    """The battery of one run: probes, the oracle's answers (made when first asked for), clean halves."""

    def __init__(self, context: Context) -> None:
        self.seed = context.seed
        self.oracle = context.numpy
        self.halves = context.halves
        self.cases = battery_cases(context.seed)
        self.probes = every_probe(context.seed)
        self._truths: dict[int, Observed] = {}
        self._taps: dict[int, Mapping[str, np.ndarray]] = {}
        self._clean: dict[tuple[int, str], tuple[str, Difference]] = {}

    def truth(self, probe: Probe) -> Observed:
        """Return the clean oracle's answer."""
        if id(probe) not in self._truths:
            self._truths[id(probe)] = probe.observe(self.oracle)
        return self._truths[id(probe)]

    def taps(self, index: int) -> Mapping[str, np.ndarray]:
        """Return the clean oracle's taps of a model case."""
        if index not in self._taps:
            self._taps[index] = record_taps(self.oracle, self.cases[index])
        return self._taps[index]

    def clean(self, probe: Probe, half: Half) -> tuple[str, Difference]:
        """Return what the clean half of this name looks like under a probe; observed once."""
        key = (id(probe), half.name)
        if key not in self._clean:
            self._clean[key] = probe.judge(probe.observe(half), self.truth(probe))
        return self._clean[key]

    def clean_results(self, half: Half) -> list[tuple[Probe, str, Difference]]:
        """Return every probe that this clean half has faced so far."""
        faced = [(probe, self._clean.get((id(probe), half.name))) for probe in self.probes]
        return [(probe, *result) for probe, result in faced if result is not None]

    def may_kill(self, probe: Probe, name: str) -> bool:
        """Does the clean half of this name (every clean half, for the oracle) pass this probe? If not, it proves
        nothing."""
        judged = [half for half in self.halves if half.name == name or name == self.oracle.name]
        return all(self.clean(probe, half)[1].value <= probe.limit for half in judged)

    def judge_of(self, half: Half) -> Half:
        """Return who judges a suspect: the oracle, or a clean half when the oracle is the suspect."""
        return self.halves[0] if half.name == "numpy" and self.halves else self.oracle


def every_probe(seed: int) -> list[Probe]:
    """Return the whole battery, cheapest and most basic first."""
    makers = (
        op_probes, forward_probes, loss_probes, optimizer_probes, sampling_probes, randomness_probes, gradient_probes,
        training_probes, decode_probes, rounding_probes,
    )  # fmt: skip
    return [probe for make in makers for probe in make(seed)]


def diagnose(bench: Bench, half: Half, seen: Probe) -> Finding | None:
    """Name the operation at fault in `half`, given the first probe that saw it."""
    for question in QUESTIONS[seen.subject]:
        finding = _ask(bench, half, question, seen)
        if finding is not None:
            return finding
    return None


def _ask(bench: Bench, half: Half, question: str, seen: Probe) -> Finding | None:
    if question not in ("forward", "backward", "cache"):
        return _by_function(bench, half, question, seen)
    for index, case in enumerate(bench.cases):
        culprit = _by_taps(bench, half, question, case, index)
        if culprit is not None:
            return Finding(culprit=culprit, question=question, case=case)
    return None


def _by_taps(bench: Bench, half: Half, question: str, case: ModelCase, index: int | None) -> Culprit | None:
    """Ask the tapped localizers, with the oracle as truth; when the oracle itself moved, with a half as truth."""
    truth = bench.judge_of(half)
    if question == "forward":
        known = bench.taps(index) if index is not None and truth is bench.oracle else None
        return localize_forward(truth, half, case, truth=known)
    if question == "backward":
        return None if half.name == "numpy" else localize_backward(bench.oracle, half, None, case)
    return localize_decode(truth, half, case)


def _by_function(bench: Bench, half: Half, subject: str, seen: Probe) -> Finding | None:
    """Name the first function of a subject that departs on its own; the subject's own first departure where it is
    alone."""
    for probe in bench.probes:
        if probe.subject != subject or not bench.may_kill(probe, half.name):
            continue
        truth = bench.truth(probe) if half.name != "numpy" else probe.observe(bench.judge_of(half))
        name, difference = probe.judge(probe.observe(half), truth)
        if difference.value > probe.limit:
            culprit = Culprit(
                half=half.name, op=probe.name_of(name), position=f"{name}{difference.position}",
                observed=difference.value, limit=probe.limit, direction=STATE, detail=f"{seen.subject} departed first",
            )  # fmt: skip
            return Finding(culprit=culprit, question=subject, case=None, probe=probe)
    return None


def still_fails(bench: Bench, half: Half, finding: Finding) -> Callable[[ModelCase], bool]:
    """Return the question for the shrinker: does the same operation still depart, in the same direction?"""

    def fails(case: ModelCase) -> bool:
        try:
            culprit = _by_taps(bench, half, finding.question, case, None)
        except SURPRISES:  # a broken half may also break on a cut case; that is another failure
            return False
        return culprit is not None and culprit.op == finding.culprit.op

    return fails


def program_of_finding(bench: Bench, finding: Finding) -> Program | None:
    """Return what departed as a program: the probe's own, or the one rounding that was named."""
    if finding.question == "rounding":
        if finding.culprit.op == "log_softmax":
            student_BTV, _, _ = prepared_logits(bench.seed)
            return RoundedLogSoftmax(oracle=bench.oracle, logits_BTV=student_BTV.astype(np.float32).astype(np.float64))
        return RoundedTap(oracle=bench.oracle, case=battery_cases(bench.seed)[1], op=finding.culprit.op)
    return None if finding.probe is None else program_of(bench.oracle, finding.probe)

"""Programs of one rounding: how many numbers of an operation round otherwise than the policy says.

The operation is fed the oracle's own rounded values, so nothing is inherited; what comes out must be the oracle's to
the bit, but for the few numbers whose float32 error straddles a boundary of bfloat16 (`mutants.battery.judge_rounding`
derives how many). Only what is beyond that allowance is counted, so a legal half answers zero.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase
from tessera_parity.halves import Half
from tessera_parity.localize import SURPRISES, record_taps, split_tap
from tessera_parity.repro_model import case_lines
from tessera_parity.repro_op import fewer
from tessera_parity.repro_source import Source, module_of
from tessera_parity.repro_state import smaller_cases
from tessera_parity.shrink import leaps
from tessera_shared.numerics import BFLOAT16, UNIT_ROUNDOFF

ROUNDINGS = 40
"""Roundings in float32 behind one number, as the battery has it."""

_WIDE = {"attention.scores": BFLOAT16.softmax, "logits": BFLOAT16.logits}

_COUNT = [
    "",
    "",
    "def beyond(values, truths, share, gap):",
    '    """Numbers that round otherwise, beyond what float32 errors at a boundary explain (a Poisson count)."""',
    "    loose = sum(int((np.abs(a - b) > gap * np.abs(b).max()).sum()) for a, b in zip(values, truths, strict=True))",
    "    expected = share * sum(truth.size for truth in truths)",
    "    return np.asarray(max(0.0, loose - (expected + 6.0 * expected**0.5 + 6.0)))",
    "",
    "",
]


def _allowance(dtype: str) -> str:
    """Return the share of numbers that may differ, and from which relative gap on a number counts, as source."""
    noise = 2.0 * budget.gamma(ROUNDINGS, "float32")
    return f"{noise / UNIT_ROUNDOFF['bfloat16']!r}, {0.0 if dtype == 'bfloat16' else noise!r}"


@dataclass(frozen=True, kw_only=True)
class RoundedTap:
    """One operation of a model under the bfloat16 policy."""

    oracle: Half
    case: ModelCase
    op: str  # tap class: "attention.norm"

    @property
    def about(self) -> str:
        """See `Program`."""
        return f"rounding of {self.op} in bfloat16"

    @property
    def limit(self) -> float:
        """See `Program`: what is counted is already beyond the allowance."""
        return budget.EXACT

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`."""
        return self.case.spec.num_layers, int(self.case.token_ids_BT.size)

    def floor(self, truth: Mapping[str, np.ndarray]) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, "model.transformer"), "forward")
        source.needs("tessera_shared.numerics", "BFLOAT16")
        values = record_taps(self.oracle, self.case, numerics=BFLOAT16)
        names = [name for name in values if split_tap(name)[1] == self.op]
        rows = [f"    {name!r}: {source.of(value, f'tap {name}')}," for name, value in values.items()]
        return [
            *case_lines(self.case, source),
            "VALUES = {  # the oracle's, rounded where the policy casts: every operation starts from these",
            *rows,
            "}",
            "seen = {}",
            *_COUNT,
            "def tap(name, value):",
            "    seen[name] = plain(value)",
            "    return cast(array(VALUES[name]), value.dtype)",
            "",
            "",
            "forward(",
            "    {name: cast(value, BFLOAT16.param) for name, value in params.items()}, token_ids_BT, spec=SPEC,",
            "    numerics=BFLOAT16, positions_BT=positions_BT, segments_BT=segments_BT, tap=tap,",
            ")",
            f"NAMES = {names!r}",
            f"SHARE, GAP = {_allowance(_WIDE.get(self.op, BFLOAT16.compute))}",
            "result = beyond([seen[name] for name in NAMES], [VALUES[name] for name in NAMES], SHARE, GAP)",
        ]

    def smaller(self) -> "Iterator[tuple[str, RoundedTap]]":
        """Cut the case; one that no longer has this operation, or that the oracle refuses, is left out."""
        widest_first = reversed(list(leaps(self.case)))  # the smallest have too few numbers to round otherwise
        for what, case in (*widest_first, *smaller_cases(self.case, leaping=False)):
            try:
                taps = record_taps(self.oracle, case, numerics=BFLOAT16)
            except SURPRISES:
                continue
            if any(split_tap(name)[1] == self.op for name in taps):
                yield what, replace(self, case=case)


@dataclass(frozen=True, kw_only=True)
class RoundedLogSoftmax:
    """The loss dtype: log-softmax of logits that the policy stores."""

    oracle: Half
    logits_BTV: np.ndarray  # values of the logits dtype

    @property
    def about(self) -> str:
        """See `Program`."""
        return "rounding of log_softmax in the loss dtype"

    @property
    def limit(self) -> float:
        """See `Program`."""
        return budget.EXACT

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`."""
        return None, int(np.prod(self.logits_BTV.shape[:2]))

    def floor(self, truth: Mapping[str, np.ndarray]) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, "distil.losses"), "log_softmax")
        source.needs("tessera_shared.numerics", "BFLOAT16")
        module = self.oracle.module("distil.losses")
        truth = self.oracle.numpy(module.log_softmax(self.oracle.array(self.logits_BTV), numerics=BFLOAT16))
        return [
            f"logits_BTV = cast(array({source.of(self.logits_BTV, 'logits')}), BFLOAT16.logits)",
            f"truth_BTV = {source.of(truth, 'truth')}",
            *_COUNT,
            f"SHARE, GAP = {_allowance(BFLOAT16.loss)}",
            "values_BTV = plain(log_softmax(logits_BTV, numerics=BFLOAT16))",
            "result = beyond([values_BTV], [truth_BTV], SHARE, GAP)",
        ]

    def smaller(self) -> "Iterator[tuple[str, RoundedLogSoftmax]]":
        """See `Program`."""
        for axis, size in enumerate(self.logits_BTV.shape):
            for kept in fewer(size):
                part = (slice(None),) * axis + (slice(kept),)
                yield f"axis {axis} {size} -> {kept}", replace(self, logits_BTV=self.logits_BTV[part])

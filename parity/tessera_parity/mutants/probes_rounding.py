"""Probes of question 2, one operation at a time: does each cast stand where the policy puts it?

Every tap of a half under the bfloat16 policy is fed the oracle's rounded values, so what differs is that operation's
own rounding. A precision bug is invisible in float64 and nearly so in whole models; here it changes a tenth of the
elements or more.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.halves import Half
from tessera_parity.loading import load_half
from tessera_parity.localize import record_taps, split_tap
from tessera_parity.mutants.battery import Observed, Probe
from tessera_parity.mutants.cases import battery_cases, prepared_logits
from tessera_shared.numerics import BFLOAT16

_WIDE = {"attention.scores": BFLOAT16.softmax, "logits": BFLOAT16.logits}


def rounding_probes(seed: int) -> Iterator[Probe]:
    """Yield the model that has every feature, its elements pooled by operation over layers, and the loss dtype."""
    yield Probe(subject="rounding", op="rounding", observe=_taps(battery_cases(seed)[1]), rounding=True)
    yield Probe(subject="rounding", op="log_softmax", observe=_loss_dtype(seed), rounding=True)


def _taps(case: ModelCase) -> Callable[[Half], Observed]:
    kept: dict[str, np.ndarray] = {}

    def observe(half: Half) -> Observed:
        if not kept:
            kept.update(record_taps(load_half("numpy"), case, numerics=BFLOAT16))
        pooled: dict[str, list[np.ndarray]] = {}
        for name, value in record_taps(half, case, numerics=BFLOAT16, replace=kept).items():
            op = split_tap(name)[1]
            pooled.setdefault(f"{_WIDE.get(op, BFLOAT16.compute)}|{op}", []).append(value.ravel())
        return {name: np.concatenate(parts) for name, parts in pooled.items()}

    return observe


def _loss_dtype(seed: int) -> Callable[[Half], Observed]:
    student_BTV, _, _ = prepared_logits(seed)
    logits_BTV = student_BTV.astype(np.float32).astype(np.float64)

    def observe(half: Half) -> Observed:
        logits = half.array(logits_BTV, BFLOAT16.logits)
        losses = half.module("distil.losses").log_softmax(logits, numerics=BFLOAT16)
        return {f"{BFLOAT16.loss}|log_softmax": half.numpy(losses)}

    return observe

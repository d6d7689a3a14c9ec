"""Repro of one rounding stream of a report: as few of its cases as already leave the legal band.

A pooled statistic has no worst number, and bands hold for the pool's own shapes, so nothing inside a case can be cut;
what is cut is the number of cases, and every other stream. The test may be looked at after every case (`sequential`),
so the first case at which it alarms is as good a proof as the last. The file asks this module for the cases; the
float64 side is computed beside the half in the same file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.calibration.store import load_entry
from tessera_parity.halves import Half
from tessera_parity.loading import load_half
from tessera_parity.localize import STATE, Culprit
from tessera_parity.repro_files import Point, write_file
from tessera_parity.repro_source import Source
from tessera_parity.resync import FUSED
from tessera_parity.rounding_cases import POOLS
from tessera_parity.rounding_measure import (
    LOSSES,
    Tally,
    add_losses,
    add_model,
    gradient_truth,
    prepare,
    prepare_losses,
)
from tessera_parity.sequential import SHARE_CASE, alpha_per_stream, case_limit, stand
from tessera_parity.variants import Variant, usual
from tessera_shared.errors import ParityError
from tessera_shared.numerics import numerics_for

JIT = "jit"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One tensor class of one pool, in one dtype, of one half run one way."""

    pool: str
    tensor: str  # "attention.norm", "grad mlp.up", "loss forward_kl"
    dtype: str
    variant: str  # usual variant of the half, or "jit"
    seed: int

    @property
    def name(self) -> str:
        """As `rounding` calls it."""
        return f"{self.pool}/{self.tensor}"


def observe_case(half: Half, stream: Stream, index: int) -> Tally:
    """Return what a half shows on one case of a stream's pool: log error ratios, exact numbers, faults."""
    tally, numerics = Tally(half.name, stream.dtype), numerics_for(stream.dtype)
    variant = _variant(half.name, stream.variant)
    oracle, truth = load_half("numpy"), gradient_truth(half)
    if stream.pool == LOSSES:
        losses = prepare_losses(oracle, truth, numerics, seed=stream.seed, index=index)
        add_losses(tally, half, variant, losses, numerics)
        return tally
    differentiated = truth if stream.tensor.startswith("grad ") or not stream.tensor else None
    add_model(
        tally, half, variant, prepare(oracle, differentiated, stream.pool, numerics, seed=stream.seed, index=index),
        numerics,
    )  # fmt: skip
    return tally


def mean_log_ratio(half: Half, stream: Stream, indices: Sequence[int]) -> float:
    """Return the mean over cases of log(error of the half / error of an ideal one)."""
    values = [value for index in indices for value in observe_case(half, stream, index).values[stream.name]]
    return float(np.mean(values)) if values else float("nan")


def count_faults(half: Half, stream: Stream, index: int) -> int:
    """Return how many exact operations, masks and dtypes of one case are not what the policy says."""
    return len(observe_case(half, stream, index).faults)


def write_stream_repro(
    half: Half, case: Mapping[str, Any], tensor: str, out: Path, *, name: str, most: int, num_streams: int
) -> tuple[list[Path], int]:
    """Write the file of one pooled check; return it and how many cases it needs.

    Raises `ParityError` where no band is there to judge by, or nothing leaves it any more.
    """
    stream = Stream(
        pool=case["pool"], tensor=tensor, dtype=case["dtype"], variant=case["variant"], seed=int(case["seed"])
    )
    entry = load_entry(half.name, stream.dtype, device=half.device)
    variant, alpha = _variant(half.name, stream.variant), alpha_per_stream(max(1, num_streams))
    band = None if entry is None else entry.band(stream.name, variant.family, alpha=alpha)
    if band is None:
        raise ParityError(
            f"repro of {name}: expected a band for {stream.name}, because rounding is judged by one; try parity calibrate"
        )
    values: list[float] = []
    half_width = 0.5 * (band.high - band.low)
    for index in range(most):
        values += observe_case(half, stream, index).values[stream.name]
        standing = stand(values, band, alpha=alpha, planned=most)
        if standing.gross is not None:
            indices = [standing.gross]
            limit = half_width + case_limit(standing.gross + 1, sigma=band.sigma, alpha=alpha * SHARE_CASE)
            return [_write(half, stream, indices, values[standing.gross], band.middle, limit, out, name)], 1
        if standing.alarm:
            indices, limit = list(range(index + 1)), half_width + standing.width
            return [_write(half, stream, indices, standing.mean, band.middle, limit, out, name)], index + 1
    raise ParityError(
        f"repro of {name}: expected {stream.name} outside its legal band within {most} cases, because a repro must show "
        "a divergence; try the version and machine that wrote the report"
    )


def write_fault_repro(
    half: Half, dtype: str, seed: int, out: Path, *, name: str, most: int, variant: str | None = None
) -> list[Path]:
    """Write the file of an exact operation, a mask or a dtype that is not the policy's: the first case that has one.

    Raises `ParityError` where none has.
    """
    for index in range(most):
        for pool in POOLS:
            stream = Stream(pool=pool, tensor="", dtype=dtype, variant=variant or usual(half.name).name, seed=seed)
            faults = observe_case(half, stream, index).faults
            if faults:
                call = f"count_faults(HALF, STREAM, {index})"
                point = Point(
                    what=f"faults in {dtype}, such as {faults[0]}"[:200], pick="result", half_value=float(len(faults)),
                    oracle_value=0.0, scale=1.0, limit=0.0,
                )  # fmt: skip
                return [_file(half, stream, "count_faults", call, point, out, name)]
    raise ParityError(
        f"repro of {name}: expected a fault within {most} cases, because a repro must show a divergence; try the version "
        "and machine that wrote the report"
    )


def _write(
    half: Half, stream: Stream, indices: list[int], mean: float, middle: float, limit: float, out: Path, name: str
) -> Path:
    point = Point(
        what=f"mean log error ratio of {stream.tensor} in {stream.dtype} over {len(indices)} cases", pick="result",
        half_value=mean, oracle_value=middle, scale=1.0, limit=limit,
    )  # fmt: skip
    call = f"mean_log_ratio(HALF, STREAM, {indices!r})"
    return _file(half, stream, "mean_log_ratio", call, point, out, name)


def _file(half: Half, stream: Stream, function: str, call: str, point: Point, out: Path, name: str) -> Path:
    source = Source()
    source.needs("tessera_parity.repro_pooled", function)
    source.needs("tessera_parity.loading", "load_half")
    lines = [
        f"HALF = load_half({half.name!r}, device={half.device!r})",
        f"STREAM = {source.of(stream)}",
        f"result = {call}",
    ]
    culprit = Culprit(
        half=half.name, op=f"rounding of {stream.tensor or 'exact operations'} in {stream.dtype}",
        observed=point.half_value, limit=point.limit, direction=STATE,
    )  # fmt: skip
    return write_file(out, name, half.name, source, lines, point, culprit)


def _variant(half: str, name: str) -> Variant:
    if name == JIT:
        return Variant(name=JIT, half=half, about="jax.jit as users call it", mode=FUSED)
    return usual(half)

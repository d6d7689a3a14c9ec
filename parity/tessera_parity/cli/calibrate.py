"""`parity calibrate`: measure what legal implementations do on this machine, and store it beside the others."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tessera_parity.calibration.store import (
    DATA,
    Entry,
    VariantStats,
    device_kind,
    framework_version,
    load_entry,
    machine,
    quantiles_of,
    save_entry,
    stats_of,
)
from tessera_parity.cli.flags import check_device
from tessera_parity.loading import require
from tessera_parity.rounding_cases import ALL_POOLS, POOLS, SHAPES
from tessera_parity.store import check_writable
from tessera_parity.variants import FAITHFUL, Variant, run_apart, variants_of
from tessera_shared.errors import ParityError

HALVES, DTYPES = ("torch", "jax"), ("float32", "bfloat16")

Values = dict[str, dict[str, list[float]]]


def calibrate(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default both")] = None,
    half: Annotated[str | None, typer.Option(help="torch or jax; default both")] = None,
    cases: Annotated[int, typer.Option(help="generated cases per variant", min=30)] = 150,
    seed: Annotated[int, typer.Option(min=0, help="of the calibration's cases, apart from every run's")] = 20_000_000,
    compiled: Annotated[bool, typer.Option(help="also torch.compile: needs a C++ compiler and minutes")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="leave a variant out, by name")] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help=f"add these to the stored entries: {', '.join(ALL_POOLS)}; default: anew")
    ] = None,
    jobs: Annotated[int, typer.Option(help="variants at once; on a GPU they share it", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="directory of the entries")] = DATA,
) -> None:
    """Measure every legal variant and write one entry per half and dtype. A few minutes on one core."""
    halves, dtypes = _chosen(half, HALVES, "half"), _chosen(dtype, DTYPES, "dtype")
    pools = tuple(dict.fromkeys(name for given in pool or () for name in _chosen(given, tuple(ALL_POOLS), "pool")))
    check_device(device)
    for name in halves:
        require(name)
    check_writable(out, option="--out")
    for name in halves:
        base = {one: load_entry(name, one, device=device, directory=out) for one in dtypes}
        for entry in base.values():
            if pools and entry is None:
                raise ParityError(
                    f"pool = {', '.join(pools)}: expected a stored entry of {name} to add to, because a pool of one "
                    f"shape is no calibration; try parity calibrate --device {device} --half {name} first"
                )
        variants = [one for one in variants_of(name, device=device, compiled=compiled) if one.name not in (skip or [])]
        if pools and set(pools) <= set(SHAPES):  # runs judge these as the half is usually run: no band for fusing
            variants = [one for one in variants if one.family == FAITHFUL]
        how = _How(dtypes, pools or tuple(POOLS), cases, seed, device, jobs)
        _calibrate_half(how, variants, dict.fromkeys(skip or [], "asked for"), out, base)


def _chosen(value: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    if value is None:
        return tuple(known)
    if value not in known:
        raise ParityError(
            f"{what} = {value!r}: expected one of {', '.join(known)}, because only these round; try {known[0]!r}"
        )
    return (value,)


@dataclass(frozen=True)
class _How:
    """What is measured of every variant."""

    dtypes: tuple[str, ...]
    pools: tuple[str, ...]
    cases: int
    seed: int
    device: str
    jobs: int

    def measured(self, variant: Variant) -> tuple[Values | ParityError, float]:
        """Return a variant's values, or why there are none, and the seconds that it took."""
        start = time.perf_counter()
        try:
            values: Values | ParityError = run_apart(
                variant, dtypes=self.dtypes, cases=self.cases, seed=self.seed, device=self.device, pools=self.pools,
                cores=max(1, (os.cpu_count() or 1) // self.jobs),
            )  # fmt: skip
        except ParityError as error:
            values = error
        return values, time.perf_counter() - start


def _calibrate_half(
    how: _How, variants: Sequence[Variant], left_out: dict[str, str], out: Path, base: Mapping[str, Entry | None]
) -> None:
    console, half = Console(), variants[0].half
    measured: dict[str, tuple[Variant, Values]] = {}
    with ThreadPoolExecutor(min(how.jobs, len(variants))) as pool:  # each thread waits for a process
        for number, (variant, (values, seconds)) in enumerate(
            zip(variants, pool.map(how.measured, variants), strict=True)
        ):
            if isinstance(values, ParityError):
                if number == 0:  # runs are made of this one: without it there is nothing to calibrate
                    raise values
                left_out[variant.name] = str(values)
                console.print(f"left out: {values}", markup=False, soft_wrap=True)
                continue
            measured[variant.name] = (variant, values)
            console.print(
                f"{half} {number + 1}/{len(variants)} {variant.name}: {variant.about}, {how.cases} cases, {seconds:.0f} s"
            )
    for dtype in how.dtypes:
        entry = replace(entry_of(half, dtype, how.device, how.seed, measured), left_out=left_out)
        stored = base.get(dtype)
        if stored is not None:
            shapes = tuple(stored.pools) if set(how.pools) >= set(POOLS) else how.pools
            entry = (
                entry.with_pools(stored, shapes) if set(how.pools) >= set(POOLS) else stored.with_pools(entry, shapes)
            )
        console.print(f"wrote {save_entry(entry, out).name}: {_widest(entry)}", soft_wrap=True)


def entry_of(half: str, dtype: str, device: str, seed: int, measured: dict[str, tuple[Variant, Values]]) -> Entry:
    """Summarize measured variants as an entry; the first is the one that runs are made of."""
    first = next(iter(measured.values()))[1][dtype]
    return Entry(
        half=half,
        dtype=dtype,
        device=device_kind(device),
        framework=framework_version(half),
        machine=machine(),
        date=datetime.now(UTC).date().isoformat(),
        seed=seed,
        variants={
            name: VariantStats(
                family=variant.family,
                about=variant.about,
                streams={stream: stats_of(cases) for stream, cases in values[dtype].items()},
            )
            for name, (variant, values) in measured.items()
        },
        quantiles={stream: quantiles_of(cases) for stream, cases in first.items()},
    )


def _widest(entry: Entry) -> str:
    """Say where the variants differ most: what this calibration can tell apart least."""
    spread = {}
    for stream in entry.streams("faithful"):
        means = [one.streams[stream].mean for one in entry.variants.values() if stream in one.streams]
        spread[stream] = max(means) - min(means)
    worst = max(spread, key=lambda stream: spread[stream])
    return f"{len(spread)} streams, widest legal range {math.exp(spread[worst]):.3g}-fold in {worst}"

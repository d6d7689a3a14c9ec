"""`parity calibrate`: measure what legal implementations do on this machine, and store it beside the others."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
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
    machine,
    quantiles_of,
    save_entry,
    stats_of,
)
from tessera_parity.cli.flags import check_device
from tessera_parity.loading import require
from tessera_parity.store import check_writable
from tessera_parity.variants import Variant, run_apart, variants_of
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
    out: Annotated[Path, typer.Option(help="directory of the entries")] = DATA,
) -> None:
    """Measure every legal variant and write one entry per half and dtype. A few minutes on one core."""
    console = Console()
    halves, dtypes = _chosen(half, HALVES, "half"), _chosen(dtype, DTYPES, "dtype")
    check_device(device)
    for name in halves:
        require(name)
    check_writable(out, option="--out")
    for name in halves:
        _calibrate_half(console, name, device, dtypes, cases, seed, compiled, skip or [], out)


def _chosen(value: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    if value is None:
        return tuple(known)
    if value not in known:
        raise ParityError(
            f"{what} = {value!r}: expected one of {', '.join(known)}, because only these round; try {known[0]!r}"
        )
    return (value,)


def _calibrate_half(
    console: Console,
    half: str,
    device: str,
    dtypes: Sequence[str],
    cases: int,
    seed: int,
    compiled: bool,
    skip: Sequence[str],
    out: Path,
) -> None:
    variants = [one for one in variants_of(half, device=device, compiled=compiled) if one.name not in skip]
    measured: dict[str, tuple[Variant, Values]] = {}
    left_out = dict.fromkeys(skip, "asked for")
    for number, variant in enumerate(variants):
        start = time.perf_counter()
        try:
            measured[variant.name] = (
                variant,
                run_apart(variant, dtypes=dtypes, cases=cases, seed=seed, device=device),
            )
        except ParityError as error:
            if number == 0:  # runs are made of this one: without it there is nothing to calibrate
                raise
            left_out[variant.name] = str(error)
            console.print(f"left out: {error}", markup=False, soft_wrap=True)
            continue
        seconds = time.perf_counter() - start
        console.print(
            f"{half} {number + 1}/{len(variants)} {variant.name}: {variant.about}, {cases} cases, {seconds:.0f} s"
        )
    for dtype in dtypes:
        entry = replace(entry_of(half, dtype, device, seed, measured), left_out=left_out)
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

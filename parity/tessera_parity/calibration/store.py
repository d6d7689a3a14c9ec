"""What legal implementations do, as measured: one JSON file per device kind, half, framework version and dtype.

A file holds, for every variant (eager, other thread counts, reduction orders, instruction sets, compilers) and every
stream, mean, deviation, sub-Gaussian scale and number of cases; and the machine, versions, date and cases that they
came from. Bands are computed from this when a run judges, because they depend on how many streams share the run's
false-alarm probability.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.budget import LAMBDA
from tessera_parity.rounding_cases import ALL_POOLS, CASES_VERSION, held_wide
from tessera_parity.sequential import SHARE_BAND, Band, legal_band, sub_gaussian_scale, variance_factor
from tessera_shared.atomic import replace_file
from tessera_shared.errors import FormatError
from tessera_shared.numerics import UNIT_ROUNDOFF, numerics_for

FORMAT_VERSION = 1
DATA = Path(__file__).parent / "data"
QUANTILES = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One stream of one variant."""

    mean: float
    deviation: float
    scale: float  # sub-Gaussian, as measured
    cases: int


@dataclass(frozen=True, kw_only=True)
class VariantStats:
    """One legal way of computing, measured."""

    family: str  # faithful | fused
    about: str
    streams: dict[str, Stats]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Everything known about one half, dtype, device kind and framework version."""

    half: str
    dtype: str
    device: str  # device kind: cpu, nvidia-h200
    framework: str  # major.minor
    machine: dict[str, str]
    date: str
    seed: int
    variants: dict[str, VariantStats]
    quantiles: dict[str, list[float]] = field(default_factory=dict)  # of the first variant, for the QQ plot
    left_out: dict[str, str] = field(default_factory=dict)  # variants that this machine could not run, and why
    pools: dict[str, dict[str, str]] = field(default_factory=dict)  # measured later than the rest: where and when
    cases_version: int = CASES_VERSION
    format_version: int = FORMAT_VERSION

    def streams(self, family: str) -> list[str]:
        """Return the streams that a family has a band for."""
        return sorted({name for one in self.variants.values() if one.family == family for name in one.streams})

    def with_pools(self, later: "Entry", pools: Sequence[str]) -> "Entry":
        """Return this entry with the streams of `pools` as `later` measured them; all else stays, the same pools of
        variants that `later` did not measure included.
        """

        def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
            kept = {stream: value for stream, value in old.items() if stream.partition("/")[0] not in pools}
            return kept | {stream: value for stream, value in new.items() if stream.partition("/")[0] in pools}

        variants = dict(self.variants)
        for name, one in later.variants.items():
            old = self.variants[name].streams if name in self.variants else {}
            variants[name] = replace(one, streams=joined(old, one.streams))
        source = {"date": later.date, "cpu": later.machine.get("cpu", "")}
        return replace(
            self, variants=variants, quantiles=joined(self.quantiles, later.quantiles),
            pools=self.pools | dict.fromkeys(pools, source),
        )  # fmt: skip

    def band(self, stream: str, family: str, *, alpha: float) -> Band | None:
        """Return a stream's legal band at the stream's share `alpha` of false alarms, or None where nothing was
        measured.

        Half of SHARE_BAND pays for the estimated means, half for the estimated scales, Bonferroni over variants.
        """
        stats = [
            one.streams[stream] for one in self.variants.values() if one.family == family and stream in one.streams
        ]
        if not stats:
            return None
        share = 0.5 * alpha * SHARE_BAND
        sigma = max(one.scale * variance_factor(one.cases - 1, alpha=share / len(stats)) for one in stats)
        floor = rounding_floor(stream, self.dtype)
        return legal_band(
            [one.mean for one in stats],
            [one.cases for one in stats],
            sigma=max(sigma, floor),
            alpha=share,
            floor=floor,
        )


def rounding_floor(stream: str, dtype: str) -> float:
    """Return by how much any legal accumulation may move a log error ratio: lambda sqrt(n) u_up / u_compute.

    Where a sum of n terms is accumulated one precision above the dtype that it is then rounded to, its order decides
    nothing but an error of at most about lambda sqrt(n) u_up before that rounding (Higham & Mary 2019), next to
    u_compute after it. Zero for values that stay in the wider dtype, where the order of summation *is* the error and
    only calibration knows it.
    """
    numerics = numerics_for(dtype)
    spec = ALL_POOLS.get(stream.partition("/")[0])
    if spec is None or numerics.softmax == numerics.compute or held_wide(stream):
        return 0.0
    longest = max(spec.ffn_width, spec.width, spec.vocab_size)
    return LAMBDA * math.sqrt(longest) * UNIT_ROUNDOFF[numerics.softmax] / UNIT_ROUNDOFF[numerics.compute]


def stats_of(values: Sequence[float]) -> Stats:
    """Summarize one stream's calibration cases. A value that is not finite is no legal variant's: FormatError."""
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        raise FormatError(
            f"calibration value = {x[~np.isfinite(x)][0]}: expected finite log ratios, because a legal variant has an "
            "error; try parity run to see what departs"
        )
    return Stats(
        mean=float(x.mean()), deviation=float(x.std(ddof=1)), scale=sub_gaussian_scale(values), cases=len(values)
    )


def quantiles_of(values: Sequence[float]) -> list[float]:
    """Return evenly spaced quantiles, extremes included."""
    return [float(value) for value in np.quantile(np.asarray(values), np.linspace(0.0, 1.0, QUANTILES))]


def framework_version(half: str) -> str:
    """Return the installed framework's major.minor: reductions change with it."""
    return ".".join(version(half).split("+")[0].split(".")[:2])


def device_kind(device: str) -> str:
    """Return what a device is, in words fit for a file name: `cpu`, `nvidia-h200`."""
    if device == "cpu":
        return "cpu"
    if find_spec("torch") is not None:
        import torch

        name = torch.cuda.get_device_name(torch.device(device))
    else:
        import jax

        name = jax.devices("gpu")[0].device_kind
    return "-".join(name.lower().split()[:2])


def machine() -> dict[str, str]:
    """Return the processor and what it can do, as far as sums depend on it."""
    model, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
        table = {key.strip(): value.strip() for key, value in lines.items()}
        model = table.get("model name", model)
        wanted = ("fma", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
        present = table.get("flags", table.get("Features", "")).split()
        flags = " ".join(flag for flag in wanted if flag in present)
    return {"cpu": model, "flags": flags, "architecture": platform.machine()}


def path_of(half: str, dtype: str, device: str, framework: str, directory: Path = DATA) -> Path:
    """Return where an entry lives."""
    return directory / f"{device}-{half}-{framework}-{dtype}.json"


def load_entry(half: str, dtype: str, *, device: str = "cpu", directory: Path = DATA) -> Entry | None:
    """Return the entry for the installed framework and this device kind, or None: uncalibrated.

    An entry of other generated cases (`cases_version`) is none either. FormatError when the file cannot be read as an
    entry.
    """
    path = path_of(half, dtype, device_kind(device), framework_version(half), directory)
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entry = _entry(data)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"calibration = {path.name}: expected an entry of format {FORMAT_VERSION}, because bands are computed from "
            f"it ({error}); try parity calibrate"
        ) from error
    return entry if entry.cases_version == CASES_VERSION else None


def save_entry(entry: Entry, directory: Path = DATA) -> Path:
    """Write an entry, whole or not at all, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = path_of(entry.half, entry.dtype, entry.device, entry.framework, directory)
    text = json.dumps(_rounded(asdict(entry)), indent=None, separators=(",", ":"), sort_keys=True)
    replace_file(path, text.replace('"about"', '\n"about"').encode() + b"\n")
    return path


def _entry(data: Mapping[str, Any]) -> Entry:
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version {data['format_version']}")
    variants = {
        name: VariantStats(
            family=one["family"],
            about=one["about"],
            streams={stream: Stats(**stats) for stream, stats in one["streams"].items()},
        )
        for name, one in data["variants"].items()
    }
    return Entry(**{**data, "variants": variants})


def _rounded(value: Any) -> Any:
    """Keep nine significant digits: far below any sampling error, and a diff that people can read."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value

"""What every `bench_<op>.py` here measures with: interleaved samples, CUDA graphs, cold L2, ceilings of the same run.

A bench has one function `rows() -> list[Row]`. `run_all.py` calls it in a process of its own. On a CPU (`run_all.py
--dry`) the same code runs on tiny shapes in Triton's interpreter: `choose(full, tiny)` gives the tiny ones.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, TypeVar

import torch

Function = Callable[[], object]
T = TypeVar("T")

FLUSH_BYTES = 256 * 2**20
"""Written between cold samples: twice what any cache of a lent GPU holds."""

WARM_SAMPLE_MS = 0.5
"""A warm sample repeats a function until it takes about this long."""

PEER_ERRORS = (
    ImportError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, NotImplementedError,
    OSError,
)  # fmt: skip
"""What a peer that does not work here may raise; it is then left out, with a line."""

DATASHEET = {"h200": {"bf16": 989.0, "fp8": 1979.0}, "h100": {"bf16": 989.0, "fp8": 1979.0}}
"""Dense tensor-core TFLOP/s that shares "of 989" and "of 1,979" mean."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call over all samples."""

    median_ms: float
    p20: float
    p80: float
    samples: int
    graph: bool = True  # False: launched from the host each time, launch gaps included


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape of one op: our time, the peers', what the work is and what must hold.

    `must`: a peer's name -> least (peer's time / ours), "share" -> least share of `limit`. `at_most`: a name ->
    (value seen, most that is allowed), for memory, passes and errors. `notes` stand in the report as they are.
    """

    op: str
    shape: str  # "fwd B2 N16 S4096 H128 causal bfloat16"
    ours: Timing
    peers: Mapping[str, Timing] = field(default_factory=dict)
    flops: float = 0.0  # useful floating-point operations of one call
    bytes_moved: float = 0.0  # least bytes: every input read once, every output written once
    limit: str = (
        "copy"  # copy (GB/s) | cublas | scaled_mm (TFLOP/s of this run) | bf16 | fp8 (TFLOP/s of the datasheet)
    )
    must: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: str = ""

    def rate(self) -> float:
        """Return GB/s under the limit `copy`, else TFLOP/s."""
        return (
            self.bytes_moved / self.ours.median_ms / 1e6
            if self.limit == "copy"
            else self.flops / self.ours.median_ms / 1e9
        )

    def share(self, limits: Mapping[str, float]) -> float | None:
        """Return which part of the limit is reached, or None where this machine has no such limit."""
        return self.rate() / limits[self.limit] if self.limit in limits else None

    def ratio(self, peer: str) -> float | None:
        """Return the peer's time over ours: above 1 we are faster. None where the peer did not run."""
        return self.peers[peer].median_ms / self.ours.median_ms if peer in self.peers else None

    def verdicts(self, limits: Mapping[str, float]) -> list[tuple[str, bool | None]]:
        """Return (what must hold with what was seen, whether it does; None = could not be judged)."""
        found: list[tuple[str, bool | None]] = []
        for name, least in self.must.items():
            seen = self.share(limits) if name == "share" else self.ratio(name)
            what = f"share of {self.limit}" if name == "share" else f"x {name}"
            text = f"{what} {'not measured' if seen is None else f'{seen:.3g}'} >= {least:g}"
            found.append((text, None if seen is None or is_dry() else seen >= least))
        for name, (seen_value, most) in self.at_most.items():
            found.append((f"{name} {seen_value:.3g} <= {most:g}", None if is_dry() else seen_value <= most))
        return found

    def to_json(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """Return plain types, derived numbers included."""
        derived = {
            "rate": self.rate(),
            "share": self.share(limits),
            "ratios": {name: self.ratio(name) for name in self.peers},
            "verdicts": self.verdicts(limits),
        }
        return asdict(self) | derived


def is_dry() -> bool:
    """Is this a dry run on the CPU?"""
    return os.environ.get("TESSERA_BENCH_DRY") == "1"


def device() -> str:
    """Return where tensors go."""
    return "cpu" if is_dry() else "cuda"


def choose(full: T, tiny: T) -> T:
    """Return `tiny` in a dry run, else `full`."""
    return tiny if is_dry() else full


def say(line: str) -> None:
    """Print a line about what was left out, beside the table."""
    print(f"  {line}", file=sys.stderr, flush=True)


def available(peers: Mapping[str, Callable[[], Function]]) -> dict[str, Function]:
    """Return the peers whose maker works here; a maker imports the peer, binds its inputs and returns what to time."""
    found = {}
    for name, make in peers.items():
        try:
            found[name] = make()
        except PEER_ERRORS as error:
            say(f"left out: {name} ({_line(error)})")
    return found


def measure(
    functions: Mapping[str, Function], *, cold: bool = False, samples: int = 30, graph: bool = True
) -> dict[str, Timing]:
    """Time functions against each other: sample by sample in turn, each from a CUDA graph where it can be captured.

    `cold` empties the L2 cache before every sample and times one call; otherwise a sample repeats the call. "ours" must
    work; another that raises is left out with a line.
    """
    if is_dry():
        return {name: timing for name, f in functions.items() if (timing := _dry(name, f)) is not None}
    replays: dict[str, tuple[Function, int, bool]] = {}
    for name, function in functions.items():
        ready = _ready(name, function, cold=cold, graph=graph)
        if ready is not None:
            replays[name] = ready
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda") if cold else None
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    names = list(replays)
    for sample in range(samples):
        for name in names[sample % len(names) :] + names[: sample % len(names)]:
            events[name].append(_sample(replays[name][0], flush))
    torch.cuda.synchronize()
    result = {}
    for name, (_, repeats, captured) in replays.items():
        times = sorted(start.elapsed_time(end) / repeats for start, end in events[name])
        result[name] = _timing(times, captured)
    return result


def _sample(replay: Function, flush: torch.Tensor | None) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.fill_(1)
    start.record()
    replay()
    end.record()
    return start, end


def _ready(name: str, function: Function, *, cold: bool, graph: bool) -> tuple[Function, int, bool] | None:
    """Warm up, see how long a call takes, capture; return (what to replay, calls in it, whether it is a graph)."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        clock = time.perf_counter()
        function()
        torch.cuda.synchronize()
        estimate_ms = (time.perf_counter() - clock) * 1e3
    except PEER_ERRORS as error:
        if name == "ours":
            raise
        say(f"left out: {name} ({_line(error)})")
        return None
    repeats = 1 if cold else max(1, min(100, round(WARM_SAMPLE_MS / max(estimate_ms, 1e-3))))
    captured = _captured(name, function, repeats) if graph else None
    if captured is not None:
        return captured, repeats, True

    def eager() -> None:
        for _ in range(repeats):
            function()

    return eager, repeats, False


def _captured(name: str, function: Function, repeats: int) -> Function | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                function()
    except RuntimeError as error:
        torch.cuda.synchronize()
        say(f"{name} cannot be captured in a graph, timed with its launches ({_line(error)})")
        return None
    graph.replay()
    return graph.replay


def _dry(name: str, function: Function) -> Timing | None:
    times = []
    try:
        for _ in range(2):
            clock = time.perf_counter()
            function()
            times.append((time.perf_counter() - clock) * 1e3)
    except PEER_ERRORS as error:
        if name == "ours":
            raise
        say(f"left out: {name} ({_line(error)})")
        return None
    return _timing(sorted(times), False)


def _timing(times: list[float], graph: bool) -> Timing:
    last = len(times) - 1
    return Timing(
        median_ms=median(times), p20=times[round(0.2 * last)], p80=times[round(0.8 * last)], samples=len(times),
        graph=graph,
    )  # fmt: skip


def peak_memory(function: Function) -> int:
    """Return the bytes that one call allocates at its peak beyond what was there before; 0 in a dry run."""
    if is_dry():
        function()
        return 0
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def ceilings() -> dict[str, float]:
    """Return this machine's limits in this run: `copy` in GB/s; `cublas`, `scaled_mm`, `bf16`, `fp8` in TFLOP/s.

    Copy counts bytes read plus written, over 4 GiB. The products are 8192^3 on random numbers; `bf16` and `fp8` are the
    datasheet's.
    """
    count = choose(2**30, 2**16)
    x = torch.randn(count, dtype=torch.bfloat16, device=device())
    y = torch.empty_like(x)
    # replayed from a graph, a copy is the copy engine's: 2,772 GB/s on an H200 where launched from the host it has 4,250
    ways = [measure({"ours": functools.partial(y.copy_, x)}, graph=graph)["ours"].median_ms for graph in (False, True)]
    limits = {"copy": 4 * count / min(ways) / 1e6}
    del x, y
    size = choose(8192, 64)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    timing = measure({"ours": lambda: a @ b})["ours"]
    limits["cublas"] = 2 * size**3 / timing.median_ms / 1e9
    if not is_dry():
        limits["scaled_mm"] = 2 * size**3 / _scaled_mm_ms(a, b) / 1e9
        limits |= next((known for name, known in DATASHEET.items() if name in gpu_name().lower()), {})
    return limits


def _scaled_mm_ms(a: torch.Tensor, b: torch.Tensor) -> float:
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    one = torch.ones((), device="cuda")
    product = functools.partial(
        torch._scaled_mm, left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return measure({"ours": product})["ours"].median_ms


def gpu_name() -> str:
    """Return the GPU's name, or that this is a dry run."""
    return "none (dry run)" if is_dry() else torch.cuda.get_device_name()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"

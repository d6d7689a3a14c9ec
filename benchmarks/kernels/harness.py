"""What every `bench_<op>.py` here measures with: interleaved samples, CUDA graphs, cold L2, ceilings of the same run.

A bench has one function `rows() -> Iterator[Row]`, which goes over its shapes through `turn`. `run_all.py` calls it in a
process of its own and keeps every row at once. Four environment variables change what happens here, all of them set by
`run_all.py` and `session.py`:

    TESSERA_BENCH_DRY=1        on a CPU, tiny shapes (`choose(full, tiny)`), Triton's interpreter, numbers mean nothing
    TESSERA_BENCH_WARM=2/7     compile only: the third of seven processes calls each function of its shapes once
    TESSERA_BENCH_UNTIL=1.7e9  no shape is begun after this time (seconds since the epoch)
    TESSERA_BENCH_WITHOUT=a,b  peers that are not tried, because they took a process down
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from statistics import median
from typing import Any, TypeVar

import torch
import triton

Function = Callable[[], object]
T = TypeVar("T")

FLUSH_BYTES = 256 * 2**20
"""Read between cold samples: more than twice what any cache of a lent GPU holds.

Read, not written: lines that a write leaves are written back while the next call runs, some 45 MB of them on an H200, which
would be billed to it.
"""

WARM_SAMPLE_MS = 0.5
"""A warm sample repeats a function until it takes about this long."""

MEASURE_SECONDS = 9.0
"""Functions that are measured together get fewer samples, though never below LEAST_SAMPLES, where all would take longer."""

LEAST_SAMPLES = 10

PEER_ERRORS = (
    ImportError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, NotImplementedError,
    OSError, triton.TritonError,
)  # fmt: skip
"""What a peer that does not work here may raise, compilers included; it is then left out, with a line."""

UNKNOWN = nan
"""The most that is allowed, where the peer that says it is not here."""

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

    `must`: a peer's name -> least (peer's time / ours), "share" -> least share of `limit`; a peer that is not here stands
    as not measured. `at_most`: a name -> (value seen, most that is allowed or UNKNOWN), for memory, passes and errors.
    `notes` stand in the report as they are.
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
            wanted = "not measured" if isnan(most) else f"{most:g}"
            met = None if is_dry() or isnan(most) else seen_value <= most
            found.append((f"{name} {seen_value:.3g} <= {wanted}", met))
        return found

    def to_json(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """Return plain types, derived numbers included."""
        derived = {
            "rate": self.rate(),
            "share": self.share(limits),
            "ratios": {name: self.ratio(name) for name in self.peers},
            "verdicts": self.verdicts(limits),
        }
        bounds = {name: [value, None if isnan(most) else most] for name, (value, most) in self.at_most.items()}
        return asdict(self) | derived | {"at_most": bounds}


def is_dry() -> bool:
    """Is this a dry run on the CPU?"""
    return os.environ.get("TESSERA_BENCH_DRY") == "1"


def is_warm_up() -> bool:
    """Does this process only compile?"""
    return bool(os.environ.get("TESSERA_BENCH_WARM"))


def turn(items: Iterable[T]) -> Iterator[T]:
    """Yield the shapes of a bench: in a warm-up this process's share, else all until the time is up, then say the rest."""
    share, _, processes = os.environ.get("TESSERA_BENCH_WARM", "0/1").partition("/")
    until = float(os.environ.get("TESSERA_BENCH_UNTIL", "inf"))
    left_out = []
    for index, item in enumerate(items):
        if index % int(processes) != int(share):
            continue
        if time.time() > until:
            left_out.append(item)
        else:
            yield item
    for item in left_out:
        say(f"{TIME_IS_UP} {item}")


TIME_IS_UP = "left out, time is up:"
TRYING = "trying:"
"""Said before a peer or we run for the first time, so that a crash has a name."""


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
    found: dict[str, Function] = {}
    without = os.environ.get("TESSERA_BENCH_WITHOUT", "").split(",")
    for name, make in peers.items():
        if name in without:
            say(f"left out: {name} (it took the process down before)")
            continue
        say(f"{TRYING} {name}")
        try:
            found[name] = make()
        except PEER_ERRORS as error:
            say(f"left out: {name} ({_line(error)})")
    return found


def measure(
    functions: Mapping[str, Function], *, cold: bool = False, samples: int = 30, graph: bool = True
) -> dict[str, Timing]:
    """Time functions against each other: sample by sample in turn, each from a CUDA graph where it can be captured.

    `cold` fills the L2 cache with other, clean lines before every sample and times one call; otherwise a sample repeats the
    call. "ours" must work; another that raises is left out with a line.
    """
    if is_warm_up():
        return {name: _called_once(name, function) for name, function in functions.items()}
    if is_dry():
        return {name: timing for name, f in functions.items() if (timing := _dry(name, f)) is not None}
    replays: dict[str, Replay] = {}
    for name, function in functions.items():
        ready = _ready(name, function, cold=cold, graph=graph)
        if ready is not None:
            replays[name] = ready
    flush = torch.ones(FLUSH_BYTES // 4, device="cuda") if cold else None
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    names = list(replays)
    for sample in range(_samples(samples, replays)):
        for name in names[sample % len(names) :] + names[: sample % len(names)]:
            events[name].append(_sample(replays[name].run, flush))
    torch.cuda.synchronize()
    result = {}
    for name, replay in replays.items():
        times = sorted(start.elapsed_time(end) / replay.calls for start, end in events[name])
        result[name] = _timing(times, replay.is_graph)
    return result


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a sample runs."""

    run: Function
    calls: int  # of the function in it
    is_graph: bool
    ms: float  # of one call, roughly


def _samples(wanted: int, replays: Mapping[str, Replay]) -> int:
    each_ms = sum(replay.ms * replay.calls for replay in replays.values())
    return max(min(wanted, LEAST_SAMPLES), min(wanted, int(MEASURE_SECONDS * 1e3 / max(each_ms, 1e-3))))


def _called_once(name: str, function: Function) -> Timing:
    """Compile what a function launches. A fault is told by the process that measures."""
    try:
        function()
        if not is_dry():
            torch.cuda.synchronize()
    except PEER_ERRORS as error:
        say(f"not warm: {name} ({_line(error)})")
    return Timing(median_ms=1.0, p20=1.0, p80=1.0, samples=0)


def _sample(replay: Function, flush: torch.Tensor | None) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.amax()
    start.record()
    replay()
    end.record()
    return start, end


def _ready(name: str, function: Function, *, cold: bool, graph: bool) -> Replay | None:
    """Warm up, see how long a call takes, capture."""
    say(f"{TRYING} {name}")
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
        return Replay(run=captured, calls=repeats, is_graph=True, ms=estimate_ms)

    def eager() -> None:
        for _ in range(repeats):
            function()

    return Replay(run=eager, calls=repeats, is_graph=False, ms=estimate_ms)


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
    """Return the bytes that one call allocates at its peak beyond what was there before; 0 in a dry run or a warm-up."""
    if is_warm_up():
        return 0
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


def best_of(name: str, timings: Mapping[str, Timing], wanted: Iterable[str]) -> dict[str, Timing]:
    """Return {name: the fastest of the wanted peers}; nothing unless all of them ran: a missing one might be faster."""
    names = list(wanted)
    if not names or not all(one in timings for one in names):
        return {}
    return {name: min((timings[one] for one in names), key=lambda timing: timing.median_ms)}


def gpu_name() -> str:
    """Return the GPU's name, or that this is a dry run."""
    return "none (dry run)" if is_dry() else torch.cuda.get_device_name()


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"

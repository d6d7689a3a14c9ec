"""Which configuration is fastest at which shape? Times every candidate of the memory-bound kernels and prints the best.

    python benchmarks/kernels/sweep_memory_bound.py [--only rms_norm,rope,swiglu,gate_up,adamw] [--seconds 400]

Its answer goes into each kernel's `choose_config` by hand, with the date, so that the choice stays a pure function.
A candidate that does not compile or fit is left out with a line. Best first; the current choice is marked with *.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOMS = ("shared", "kernels")
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / room) for room in ROOMS)]

from harness import PEER_ERRORS, ceilings, choose, device, measure  # noqa: E402

from tessera_kernels.triton import _gate_up, adamw, rms_norm, rope, swiglu  # noqa: E402

Candidate = tuple[Any, Callable[[], object]]
Sweep = tuple[str, float, Any, Sequence[Candidate]]  # shape, bytes or flops, current choice, candidates


def main() -> int:
    """Sweep what is asked for until the time is up; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=400.0, help="no new shape is begun after this")
    options = parser.parse_args()
    clock = time.perf_counter()
    limits = ceilings()
    print("limits:", {name: round(value) for name, value in limits.items()}, flush=True)
    for name, sweeps in SWEEPS.items():
        if options.only and name not in options.only.split(","):
            continue
        limit = "cublas" if name == "gate_up" else "copy"
        for shape, work, current, candidates in sweeps():
            if time.perf_counter() - clock > options.seconds:
                print(f"{name} {shape}: left out, time is up")
                continue
            _report(name, shape, work, current, candidates, limits[limit] * (1e9 if limit == "cublas" else 1e6))
    return 0


def _report(name: str, shape: str, work: float, current: Any, candidates: Sequence[Candidate], limit: float) -> None:
    times = []
    for config, function in candidates:
        try:
            timing = measure({"ours": function}, samples=choose(12, 2))["ours"]
        except PEER_ERRORS as error:
            print(
                f"    left out: {tuple(config)} {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True
            )
            continue
        times.append((timing.median_ms, config))
    print(f"{name} {shape}", flush=True)
    for rank, (ms, config) in enumerate(sorted(times)):
        if rank < 5 or tuple(config) == tuple(current):
            mark = "*" if tuple(config) == tuple(current) else " "
            print(f"  {mark} {ms * 1e3:9.1f} us {100 * work / ms / limit:5.1f} %  {tuple(config)}", flush=True)
    torch.cuda.empty_cache()


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16)


def _norm_sweeps() -> Iterator[Sweep]:
    shapes = ((16384, 4096), (4096, 16384), (32768, 2048), (16384, 8192), (65536, 1024), (262144, 128))
    for rows, width in choose(shapes, ((5, 64),)):
        x, dy, gain = _random(rows, width), _random(rows, width), _random(width)
        rstd = rms_norm._run_forward(x, None, gain, 1e-6, False, [])[2]
        chosen = rms_norm.choose_config(width, 2)
        heights = (1, 2, 4, 8, 16) if width <= 1024 else (1,)
        warps = tuple(w for w in (1, 2, 4, 8, 16, 32) if 128 <= max(width, 1024) // w <= 2048)
        forwards = [
            rms_norm.RowConfig(32768, *cut) for cut in product(heights, warps, (0, 2, 4), (1, 2, 3))
            if cut[2] or cut[3] == 1
        ]  # fmt: skip
        backwards = [rms_norm.RowConfig(16384, *cut) for cut in product(heights, warps, (1, 2, 3, 4, 6), (1, 2, 3, 4))]
        candidates = [(c, _norm_forward(x, gain, c)) for c in choose(forwards, forwards[:2])]
        yield f"forward {rows}x{width}", 4.0 * x.numel(), chosen.forward, candidates
        candidates = [(c, _norm_backward(dy, x, gain, rstd, c)) for c in choose(backwards, backwards[:2])]
        yield f"backward {rows}x{width}", 6.0 * x.numel(), chosen.backward, candidates


def _norm_forward(x: torch.Tensor, gain: torch.Tensor, cut: rms_norm.RowConfig) -> Callable[[], object]:
    return lambda: rms_norm._run_forward(x, None, gain, 1e-6, False, list(cut))


def _norm_backward(
    dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor, cut: rms_norm.RowConfig
) -> Callable[[], object]:
    return lambda: rms_norm._run_backward(dy, x, gain, rstd, None, False, list(cut))


def _rope_sweeps() -> Iterator[Sweep]:
    shapes = ((4, 4096, 32, 8, 128), (8, 2048, 32, 32, 64), (16, 4096, 8, 2, 128))
    for batch, positions, heads, kv_heads, width in choose(shapes, ((1, 3, 4, 2, 8),)):
        q, k = _random(batch, positions, heads, width), _random(batch, positions, kv_heads, width)
        cos, sin = _random(batch, positions, width), _random(batch, positions, width)
        cuts = [rope.RopeConfig(*cut) for cut in product((1, 2, 4), (4, 8, 16, 32), (2, 4, 8))]
        candidates = [(c, _rope(q, k, cos, sin, c)) for c in choose(cuts, cuts[:2])]
        moved = 4.0 * (q.numel() + k.numel() + cos.numel())
        yield f"N{heads} K{kv_heads} H{width}", moved, rope.choose_config(max(heads, kv_heads), width), candidates


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cut: rope.RopeConfig
) -> Callable[[], object]:
    return lambda: rope._turn_anew(q, k, cos, sin, False, list(cut))


def _swiglu_sweeps() -> Iterator[Sweep]:
    for rows, width in choose(((8192, 14336), (16384, 2816)), ((3, 40),)):
        gate, up, dact = (_random(rows, width) for _ in range(3))
        cuts = [
            swiglu.SwigluConfig(*cut) for cut in product((1024, 2048, 4096, 8192), (4, 8, 16)) if cut[0] >= cut[1] * 256
        ]
        current = swiglu.choose_config(gate.numel(), 2)
        candidates = [(c, _swiglu(gate, up, c)) for c in choose(cuts, cuts[:2])]
        yield f"forward {rows}x{width}", 6.0 * gate.numel(), current, candidates
        candidates = [(c, _swiglu_backward(dact, gate, up, c)) for c in choose(cuts, cuts[:2])]
        yield f"backward {rows}x{width}", 10.0 * gate.numel(), current, candidates


def _swiglu(gate: torch.Tensor, up: torch.Tensor, cut: swiglu.SwigluConfig) -> Callable[[], object]:
    return lambda: swiglu._run_forward(gate, up, list(cut))


def _swiglu_backward(
    dact: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, cut: swiglu.SwigluConfig
) -> Callable[[], object]:
    return lambda: swiglu._run_backward(dact, gate, up, list(cut))


def _gate_up_sweeps() -> Iterator[Sweep]:
    for rows, depth, width in choose(((8192, 4096, 14336), (16384, 2048, 8192), (64, 4096, 14336)), ((5, 16, 24),)):
        x, gate, up = _random(rows, depth), _random(width, depth), _random(width, depth)
        cuts = {
            *_gate_up.CONFIGS,
            *(_gate_up.GateUpConfig(128, 128, 64, 8, stages, group, persistent, 1)
              for stages, group, persistent in product((3, 4), (4, 8, 16, 32), (0, 1))),
        }  # fmt: skip
        candidates = [(c, _gate_up_call(x, gate, up, c)) for c in choose(sorted(cuts), sorted(cuts)[:1])]
        yield f"{rows}x{depth}x2*{width}", 4.0 * rows * depth * width, _gate_up.choose_config(rows, 2, True), candidates


def _gate_up_call(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, cut: _gate_up.GateUpConfig
) -> Callable[[], object]:
    return lambda: _gate_up.gate_up_forward(x, gate, up, False, list(cut))


def _adamw_sweeps() -> Iterator[Sweep]:
    count = choose(2**27, 300)
    state = [torch.randn(count, device=device()) for _ in range(3)] + [torch.rand(count, device=device())]
    cuts = [adamw.AdamWConfig(*cut) for cut in product((512, 1024, 2048), (4, 8), (0, 4, 8, 16))]
    candidates = [(c, _adamw(state, c)) for c in choose(cuts, cuts[:2])]
    yield f"{count} float32", 28.0 * count, adamw.choose_config(count), candidates


def _adamw(state: list[torch.Tensor], cut: adamw.AdamWConfig) -> Callable[[], object]:
    step, lr = torch.tensor(10, device=device()), torch.tensor(1e-4, device=device())
    return lambda: adamw.adamw_flat_(
        *state, step=step, lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, config=cut
    )


SWEEPS: dict[str, Callable[[], Iterator[Sweep]]] = {
    "rms_norm": _norm_sweeps,
    "rope": _rope_sweeps,
    "swiglu": _swiglu_sweeps,
    "gate_up": _gate_up_sweeps,
    "adamw": _adamw_sweeps,
}


if __name__ == "__main__":
    sys.exit(main())

"""Sweeps of the kernels that memory bounds, and of the gate-up product: see `sweeping.py`, which runs them.

Candidates are the configurations of `CONFIGS` and a small grid around them; one of the grid that wins goes into `CONFIGS`.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from harness import choose, device
from sweeping import Sweep

from tessera_kernels.triton import _gate_up, adamw, rms_norm, rope, swiglu


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16)


def _norm_sweeps() -> Iterator[Sweep]:
    shapes = ((16384, 4096), (4096, 16384), (32768, 2048), (16384, 8192), (65536, 1024), (262144, 128))
    for rows, width in choose(shapes, ((5, 64),)):
        x, dy, gain = _random(rows, width), _random(rows, width), _random(width)
        rstd = rms_norm.run_forward(x, None, gain, 1e-6, False, [])[2]
        chosen = rms_norm.choose_config(width, 2)
        forwards, backwards = _norm_forwards(chosen.forward, width), _norm_backwards(chosen.backward, 2 * width)
        few = choose(len(backwards) + len(forwards), 2)
        for part, current, cuts, bytes_each in (
            ("forward", chosen.forward, forwards, 4.0), ("backward", chosen.backward, backwards, 6.0),
        ):  # fmt: skip
            calls = {
                cut: _norm_forward(x, gain, cut) if part == "forward" else _norm_backward(dy, x, gain, rstd, cut)
                for cut in list(dict.fromkeys(cuts))[:few]
            }
            yield Sweep(
                part=part, key=f"width {width}", shape=f"{rows}x{width}", current=current, candidates=calls,
                work=bytes_each * x.numel(), limit="copy",
            )  # fmt: skip


def _norm_forwards(chosen: rms_norm.ForwardConfig, width: int) -> list[rms_norm.ForwardConfig]:
    heights = (1, 4, 16) if width <= 1024 else (1,)
    warps = {chosen.num_warps // 2, chosen.num_warps, 2 * chosen.num_warps} & {4, 8, 16, 32}
    return [chosen, *(rms_norm.ForwardConfig(32768, *cut) for cut in product(heights, sorted(warps)))]


def _norm_backwards(chosen: rms_norm.BackwardConfig, row_bytes: int) -> list[rms_norm.BackwardConfig]:
    """As many programs as make 16, 24 or 32 warps, of half as many, as many and twice as many warps as chosen."""
    usual = chosen.num_warps
    cuts = [(usual, most // usual, 3) for most in (16, 24, 32)] + [(usual, max(1, 16 // usual), 2)]
    cuts += [(2 * usual, most // (2 * usual), 3) for most in (16, 32)]
    if row_bytes <= 8192:
        cuts += [(usual, max(1, 16 // usual), 4), (usual // 2, 32 // usual, 3)]
    cuts = [cut for cut in cuts if 4 <= cut[0] <= 32 and cut[1] >= 1]
    return [chosen, *(chosen._replace(num_warps=w, programs_per_sm=p, stages=s) for w, p, s in cuts)]


def _norm_forward(x: torch.Tensor, gain: torch.Tensor, cut: rms_norm.ForwardConfig) -> Callable[[], object]:
    return lambda: rms_norm.run_forward(x, None, gain, 1e-6, False, list(cut))


def _norm_backward(
    dy: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, rstd: torch.Tensor, cut: rms_norm.BackwardConfig
) -> Callable[[], object]:
    return lambda: rms_norm.run_backward(dy, x, gain, rstd, None, False, list(cut))


def _rope_sweeps() -> Iterator[Sweep]:
    shapes = ((4, 4096, 32, 8, 128), (8, 2048, 32, 32, 64), (16, 4096, 8, 2, 128))
    for batch, positions, heads, kv_heads, width in choose(shapes, ((1, 3, 4, 2, 8),)):
        q, k = _random(batch, positions, heads, width), _random(batch, positions, kv_heads, width)
        cos, sin = _random(batch, positions, width), _random(batch, positions, width)
        chosen = rope.choose_config(max(heads, kv_heads), width)
        cuts = [chosen, *(rope.RopeConfig(*cut) for cut in product((1, 2, 4), (4, 8, 16, 32), (4, 8)))]
        yield Sweep(
            part="turn", key=f"{heads} heads of {width}", shape=f"N{heads} K{kv_heads} H{width}", current=chosen,
            candidates={cut: _rope(q, k, cos, sin, cut) for cut in list(dict.fromkeys(cuts))[: choose(99, 2)]},
            work=4.0 * (q.numel() + k.numel() + cos.numel()), limit="copy",
        )  # fmt: skip


def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cut: rope.RopeConfig
) -> Callable[[], object]:
    return lambda: rope._turn_anew(q, k, cos, sin, False, list(cut))


def _swiglu_sweeps() -> Iterator[Sweep]:
    for rows, width in choose(((8192, 14336), (16384, 2816)), ((3, 40),)):
        gate, up, dact = (_random(rows, width) for _ in range(3))
        chosen = swiglu.choose_config(gate.numel(), 2)
        grid = [
            swiglu.SwigluConfig(*cut) for cut in product((1024, 2048, 4096, 8192), (4, 8, 16)) if cut[0] >= cut[1] * 256
        ]
        cuts = list(dict.fromkeys([chosen, *grid]))[: choose(99, 2)]
        for part, bytes_each in (("forward", 6.0), ("backward", 10.0)):
            calls = {
                cut: _swiglu(gate, up, cut) if part == "forward" else _swiglu_backward(dact, gate, up, cut)
                for cut in cuts
            }
            yield Sweep(
                part=part, key="large", shape=f"{rows}x{width}", current=chosen, candidates=calls,
                work=bytes_each * gate.numel(), limit="copy",
            )  # fmt: skip


def _swiglu(gate: torch.Tensor, up: torch.Tensor, cut: swiglu.SwigluConfig) -> Callable[[], object]:
    return lambda: swiglu._run_forward(gate, up, list(cut))


def _swiglu_backward(
    dact: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, cut: swiglu.SwigluConfig
) -> Callable[[], object]:
    return lambda: swiglu._run_backward(dact, gate, up, list(cut))


def _gate_up_sweeps() -> Iterator[Sweep]:
    for rows, depth, width in choose(((8192, 4096, 14336), (16384, 2048, 8192), (64, 4096, 14336)), ((5, 16, 24),)):
        x, both = _random(rows, depth), _random(2 * width, depth)
        gate, up = both[:width], both[width:]
        chosen = _gate_up.choose_config(rows, 2, choose(True, False))
        grid = [
            _gate_up.GateUpConfig(128, 128, 64, 8, stages, group, persistent, 1)
            for stages, group, persistent in product((3, 4), (4, 8, 16), (0, 1))
        ]
        cuts = list(dict.fromkeys([chosen, *_gate_up.CONFIGS, *grid]))[: choose(99, 1)]
        yield Sweep(
            part="product", key="up to 64 rows" if rows <= 64 else "more rows", shape=f"{rows}x{depth}x2*{width}",
            current=chosen, candidates={cut: _gate_up_call(x, gate, up, cut) for cut in cuts},
            beside={"plain GEMM": _plain(x, both)}, work=4.0 * rows * depth * width, limit="cublas",
        )  # fmt: skip


def _plain(x: torch.Tensor, both: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, both)


def _gate_up_call(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, cut: _gate_up.GateUpConfig
) -> Callable[[], object]:
    return lambda: _gate_up.gate_up_forward(x, gate, up, False, list(cut))


def _adamw_sweeps() -> Iterator[Sweep]:
    count = choose(2**27, 300)
    state = [torch.randn(count, device=device()) for _ in range(3)] + [torch.rand(count, device=device())]
    chosen = adamw.choose_config(count)
    cuts = [chosen, *(adamw.AdamWConfig(*cut) for cut in product((512, 1024, 2048), (4, 8), (0, 8, 16)))]
    yield Sweep(
        part="update", key="large", shape=f"{count} float32", current=chosen,
        candidates={cut: _adamw(state, cut) for cut in list(dict.fromkeys(cuts))[: choose(99, 2)]}, work=28.0 * count,
        limit="copy",
    )  # fmt: skip


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

"""RMSNorm in CUDA C++ beside our Triton kernel, Liger, torch and torch.compile.

    python benchmarks/kernels/run_all.py --only cuda_rms_norm            the table
    python benchmarks/kernels/bench_cuda_rms_norm.py                     every configuration: error, ms, GB/s

Shapes, work and the other peers are those of `bench_rms_norm`.
"""

from collections.abc import Iterator
from functools import partial

import bench_rms_norm as theirs
import torch
from harness import Function, Row, available, best_of, choose, device, measure, turn
from torch import Tensor

from tessera_kernels.cuda import rms_norm as ours
from tessera_shared.errors import KernelError

EPS = theirs.EPS


def rows() -> Iterator[Row]:
    for x_rows, width in turn(choose(theirs.SHAPES, ((5, 64),))):
        x, residual, dy, dtotal = _tensors(x_rows, width)
        gain = torch.randn(width, device=device(), dtype=torch.bfloat16)
        parts = (
            theirs._forward(x, gain),
            theirs._backward(x, gain, dy),
            theirs._add_forward(x, residual, gain),
            theirs._add_backward(x, gain, dy, dtotal),
        )
        functions = _functions(x, residual, gain, dy, dtotal, None)
        for (name, bytes_each, must, triton, makers), function in zip(parts, functions, strict=True):
            times = measure({"ours": function, "our triton": triton, **available(makers)})
            peers = {peer: timing for peer, timing in times.items() if peer != "ours"}
            peers |= best_of("liger best", times, [peer for peer in makers if peer in theirs.LIGER_BACKWARDS])
            yield Row(
                op="cuda_rms_norm", shape=f"{name} {x_rows}x{width} bfloat16", ours=times["ours"], peers=peers,
                bytes_moved=float(bytes_each * x.numel()), must={"our triton": 1.0} | must,
            )  # fmt: skip


def _tensors(x_rows: int, width: int) -> list[Tensor]:
    return [torch.randn(x_rows, width, device=device(), dtype=torch.bfloat16) for _ in range(4)]


def _functions(
    x: Tensor, residual: Tensor, gain: Tensor, dy: Tensor, dtotal: Tensor, config: ours.NormConfig | None
) -> tuple[Function, ...]:
    """Return forward, backward, and both after a residual add; in the configuration that the op chooses when it is None."""
    forward, backward = (list(part) for part in config or ((), ()))
    rstd = ours.run_forward(x, None, gain, EPS, False, forward)[2]
    return (
        partial(ours.run_forward, x, None, gain, EPS, False, forward),
        partial(ours.run_backward, dy, x, gain, rstd, None, False, backward),
        partial(ours.run_forward, x, residual, gain, EPS, False, forward),
        partial(ours.run_backward, dy, x, gain, rstd, dtotal, False, backward),
    )


def sweep() -> None:
    """Print every configuration at every shape: largest error against the chosen one, milliseconds, GB/s."""
    for x_rows, width in choose(theirs.SHAPES, ((5, 64),)):
        tensors = _tensors(x_rows, width)
        gain = torch.randn(width, device=device(), dtype=torch.bfloat16)
        x, residual, dy, dtotal = tensors
        wanted = [run()[0].float() for run in _functions(x, residual, gain, dy, dtotal, None)]
        print(f"\n{x_rows}x{width} bfloat16", flush=True)
        for config in ours.CONFIGS:
            told = []
            functions = _functions(x, residual, gain, dy, dtotal, config)
            for run, y, bytes_each in zip(functions, wanted, (4, 6, 8, 8), strict=True):
                try:
                    error = float((run()[0].float() - y).abs().max())
                except KernelError:
                    told.append("refused")
                    continue
                ms = measure({"ours": run})["ours"].median_ms
                told.append(f"{ms:.4f} ms {bytes_each * x.numel() / ms / 1e6:,.0f} GB/s ({error:.2g})")
            print(f"  {tuple(map(tuple, config))}: " + ", ".join(told), flush=True)


if __name__ == "__main__":
    sweep()

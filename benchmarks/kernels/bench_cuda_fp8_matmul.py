"""The E4M3 product in CUDA C++ with fast accumulation beside our Triton kernel and torch._scaled_mm.

    python benchmarks/kernels/run_all.py --only cuda_fp8_matmul        the table
    python benchmarks/kernels/sweeping.py cuda_fp8_matmul              depths of the ring

Shapes and musts are those of `bench_fp8_matmul`.
"""

from collections.abc import Iterator
from functools import partial

import bench_fp8_matmul as theirs
import harness
from harness import Row
from sweeping import Sweep

from tessera_kernels.cuda.fp8_matmul import CONFIGS, SCALINGS, fp8_matmul
from tessera_kernels.triton import fp8_matmul as triton


def rows() -> Iterator[Row]:
    """Yield one row for each large shape and scaling, those first at which the Triton kernel falls shortest."""
    shapes = harness.choose((theirs.SHAPES[1], theirs.SHAPES[0], theirs.SHAPES[2]), ((70, 96, 256),))
    for shape, scaling in harness.turn((shape, scaling) for shape in shapes for scaling in reversed(SCALINGS)):
        given = theirs.operands(*shape, scaling)
        functions = {
            "ours": partial(fp8_matmul, *given, scaling=scaling),
            "our triton": partial(triton.fp8_matmul, *given, scaling=scaling, accumulation="fast"),
        }
        timed = harness.measure(functions | harness.available(theirs.peers(given, scaling, "fast")))
        count, outputs, width = shape
        yield Row(
            op="cuda_fp8_matmul",
            shape=f"{scaling} fast X{count} F{outputs} D{width}",
            ours=timed["ours"],
            peers={peer: time for peer, time in timed.items() if peer != "ours"},
            flops=2.0 * count * outputs * width,
            limit="fp8",
            must={"our triton": 1.0, "_scaled_mm": 0.95, "share": 0.62},
        )


def sweeps() -> Iterator[Sweep]:
    """Yield the depths of the ring with scales by row, the library beside them."""
    for shape in harness.choose(theirs.SHAPES[:2], ((70, 96, 256),)):
        given = theirs.operands(*shape, "row")
        count, outputs, width = shape
        yield Sweep(
            part="row fast",
            key=f"{width} inputs",
            shape=f"X{count} F{outputs} D{width}",
            current=CONFIGS[0],
            candidates={config: partial(fp8_matmul, *given, scaling="row", config=config) for config in CONFIGS},
            beside=harness.available({"_scaled_mm": theirs.peers(given, "row", "fast")["_scaled_mm"]}),
            work=2.0 * count * outputs * width,
            limit="fp8",
        )

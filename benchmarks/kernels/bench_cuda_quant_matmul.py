"""Products with 8- and 4-bit weights in CUDA C++ beside our Triton kernel and cuBLAS.

    python benchmarks/kernels/run_all.py --only cuda_quant_matmul        the table
    python benchmarks/kernels/sweeping.py cuda_quant_matmul              every configuration

Shapes, formats, musts and the cold L2 cache are those of `bench_quant_matmul`.
"""

from collections.abc import Iterator
from functools import partial

import bench_quant_matmul as theirs
import harness
import torch
from harness import Row
from sweeping import Sweep

from tessera_kernels.cuda.quant_matmul import CONFIGS, choose_config, is_faster, quant_matmul
from tessera_kernels.triton import quant_matmul as triton

COUNTS = (256, 16, 1, 128, 512, 8, 1024, 2048, 4096)
"""Rows of x, those first at which the Triton kernel falls shortest."""

SMALL = (4096, 4096)
"""A shape of smaller models, held against the Triton kernel alone."""


def rows() -> Iterator[Row]:
    """Yield one row for each shape, format and number of rows."""
    shapes = harness.choose((*theirs.SHAPES, SMALL), ((96, 256),))
    for (outputs, width), name in harness.turn((shape, name) for shape in shapes for name in theirs.FORMATS):
        weight_FD = theirs.random_weight(outputs, width)
        packed = theirs.FORMATS[name](weight_FD)
        counts = COUNTS if (outputs, width) == theirs.SHAPES[0] else (1, 16, 128)
        for count in harness.choose(counts, (3,)):
            x = theirs.random_rows(count, width)
            timed = harness.measure(
                {
                    "ours": partial(quant_matmul, x, packed),
                    "our triton": partial(triton.quant_matmul, x, packed),
                    "cuBLAS bf16": partial(torch.nn.functional.linear, x, weight_FD),
                },
                cold=True,
            )
            is_few = count <= theirs.FEW[-1]
            yield Row(
                op="cuda_quant_matmul",
                shape=f"{name} rows {count} F{outputs} D{width}",
                ours=timed["ours"],
                peers={peer: time for peer, time in timed.items() if peer != "ours"},
                flops=2.0 * count * outputs * width,
                bytes_moved=packed.num_bytes + 2.0 * count * (width + outputs),
                limit="copy" if is_few else "cublas",
                must=({"our triton": 1.0} if is_faster(count, outputs) else {})
                | ({} if (outputs, width) == SMALL else theirs.MUST[packed.bits][0 if is_few else 1]),
                notes=f"cold L2; {tuple(choose_config(count, outputs, width))}",
            )


def sweeps() -> Iterator[Sweep]:
    """Yield two formats at the numbers of rows that a must is missed at, cuBLAS in bfloat16 beside them."""
    outputs, width = harness.choose(theirs.SHAPES[0], (96, 256))
    weight_FD = theirs.random_weight(outputs, width)
    for name in ("W8A16 g128", "W4A16 g128"):
        packed = theirs.FORMATS[name](weight_FD)
        for count in harness.choose(COUNTS[:6], (3,)):
            x, is_few = theirs.random_rows(count, width), count <= theirs.FEW[-1]
            suited = [config for config in CONFIGS if config.is_few == is_few]
            yield Sweep(
                part=name,
                key=f"{count} rows",
                shape=f"rows {count} F{outputs} D{width}",
                current=choose_config(count, outputs, width),
                candidates={config: partial(quant_matmul, x, packed, config=config) for config in suited},
                beside={"cuBLAS bf16": partial(torch.nn.functional.linear, x, weight_FD)},
                work=packed.num_bytes + 2.0 * count * (width + outputs),
                limit="copy",
                cold=True,
            )

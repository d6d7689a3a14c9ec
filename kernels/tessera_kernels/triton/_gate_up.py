"""Gate-up GEMM with SwiGLU in its epilogue: act = silu(x gate^T) * (x up^T), two products of one x tile.

          F ->                        HBM        x, gate and up tiles by TMA where rows are 16-byte aligned, by pointers
       +------+------+                           elsewhere; act written once (gate and up too when a gradient is wanted)
     X | tile | tile |  BLOCK_X x     shared     STAGES tiles of x, gate and up, BLOCK_D deep; the tile of act on its way out
       +------+------+  BLOCK_F       registers  a float32 accumulator BLOCK_X x 2 BLOCK_F: rows of gate, then rows of up.
       | tile | tile |                           One product 256 wide reads x from shared memory once, two of 128 twice
       +------+------+                tiles go in columns of GROUP row blocks, so that weights stay in L2

One descriptor reads the gate's tile and up's: [2, F, D], with the distance between the matrices as its first stride. Results
leave by TMA too where a row of them ends at 16 bytes: then no mask is needed, whatever the shape.
Reference: `tessera_kernels.reference.swiglu.gate_up_swiglu`. Products round to the working dtype before the activation.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: ARG001 - a fake takes what its op takes

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.triton._launch import SHARED_BYTES, graph_op, num_programs, on_device, read, write
from tessera_shared.errors import KernelError


class GateUpConfig(NamedTuple):
    """One tiling. Integers only: it travels through a custom op's schema."""

    block_x: int
    block_f: int  # of gate and of up, each
    block_d: int
    num_warps: int
    stages: int
    group: int  # row blocks that share a column of weights before the next column
    persistent: int  # 1 = one program a multiprocessor, tiles in a loop
    tma: int  # 1 = tiles by TMA descriptors, where alignment allows
    paired: int = 0  # 1 = gate and up rows in one tile and one product, where both lie alike in memory
    flatten: int = 0  # 1 = persistent, and a tile's first loads start before the last one is stored


FARTHEST = 2**40
"""Bytes that a stride of a descriptor stays below."""

CONFIGS: tuple[GateUpConfig, ...] = (
    GateUpConfig(128, 128, 64, 8, 4, 8, 1, 1, 1, 1),
    GateUpConfig(128, 128, 64, 8, 3, 8, 1, 1, 1, 1),
    GateUpConfig(128, 128, 64, 8, 4, 16, 1, 1, 1, 1),
    GateUpConfig(128, 128, 64, 8, 4, 4, 1, 1, 1, 1),
    GateUpConfig(128, 128, 64, 8, 4, 8, 1, 1, 1, 0),
    GateUpConfig(128, 128, 64, 8, 3, 8, 1, 1, 1, 0),
    GateUpConfig(128, 128, 64, 8, 4, 8, 0, 1, 1, 0),
    GateUpConfig(256, 64, 64, 8, 3, 8, 1, 1, 1, 1),
    GateUpConfig(128, 64, 64, 4, 3, 8, 0, 1, 1, 0),  # two programs a multiprocessor: one stores, one multiplies
    GateUpConfig(64, 64, 64, 4, 4, 8, 0, 1, 1, 0),
    GateUpConfig(128, 128, 64, 8, 3, 8, 1, 1),
    GateUpConfig(128, 128, 64, 8, 4, 8, 1, 1),
    GateUpConfig(64, 64, 64, 4, 4, 8, 0, 1),
    GateUpConfig(128, 64, 64, 8, 3, 8, 0, 0),
    GateUpConfig(64, 32, 32, 4, 3, 4, 0, 0),
)
"""Every configuration that the GPU lane runs and the sweep times; `choose_config` picks."""


def choose_config(rows: int, itemsize: int, aligned: bool) -> GateUpConfig:
    """Return the tiling for `rows` rows of x; `aligned` says whether TMA can read all operands. Not swept yet."""
    if itemsize == 4 or not aligned:
        return GateUpConfig(64, 32, 32, 4, 3, 4, 0, 0)
    if rows <= 64:
        return GateUpConfig(64, 64, 64, 4, 4, 8, 0, 1, 1, 0)
    return GateUpConfig(128, 128, 64, 8, 4, 8, 1, 1, 1, 1)


@triton.jit
def _tile(matrix, stride, row, column, num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
          TMA: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    if TMA:
        tile = matrix.load([row, column])
    else:
        rows, columns = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tile = read(matrix + rows[:, None].to(tl.int64) * stride + columns[None, :], inside, MASKED)
    return tile


@triton.jit
def _store(matrix, tile, row, column, num_rows, num_columns, TMA_OUT: tl.constexpr, MASKED: tl.constexpr):
    if TMA_OUT:
        matrix.store([row, column], tile)
    else:
        rows, columns = row + tl.arange(0, tile.shape[0]), column + tl.arange(0, tile.shape[1])
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        write(matrix + (rows[:, None].to(tl.int64) * num_columns + columns[None, :]), tile, inside, MASKED)


@triton.jit
def _add_product(total, a, b, EXACT: tl.constexpr, LIFT: tl.constexpr):
    if LIFT:  # the interpreter multiplies bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    if EXACT:  # noqa: SIM108 - decides which code is compiled
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    else:
        total = tl.dot(a, tl.trans(b), total)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x, gate_weight, up_weight, act, gate_out, up_out, x_stride, gate_stride, up_stride, num_rows, F, D,
    BLOCK_X: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr, PAIRED: tl.constexpr, UP_FIRST: tl.constexpr, FLATTEN: tl.constexpr, OUT: tl.constexpr,
    EVEN: tl.constexpr, KEPT: tl.constexpr, EXACT: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    blocks_x, blocks_f = tl.cdiv(num_rows, BLOCK_X), tl.cdiv(F, BLOCK_F)
    for tile in tl.range(tl.program_id(0), blocks_x * blocks_f, tl.num_programs(0), flatten=FLATTEN):
        group_size = GROUP * blocks_f
        first = (tile // group_size) * GROUP
        height = tl.minimum(blocks_x - first, GROUP)
        row = (first + tile % group_size % height) * BLOCK_X
        column = (tile % group_size // height) * BLOCK_F
        if PAIRED:
            both_acc = tl.zeros([BLOCK_X, 2 * BLOCK_F], tl.float32)
            for start in tl.range(0, D, BLOCK_D):
                a = x.load([row, start])
                b = gate_weight.load([0, column, start]).reshape([2 * BLOCK_F, BLOCK_D])
                both_acc = _add_product(both_acc, a, b, EXACT, LIFT)
            first_acc, second_acc = both_acc.reshape([BLOCK_X, 2, BLOCK_F]).permute(0, 2, 1).split()
            gate_acc, up_acc = (second_acc, first_acc) if UP_FIRST else (first_acc, second_acc)
        else:
            gate_acc = tl.zeros([BLOCK_X, BLOCK_F], tl.float32)
            up_acc = tl.zeros([BLOCK_X, BLOCK_F], tl.float32)
            for start in tl.range(0, D, BLOCK_D):
                a = _tile(x, x_stride, row, start, num_rows, D, BLOCK_X, BLOCK_D, TMA, not EVEN)
                b = _tile(gate_weight, gate_stride, column, start, F, D, BLOCK_F, BLOCK_D, TMA, not EVEN)
                c = _tile(up_weight, up_stride, column, start, F, D, BLOCK_F, BLOCK_D, TMA, not EVEN)
                gate_acc = _add_product(gate_acc, a, b, EXACT, LIFT)
                up_acc = _add_product(up_acc, a, c, EXACT, LIFT)
        gate, up = gate_acc.to(OUT), up_acc.to(OUT)
        if KEPT:
            _store(gate_out, gate, row, column, num_rows, F, TMA_OUT, not EVEN)
            _store(up_out, up, row, column, num_rows, F, TMA_OUT, not EVEN)
        g = gate.to(tl.float32)
        root = tl.rsqrt(1.0 + tl.exp2(g * -1.4426950408889634))  # a quotient takes twice the instructions
        result = g * (root * root) * up.to(tl.float32)
        _store(act, result.to(OUT), row, column, num_rows, F, TMA_OUT, not EVEN)


def _fake(x: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool, config: list[int]) -> tuple[Tensor, ...]:
    act = x.new_empty(x.shape[0], gate_weight.shape[0])
    return act, torch.empty_like(act) if keep else x.new_empty(0), torch.empty_like(act) if keep else x.new_empty(0)


@graph_op("gate_up_swiglu_forward", fake=_fake)
def gate_up_forward(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool, config: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return act [X, F] and, when `keep`, both rounded products (else empty). Rows of all operands have unit stride."""
    num_rows, depth = x.shape
    width = gate_weight.shape[0]
    aligned = all(_tma_reads(operand) for operand in (x, gate_weight, up_weight))
    cut = GateUpConfig(*config) if config else choose_config(num_rows, x.element_size(), aligned)
    _check(cut, x.element_size())
    act = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    gate, up = (torch.empty_like(act) if keep else x.new_empty(0) for _ in range(2))
    tma = bool(cut.tma) and aligned
    operands: list[Any] = [x, gate_weight, up_weight]
    paired = tma and bool(cut.paired) and _distance(gate_weight, up_weight) != 0
    up_first = paired and _distance(gate_weight, up_weight) < 0
    if paired:
        pair = _pair(*((up_weight, gate_weight) if up_first else (gate_weight, up_weight)), cut)
        operands = [TensorDescriptor.from_tensor(x, [cut.block_x, cut.block_d]), pair, up_weight]
    elif tma:
        blocks = ([cut.block_x, cut.block_d], [cut.block_f, cut.block_d], [cut.block_f, cut.block_d])
        operands = [TensorDescriptor.from_tensor(tensor, block) for tensor, block in zip(operands, blocks, strict=True)]
    results: list[Any] = [act, gate, up]
    tma_out = tma and _tma_reads(act)  # a row ends at whole 16 bytes: the copy engine writes none past it
    if tma_out:
        block = [cut.block_x, cut.block_f]
        results = [TensorDescriptor.from_tensor(out, block) if out.numel() else out for out in results]
    tiles = triton.cdiv(num_rows, cut.block_x) * triton.cdiv(width, cut.block_f)
    # the copy engine minds every edge itself: no mask, hence one compilation for all numbers of rows
    even = tma_out or (num_rows % cut.block_x == 0 and width % cut.block_f == 0 and (tma or depth % cut.block_d == 0))
    with on_device(x):
        _gate_up_kernel[(num_programs(tiles, cut.persistent, x.device),)](
            *operands, *results, x.stride(0), gate_weight.stride(0), up_weight.stride(0), num_rows, width, depth,
            BLOCK_X=cut.block_x, BLOCK_F=cut.block_f, BLOCK_D=cut.block_d, GROUP=cut.group, TMA=tma,
            TMA_OUT=tma_out, PAIRED=paired, UP_FIRST=up_first, FLATTEN=bool(cut.flatten),
            OUT=_TRITON_DTYPES[x.dtype], EVEN=even,
            KEPT=keep, EXACT=x.dtype == torch.float32, LIFT=is_interpreting() and x.dtype != torch.float32,
            num_warps=cut.num_warps, num_stages=cut.stages,
        )  # fmt: skip
    return act, gate, up


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _tma_reads(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _distance(gate: Tensor, up: Tensor) -> int:
    """Return how many numbers up lies behind gate; 0 where one descriptor cannot read both.

    In the interpreter both must be of one buffer: its products round by how their operands lie, and addresses are chance.
    """
    distance = up.data_ptr() - gate.data_ptr()
    one_buffer = gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    reached = gate.stride(0) == up.stride(0) and abs(distance) < FARTHEST and (gate.is_cuda or one_buffer)
    return distance // gate.element_size() if reached else 0


def _pair(first: Tensor, second: Tensor, cut: GateUpConfig) -> TensorDescriptor:
    """Return one descriptor of two matrices, [2, F, D]: the copy engine does not ask what lies between them."""
    strides = [_distance(first, second), first.stride(0), 1]
    return TensorDescriptor(first, [2, *first.shape], strides, [2, cut.block_f, cut.block_d])


def _check(cut: GateUpConfig, itemsize: int) -> None:
    tile_bytes = (cut.block_x + 2 * cut.block_f) * cut.block_d * itemsize * cut.stages
    tile_bytes += cut.tma * cut.block_x * cut.block_f * itemsize
    if tile_bytes > SHARED_BYTES:
        raise KernelError(
            f"config = {cut} with {itemsize}-byte elements: expected at most {SHARED_BYTES} bytes of tiles, because that "
            f"is a multiprocessor's shared memory and these take {tile_bytes}; try fewer stages or config=None"
        )

"""Rotary positions on queries and keys, in place, both in one launch; forward and backward.

    first'  = first cos_1 - second sin_1          pairs (j, j + H/2): the half-split layout
    second' = second cos_2 + first sin_2          (Su et al. 2021, arXiv 2104.09864)
    backward, the transpose: dfirst = dfirst' cos_1 + dsecond' sin_2, dsecond = dsecond' cos_2 - dfirst' sin_1

       heads N, then K ->                HBM        each head element read once and written once; a token's table row
    +---------+---------+                           once for all its heads
    | q first | q second|  TOKENS        registers  both halves of TOKENS x HEADS heads, cosines and sines in float32
    | k first | k second|  a program     shared     only to spread the table over the heads
    +---------+---------+

Both products and their sum round to the working dtype, as in `tessera_kernels.reference.rope`; contraction into a fused
multiply-add is switched off for that reason.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: ARG001 - a fake takes what its op takes

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera_kernels.checks import (
    expect_dtype,
    expect_multiple,
    expect_rank,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    expect_triton_device,
)
from tessera_kernels.triton._launch import FLOATS, expect_tile, graph_op, is_far, on_device, read, write
from tessera_shared.errors import KernelError


class RopeConfig(NamedTuple):
    """How the heads are cut up. Integers only: it travels through a custom op's schema."""

    tokens: int  # tokens of a program
    heads: int  # most heads in registers at a time; more are looped
    num_warps: int


CONFIGS: tuple[RopeConfig, ...] = (
    RopeConfig(1, 32, 4),
    RopeConfig(1, 16, 4),
    RopeConfig(1, 32, 8),
    RopeConfig(2, 16, 4),
    RopeConfig(2, 32, 8),
    RopeConfig(4, 8, 4),
    RopeConfig(8, 4, 4),
)
"""Every configuration that the GPU lane runs and the sweep times; `choose_config` picks."""


def choose_config(heads: int, width: int) -> RopeConfig:
    """Return the configuration for tokens of `heads` queries' heads of `width`: about 4,096 elements a tile."""
    held = min(32, triton.next_power_of_2(heads), max(1, 4096 // triton.next_power_of_2(width)))
    tokens = max(1, 4096 // (held * triton.next_power_of_2(width)))
    return RopeConfig(min(tokens, 8), held, 4)


@triton.jit
def _place(tensor, origin, start, stride_n, stride_h, HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    heads = (start + tl.arange(0, HEADS))[None, :, None]
    return tensor + origin[:, None, None] + heads * stride_n + tl.arange(0, BLOCK_H)[None, None, :] * stride_h


@triton.jit
def _mask(inside, start, NUM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    heads = (start + tl.arange(0, HEADS))[None, :, None]
    return inside[:, None, None] & (heads < NUM) & (tl.arange(0, BLOCK_H)[None, None, :] < HALF)


@triton.jit
def _write_turned(
    first, second, there, half_stride, mask, cos_1, sin_1, cos_2, sin_2, MASKED: tl.constexpr, BACKWARD: tl.constexpr
):
    dtype: tl.constexpr = there.dtype.element_ty
    first, second = first.to(tl.float32), second.to(tl.float32)
    if BACKWARD:
        new_first = (first * cos_1).to(dtype).to(tl.float32) + (second * sin_2).to(dtype).to(tl.float32)
        new_second = (second * cos_2).to(dtype).to(tl.float32) - (first * sin_1).to(dtype).to(tl.float32)
    else:
        new_first = (first * cos_1).to(dtype).to(tl.float32) - (second * sin_1).to(dtype).to(tl.float32)
        new_second = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_2).to(dtype).to(tl.float32)
    write(there, new_first, mask, MASKED)
    write(there + half_stride, new_second, mask, MASKED)


@triton.jit(do_not_specialize=["num_tokens", "T"])
def _turn_kernel(
    q, k, q_out, k_out, cos, sin, num_tokens, T,
    q_b, q_t, q_n, q_h, k_b, k_t, k_n, k_h, qo_b, qo_t, qo_n, qo_h, ko_b, ko_t, ko_n, ko_h,
    cos_b, cos_t, cos_h, sin_b, sin_t, sin_h,
    N: tl.constexpr, K: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, TOKENS: tl.constexpr, EVEN_TOKENS: tl.constexpr, BACKWARD: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    if FAR:  # heads before positions in memory: the last one begins further on than 32 bits count
        q_n, k_n = tl.cast(q_n, tl.int64), tl.cast(k_n, tl.int64)
        qo_n, ko_n = tl.cast(qo_n, tl.int64), tl.cast(ko_n, tl.int64)
    EVEN: tl.constexpr = EVEN_TOKENS and HALF == BLOCK_H
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    b, t = (token // T).to(tl.int64), (token % T).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)[None, :]
    mask = inside[:, None] & (columns < HALF)
    cosines = cos + (b * cos_b + t * cos_t)[:, None] + columns * cos_h
    sines = sin + (b * sin_b + t * sin_t)[:, None] + columns * sin_h
    # The first keys' heads are under way before anything is stored: behind a store to memory that may be the same, the
    # compiler would leave them waiting.
    k_at = _place(k, b * k_b + t * k_t, 0, k_n, k_h, HEADS_K, BLOCK_H)
    k_mask = _mask(inside, 0, K, HEADS_K, HALF, BLOCK_H)
    K_MASKED: tl.constexpr = not (EVEN and K > 0 and K % HEADS_K == 0)
    k_first, k_second = read(k_at, k_mask, K_MASKED), read(k_at + HALF * k_h, k_mask, K_MASKED)
    cos_1 = read(cosines, mask, not EVEN).to(tl.float32)[:, None, :]
    cos_2 = read(cosines + HALF * cos_h, mask, not EVEN).to(tl.float32)[:, None, :]
    sin_1 = read(sines, mask, not EVEN).to(tl.float32)[:, None, :]
    sin_2 = read(sines + HALF * sin_h, mask, not EVEN).to(tl.float32)[:, None, :]
    Q_MASKED: tl.constexpr = not (EVEN and N % HEADS_Q == 0)
    for start in tl.static_range(0, N, HEADS_Q):
        at = _place(q, b * q_b + t * q_t, start, q_n, q_h, HEADS_Q, BLOCK_H)
        q_mask = _mask(inside, start, N, HEADS_Q, HALF, BLOCK_H)
        first, second = read(at, q_mask, Q_MASKED), read(at + HALF * q_h, q_mask, Q_MASKED)
        there = _place(q_out, b * qo_b + t * qo_t, start, qo_n, qo_h, HEADS_Q, BLOCK_H)
        _write_turned(first, second, there, HALF * qo_h, q_mask, cos_1, sin_1, cos_2, sin_2, Q_MASKED, BACKWARD)
    there = _place(k_out, b * ko_b + t * ko_t, 0, ko_n, ko_h, HEADS_K, BLOCK_H)
    _write_turned(k_first, k_second, there, HALF * ko_h, k_mask, cos_1, sin_1, cos_2, sin_2, K_MASKED, BACKWARD)
    for start in tl.static_range(HEADS_K, K, HEADS_K):
        at = _place(k, b * k_b + t * k_t, start, k_n, k_h, HEADS_K, BLOCK_H)
        k_mask = _mask(inside, start, K, HEADS_K, HALF, BLOCK_H)
        first, second = read(at, k_mask, K_MASKED), read(at + HALF * k_h, k_mask, K_MASKED)
        there = _place(k_out, b * ko_b + t * ko_t, start, ko_n, ko_h, HEADS_K, BLOCK_H)
        _write_turned(first, second, there, HALF * ko_h, k_mask, cos_1, sin_1, cos_2, sin_2, K_MASKED, BACKWARD)


def apply_rope_(
    q_BTNH: Tensor, k_BTKH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor, *, config: RopeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Turn q and k in their own memory and return them; any strides, one dtype, tables without gradient.

    Go on with what is returned: the arguments' memory holds the turned heads, and autograd treats the arguments as
    overwritten. Where an argument is a view, or under `torch.compile` (which gives new tensors), only the returned ones
    carry the gradient.
    """
    _check(q_BTNH, k_BTKH, cos_BTH, sin_BTH)
    if torch.compiler.is_compiling():
        turned = _Turned.apply(q_BTNH, k_BTKH, cos_BTH, sin_BTH, False, list(config or ()))
    else:
        turned = _Turned.apply(q_BTNH, k_BTKH, cos_BTH, sin_BTH, True, list(config or ()))
    return turned  # type: ignore[no-any-return]


def _check(q_BTNH: Tensor, k_BTKH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> None:
    tensors = {"q_BTNH": q_BTNH, "k_BTKH": k_BTKH, "cos_BTH": cos_BTH, "sin_BTH": sin_BTH}
    expect_triton_device("q_BTNH", q_BTNH)
    expect_dtype("q_BTNH", q_BTNH, *FLOATS)
    expect_same_device(tensors)
    expect_same_dtype(tensors)
    expect_rank("q_BTNH", q_BTNH, 4)
    rows, positions, _, width = q_BTNH.shape
    expect_multiple("H", width, 2, "the first half of a head is turned against the second")
    expect_shape("k_BTKH", k_BTKH, (rows, positions, None, width), "it is turned with q_BTNH")
    for name in ("cos_BTH", "sin_BTH"):
        expect_shape(name, tensors[name], (rows, positions, width), "each position of q_BTNH has its angles")
        if tensors[name].requires_grad:
            raise KernelError(
                f"{name}.requires_grad = True: expected False, because angles come from positions and the kernel has no "
                f"gradient for them; try {name}.detach()"
            )
    for name in ("q_BTNH", "k_BTKH"):
        if tensors[name].requires_grad and tensors[name].is_leaf and torch.is_grad_enabled():
            raise KernelError(
                f"{name}.is_leaf = True with requires_grad: expected the result of an operation, because a leaf cannot be "
                f"overwritten; try {name}.clone()"
            )


class _Turned(torch.autograd.Function):
    """Autograd's view of turning q and k; only the tables are kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, in_place: bool, config: list[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.config = config
        ctx.set_materialize_grads(False)
        if not in_place:
            turned: tuple[Tensor, Tensor] = _turn_anew(q, k, cos, sin, False, config)
            return turned
        _launch(q, k, q, k, cos, sin, False, config)
        # Autograd copies the base of a view that is marked dirty, and allows one such output only. Raising the version
        # and returning the argument costs nothing, and whoever kept it for a backward is told.
        if q._is_view() or k._is_view():
            torch.autograd.graph.increment_version((q, k))
        else:
            ctx.mark_dirty(q, k)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if dq is None and dk is None:
            return None, None, None, None, None, None
        nothing = cos.new_empty(*cos.shape[:2], 0, cos.shape[2])
        new_q, new_k = _turn_anew(
            nothing if dq is None else dq, nothing if dk is None else dk, cos, sin, True, ctx.config
        )
        return None if dq is None else new_q, None if dk is None else new_k, None, None, None, None


def _fake_turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool, config: list[int]
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@graph_op("rope_turn", fake=_fake_turn)
def _turn_anew(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool, config: list[int]
) -> tuple[Tensor, Tensor]:
    """Turn into new, contiguous tensors: an incoming gradient may be shared or expanded, so it is not overwritten."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, q_out, k_out, cos, sin, backward, config)
    return q_out, k_out


def _launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, backward: bool, config: list[int]
) -> None:
    rows, positions, width = cos.shape
    num_tokens, num_q, num_k = rows * positions, q.shape[2], k.shape[2]
    if num_tokens * max(num_q, num_k) == 0:
        return
    cut = RopeConfig(*config) if config else choose_config(max(num_q, num_k), width)
    block = triton.next_power_of_2(width // 2)
    heads_q = min(cut.heads, triton.next_power_of_2(max(num_q, 1)))
    heads_k = min(cut.heads, triton.next_power_of_2(max(num_k, 1)))
    expect_tile("tokens x heads x width", cut.tokens * max(heads_q, heads_k) * block * 2, cut.num_warps)
    with on_device(q):
        _turn_kernel[(triton.cdiv(num_tokens, cut.tokens),)](
            q, k, q_out, k_out, cos, sin, num_tokens, positions,
            *q.stride(), *k.stride(), *q_out.stride(), *k_out.stride(), *cos.stride(), *sin.stride(),
            N=num_q, K=num_k, HEADS_Q=heads_q, HEADS_K=heads_k, HALF=width // 2, BLOCK_H=block, TOKENS=cut.tokens,
            EVEN_TOKENS=num_tokens % cut.tokens == 0, BACKWARD=backward, FAR=is_far(q, k, q_out, k_out, dim=2),
            num_warps=cut.num_warps, enable_fp_fusion=False,
        )  # fmt: skip

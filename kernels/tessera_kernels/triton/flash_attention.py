"""Attention without the score matrix, forward and backward: out = softmax(cap(scale Q K^T) + mask) V, and its log-sum-exp.

Equations, tile pictures and what lives where: `flash_attention_forward` and `flash_attention_backward`; tile sizes:
`flash_attention_configs`. This file checks, lays out memory and launches. Causal or full, grouped key/value heads,
sliding window, soft cap, packed sequences, any head width that is a multiple of 16 up to 256.

Reference: `tessera_kernels.reference.flash_attention`.
"""

# ruff: noqa: ARG001 - a fake takes what its op takes

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.errors import OutOfResources
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.attention_rule import (
    Rule,
    check_dense,
    check_packed,
    describable,
    heads_at_once,
    outer_strides,
    precision,
    rule_of,
    unit_rows,
)
from tessera_kernels.checks import expect_triton_device, is_interpreting
from tessera_kernels.triton import flash_attention_backward as backward_kernels
from tessera_kernels.triton._attention_tiles import SPARE
from tessera_kernels.triton._launch import FLOATS, graph_op, on_device
from tessera_kernels.triton.flash_attention_configs import (
    ADDS,
    CONFIGS,
    AttentionConfig,
    ForwardConfig,
    KeyConfig,
    QueryConfig,
    choose_config,
    expect_fitting,
)
from tessera_kernels.triton.flash_attention_forward import forward_kernel
from tessera_shared.errors import KernelError

__all__ = ["CONFIGS", "AttentionConfig", "choose_config", "flash_attention", "flash_attention_varlen"]

_STARTS = Tensor | None


def flash_attention(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out_BTNH in the inputs' dtype, lse_BNT float32); both can be differentiated.

    Query t stands at key position t + S - T: causal, it sees keys up to there; with a `window`, only those nearer than it
    (both ways when not causal). A query that sees nothing gives 0 and -inf. `scale` is 1 / sqrt(H) by default. float16,
    bfloat16 or float32 (in full precision); N a multiple of K. Any strides: a stride within a head is copied away.
    `deterministic` insists on a configuration that keeps every sum of the backward in one order, as the chosen one does.
    `KernelError` says what does not fit.
    """
    expect_triton_device("q_BTNH", q_BTNH)
    check_dense(q_BTNH, k_BSKH, v_BSKH, FLOATS)
    rule = rule_of(q_BTNH.shape[-1], scale, softcap, window, causal)
    cuts = _cuts(q_BTNH, deterministic, config)
    out, lse, _, _ = _Attention.apply(  # type: ignore[no-untyped-call]
        q_BTNH, k_BSKH, v_BSKH, None, None, q_BTNH.shape[1], k_BSKH.shape[1], *rule, *cuts
    )  # fmt: skip
    return out, lse


def flash_attention_varlen(
    q_XNH: Tensor,
    k_YKH: Tensor,
    v_YKH: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    longest_query: int,
    longest_key: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within each of B packed sequences: (out_XNH, lse_NX float32). Options as in `flash_attention`.

    Sequence i has the queries query_starts[i] to query_starts[i + 1] and keys likewise: int32 [B + 1], rising, on the
    device, never read by the host. `longest_query` and `longest_key` are at least the longest lengths; queries past them
    are left at 0 and -inf, as are rows past the last sequence, and those take no part in any gradient.
    """
    expect_triton_device("q_XNH", q_XNH)
    check_packed(q_XNH, k_YKH, v_YKH, query_starts, key_starts, FLOATS)
    rule = rule_of(q_XNH.shape[-1], scale, softcap, window, causal)
    cuts = _cuts(q_XNH, deterministic, config)
    out, lse, _, _ = _Attention.apply(  # type: ignore[no-untyped-call]
        q_XNH, k_YKH, v_YKH, query_starts.contiguous(), key_starts.contiguous(), longest_query, longest_key, *rule, *cuts
    )  # fmt: skip
    return out, lse


def _cuts(q: Tensor, deterministic: bool, config: AttentionConfig | None) -> tuple[list[int], list[int], list[int]]:
    if deterministic and config is not None and not config.deterministic:
        raise KernelError(
            f"config.keys.fused = {config.keys.fused} ({ADDS[config.keys.fused]}): expected 0 with deterministic=True, because "
            "atomic additions come in no fixed order; try config=None"
        )
    chosen = config or choose_config(q.shape[-1], q.dtype)
    padded = triton.next_power_of_2(q.shape[-1])
    for part in chosen[: 2 if chosen.keys.fused else 3]:
        expect_fitting(part, padded, q.element_size())
    return list(chosen.forward), list(chosen.keys), list(chosen.queries)


class Attention(torch.autograd.Function):
    """Attention whose forward leaves (out, lse, top, spread) to the backward kernels of this file.

    The first three inputs of a forward are q, k and v; it ends with `keep`.
    """

    @staticmethod
    def keep(ctx: Any, *tensors: Tensor | None, plain: tuple[Any, ...], run: Callable[..., tuple[Tensor, ...]]) -> None:
        """Save (q, k, v, out, top, spread, query_starts, key_starts), what makes gradients and its plain arguments.

        `run` is called as `run_backward` is.
        """
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*tensors[4:6])
        ctx.set_materialize_grads(False)
        ctx.plain, ctx.run = plain, run

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, _dtop: Tensor | None, _dspread: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v."""
        nothing = (None,) * (len(ctx.needs_input_grad) - 3)
        if dout is None and dlse is None:
            return None, None, None, *nothing
        q, k, v, out, top, spread, query_starts, key_starts = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else unit_rows(dout)
        dlse = None if dlse is None else dlse.float().contiguous()
        grads = ctx.run(q, k, v, out, dout, dlse, top, spread, query_starts, key_starts, *ctx.plain)
        return *grads, *nothing


class _Attention(Attention):
    """Autograd's view: (q, k, v, starts, lengths, rule, cuts) -> (out, lse, and what the backward needs of each row)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor, k: Tensor, v: Tensor, query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
        scale: float, softcap: float, window: int, causal: bool,
        forward_cut: list[int], key_cut: list[int], query_cut: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
        plain = (longest_query, longest_key, scale, softcap, window, causal)
        out, lse, top, spread = _run_forward(q, k, v, query_starts, key_starts, *plain, forward_cut)
        saved = (q, k, v, out, top, spread, query_starts, key_starts)
        Attention.keep(ctx, *saved, plain=(*plain, key_cut, query_cut), run=run_backward)
        return out, lse, top, spread


def fake_forward(
    q: Tensor, k: Tensor, v: Tensor, query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, cut: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the empty tensors of a forward: out, lse, top, spread."""
    rows = (q.shape[0], q.shape[2], q.shape[1]) if query_starts is None else (q.shape[1], q.shape[0])
    row = q.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), row, torch.empty_like(row), torch.empty_like(row)


@graph_op("flash_attention_forward", fake=fake_forward)
def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, cut: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, lse, and each row's maximum before scaling and log2 sum, all rows as (sequence, head, query)."""
    rule, cfg = Rule(scale, softcap, window, causal), ForwardConfig(*cut)
    out, lse, top, spread = fake_forward(
        q, k, v, query_starts, key_starts, longest_query, longest_key, scale, softcap, window, causal, cut
    )
    packed = query_starts is not None
    if packed or k.numel() == 0:  # rows that no program comes to
        out.zero_()
        lse.fill_(-math.inf)
        top.zero_()
        spread.fill_(math.inf)
    if q.numel() == 0 or k.numel() == 0:
        return out, lse, top, spread
    padded = triton.next_power_of_2(q.shape[-1])
    tma = bool(cfg.tma) and describable(q, k, v)
    shape = _Shape.of(q, k, query_starts)
    heads = q.shape[-2]
    grid = (triton.cdiv(longest_query, cfg.block_m) * shape.sequences * heads,)
    a_head = 2 * longest_key * k.shape[-1] * k.element_size()
    section = heads_at_once(a_head, group=shape.group, most=shape.sequences * heads)
    with on_device(q), _resources(cfg):
        forward_kernel[grid](
            _describe(q, cfg.block_m, padded, tma), _describe(k, cfg.block_n, padded, tma),
            _describe(v, cfg.block_n, padded, tma), q, k, v, out, lse, top, spread, query_starts, key_starts,
            *outer_strides(q), *outer_strides(k), *outer_strides(v), *outer_strides(out),
            shape.sequences, shape.queries, shape.keys, heads, section, longest_query, rule.window, rule.unit, rule.inner,
            GROUP=shape.group, VARLEN=packed, WIDTH=q.shape[-1], PADDED=padded, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
            STAGES=cfg.stages, TMA=tma, PRECISION=precision(q), **rule.flags,
            num_warps=cfg.num_warps, num_stages=cfg.stages,
        )  # fmt: skip
    return out, lse, top, spread


def fake_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None, top: Tensor, spread: Tensor,
    query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, key_cut: list[int], query_cut: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the empty tensors of a backward."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


@graph_op("flash_attention_backward", fake=fake_backward)
def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None, top: Tensor, spread: Tensor,
    query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, key_cut: list[int], query_cut: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, contiguous."""
    rule, keys, queries = Rule(scale, softcap, window, causal), KeyConfig(*key_cut), QueryConfig(*query_cut)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if query_starts is not None or q.numel() == 0 or k.numel() == 0:
        for grad in (dq, dk, dv):
            grad.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dv
    with on_device(q):
        rows = _statistics(out, dout, dlse, top, spread, query_starts, longest_query, rule)
        if keys.fused:
            total = torch.zeros(
                (*q.shape[:-1], triton.next_power_of_2(q.shape[-1])), dtype=torch.float32, device=q.device
            )
            _run_keys(
                q, k, v, dout, rows, total, dk, dv, query_starts, key_starts, longest_query, longest_key, rule, keys
            )
            torch.mul(total[..., : q.shape[-1]], rule.scale, out=dq)
        else:
            _run_keys(q, k, v, dout, rows, dq, dk, dv, query_starts, key_starts, longest_query, longest_key, rule, keys)
            _run_queries(q, k, v, dout, rows, dq, query_starts, key_starts, longest_query, longest_key, rule, queries)
    return dq, dk, dv


def _statistics(
    out: Tensor, dout: Tensor, dlse: Tensor | None, top: Tensor, spread: Tensor, query_starts: _STARTS, longest_query: int,
    rule: Rule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return base and delta of each row in lines, [.., line], where a sequence begins at whole 16 bytes."""
    queries, heads, width = out.shape[-3:]
    packed = query_starts is not None
    sequences = query_starts.shape[0] - 1 if query_starts is not None else out.shape[0]
    line = 4 * triton.cdiv(queries + sequences * SPARE * packed, 4)
    base, delta = (top.new_empty((*top.shape[:-1], line)) for _ in range(2))
    if packed:  # between and after sequences: probability 0
        base.fill_(math.inf)
        delta.zero_()
    padded = triton.next_power_of_2(width)
    block = max(16, 8192 // padded)
    lanes = sequences * heads  # many short sequences are more than a grid's second dimension holds, 65,535
    backward_kernels.delta_kernel[(triton.cdiv(longest_query, block) * lanes,)](
        out, dout, delta if dlse is None else dlse, top, spread, base, delta, query_starts,
        *outer_strides(out), *outer_strides(dout), queries, heads, lanes, line, rule.unit,
        HAS_DLSE=dlse is not None, VARLEN=packed, WIDTH=width, PADDED=padded, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return base, delta


def _run_keys(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: tuple[Tensor, Tensor], total: Tensor, dk: Tensor, dv: Tensor,
    query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int, rule: Rule, cfg: KeyConfig,
) -> None:  # fmt: skip
    padded = triton.next_power_of_2(q.shape[-1])
    tma = bool(cfg.tma) and describable(q, k, v, dout)
    add = "pointer" if cfg.fused and is_interpreting() else ADDS[cfg.fused]
    shape, packed = _Shape.of(q, k, query_starts), query_starts is not None
    heads = k.shape[-2]
    grid = (triton.cdiv(longest_key, cfg.block_n) * shape.sequences * heads,)
    a_head = 2 * longest_query * shape.group * q.shape[-1] * q.element_size()
    section = heads_at_once(a_head, most=shape.sequences * heads)
    with _resources(cfg):
        backward_kernels.key_kernel[grid](
            _describe(q, cfg.block_m, padded, tma), _describe(dout, cfg.block_m, padded, tma),
            _describe(k, cfg.block_n, padded, tma), _describe(v, cfg.block_n, padded, tma),
            *(_describe_lines(x, x.shape[-1] if packed else shape.queries, cfg) for x in rows),
            _describe(total, cfg.block_m, padded, add == "descriptor"), q, k, v, dout, *rows, total, dk, dv,
            query_starts, key_starts,
            *outer_strides(q), *outer_strides(k), *outer_strides(v), *outer_strides(dout), *outer_strides(total), *outer_strides(dk),
            rows[0].shape[-1], shape.sequences, shape.queries, shape.keys, heads, section, longest_key,
            rule.window, rule.unit, rule.inner, rule.scale,
            GROUP=shape.group, VARLEN=packed, ADD=add, WIDTH=q.shape[-1], PADDED=padded,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, STAGES=cfg.stages, KEYS_FIRST=bool(cfg.keys_first),
            EARLY=bool(cfg.early), TMA=tma, ROWS_TMA=bool(cfg.tma), PRECISION=precision(q), **rule.flags,
            num_warps=cfg.num_warps, num_stages=cfg.stages,
        )  # fmt: skip


def _run_queries(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: tuple[Tensor, Tensor], dq: Tensor,
    query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int, rule: Rule, cfg: QueryConfig,
) -> None:  # fmt: skip
    padded = triton.next_power_of_2(q.shape[-1])
    tma = bool(cfg.tma) and describable(q, k, v, dout)
    shape = _Shape.of(q, k, query_starts)
    heads = q.shape[-2]
    grid = (triton.cdiv(longest_query, cfg.block_m) * shape.sequences * heads,)
    a_head = 2 * longest_key * k.shape[-1] * k.element_size()
    section = heads_at_once(a_head, group=shape.group, most=shape.sequences * heads)
    with _resources(cfg):
        backward_kernels.query_kernel[grid](
            _describe(q, cfg.block_m, padded, tma), _describe(dout, cfg.block_m, padded, tma),
            _describe(k, cfg.block_n, padded, tma), _describe(v, cfg.block_n, padded, tma), q, k, v, dout, *rows, dq,
            query_starts, key_starts, *outer_strides(q), *outer_strides(k), *outer_strides(v), *outer_strides(dout), *outer_strides(dq),
            rows[0].shape[-1], shape.sequences, shape.queries, shape.keys, heads, section, longest_query,
            rule.window, rule.unit, rule.inner, rule.scale,
            GROUP=shape.group, VARLEN=query_starts is not None, WIDTH=q.shape[-1], PADDED=padded,
            BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, STAGES=cfg.stages, TMA=tma,
            PRECISION=precision(q), **rule.flags, num_warps=cfg.num_warps, num_stages=cfg.stages,
        )  # fmt: skip


class _Shape(NamedTuple):
    """Sizes as the kernels take them; packed, `queries` and `keys` are those of all sequences."""

    sequences: int
    queries: int
    keys: int
    group: int

    @staticmethod
    def of(q: Tensor, k: Tensor, query_starts: _STARTS) -> "_Shape":
        """Read the sizes off q and k, [B, T, N, H] or [X, N, H]."""
        sequences = q.shape[0] if query_starts is None else query_starts.shape[0] - 1
        return _Shape(sequences, q.shape[-3], k.shape[-3], q.shape[-2] // k.shape[-2])


class _resources:  # noqa: N801
    """Say in one line which configuration does not fit this device."""

    def __init__(self, config: tuple[int, ...]) -> None:
        self.config = tuple(config)

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Turn Triton's complaint about too little shared memory or registers into a `KernelError`."""
        if isinstance(error, OutOfResources):
            raise KernelError(
                f"config = {self.config}: expected {error.name} up to {error.limit}, because this GPU has no more, and the "
                f"kernel needs {error.required}; try a smaller tile or fewer stages"
            ) from error


def _describe(x: Tensor, rows: int, padded: int, tma: bool) -> Any:
    """Return a descriptor of tiles of `rows` positions of one head, [batch, head, position, width]; x itself without TMA.

    Packed rows get a ragged one, whose bounds are each sequence's: a tile that runs past its sequence reads zeros.
    """
    if not tma:
        return x
    if x.ndim == 3:
        return create_ragged_descriptor(x.permute(1, 0, 2), [1, rows, padded], ragged_dim=1)
    view = x.permute(0, 2, 1, 3)
    return TensorDescriptor(x, list(view.shape), list(view.stride()), [1, 1, rows, padded])


def _describe_lines(x: Tensor, length: int, cfg: KeyConfig) -> Any:
    """Return a descriptor of `block_m` numbers of one line, [line, place], each line `length` long; x without TMA."""
    lines = x.flatten(0, -2)
    return TensorDescriptor(lines, [len(lines), length], list(lines.stride()), [1, cfg.block_m]) if cfg.tma else x

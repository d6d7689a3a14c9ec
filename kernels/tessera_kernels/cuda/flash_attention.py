"""Attention in CUDA C++: warpgroup products and the copy engine on Hopper, products of one warp elsewhere.

Equations, tile pictures and what lives where: `flash_attention_sm90.cu`, `flash_attention_backward_sm90.cu` and
`flash_attention_sm80.cu`; what they share: `attention.cuh`. This file checks, lays out memory and launches. Where there is
no backward here (see `has_backward`) it is the Triton kernel's, which reads the same out, lse, top and spread. float16 and
bfloat16; causal or full, grouped key/value heads, sliding window, soft cap, packed sequences, any head width that is a
multiple of 16 up to 256.

Reference: `tessera_kernels.reference.flash_attention`.
"""

# ruff: noqa: ARG001 - a backward takes what every backward takes, a fake what its op takes

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tessera_kernels.attention_rule import (
    FAR,
    Rule,
    check_dense,
    check_packed,
    describable,
    heads_at_once,
    outer_strides,
    rule_of,
    unit_rows,
)
from tessera_kernels.checks import expect_choice
from tessera_kernels.cuda._attention_configs import (
    BACKWARD_QUERIES,
    CONFIGS,
    DTYPES,
    CudaConfig,
    capability,
    choose_config,
    padded_width,
)
from tessera_kernels.cuda._attention_waves import backward_turns, turns
from tessera_kernels.cuda._launch import Int64, Kernel, expect_cuda_device, launch, num_sms, tensor_map
from tessera_kernels.launching import SHARED_BYTES, graph_op
from tessera_kernels.triton.flash_attention import Attention, fake_backward, fake_forward
from tessera_kernels.triton.flash_attention import run_backward as run_triton_backward
from tessera_kernels.triton.flash_attention_configs import choose_config as choose_backward
from tessera_shared.errors import KernelError

NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
ENTRY = "flash_attention_forward"

BACKWARD_ENTRIES = ("gather_rows", "flash_attention_backward", "finish_queries")
BACKWARD_STAGES = 2
BACKWARD_BYTES = 2 * 128 * 128 * 2 + 2 * BACKWARD_STAGES * 64 * 128 * 2 + 2 * 128 * 64 * 2 + 64 * 128 * 4 + 3072
"""Shared memory of the backward: K, V, the rings, dS twice, dQ, and the rows' numbers with the barriers."""

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
    config: CudaConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out_BTNH in the inputs' dtype, lse_BNT float32); both can be differentiated.

    As `tessera_kernels.triton.flash_attention`, for float16 and bfloat16. `KernelError` says what does not fit.
    """
    expect_cuda_device("q_BTNH", q_BTNH)
    check_dense(q_BTNH, k_BSKH, v_BSKH, DTYPES)
    rule = rule_of(q_BTNH.shape[-1], scale, softcap, window, causal)
    return _attend(
        (q_BTNH, k_BSKH, v_BSKH), (None, None), (q_BTNH.shape[1], k_BSKH.shape[1]), rule, deterministic, config
    )


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
    config: CudaConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within each of B packed sequences: (out_XNH, lse_NX float32); see the Triton kernel of this name."""
    expect_cuda_device("q_XNH", q_XNH)
    check_packed(q_XNH, k_YKH, v_YKH, query_starts, key_starts, DTYPES)
    rule = rule_of(q_XNH.shape[-1], scale, softcap, window, causal)
    starts = (query_starts.contiguous(), key_starts.contiguous())
    return _attend((q_XNH, k_YKH, v_YKH), starts, (longest_query, longest_key), rule, deterministic, config)


def _attend(
    heads: tuple[Tensor, Tensor, Tensor], starts: tuple[_STARTS, _STARTS], longest: tuple[int, int], rule: Rule,
    deterministic: bool, config: CudaConfig | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q = heads[0]
    cut = config or choose_config(q.shape[-1], capability(q.device))
    _expect_fitting(cut, q)
    backward = choose_backward(q.shape[-1], q.dtype)
    out, lse, _, _ = _Attention.apply(  # type: ignore[no-untyped-call]
        *heads, *starts, *longest, *rule, deterministic, list(cut), list(backward.keys), list(backward.queries)
    )
    return out, lse


def _expect_fitting(cut: CudaConfig, q: Tensor) -> None:
    padded = padded_width(q.shape[-1])
    if cut.width not in (0, padded):
        raise KernelError(
            f"config.width = {cut.width}: expected {padded}, because a head of {q.shape[-1]} is padded to that; try config=None"
        )
    expect_choice("config.arch", cut.arch, (80, 90))
    if cut.arch == 90 and capability(q.device) != 90:
        raise KernelError(
            "config.arch = 90: expected 80, because this GPU is not Hopper and lacks its instructions; try config=None"
        )
    if cut.shared_bytes(padded) > SHARED_BYTES:
        raise KernelError(
            f"config = {tuple(cut)}: expected at most {SHARED_BYTES} bytes of shared memory, because a block has no more, and "
            f"this takes {cut.shared_bytes(padded)}; try fewer keys or stages"
        )


class _Attention(Attention):
    """Autograd's view: (q, k, v, starts, lengths, rule, cuts) -> (out, lse, and what the backward needs of each row)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor, k: Tensor, v: Tensor, query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
        scale: float, softcap: float, window: int, causal: bool, deterministic: bool,
        cut: list[int], key_cut: list[int], query_cut: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
        plain = (longest_query, longest_key, scale, softcap, window, causal)
        out, lse, top, spread = _run_forward(q, k, v, query_starts, key_starts, *plain, cut)
        saved = (q, k, v, out, top, spread, query_starts, key_starts)
        if query_starts is None and has_backward(q.shape[-1], softcap, deterministic, CudaConfig(*cut)):
            Attention.keep(ctx, *saved, plain=(*plain, cut), run=_run_backward)
        else:
            Attention.keep(ctx, *saved, plain=(*plain, key_cut, query_cut), run=run_triton_backward)
        return out, lse, top, spread


def has_backward(width: int, softcap: float | None, deterministic: bool, cut: CudaConfig) -> bool:
    """Is the backward of dense sequences CUDA C++ too? It adds dQ up in no fixed order."""
    return cut.arch == 90 and padded_width(width) == 128 and not softcap and not deterministic


@graph_op("cuda_flash_attention_forward", fake=fake_forward)
def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, cut: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, lse, and what the backward takes each row's weights from, all rows as (sequence, head, query).

    That is a score before scaling, near the row's largest, and the log2 of the row's sum relative to it.
    """
    rule, cfg = Rule(scale, softcap, window, causal), CudaConfig(*cut)
    made = fake_forward(
        q, k, v, query_starts, key_starts, longest_query, longest_key, scale, softcap, window, causal, cut
    )
    if query_starts is not None or k.numel() == 0:  # rows that no block comes to
        for tensor, value in zip(made, (0.0, -math.inf, 0.0, math.inf), strict=True):
            tensor.fill_(value)
    if q.numel() == 0 or k.numel() == 0 or longest_query == 0:
        return made
    q, k, v = (x if describable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    sizes, count = _problem(q, k, query_starts, longest_query, longest_key, rule, cfg)
    starts = (query_starts, key_starts)
    capped = rule.softcap > 0.0
    numbers = (q.shape[-1], rule.unit * math.log2(math.e), rule.inner)
    padded = padded_width(q.shape[-1])
    where: dict[str, Any] = {"block": cfg.threads, "like": q, "shared_bytes": cfg.shared_bytes(padded)}
    if cfg.arch == 90:
        boxes = ((q, cfg.block_m), (k, cfg.block_n), (v, cfg.block_n))
        maps = [tensor_map(_four(x), (1, 1, rows, 64)) for x, rows in boxes]
        across = min(count, num_sms(q.device))
        turning = query_starts is None and turns(tuple(sizes), cfg.block_m, cfg.block_n, across)
        arguments = [*maps, *made, *starts, *_outer(made[0]), *sizes, count, int(turning), *numbers]
        launch(hopper(q.dtype, padded, cfg, capped), grid=(across, 1, 1), arguments=arguments, **where)
    else:
        strides = [stride for x in (q, k, v, made[0]) for stride in _outer(x)]
        arguments = [q, k, v, *made, *starts, *strides, *sizes, *numbers]
        launch(ampere(q.dtype, padded, cfg), grid=(count, 1, 1), arguments=arguments, **where)
    return made


@functools.cache
def hopper(dtype: torch.dtype, padded: int, cfg: CudaConfig, capped: bool = False) -> Kernel:
    """Return the specialization of `flash_attention_sm90.cu`; `capped`: with a soft cap."""
    defines = (("TYPE", NAMES[dtype]), ("PADDED", padded), ("CONSUMERS", cfg.groups), ("BLOCK_N", cfg.block_n))
    stages = (("STAGES", cfg.stages), ("QUERY_STAGES", cfg.query_stages(padded)), ("SOFTCAP", int(capped)))
    return Kernel("flash_attention_sm90.cu", ENTRY, defines + stages, needs="sm_90a")


@functools.cache
def ampere(dtype: torch.dtype, padded: int, cfg: CudaConfig) -> Kernel:
    """Return the specialization of `flash_attention_sm80.cu`."""
    defines = (("TYPE", NAMES[dtype]), ("PADDED", padded), ("WARPS", cfg.groups), ("BLOCK_N", cfg.block_n))
    return Kernel("flash_attention_sm80.cu", ENTRY, defines)


def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None, top: Tensor, spread: Tensor,
    query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, cut: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_backward(
        q, k, v, out, dout, dlse, top, spread, query_starts, key_starts, longest_query, longest_key, scale, softcap, window,
        causal, cut, cut,
    )  # fmt: skip


@graph_op("cuda_flash_attention_backward", fake=_fake_backward)
def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Tensor | None, top: Tensor, spread: Tensor,
    query_starts: _STARTS, key_starts: _STARTS, longest_query: int, longest_key: int,
    scale: float, softcap: float, window: int, causal: bool, cut: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, contiguous."""
    rule, cfg = Rule(scale, softcap, window, causal), CudaConfig(*cut)
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq, dk, dv = grads
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout = (x if describable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v, dout))
    rows, queries, heads, width = q.shape
    sizes, _ = _problem(q, k, None, queries, longest_key, rule, cfg)
    a_head = 2 * queries * heads // k.shape[2] * width * q.element_size()
    sizes[5] = heads_at_once(a_head, most=rows * k.shape[2])
    sizes[6] = blocks = -(-queries // BACKWARD_QUERIES)
    tiles = (rows * heads, blocks, 1)  # the second may not exceed 65,535
    numbers = torch.empty(rows * heads * blocks, 3, BACKWARD_QUERIES, dtype=torch.float32, device=q.device)
    sums = numbers.new_empty(rows * heads * blocks, BACKWARD_QUERIES, 128)
    prepare, main, finish = (backward(q.dtype, cfg.overlap, entry) for entry in BACKWARD_ENTRIES)
    given = [out, dout, dlse, top, spread, numbers, sums, queries, heads, blocks, *_outer(dout), width]
    launch(prepare, grid=tiles, block=256, arguments=given, like=q)
    boxes = ((q, BACKWARD_QUERIES), (k, 128), (v, 128), (dout, BACKWARD_QUERIES))
    maps = [tensor_map(_four(x), (1, 1, count, 64)) for x, count in boxes]
    count = -(-k.shape[1] // 128) * rows * k.shape[2]
    across = min(count, num_sms(q.device))
    order = [count, int(backward_turns(tuple(sizes), across))]
    launch(
        main, grid=(across, 1, 1), block=384, shared_bytes=BACKWARD_BYTES, like=q,
        arguments=[*maps, numbers, sums, dk, dv, *sizes, *order, width, rule.unit * math.log2(math.e), rule.scale],
    )  # fmt: skip
    launch(finish, grid=tiles, block=256, arguments=[sums, dq, queries, heads, blocks, width, rule.scale], like=q)
    return dq, dk, dv


@functools.cache
def backward(dtype: torch.dtype, overlap: int, entry: str) -> Kernel:
    """Return one kernel of `flash_attention_backward_sm90.cu`."""
    defines = (("TYPE", NAMES[dtype]), ("STAGES", BACKWARD_STAGES), ("OVERLAP", overlap))
    return Kernel("flash_attention_backward_sm90.cu", entry, defines, needs="sm_90a")


def _problem(
    q: Tensor, k: Tensor, query_starts: _STARTS, longest_query: int, longest_key: int, rule: Rule, cfg: CudaConfig
) -> tuple[list[int], int]:
    """Return the sizes that both kernels take, and the number of tiles."""
    sequences = q.shape[0] if query_starts is None else query_starts.shape[0] - 1
    heads, kv_heads = q.shape[-2], k.shape[-2]
    blocks = -(-longest_query // cfg.block_m)
    a_head = 2 * longest_key * k.shape[-1] * k.element_size()
    section = heads_at_once(a_head, group=heads // kv_heads, most=sequences * heads)
    reach = rule.window - 1 if rule.window else FAR
    sizes = [sequences, q.shape[-3], k.shape[-3], heads, heads // kv_heads, section, blocks]
    return [*sizes, reach, 0 if rule.causal else reach], blocks * sequences * heads


def _outer(x: Tensor) -> list[Int64]:
    return [Int64(stride) for stride in outer_strides(x)]


def _four(x: Tensor) -> Tensor:
    """Return x as [batch, head, row, column] with the strides that it has; packed rows are one sequence."""
    return (x if x.ndim == 4 else x.unsqueeze(0)).permute(0, 2, 1, 3)


def specializations() -> list[Kernel]:
    """Return what `python -m tessera_kernels.cuda.build` compiles: every configuration at the widths that it is for."""
    found = []
    for cfg in CONFIGS:
        if cfg.overlap != CudaConfig._field_defaults["overlap"]:
            continue  # the forward is the same
        for padded in (64, 128, 256) if cfg.width == 0 else (cfg.width,):
            source = hopper if cfg.arch == 90 else ampere
            found += [source(dtype, padded, cfg) for dtype in DTYPES if cfg.shared_bytes(padded) <= SHARED_BYTES]
    found += [hopper(dtype, padded, choose_config(padded, 90), True) for dtype in DTYPES for padded in (64, 128, 256)]
    return found + [backward(dtype, overlap, BACKWARD_ENTRIES[1]) for dtype in DTYPES for overlap in (1, 2)]

"""Attention over a page table: split-KV decode and chunked prefill, out = softmax(u c(Q K^T)) V, one kernel for both.

    c(x) = x and u = scale, or with a soft cap c(x) = tanh(x scale / softcap) and u = softcap
    split i:   m_i = max_s c,  l_i = sum_s e^(u (c_s - m_i)),  A_i = sum_s e^(u (c_s - m_i)) V_s     (online, tile by tile)
    merge:     m = max_i m_i,  out = sum_i e^(u (m_i - m)) A_i / sum_i e^(u (m_i - m)) l_i          (i = 0, 1, 2, ...)
    (Dao et al. 2022, arXiv 2205.14135; Flash-Decoding, 2023; pages: Kwon et al. 2023, arXiv 2309.06180)

            split 0             split 1           HBM        pages, table, q, out; A, m, l of the splits
          +--------+--------+--------+--------+   shared     q, and STAGES tiles of K and V in flight
    rows  | page 7 | page 2 | page 9 | page 4 |   registers  S, P, A, m, l in float32; pages of the next tile
          +--------+--------+--------+--------+
    Rows of a program are (query, head of the group): all heads that share a key/value head read it once. A decode step has
    one query, and its group is padded to 16 rows, the least of a tensor-core product.

Which split a key falls into: with `split_size`, key s of a row falls into split s // split_size, so that a row's bits do not
depend on its batch; with `splits`, a row's keys are divided evenly. By default there are as many splits as fill the GPU,
judged by shapes alone: no length is read by the host, and a CUDA graph replays what it recorded.

Reference: `tessera_kernels.reference.paged_attention`.
"""

# ruff: noqa: ARG001 - a fake takes what its op takes

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tessera_kernels.attention_rule import Rule, expect_groups, precision, rule_of
from tessera_kernels.checks import (
    expect_between,
    expect_dtype,
    expect_multiple,
    expect_page_table,
    expect_rank,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    expect_triton_device,
)
from tessera_kernels.triton._launch import FLOATS, SHARED_BYTES, graph_op, is_far, num_sms, on_device
from tessera_kernels.triton._paged_kernels import merge_kernel, split_kernel
from tessera_shared.errors import KernelError

__all__ = ["CONFIGS", "PagedConfig", "choose_config", "choose_splits", "paged_attention", "paged_prefill"]

REGISTERS = 65536
"""Registers of one multiprocessor."""

MOST_SPLITS = 1024
"""A merging program reads the maxima of all splits at once."""


class PagedConfig(NamedTuple):
    """How the work is cut up. Integers only: it travels through a custom op's schema."""

    block_m: int  # rows of a program: (query, head of the group)
    block_n: int  # keys of a tile
    num_warps: int
    stages: int  # tiles of K and V in flight

    def shared_bytes(self, padded: int, itemsize: int) -> int:
        """Estimate the shared memory: q, P, and K and V in flight (one tile of them in registers where M is small)."""
        buffers = self.stages - (self.block_m < 64)
        tiles = (2 * buffers * self.block_n + self.block_m) * padded
        return (tiles + self.block_m * self.block_n) * itemsize + 1024

    def programs_per_sm(self, padded: int, itemsize: int) -> int:
        """Estimate how many programs one multiprocessor runs at a time; registers a thread as seen in compiled code."""
        registers = {1: 248, 2: 200}.get(self.num_warps, 168) if self.block_m <= 16 else 240
        by_registers = REGISTERS // (32 * self.num_warps * registers)
        return max(1, min(by_registers, SHARED_BYTES // self.shared_bytes(padded, itemsize)))


CONFIGS: tuple[PagedConfig, ...] = (
    PagedConfig(16, 64, 4, 3),
    PagedConfig(16, 64, 4, 2),
    PagedConfig(16, 64, 4, 4),
    PagedConfig(16, 32, 4, 4),
    PagedConfig(16, 32, 4, 3),
    PagedConfig(16, 32, 2, 3),
    PagedConfig(16, 32, 2, 4),
    PagedConfig(16, 64, 2, 3),
    PagedConfig(16, 16, 1, 4),
    PagedConfig(16, 128, 4, 2),
    PagedConfig(16, 128, 4, 3),
    PagedConfig(16, 128, 8, 3),
    PagedConfig(32, 64, 4, 3),
    PagedConfig(32, 32, 4, 2),
    PagedConfig(64, 64, 4, 3),
    PagedConfig(64, 64, 8, 2),
    PagedConfig(64, 128, 4, 2),
    PagedConfig(128, 64, 8, 3),
    PagedConfig(128, 32, 8, 3),
    PagedConfig(128, 128, 8, 2),
)
"""Every configuration that `choose_config` can give, and those that the sweep compares it with."""

FLOAT32_SCORES = 2048
"""Largest tile of scores in float32, whose products are unrolled multiply-adds: more would spill and compile for minutes."""


def choose_config(rows: int, width: int, dtype: torch.dtype) -> PagedConfig:
    """Return the configuration for sequences of up to `rows` (query, head of the group) pairs a key/value head."""
    if dtype == torch.float32:
        return PagedConfig(16, 32, 4, 3) if rows <= 16 else PagedConfig(32, 32, 4, 2)
    wide = width > 128
    if rows <= 16:
        return PagedConfig(16, 32, 4, 4) if wide else PagedConfig(16, 64, 4, 3)
    if rows <= 32:
        return PagedConfig(32, 32, 4, 2) if wide else PagedConfig(32, 64, 4, 3)
    if rows <= 64:
        return PagedConfig(64, 64, 8, 2) if wide else PagedConfig(64, 64, 4, 3)
    return PagedConfig(128, 32, 8, 3) if wide else PagedConfig(128, 64, 8, 3)


@functools.cache  # asked at every call, and a search: a millisecond and more where there are few programs
def choose_splits(programs: int, tiles: int, sms: int, wanted: int) -> int:
    """Return among how many splits to divide up to `tiles` tiles of keys for each of `programs`.

    Least time in units of a tile: the busiest of `sms` multiprocessors has so many programs, each as long as its tiles and
    START, and fewer than `wanted` at a time do not draw all of its bandwidth; then the merge reads the parts.
    """
    most = max(1, min(tiles // LEAST_TILES, MOST_SPLITS, 4 * -(-wanted * sms // max(1, programs))))
    best, least = 1, math.inf
    for splits in range(1, most + 1):
        busiest = max(wanted, -(-programs * splits // sms))
        time = busiest * (-(-tiles // splits) + START) + (MERGE + splits / 8 if splits > 1 else 0)
        if time < least:
            best, least = splits, time
    return best


LEAST_TILES = 2
"""Tiles that a split has at least, when every sequence is as long as its row of the page table."""

START, MERGE = 2, 4
"""Tiles of work that starting a program costs, and the merging kernel."""

WANTED = 2
"""Programs at a time that draw all the bandwidth a multiprocessor gets."""


def paged_attention(
    q_BNH: Tensor,
    key_pages_PZKH: Tensor,
    value_pages_PZKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    splits: int | None = None,
    split_size: int | None = None,
    config: PagedConfig | None = None,
    check_pages: bool = False,
) -> Tensor:
    """Return out_BNH in q's dtype: one query a sequence, which stands at position length - 1 and sees all keys up to there.

    Key s of sequence b lies in slot s % Z of page page_table_BM[b, s // Z]; entries past the length are not looked at.
    Table and lengths are int32, on the device, never read by the host unless `check_pages`, which waits for the device and
    raises for what does not exist (else a wrong page is some page, a wrong length is cut to the table). A length of 0
    gives zeros. `window`: only the last that many keys. `splits` or `split_size` (a multiple of the configuration's
    block_n) fix how a row's keys are divided: see the module. float16, bfloat16 or float32; N a multiple of K; H a
    multiple of 16 up to 256; any Z. Pages may be strided (one tensor for keys and values, heads before slots), as long as
    a head's numbers lie side by side. No gradient. `KernelError` says what does not fit.
    """
    expect_shape("lengths_B", lengths_B, (q_BNH.shape[0],), "each sequence has one query and one length")
    return _attend(
        q_BNH, key_pages_PZKH, value_pages_PZKH, page_table_BM, lengths_B, None, 1, scale, softcap, window, splits,
        split_size, config, check_pages,
    )  # fmt: skip


def paged_prefill(
    q_XNH: Tensor,
    key_pages_PZKH: Tensor,
    value_pages_PZKH: Tensor,
    page_table_BM: Tensor,
    lengths_B: Tensor,
    query_starts: Tensor,
    *,
    longest_query: int,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    splits: int | None = None,
    split_size: int | None = None,
    config: PagedConfig | None = None,
    check_pages: bool = False,
) -> Tensor:
    """Return out_XNH: the newest queries of B sequences against all their keys so far, causal, for chunked prefill.

    Sequence i has the queries query_starts[i] to query_starts[i + 1] (int32 [B + 1], rising, on the device); the last of
    them stands at position lengths_B[i] - 1, and their own keys are in the pages already. `longest_query` is at least the
    most queries of a sequence; queries past it, rows past the last sequence and queries that see nothing give zeros.
    Everything else as in `paged_attention`.
    """
    expect_shape("query_starts", query_starts, (lengths_B.shape[0] + 1,), "sequences lie between B + 1 edges")
    expect_dtype("query_starts", query_starts, torch.int32)
    expect_same_device({"q_XNH": q_XNH, "query_starts": query_starts})
    expect_between("longest_query", longest_query, 0, 2**24, "it is a number of queries")
    return _attend(
        q_XNH, key_pages_PZKH, value_pages_PZKH, page_table_BM, lengths_B, query_starts.contiguous(), longest_query, scale,
        softcap, window, splits, split_size, config, check_pages,
    )  # fmt: skip


def _attend(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, starts: Tensor | None, longest: int,
    scale: float | None, softcap: float | None, window: int | None, splits: int | None, split_size: int | None,
    config: PagedConfig | None, check_pages: bool,
) -> Tensor:  # fmt: skip
    _check(q, k, v, table, lengths)
    rule = rule_of(q.shape[-1], scale, softcap, window)
    if check_pages:
        expect_page_table(table, lengths, num_pages=k.shape[0], page_size=k.shape[1])
    group = q.shape[1] // max(1, k.shape[2])
    chosen = config or choose_config(longest * group, q.shape[-1], q.dtype)
    _expect_fitting(chosen, q)
    division = _division(splits, split_size, chosen)
    return _launch(q, k, v, table, lengths.contiguous(), starts, longest, *rule[:3], *division, list(chosen))


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> None:
    expect_rank("q", q, 3)
    expect_rank("key_pages_PZKH", k, 4)
    expect_triton_device("q", q)
    expect_dtype("q", q, *FLOATS)
    tensors = {"q": q, "key_pages_PZKH": k, "value_pages_PZKH": v}
    expect_same_device(tensors | {"page_table_BM": table, "lengths_B": lengths})
    expect_same_dtype(tensors)
    expect_shape("key_pages_PZKH", k, (None, None, None, q.shape[-1]), "the head width is the queries'")
    expect_shape("value_pages_PZKH", v, tuple(k.shape), "each key has one value of the head width")
    expect_rank("page_table_BM", table, 2)
    expect_shape("lengths_B", lengths, (table.shape[0],), "each row of page_table_BM has one length")
    for what, tensor in (("page_table_BM", table), ("lengths_B", lengths)):
        expect_dtype(what, tensor, torch.int32)
    for what, pages in (("key_pages_PZKH", k), ("value_pages_PZKH", v)):
        if pages.shape[-1] > 1 and pages.stride(-1) != 1:
            raise KernelError(
                f"{what}.stride(-1) = {pages.stride(-1)}: expected 1, because a head is read in 16-byte pieces and a copy of "
                "all pages would cost more than the attention; try pages whose last dimension is the head width"
            )
    expect_multiple("head width", q.shape[-1], 16, "a tensor-core product takes 16 columns at a time")
    expect_between("head width", q.shape[-1], 16, 256, "a head is one tile")
    expect_groups(q.shape[1], k.shape[2])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise KernelError(
            "requires_grad = True: expected False, because attention over pages has no backward; try torch.no_grad(), or "
            "flash_attention for training"
        )


def _division(splits: int | None, split_size: int | None, config: PagedConfig) -> tuple[int, int]:
    """Return (splits, tiles of a split); 0 = not said."""
    if splits is not None and split_size is not None:
        raise KernelError(
            f"splits = {splits}, split_size = {split_size}: expected one of the two, because one follows from the other; "
            "try split_size alone"
        )
    if splits is not None:
        expect_between("splits", splits, 1, MOST_SPLITS, "the merge reads all of them at once")
    if split_size is not None:
        expect_multiple("split_size", split_size, config.block_n, "a split is a whole number of the config's tiles")
    return splits or 0, (split_size or 0) // config.block_n


def _expect_fitting(config: PagedConfig, q: Tensor) -> None:
    if q.dtype == torch.float32 and config.block_m * config.block_n > FLOAT32_SCORES:
        raise KernelError(
            f"config = {tuple(config)}: expected tiles of at most {FLOAT32_SCORES} scores for float32, because full precision "
            "has no tensor cores; try config=None"
        )
    needed = config.shared_bytes(triton.next_power_of_2(q.shape[-1]), q.element_size())
    if needed > SHARED_BYTES:
        raise KernelError(
            f"config = {tuple(config)}: expected at most {SHARED_BYTES} bytes of shared memory, because a program has no more, "
            f"and tiles of head width {q.shape[-1]} take {needed}; try config=None"
        )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, starts: Tensor | None, longest: int,
    scale: float, softcap: float, window: int, splits: int, split_tiles: int, cut: list[int],
) -> Tensor:  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@graph_op("paged_attention", fake=_fake)
def _launch(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, starts: Tensor | None, longest: int,
    scale: float, softcap: float, window: int, splits: int, split_tiles: int, cut: list[int],
) -> Tensor:  # fmt: skip
    rule, config = Rule(scale, softcap, window), PagedConfig(*cut)
    q, table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, table))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sequences, table_width = table.shape
    if q.numel() == 0 or k.numel() == 0 or table.numel() == 0 or longest == 0:
        return out.zero_()
    rows, heads, width = q.shape
    page_size, kv_heads = k.shape[1:3]
    padded, group = triton.next_power_of_2(width), heads // kv_heads
    blocks = triton.cdiv(longest * group, config.block_m)
    splits = _num_splits(
        splits, split_tiles, sequences * blocks * kv_heads, table_width * page_size, rule.window, config, q
    )
    parts, tops, totals = out, out, out
    if splits > 1:
        parts = q.new_empty((splits, rows, heads, width), dtype=torch.float32)
        tops, totals = (q.new_empty((splits, rows, heads), dtype=torch.float32) for _ in range(2))
    if starts is not None:  # rows that no program comes to
        (out if splits == 1 else totals).zero_()
    with on_device(q):
        split_kernel[(sequences * blocks * kv_heads * splits,)](
            q, k, v, table, lengths, starts, parts, tops, totals, q.stride(0), q.stride(1), *k.stride()[:3],
            *v.stride()[:3], table.stride(0), rows, k.shape[0], table_width, heads, kv_heads, blocks, splits, split_tiles,
            rule.window, rule.unit, rule.inner, GROUP=group, PAGE=page_size, WIDTH=width, PADDED=padded,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, VARLEN=starts is not None,
            WINDOW=rule.window > 0, SOFTCAP=rule.softcap > 0.0, SPLIT=splits > 1, FAR=is_far(q, k, v, dim=1),
            PRECISION=precision(q), num_warps=config.num_warps, num_stages=config.stages,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(rows * heads,)](
                parts, tops, totals, out, rows * heads, splits, rule.unit,
                SPLITS=triton.next_power_of_2(splits), WIDTH=width, PADDED=padded, num_warps=2,
            )  # fmt: skip
    return out


def _num_splits(
    splits: int, split_tiles: int, programs: int, most_keys: int, window: int, config: PagedConfig, q: Tensor
) -> int:
    """Return the splits of the grid: as asked for, else as many as fill the GPU; more than tiles only where asked for."""
    if splits:
        return splits
    if window and q.shape[0] and programs:
        most_keys = min(most_keys, window + 2 * config.block_n + config.block_m)
    tiles: int = triton.cdiv(most_keys, config.block_n)
    if split_tiles:
        found = -(-tiles // split_tiles)
        expect_between("splits that split_size gives", found, 1, MOST_SPLITS, "the merge reads all of them at once")
        return found
    at_once = config.programs_per_sm(triton.next_power_of_2(q.shape[-1]), q.element_size())
    return choose_splits(programs, tiles, num_sms(q.device), min(WANTED, at_once))

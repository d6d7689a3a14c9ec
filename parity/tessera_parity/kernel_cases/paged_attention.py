"""Cases of attention over a page table: decode and chunked prefill, page sizes, shuffled tables, ragged tails, shared prefixes.

Sequences share pages of a common prefix. Pages of no sequence and slots past a length hold NaN, table entries past a length the
least integer: a key that should not be read poisons the answer. A prefill is drawn as [rows, queries] with each row's number of
queries beside it, and packed on the way into the kernel, with NaN rows of no sequence after the last one, so that a row alone
must equal the row in its batch, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference import paged_attention as plain
from tessera_kernels.triton import paged_attention as paged
from tessera_kernels.triton.paged_attention import CONFIGS, PagedConfig
from tessera_parity.kernel_budget import finer
from tessera_parity.kernel_cases.case import (
    KernelOp,
    Tensors,
    draw,
    dtypes,
    lay_out,
    layouts,
    poison_of,
    seeds,
    sizes,
    value_kinds,
)
from tessera_parity.loading import Patch

KERNELS = "tessera_kernels/triton/_paged_kernels"

SMALL = PagedConfig(16, 16, 4, 2)
"""Lets the interpreter see several tiles and splits at small sizes; for it alone."""

BEYOND = 2
"""Rows after the last sequence of a prefill."""

PAGES = ("separate", "joint", "heads_first")
"""Two tensors | one [P, 2, Z, K, H] for both | [P, K, Z, H] seen as [P, Z, K, H]."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """q [rows, queries, kv_heads * group, width] against pages of `page_size`; lengths up to `longest` keys."""

    dtype: str = "float32"
    layout: str = "contiguous"  # of q
    values: str = "normal"
    seed: int = 0
    rows: int = 2
    queries: int = 0  # 0 = decode, else a prefill of up to so many
    longest: int = 40
    page_size: int = 8
    kv_heads: int = 1
    group: int = 1
    width: int = 16
    pages: str = "separate"
    full: bool = False  # all lengths are the longest
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    splits: int | None = None
    split_tiles: int | None = None  # split_size in tiles of the configuration
    config: PagedConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=dtypes(),
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
        rows=st.integers(0, 9 if gpu else 3),
        queries=st.sampled_from([0, 0, 1, 7, 33, 130]) if gpu else st.sampled_from([0, 0, 1, 9, 20]),
        longest=sizes(tile=128, most=2100) if gpu else sizes(tile=16, most=70),
        page_size=st.sampled_from([8, 16, 32, 64, 128, 1, 5]) if gpu else st.sampled_from([8, 16, 32, 5, 1]),
        kv_heads=st.integers(1, 3 if gpu else 2),
        group=st.sampled_from([1, 2, 4, 5, 8, 17]) if gpu else st.sampled_from([1, 3, 4]),
        width=st.sampled_from([16, 48, 64, 80, 128, 256]) if gpu else st.sampled_from([16, 32, 48]),
        pages=st.sampled_from(PAGES),
        full=st.booleans(),
        scale=st.sampled_from([None, 0.3]),
        window=st.none() | st.integers(1, 300 if gpu else 40),
        softcap=st.none() | st.sampled_from([2.0, 30.0]),
        splits=st.none(),
        split_tiles=st.none() | st.integers(1, 3),
        config=st.none() if gpu else st.just(SMALL),
    ) | st.builds(
        Case,
        rows=st.integers(1, 3),
        longest=sizes(tile=16, most=2100 if gpu else 70),
        splits=st.integers(1, 9),
        queries=st.sampled_from([0, 0, 5]),
        dtype=dtypes(),
        seed=seeds(),
        config=st.none() if gpu else st.just(SMALL),
    )


def _tensors(case: Case) -> Tensors:
    stream = torch.Generator().manual_seed(case.seed)
    width_M = -(-case.longest // case.page_size)
    share = torch.rand(case.rows, generator=stream) * 1.4 - 0.2  # some empty, some of full length
    lengths_B = (
        (torch.ones(case.rows) if case.full else share.clamp(0.0, 1.0)).mul(case.longest).round().to(torch.int32)
    )
    page_table_BM, owned = _table(case, lengths_B, width_M, stream)
    keys, values = (_pages(case, name, owned) for name in ("keys", "values"))
    found = {
        "q": draw(case, "q", (case.rows, max(1, case.queries), case.kv_heads * case.group, case.width)),
        "page_table": lay_out(page_table_BM, "sliced"),
        "lengths": lay_out(lengths_B, "contiguous"),
        "counts": lay_out(_counts(case, lengths_B, stream), "contiguous"),
    }
    if case.pages == "joint":
        return found | {"cache": lay_out(torch.stack([keys, values], 1), "contiguous")}
    if case.pages == "heads_first":
        keys, values = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    layout = "offset1" if case.layout == "offset1" else "contiguous"
    return found | {"keys": lay_out(keys, layout), "values": lay_out(values, layout)}


def _table(case: Case, lengths_B: Tensor, width_M: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a shuffled table, and how many slots of each page belong to a sequence; odd rows share row 0's first pages."""
    num_pages = case.rows * width_M + 3
    order = torch.randperm(num_pages, generator=stream)[: case.rows * width_M].view(case.rows, width_M)
    used_BM = (lengths_B[:, None] - torch.arange(width_M) * case.page_size).clamp(0, case.page_size)
    if case.rows > 1:
        whole = int((used_BM[0] == case.page_size).sum())
        order[1::2, : whole // 2] = order[0, : whole // 2]
    owned = torch.zeros(num_pages, dtype=torch.long).scatter_reduce(
        0, order.flatten(), used_BM.flatten().long(), "amax"
    )
    return order.masked_fill(used_BM == 0, poison_of(torch.int32)).to(torch.int32), owned


def _pages(case: Case, name: str, owned: Tensor) -> Tensor:
    shape = (len(owned), case.page_size, case.kv_heads, case.width)
    free_PZ = torch.arange(case.page_size) >= owned[:, None]
    return draw(case, name, shape, layout="contiguous").masked_fill(free_PZ[..., None, None], torch.nan)


def _counts(case: Case, lengths_B: Tensor, stream: torch.Generator) -> Tensor:
    """Queries of each sequence: in a prefill any number up to `queries`, now and then more than the keys."""
    if case.queries == 0:
        return torch.ones_like(lengths_B)
    share = (torch.rand(case.rows, generator=stream) * 1.4 - 0.2).clamp(0.0, 1.0)
    counts_B = (share * case.queries).round().to(torch.int32)
    return torch.where(torch.rand(case.rows, generator=stream) < 0.9, torch.minimum(counts_B, lengths_B), counts_B)


def _cached(case: Case, tensors: Tensors) -> tuple[Tensor, Tensor]:
    if case.pages == "joint":
        return tensors["cache"][:, 0], tensors["cache"][:, 1]
    if case.pages == "heads_first":
        return tensors["keys"].transpose(1, 2), tensors["values"].transpose(1, 2)
    return tensors["keys"], tensors["values"]


def _run(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    q = tensors["q"]
    given = (*_cached(case, tensors), tensors["page_table"], tensors["lengths"])
    options: dict[str, Any] = {
        "scale": case.scale,
        "softcap": case.softcap,
        "window": case.window,
        "config": case.config,
    }
    options |= _division(case, q)
    if case.queries == 0:
        out = module.paged_attention(q[:, 0], *given, check_pages=True, **options)
        return {"out": out[:, None]}
    counts = tensors["counts"].tolist()
    beyond = q.new_full((BEYOND, *q.shape[2:]), torch.nan)
    packed = lay_out(torch.cat([*(q[i, :count] for i, count in enumerate(counts)), beyond]).cpu(), case.layout)
    starts = torch.tensor([0, *counts], device=q.device).cumsum(0).to(torch.int32)
    out = module.paged_prefill(packed.to(q.device), *given, starts, longest_query=case.queries, **options)
    found = out.new_zeros(q.shape)
    for i, count in enumerate(counts):
        found[i, :count] = out[int(starts[i]) : int(starts[i]) + count]
    return {"out": found, "beyond": out[-BEYOND:]}


def _division(case: Case, q: Tensor) -> dict[str, int | None]:
    """What fixes how keys are divided. A row alone is told what the kernel chose for its batch."""
    config = _config(case)
    if case.splits or case.split_tiles:
        return {"splits": case.splits, "split_size": case.split_tiles and case.split_tiles * config.block_n}
    if q.shape[0] == case.rows:
        return {"splits": None, "split_size": None}
    programs = case.rows * case.kv_heads * -(-max(1, case.queries) * case.group // config.block_m)
    page_table = -(-case.longest // case.page_size) * case.page_size
    chosen = paged._num_splits(0, 0, programs, page_table, case.window or 0, config, q)
    return {"splits": chosen, "split_size": None}


def _config(case: Case) -> PagedConfig:
    rows = max(1, case.queries) * case.group
    return case.config or paged.choose_config(rows, case.width, getattr(torch, case.dtype))


def _magnitudes(case: Case, tensors: Tensors) -> Mapping[str, float]:
    """An error of u32 in a score, relative to the terms of its sum, moves its probability by that times the terms."""
    q = tensors["q"].double()
    keys, values = (x.double().nan_to_num(0.0) for x in _cached(case, tensors))
    if 0 in q.shape or 0 in keys.shape:
        return {}
    scale = case.width**-0.5 if case.scale is None else case.scale
    grouped = q.abs().reshape(*q.shape[:2], case.kv_heads, case.group, q.shape[3])
    terms = scale * float(torch.einsum("btkgh,pzkh->kgbtpz", grouped, keys.abs()).max())
    felt = 1.0 + terms * finer(tensors["q"].dtype)
    return {"out": felt * float(values.abs().max())} if felt > 2.0 else {}


def _lengths(case: Case, tensors: Tensors) -> Mapping[str, int]:
    del tensors
    return {"out": case.longest}


def _bug(find: str, replace: str) -> Patch:
    return Patch(file=f"{KERNELS}.py", find=find, replace=replace)


OP = KernelOp(
    name="paged_attention",
    cases=_cases,
    tensors=_tensors,
    kernel=lambda case, tensors: _run(paged, case, tensors),
    reference=lambda case, tensors: _run(plain, case, tensors),
    row_independent=("out",),
    row_inputs=("q", "page_table", "lengths", "counts"),
    configs=lambda: CONFIGS,
    magnitudes=_magnitudes,
    lengths=_lengths,
    examples=(
        Case(rows=3, longest=50, group=4, kv_heads=2, width=32, config=SMALL, splits=3, seed=7),
        Case(rows=3, longest=70, page_size=16, dtype="bfloat16", split_tiles=1, config=SMALL, seed=1),
        Case(rows=2, longest=33, queries=20, group=3, page_size=5, dtype="float16", config=SMALL, seed=2),
        Case(rows=3, longest=64, queries=9, group=2, page_size=32, window=11, softcap=2.0, config=SMALL, splits=2),
        Case(rows=3, longest=257, group=8, kv_heads=2, width=128, page_size=16, dtype="bfloat16", pages="joint", full=True),
        Case(rows=2, longest=199, queries=130, group=4, width=64, page_size=8, dtype="bfloat16", pages="heads_first"),
        Case(rows=2, longest=300, queries=33, group=5, width=80, page_size=128, dtype="float16", window=50, seed=4),
        Case(rows=2, longest=130, group=17, width=256, page_size=64, dtype="bfloat16", values="mixed", window=70),
        Case(rows=2, longest=129, page_size=1, dtype="float16", values="extreme", layout="offset1"),
        Case(rows=2, longest=65, values="extreme", split_tiles=1, full=True, layout="sliced", softcap=30.0),
        Case(rows=2, longest=65, values="ties", layout="transposed", group=4),
        Case(rows=3, longest=1, page_size=8, full=True),
        Case(rows=2, longest=20, queries=5, splits=3, config=SMALL),
        Case(rows=2, longest=0),
        Case(rows=0, longest=9),
    ),
    bug_cases=(
        Case(rows=3, longest=70, group=4, full=True, config=SMALL, splits=3, scale=1.0),
        Case(rows=2, longest=70, queries=20, group=3, page_size=32, config=SMALL, full=True, window=21, scale=1.0),
        Case(rows=3, longest=45, page_size=16, config=SMALL, seed=1, split_tiles=1, scale=1.0),
        Case(rows=2, longest=20, queries=5, splits=3, config=SMALL),
    ),
    bugs=(
        _bug("page = tl.load(table + key // PAGE, mask", "page = tl.load(table + key * 0 + column // PAGE, mask"),  # wrong page
        _bug("page = _look_up(table, column + BLOCK_N, high", "page = _look_up(table, column, high"),  # the page before
        _bug("    inside = (column + n < high)[:, None]\n", "    inside = (column + n <= high)[:, None]\n"),
        _bug("total = total * fade[:, None] + probs", "total = total + probs"),
        _bug("own * weight, 0)", "own, 0)"),  # stale maximum of a split
        _bug("lanes + lane\n    saw = tl.load(totals_ptr + places, mask=every < splits, other=0.0) != 0.0\n",
             "lanes + lane\n    saw = every < splits\n"),  # maxima that nobody wrote
        _bug("head = kv_head * GROUP + r % GROUP", "head = kv_head * GROUP"),
        _bug("seen = seen & (ahead > -window)", "seen = seen & (ahead >= -window)"),
        _bug("query = (row + tl.arange(0, BLOCK_M)[:, None]) // GROUP", "query = row + tl.arange(0, BLOCK_M)[:, None]"),
        _bug("low += split * split_tiles * BLOCK_N", "low += split * (split_tiles - 1) * BLOCK_N"),
    ),
)  # fmt: skip

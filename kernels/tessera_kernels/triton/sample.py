"""Drawing the next token from given uniforms, exactly and without a sort: temperature, top-k, top-p and min-p.

    order ids by (logit down, id up);  w_i = e^((x_i - x_0) / temperature);  W_n = w_0 + ... + w_(n-1)
    kept = min of  top_k (0 = V),  then the least n with W_n >= top_p W_kept,  then the n with w_i >= min_p for all i < n
    answer = the first i with W_(i+1) > u W_kept

Each of the three edges is a selection: the first place in the order where a rank or a mass is reached. A program has a row:

    pass 1     512 lanes, the largest of each       +--+--+--+-----------+--+   HBM/L2     logits; the list (numbers, ids),
    a sample   sorted, says where edges should lie  |##|##|##| the list  |  |              the sorted sample
    pass 2     the list around the first edge,      +--+--+--+-----------+--+   registers  a tile of the row, sums of each lane
               sums above it, the mass of the row
    the list   cut by 8 pivots at a time down to one value, ids of equal values counted in their order

An edge that lies in the list there is needs no pass (with top-k up to 512 the list holds that many for certain); each other one
takes one more, around where the sample says: 2 to 4 passes. A lane keeps its own part of the list, so that a pass moves nothing
between threads. Where a guess fails (a row that its evenly spaced sample does not stand for, or more neighbors than the list
holds) it is made again of what is left, then pivots cut the row itself. Sums are integers (see `_sample_numbers`): exact, in any
order, so that a row's answer depends on nothing else. Where rounding of e^x to float32 cannot decide, ids are those of float64.

A dtype is one compilation, whatever filters are on and whether a parameter is a number or a tensor. The compiler's time grows
with (reads and writes) x (operations that hang together)^2, hence a sample that passes through memory, and a loop that holds
each helper once: 8 s instead of 27 to 45.

Reference: `tessera_kernels.reference.sample`.
"""

# ruff: noqa: ARG001 - a fake takes what its op takes

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import (
    expect_between,
    expect_dtype,
    expect_rank,
    expect_same_device,
    expect_shape,
    expect_triton_device,
)
from tessera_kernels.triton._launch import FLOATS, graph_op, on_device
from tessera_kernels.triton._sample_kernels import sample_kernel
from tessera_shared.errors import KernelError

__all__ = ["CONFIGS", "SampleConfig", "choose_config", "passes_of", "sample"]


class SampleConfig(NamedTuple):
    """How a row is walked. Integers only: it travels through a custom op's schema."""

    num_warps: int
    lanes: int  # columns of a tile, best one for each thread; top-k up to so many needs two passes
    depth: int  # rows of a tile
    slots: int  # of the list, for each lane
    pivots: int = 8  # of a pass over the row
    list_pivots: int = 8  # of a pass over the list
    list_depth: int = 4  # rows of a tile of the list
    sample: int = 2048  # numbers that say where to look
    scan_depth: int = 16  # rows of a tile of the first pass


CONFIGS: tuple[SampleConfig, ...] = (
    SampleConfig(16, 512, 8, 64),
    SampleConfig(16, 512, 16, 64),  # twice the reads in flight of a pass that lists
    SampleConfig(16, 512, 8, 64, list_pivots=4),  # more and shorter passes over the list
)
"""Every configuration that `choose_config` can give, and those that the sweep compares it with."""

MOST_IDS = 2**24
"""Vocabulary up to which masses keep 38 bits behind the point."""


SAME_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Last bits of a float32 that all numbers of a dtype have in common."""


def choose_config(num_ids: int) -> SampleConfig:
    """Return the configuration for a vocabulary."""
    del num_ids
    return CONFIGS[0]


def sample(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    config: SampleConfig | None = None,
) -> Tensor:
    """Return an int32 id per row: the first in order (logit down, id up) whose cumulative probability exceeds u * kept mass.

    logits_BV float32, bfloat16 or float16, any strides; uniforms_B float32 in [0, 1). Kept are the first `top_k` (0 = all),
    of these the smallest prefix that holds `top_p` of their mass, then those with probability >= `min_p` times the
    largest; the first always. Temperature 0 gives the first, as does a row whose largest logit is not finite (a NaN is
    larger than any number). A parameter is one number, or a tensor with one for each row (temperature, top_p, min_p
    float32; top_k int32), which is not looked at by the host. Nothing waits for the device. No gradient. `KernelError`
    says what does not fit.
    """
    return _drawn(logits_BV, uniforms_B, temperature, top_k, top_p, min_p, config)[0]


def passes_of(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    config: SampleConfig | None = None,
) -> Tensor:
    """Return how often `sample` reads each row, int32 [B]."""
    return _drawn(logits_BV, uniforms_B, temperature, top_k, top_p, min_p, config)[1]


def _drawn(
    logits: Tensor, uniforms: Tensor, temperature: float | Tensor, top_k: int | Tensor, top_p: float | Tensor,
    min_p: float | Tensor, config: SampleConfig | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    expect_rank("logits_BV", logits, 2)
    expect_triton_device("logits_BV", logits)
    expect_dtype("logits_BV", logits, *FLOATS)
    expect_between("vocabulary", logits.shape[1], 1, MOST_IDS, "an id is drawn, and masses of all ids are added up")
    expect_shape("uniforms_B", uniforms, (logits.shape[0],), "each row has one uniform")
    expect_dtype("uniforms_B", uniforms, torch.float32)
    expect_same_device({"logits_BV": logits, "uniforms_B": uniforms})
    each: list[Tensor | None] = []
    plain: list[float] = []
    for what, value, most in (
        ("temperature", temperature, math.inf), ("top_p", top_p, 1.0), ("min_p", min_p, 1.0), ("top_k", top_k, 2**31 - 1),
    ):  # fmt: skip
        given, number = _parameter(what, value, most, logits)
        each.append(given)
        plain.append(number)
    chosen = config or choose_config(logits.shape[1])
    heat_B, top_p_B, min_p_B, top_k_B = each
    heat, most_mass, least_share, top_count = plain
    return _launch(
        logits.detach(), uniforms, heat_B, top_p_B, min_p_B, top_k_B, heat, most_mass, least_share, int(top_count),
        list(chosen),
    )  # fmt: skip


def _parameter(what: str, value: float | Tensor, most: float, logits: Tensor) -> tuple[Tensor | None, float]:
    """Return (a tensor of each row's, or None; the one number)."""
    if isinstance(value, Tensor):
        expect_shape(what, value, (logits.shape[0],), "each row has its own")
        expect_dtype(what, value, torch.int32 if what == "top_k" else torch.float32)
        expect_same_device({"logits_BV": logits, what: value})
        return value.contiguous(), 0.0
    if what == "temperature" and value == math.inf:
        raise KernelError(f"{what} = inf: expected a finite number, because logits are divided by it; try a large one")
    expect_between(what, value, 0, most, "the law has no meaning outside")
    return None, float(value)  # an int would be another compilation


def _fake(
    logits: Tensor, uniforms: Tensor, heat_B: Tensor | None, top_p_B: Tensor | None, min_p_B: Tensor | None,
    top_k_B: Tensor | None, heat: float, top_p: float, min_p: float, top_k: int, settings: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ids = logits.new_empty(logits.shape[0], dtype=torch.int32)
    return ids, torch.empty_like(ids)


@graph_op("sample", fake=_fake)
def _launch(
    logits: Tensor, uniforms: Tensor, heat_B: Tensor | None, top_p_B: Tensor | None, min_p_B: Tensor | None,
    top_k_B: Tensor | None, heat: float, top_p: float, min_p: float, top_k: int, settings: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (ids, passes)."""
    config = SampleConfig(*settings)
    rows, num_ids = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int32)
    passes = torch.empty_like(ids)
    if rows == 0:
        return ids, passes
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    lists = logits.new_empty((rows, 2, config.slots, config.lanes), dtype=torch.int64)
    known = ids.new_empty((rows, config.sample))
    uniforms = uniforms.contiguous()
    each = sum(1 << place for place, own in enumerate((heat_B, top_k_B, top_p_B, min_p_B)) if own is not None)
    heats, ps, ms = (uniforms if own is None else own for own in (heat_B, top_p_B, min_p_B))  # not read when not given
    ks = ids if top_k_B is None else top_k_B
    same = SAME_BITS[logits.dtype]
    with on_device(logits):
        sample_kernel[(rows,)](
            logits, uniforms, ids, passes, known, lists, heats, ks, ps, ms,
            heat, top_k, top_p, min_p, num_ids, logits.stride(0), each,
            DROP=same, ONE=2 ** min(44, 62 - num_ids.bit_length()), DEPTH=config.depth, LANES=config.lanes,
            SLOTS=config.slots, PIVOTS=config.pivots, LIST_PIVOTS=config.list_pivots, LIST_DEPTH=config.list_depth,
            SAMPLE=config.sample, SCAN_DEPTH=config.scan_depth, num_warps=config.num_warps,
        )  # fmt: skip
    return ids, passes

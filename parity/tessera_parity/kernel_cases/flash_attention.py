"""Cases of attention: dense and packed, causal and full, grouped heads, window, soft cap, empty sequences, all gradients.

A packed case is drawn dense, with the lengths of each row's sequence beside it, and packed on the way into the kernel (with
poisoned rows after the last sequence). So a sequence alone must equal the sequence in its pack, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference import flash_attention as plain
from tessera_kernels.triton import flash_attention as fused
from tessera_kernels.triton.flash_attention import CONFIGS, AttentionConfig, choose_config
from tessera_kernels.triton.flash_attention_configs import ForwardConfig, KeyConfig, QueryConfig
from tessera_parity.kernel_budget import finer
from tessera_parity.kernel_cases.case import (
    KernelOp,
    Tensors,
    draw,
    dtypes,
    lay_out,
    layouts,
    seeds,
    sizes,
    value_kinds,
)
from tessera_parity.loading import Patch

FOLDER = "tessera_kernels/triton"
UNUSED = 3
"""Rows after the last packed sequence; NaN going in, zeros coming out."""

SMALL_SPLIT = AttentionConfig(
    ForwardConfig(16, 16, 4, 1, 0), KeyConfig(16, 16, 4, 1, 0, 0, 0), QueryConfig(16, 16, 4, 1, 0)
)
SMALL_FUSED = AttentionConfig(
    ForwardConfig(32, 16, 4, 2, 1), KeyConfig(16, 32, 4, 2, 1, 2, 1), QueryConfig(16, 16, 4, 1, 1)
)
"""Let the interpreter see several tiles, edges and loops at small sizes; for it alone."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """q [rows, queries, kv_heads * group, width] against k, v [rows, keys, kv_heads, width]."""

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"  # of q, k and v
    seed: int = 0
    rows: int = 1
    queries: int = 5
    keys: int = 5
    kv_heads: int = 1
    group: int = 1
    width: int = 16
    scale: float | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    packed: bool = False  # lengths up to queries and keys, zero among them
    deterministic: bool = False
    config: Any = None  # the room's own


def cases_of(gpu: bool, *, dtype: SearchStrategy[str], config: SearchStrategy[Any]) -> SearchStrategy[Case]:
    """Draw cases for the kernel of any room, with its dtypes and configurations."""
    return st.builds(
        Case,
        dtype=dtype,
        layout=layouts(),
        values=value_kinds(),
        seed=seeds(),
        rows=st.integers(1, 3) if gpu else st.integers(1, 2),
        queries=sizes(tile=128, most=1100, least=0) if gpu else sizes(tile=16, most=50, least=0),
        keys=sizes(tile=128, most=1100, least=0) if gpu else sizes(tile=16, most=50, least=0),
        kv_heads=st.integers(1, 3 if gpu else 2),
        group=st.integers(1, 5 if gpu else 3),
        width=st.sampled_from([16, 48, 64, 80, 128, 192, 256]) if gpu else st.sampled_from([16, 32, 48]),
        scale=st.sampled_from([None, 0.3, 1.0]),
        causal=st.booleans(),
        window=st.none() | st.integers(1, 300 if gpu else 40),
        softcap=st.none() | st.sampled_from([2.0, 30.0]),
        packed=st.booleans(),
        deterministic=st.just(False) if gpu else st.booleans(),
        config=config,
    )


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return cases_of(gpu, dtype=dtypes(), config=st.none() if gpu else st.just(SMALL_SPLIT))


def _tensors(case: Case) -> Tensors:
    heads = case.kv_heads * case.group
    found = {
        "q": draw(case, "q", (case.rows, case.queries, heads, case.width)),
        "k": draw(case, "k", (case.rows, case.keys, case.kv_heads, case.width)),
        "v": draw(case, "v", (case.rows, case.keys, case.kv_heads, case.width)),
        "dout": draw(case, "dout", (case.rows, case.queries, heads, case.width), values="normal"),
        "dlse": draw(case, "dlse", (case.rows, heads, case.queries), values="normal", layout="contiguous").float(),
    }
    if case.packed:
        stream = torch.Generator().manual_seed(case.seed)
        share = torch.rand(case.rows, 2, generator=stream) * 1.4 - 0.2  # some empty, some of full length
        found["lengths"] = (share.clamp(0.0, 1.0) * torch.tensor([case.queries, case.keys])).round().to(torch.int32)
    return found


def _options(case: Case) -> dict[str, Any]:
    return {
        "scale": case.scale,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "deterministic": case.deterministic,
        "config": case.config,
    }


def run(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    """Return out, lse and all gradients of a room's flash_attention, by name."""
    if case.packed:
        return _run_packed(module, case, tensors)
    leaves = [tensors[name].detach().requires_grad_() for name in "qkv"]
    out, lse = module.flash_attention(*leaves, **_options(case))
    dlse = tensors["dlse"].to(lse.dtype)
    gradients = torch.autograd.grad([out, lse], leaves, [tensors["dout"], dlse])
    return {"out": out, "lse": lse} | {f"grad {name}": grad for name, grad in zip("qkv", gradients, strict=True)}


def _run_packed(module: ModuleType, case: Case, tensors: Tensors) -> Tensors:
    lengths = tensors["lengths"].tolist()
    q_lengths, k_lengths = [pair[0] for pair in lengths], [pair[1] for pair in lengths]
    leaves = [_pack(tensors["q"], q_lengths, case.layout), *(_pack(tensors[x], k_lengths, case.layout) for x in "kv")]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    edges = [torch.tensor([0, *x], device=leaves[0].device).cumsum(0).to(torch.int32) for x in (q_lengths, k_lengths)]
    out, lse = module.flash_attention_varlen(
        *leaves,
        *edges,
        longest_query=max(q_lengths, default=0),
        longest_key=max(k_lengths, default=0),
        **_options(case),
    )
    dout = _pack(tensors["dout"], q_lengths, case.layout)
    dlse = _pack(tensors["dlse"].transpose(1, 2), q_lengths, "contiguous").T.to(lse.dtype)
    dout[-UNUSED:], dlse[:, -UNUSED:] = 0.0, 0.0
    grads = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    queries, keys = tensors["q"].shape[1], tensors["k"].shape[1]
    found = {"out": _unpack(out, q_lengths, queries), "lse": _unpack(lse.T, q_lengths, queries).transpose(1, 2)}
    found |= {"grad q": _unpack(grads[0], q_lengths, queries), "grad k": _unpack(grads[1], k_lengths, keys)}
    unused = torch.stack([x[-UNUSED:].sum() for x in (out, *grads)])
    return found | {"grad v": _unpack(grads[2], k_lengths, keys), "unused rows": unused}


def _pack(x: Tensor, lengths: list[int], layout: str) -> Tensor:
    parts = [x[row, :length] for row, length in enumerate(lengths)]
    unused = x.new_full((UNUSED, *x.shape[2:]), torch.nan)
    return lay_out(torch.cat([*parts, unused]).detach().cpu(), layout).to(x.device)


def _unpack(x: Tensor, lengths: list[int], longest: int) -> Tensor:
    found = x.new_zeros(len(lengths), longest, *x.shape[1:])
    start = 0
    for row, length in enumerate(lengths):
        found[row, :length] = x[start : start + length]
        start += length
    return found


def _magnitudes(case: Case, tensors: Tensors) -> Mapping[str, float]:
    """Sizes of the terms behind each output.

    An error of u32 in a score, relative to the terms of its sum, moves its probability by that times the terms: outputs
    feel it as 1 + terms u32 / u roundings of theirs, which matters only where scores are large. Gradients of q and k sum
    differences dP - delta, as large as dP.
    """
    q, k, v, dout = (tensors[name].double() for name in ("q", "k", "v", "dout"))
    if 0 in q.shape or 0 in k.shape:
        return {}
    scale = case.width**-0.5 if case.scale is None else case.scale
    k, v = k.repeat_interleave(case.group, 2), v.repeat_interleave(case.group, 2)
    terms = scale * float(torch.einsum("btnh,bsnh->bnts", q.abs(), k.abs()).max())
    dprobs = float(torch.einsum("btnh,bsnh->bnts", dout.abs(), v.abs()).max()) + float(tensors["dlse"].abs().max())
    felt = 1.0 + terms * finer(tensors["q"].dtype)
    sizes_of = {
        "lse": terms,
        "grad q": felt * scale * dprobs * float(k.abs().max()),
        "grad k": felt * scale * dprobs * float(q.abs().max()) * case.group,
    }
    if felt > 2.0:
        sizes_of |= {"out": felt * float(v.abs().max()), "grad v": felt * float(dout.abs().max()) * case.group}
    return sizes_of


def _unordered(case: Case) -> frozenset[str]:
    config = case.config or choose_config(case.width, getattr(torch, case.dtype))
    return frozenset() if config.deterministic else frozenset({"grad q"})


def _bug(file: str, find: str, replace: str) -> Patch:
    return Patch(file=f"{FOLDER}/{file}.py", find=find, replace=replace)


OP = KernelOp(
    name="flash_attention",
    cases=_cases,
    tensors=_tensors,
    kernel=lambda case, tensors: run(fused, case, tensors),
    reference=lambda case, tensors: run(plain, case, tensors),
    row_independent=("out", "lse", "grad k", "grad v"),
    row_inputs=("q", "k", "v", "dout", "dlse", "lengths"),
    configs=lambda: CONFIGS,
    magnitudes=_magnitudes,
    unordered=_unordered,
    examples=(
        Case(rows=2, queries=37, keys=37, kv_heads=2, group=2, width=32),
        Case(rows=2, queries=33, keys=50, group=3, width=48, dtype="bfloat16", packed=True, seed=1),
        Case(queries=40, keys=19, window=7, softcap=2.0, dtype="float16", layout="sliced", values="large"),
        Case(queries=199, keys=199, width=64, dtype="bfloat16", window=50, layout="transposed"),
        Case(queries=130, keys=257, width=128, dtype="float16", causal=False, group=2),
        Case(queries=129, keys=129, width=256, dtype="bfloat16", values="mixed"),
        Case(queries=3, keys=300, width=80, dtype="bfloat16", causal=False, window=9, layout="offset1"),
        Case(queries=65, keys=64, width=64, dtype="bfloat16", values="extreme"),
        Case(queries=17, keys=31, dtype="float16", values="ties", deterministic=True, packed=True, rows=2),
        Case(queries=33, keys=33, values="extreme", causal=False),
        Case(queries=20, keys=20, values="constant", window=1),
        Case(rows=2, queries=0, keys=7),
        Case(rows=2, queries=7, keys=0),
        Case(rows=0, queries=7, keys=7),
    ),
    bug_cases=(
        Case(queries=20, keys=20, group=2, config=SMALL_SPLIT),
        Case(queries=37, keys=37, config=SMALL_FUSED, softcap=2.0),
        Case(queries=33, keys=33, window=9, config=SMALL_SPLIT),
        Case(rows=3, queries=20, keys=30, packed=True, seed=1, config=SMALL_SPLIT),
    ),
    bugs=(
        _bug("flash_attention_forward", "total * fade + tl.sum(probs, 1), fade", "total + tl.sum(probs, 1), fade"),
        _bug("flash_attention_forward", "tl.range(low, high, BLOCK_N,", "tl.range(low + BLOCK_N, high, BLOCK_N,"),
        _bug("_attention_tiles", "seen = seen & (ahead > -window)", "seen = seen & (ahead >= -window)"),
        _bug("_attention_tiles", "whole = tl.minimum(whole, row + past + 1)", "whole = tl.minimum(whole, row + past + SPAN)"),
        _bug("_attention_tiles", "last = tl.minimum(tl.maximum(tl.load(starts + sequence + 1), first), rows)", "last = rows"),
        _bug("flash_attention_backward", "head = kv_head * GROUP + member", "head = kv_head * GROUP"),
        _bug("flash_attention_backward", "delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
        _bug("flash_attention_backward", "store_tile(dk_ptr + place, dk * scale", "store_tile(dk_ptr + place, dk"),
        _bug(
            "flash_attention_backward",
            "            dscores = dscores * (1.0 - scores * scores)\n        rounded",
            "            dscores = dscores * 1.0\n        rounded",
        ),
    ),
)  # fmt: skip

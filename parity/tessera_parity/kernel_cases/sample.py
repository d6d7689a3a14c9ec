"""Cases of `sample`: one parameter for all rows or one each, ties, -inf and NaN rows, uniforms at both ends.

Two correct kernels may differ where rounding decides, as in `flips`: so what is compared is how far the uniform lies outside
the interval of cumulative probability that the float64 law gives the drawn id. Order, ties and ranks are exact there;
the edges of top-p and min-p are taken both ways when they lie closer than rounding. Ids that rounding has no part in (greedy,
rows whose largest logit is not finite) are compared as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference.sample import sample as plain
from tessera_kernels.triton.sample import CONFIGS, SampleConfig
from tessera_kernels.triton.sample import sample as fused
from tessera_parity.kernel_budget import noise_floor
from tessera_parity.kernel_cases.case import (
    KernelOp,
    Tensors,
    draw,
    drawn_values,
    dtypes,
    generator,
    lay_out,
    layouts,
    seeds,
    sizes,
    value_kinds,
)
from tessera_parity.loading import Patch

KERNELS, LISTS, NUMBERS = (f"tessera_kernels/triton/_sample_{part}.py" for part in ("kernels", "lists", "numbers"))
VALUES = ("normal", "small", "large", "mixed", "extreme", "constant", "ties", "inf_rows", "nan_rows", "peaked", "zeros")
JUST_BELOW_ONE = 1.0 - 2.0**-24

SMALL = SampleConfig(4, 8, 2, 4, 4, 4, 1, 8, 2)
WIDE = SampleConfig(4, 16, 2, 4, 4, 8, 1, 16, 2)
"""Let the interpreter see lists that overflow, pivots and ties at small sizes; for it alone."""
LONG = SampleConfig(4, 1024, 8, 16, 8, 8, 1, 64, 2)
"""What the interpreter takes where a case names none: a tile for a GPU keeps it busy for 20 s, one number or 40,000."""

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """logits [rows, ids]; with `each` the parameters are drawn for each row between nothing and what is said here."""

    rows: int
    ids: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    each: bool = False
    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    config: SampleConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        rows=st.integers(0, 8 if gpu else 3),
        ids=sizes(tile=4096, most=140_000) if gpu else sizes(tile=32, most=90),
        temperature=st.sampled_from([1.0, 0.7, 1.6, 0.01, 0.0]),
        top_k=st.sampled_from([0, 0, 1, 5, 50, 700, 20_000] if gpu else [0, 0, 1, 5, 20, 60]),
        top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        each=st.booleans(),
        dtype=dtypes(),
        layout=layouts(),
        values=value_kinds(*VALUES),
        seed=seeds(),
        config=st.none() if gpu else st.sampled_from([SMALL, WIDE]),
    )


def _tensors(case: Case) -> Tensors:
    shape = (case.rows, case.ids)
    stream = generator(case.seed, "more")
    logits = draw(
        case, "logits", shape, values=case.values if case.values in VALUES[:8] else "normal", layout="contiguous"
    )
    if case.values == "nan_rows":
        logits[torch.rand(shape, generator=stream) < 0.3 / max(1, case.ids)] = torch.nan
        logits[torch.rand(shape, generator=stream) < 0.3 / max(1, case.ids)] = torch.inf
    elif case.values == "peaked":
        logits = (logits * 2.0 + 30.0 * (torch.rand(shape, generator=stream) < 3.0 / max(1, case.ids))).to(logits.dtype)
    elif case.values == "zeros":
        logits = torch.where(torch.rand(shape, generator=stream) < 0.5, 0.0, -0.0).to(logits.dtype)
    uniforms = torch.rand(case.rows, generator=stream)
    uniforms[1::4], uniforms[2::4] = 0.0, JUST_BELOW_ONE
    found = {"logits": lay_out(logits, case.layout), "uniforms": lay_out(uniforms, "contiguous")}
    if case.each:
        some = drawn_values((4, case.rows), "normal", stream).sigmoid() * (
            torch.rand(4, case.rows, generator=stream) < 0.8
        )
        heat = case.temperature * (0.5 + some[0]) * (torch.rand(case.rows, generator=stream) < 0.9)
        found |= {
            "temperature": lay_out(heat, "contiguous"),
            "top_k": lay_out((case.top_k * some[1]).round().to(torch.int32), "contiguous"),
            "top_p": lay_out(1.0 - (1.0 - case.top_p) * some[2], "contiguous"),
            "min_p": lay_out(case.min_p * some[3], "contiguous"),
        }
    return found


def _parameters(case: Case, given: Tensors) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: given[name] if case.each else getattr(case, name) for name in names}


def _run_kernel(case: Case, given: Tensors) -> Tensors:
    config = case.config or (None if given["logits"].is_cuda else LONG)
    ids = fused(given["logits"], given["uniforms"], config=config, **_parameters(case, given))
    return _judged(case, given, ids)


def _run_reference(case: Case, given: Tensors) -> Tensors:
    return _judged(case, given, plain(given["logits"], given["uniforms"], **_parameters(case, given)))


def _judged(case: Case, given: Tensors, ids: Tensor) -> Tensors:
    """Return how far outside of its id's interval each uniform lies, and the ids that rounding has no part in (else -1)."""
    logits, uniforms = (given[name].double().cpu().numpy() for name in ("logits", "uniforms"))
    each = _each(case, given)
    drawn = ids.cpu().numpy()
    outside = np.zeros(len(drawn), np.float32)
    certain = np.full(len(drawn), -1, np.int32)
    for row, token in enumerate(drawn):
        heat, top_k, top_p, min_p = (numbers[row] for numbers in each)
        if heat == 0.0 or not np.isfinite(logits[row].max()):
            certain[row] = token
        elif not 0 <= token < case.ids:
            outside[row] = 2.0
        else:
            outside[row] = _outside(logits[row], uniforms[row], int(token), heat, int(top_k), top_p, min_p)
    return {"outside": torch.from_numpy(outside), "certain": torch.from_numpy(certain)}


def _each(case: Case, given: Tensors) -> list[Numbers]:
    rows = given["logits"].shape[0]
    if case.each:
        return [given[name].double().cpu().numpy() for name in ("temperature", "top_k", "top_p", "min_p")]
    return [np.full(rows, value, np.float64) for value in (case.temperature, case.top_k, case.top_p, case.min_p)]


def _outside(x_V: Numbers, uniform: float, token: int, heat: float, top_k: int, top_p: float, min_p: float) -> float:
    order = np.argsort(-x_V, kind="stable")
    weights = np.exp((x_V[order] - x_V[order[0]]) / heat)
    sums = np.cumsum(weights)
    first = min(top_k or len(x_V), len(x_V))
    slack = noise_floor(torch.float32, magnitude=1.0, length=len(x_V))
    place = int(np.flatnonzero(order == token)[0])
    most, least = (_kept(weights, sums, first, top_p, min_p, sign * slack) for sign in (1.0, -1.0))
    if place >= most or weights[place] == 0.0:
        return 1.0
    before = sums[place] - weights[place]
    return float(max(0.0, before / sums[most - 1] - uniform, uniform - sums[place] / sums[least - 1]))


def _kept(weights: Numbers, sums: Numbers, first: int, top_p: float, min_p: float, slack: float) -> int:
    """Return the length of the kept prefix, edges decided generously (slack > 0) or strictly."""
    count = first
    if top_p < 1.0:
        count = min(count, 1 + int((sums[: first - 1] < top_p * sums[first - 1] * (1.0 + slack)).sum()))
    far = 1.0 - np.log(max(min_p, 1e-30))  # rounding of an exponent grows with it
    return max(1, min(count, int((weights >= min_p * (1.0 - slack * far)).sum())))


def _bug(find: str, replace: str, *, file: str = KERNELS) -> Patch:
    return Patch(file=file, find=find, replace=replace)


def _magnitudes(case: Case, given: Tensors) -> Mapping[str, float]:
    del case, given
    return {"outside": 1.0}  # differences of cumulative probabilities


OP = KernelOp(
    name="sample",
    cases=_cases,
    tensors=_tensors,
    kernel=_run_kernel,
    reference=_run_reference,
    row_independent=("outside", "certain"),
    row_inputs=("logits", "uniforms", "temperature", "top_k", "top_p", "min_p"),
    configs=lambda: CONFIGS,
    magnitudes=_magnitudes,
    lengths=lambda case, given: {"outside": case.ids},
    examples=(
        Case(rows=3, ids=70, top_k=20, top_p=0.9, min_p=0.05, config=SMALL, seed=1),
        Case(rows=4, ids=90, config=SMALL),
        Case(rows=4, ids=90, top_p=0.9, dtype="bfloat16", config=WIDE, seed=2),
        Case(rows=4, ids=61, values="ties", top_k=30, temperature=0.7, config=WIDE, layout="transposed", seed=3),
        Case(rows=4, ids=50, values="constant", config=SMALL, top_k=33),
        Case(rows=4, ids=70, values="nan_rows", each=True, top_k=60, top_p=0.5, min_p=0.5, config=SMALL, seed=4),
        Case(rows=5, ids=33, values="inf_rows", top_k=20, dtype="float16", layout="sliced", config=WIDE, seed=5),
        Case(rows=3, ids=40, values="zeros", top_p=0.5, config=WIDE),
        Case(rows=3, ids=4097, values="peaked", top_p=0.9, layout="offset1"),
        Case(rows=2, ids=1021, values="extreme", temperature=0.01, dtype="float16"),
        Case(rows=2, ids=513, temperature=0.0, values="ties"),
        Case(rows=3, ids=1, top_k=5, top_p=0.5, min_p=1.0),
        Case(rows=0, ids=9),
        Case(rows=2, ids=40_009, top_k=30_000, top_p=0.9, seed=6),
        Case(rows=2, ids=40_009, top_p=0.5, dtype="bfloat16", seed=7),
        Case(rows=2, ids=20_011, values="constant", top_k=19_000, top_p=0.7),
    ),
    bug_cases=(
        Case(rows=1, ids=60, temperature=0.7, config=SMALL, seed=7),
        Case(rows=1, ids=61, values="ties", top_k=40, config=WIDE, seed=7),
        Case(rows=1, ids=40, values="zeros", config=WIDE, seed=7),
        Case(rows=1, ids=40, min_p=0.3, config=WIDE, seed=7),
        Case(rows=3, ids=80, top_p=0.5, config=WIDE, seed=7),
    ),
    bugs=(
        _bug("inside = (x >= least) & (x <= most)\n", "inside = (x >= least) & (x < most)\n", file=LISTS),
        _bug("held * LANES + lane, _entry", "held * LANES + lane + LANES, _entry", file=LISTS),  # a slot too far
        _bug("rate = tl.minimum(1.4426950408889634 / heat", "rate = tl.minimum(1.4426950408889634"),  # dropped temperature
        _bug("kept = heavier + (target - ranks) * one", "kept = heavier"),
        _bug("(target - heavier + one - 1) // one * one", "(target - heavier) // one * one"),
        _bug("n = (target - heavier - 1) // one", "n = target * 0"),  # always the first of equals
        _bug("counts + near_rank, masses + near_mass", "counts, masses"),  # the list's own sums
        _bug("narrow_ptr, ranks, heavier", "narrow_ptr, near_rank, near_mass"),  # stale sums above what is left
        _bug("kept = tl.minimum(kept, tl.maximum(likely, ONE))", "kept = tl.minimum(kept, kept)"),
        _bug("bits = (x + 0.0).to", "bits = x.to", file=NUMBERS),  # -0 below 0
    ),
)  # fmt: skip

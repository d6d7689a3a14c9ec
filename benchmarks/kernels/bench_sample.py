"""How far ahead of a sort is drawing a token without one, and how often is a row of logits read?

    python benchmarks/kernels/run_all.py --only sample        the table
    python benchmarks/kernels/sweeping.py sample              every configuration

Flat rows (normal numbers: thousands of ids share the mass) are the hard case, peaked ones (three times that) what a language
model gives. "torch sort" is the reference: a sort, a softmax, a cumulative sum. FlashInfer draws from a seed and an offset that
are given (so that no host state is read and a graph holds it), its own softmax included where it takes probabilities, with
top-k before top-p as ours has it, deterministic as by default and not; what it draws must be among the k largest. Passes: the most
reads of any row, as the kernel itself counts them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from harness import Function, Row
from sweeping import Sweep
from torch import Tensor

from tessera_kernels.reference.sample import sample as by_sort
from tessera_kernels.triton import sample as kernel

Settings = dict[str, Any]
SETTINGS: dict[str, Settings] = {
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50 top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 1000, "top_p": 0.95, "min_p": 0.02},
    "top-k 20000 top-p 0.9": {"top_k": 20_000, "top_p": 0.9},
    "none": {},
    "greedy": {"temperature": 0.0},
}
SWEPT = ("top-k 50", "top-p 0.9", "top-k 20000 top-p 0.9")
FULL = ((128, 131072), (1, 131072), (32, 151936))
TINY = ((2, 600),)


def rows() -> Iterator[Row]:
    """Yield flat float32 rows of all settings at the shape of the must, then peaked and bfloat16 ones and other shapes."""
    goal, *others = harness.choose(FULL, TINY)
    settings = harness.choose(SETTINGS, {"all": SETTINGS["all"]})
    plan = [(name, goal, 1.0, torch.float32) for name in settings]
    for name in list(settings)[:3]:
        plan += [(name, goal, 3.0, torch.float32), (name, goal, 1.0, torch.bfloat16)]
        plan += [(name, shape, 1.0, torch.float32) for shape in others]
    for name, shape, spread, dtype in harness.turn(plan):
        yield _row(name, settings[name], shape, spread, dtype)


def _inputs(shape: tuple[int, int], spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(shape, device=harness.device()) * spread).to(dtype)
    return logits, torch.rand(shape[0], device=harness.device())


def _row(name: str, how: Settings, shape: tuple[int, int], spread: float, dtype: torch.dtype) -> Row:
    logits, uniforms = _inputs(shape, spread, dtype)
    functions: dict[str, Function] = {"ours": functools.partial(kernel.sample, logits, uniforms, **how)}
    functions["torch sort"] = functools.partial(by_sort, logits, uniforms, **how)
    functions |= harness.available(_flashinfer(logits, how))
    timed = harness.measure(functions, cold=True)
    passes = kernel.passes_of(logits, uniforms, **how)
    differ = int((kernel.sample(logits, uniforms, **how) != by_sort(logits.double(), uniforms.double(), **how)).sum())
    is_goal = shape == FULL[0]
    kind = "flat" if spread == 1.0 else "peaked"
    return Row(
        op="sample",
        shape=f"{name} B{shape[0]} V{shape[1]} {kind} {str(dtype).removeprefix('torch.')}",
        ours=timed["ours"],
        peers={peer: timing for peer, timing in timed.items() if peer != "ours"},
        bytes_moved=float(logits.numel() * logits.element_size()),
        limit="copy",
        must={"torch sort": 5.0} if is_goal and how.get("temperature") != 0.0 else {},
        at_most={"passes": (float(passes.max()), 6.0)} if is_goal else {},
        notes=f"cold L2; passes {int(passes.min())} to {int(passes.max())}; {differ} ids other than float64's",
    )


def _flashinfer(logits: Tensor, how: Settings) -> dict[str, Callable[[], Function]]:
    if harness.is_dry() or how.get("temperature", 1.0) != 1.0:
        return {}
    return {"flashinfer": lambda: _peer(logits, how, True), "flashinfer loose": lambda: _peer(logits, how, False)}


def _peer(logits: Tensor, how: Settings, deterministic: bool) -> Function:
    from flashinfer import sampling

    top_k, top_p, wide = how.get("top_k", 0), how.get("top_p", 1.0), logits.float()
    given = {"deterministic": deterministic, "seed": 1, "offset": 0}

    def run() -> Tensor:
        if top_k and top_p < 1.0:
            drawn = sampling.top_k_top_p_sampling_from_logits(
                wide, top_k, top_p, filter_apply_order="top_k_first", **given
            )
        elif top_k:
            drawn = sampling.top_k_sampling_from_probs(sampling.softmax(wide), top_k, **given)
        elif top_p < 1.0:
            drawn = sampling.top_p_sampling_from_probs(sampling.softmax(wide), top_p, **given)
        else:
            drawn = sampling.sampling_from_logits(wide, **given)
        return drawn  # type: ignore[no-any-return]

    ids = run().long()
    least = wide.topk(top_k or wide.shape[-1]).values[:, -1]
    if not bool((wide.gather(-1, ids[:, None])[:, 0] >= least).all()):
        raise ValueError(f"it drew ids that are not among the {top_k} largest")
    return run


def sweeps() -> Iterator[Sweep]:
    """Yield flat and peaked rows under three settings; every configuration draws the same ids."""
    shape = harness.choose(FULL[0], TINY[0])
    for spread in (1.0, 3.0):
        logits, uniforms = _inputs(shape, spread, torch.float32)
        for name in SWEPT[: harness.choose(3, 1)]:
            draw = functools.partial(kernel.sample, logits, uniforms, **SETTINGS[name])
            yield Sweep(
                part="draw",
                key=f"{shape[1]} ids",
                shape=f"B{shape[0]} V{shape[1]} spread {spread:g} {name}",
                current=kernel.choose_config(shape[1]),
                candidates={config: _as_floats(functools.partial(draw, config=config)) for config in kernel.CONFIGS},
                work=4.0 * logits.numel(),
                limit="copy",
                cold=True,
            )


def _as_floats(draw: Callable[[], Tensor]) -> Function:
    """Return ids as numbers that a sweep compares between configurations."""
    return lambda: draw().double()

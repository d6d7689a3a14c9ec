"""How far ahead of a sort is drawing a token without one, and how often is a row of logits read?

    python benchmarks/kernels/run_all.py --only sample        the table
    python benchmarks/kernels/bench_sample.py                 every configuration at every shape

Flat rows (normal numbers: thousands of ids share the mass) are the hard case, peaked ones (three times that) what a language
model gives. "torch sort" is the reference: a sort, a softmax, a cumulative sum. FlashInfer draws with its own numbers, softmax
included where it takes probabilities. Passes: the most reads of any row, as the kernel itself counts them.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Function, Row
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
FULL = ((128, 131072), (1, 131072), (32, 151936))
TINY = ((2, 600),)


def rows() -> list[Row]:
    """Return flat float32 rows of all settings and shapes, then peaked and bfloat16 ones of the first."""
    shapes = harness.choose(FULL, TINY)
    settings = harness.choose(SETTINGS, {"all": SETTINGS["all"]})
    found = [_row(name, how, shape, 1.0, torch.float32) for name, how in settings.items() for shape in shapes[:1]]
    for name in list(settings)[:3]:
        found.append(_row(name, settings[name], shapes[0], 3.0, torch.float32))
        found.append(_row(name, settings[name], shapes[0], 1.0, torch.bfloat16))
        found += [_row(name, settings[name], shape, 1.0, torch.float32) for shape in shapes[1:]]
    return found


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
    return {"flashinfer": lambda: _peer(logits, how)}


def _peer(logits: Tensor, how: Settings) -> Function:
    from flashinfer import sampling

    top_k, top_p, wide = how.get("top_k", 0), how.get("top_p", 1.0), logits.float()
    run: Function
    if top_k and top_p < 1.0:
        run = functools.partial(sampling.top_k_top_p_sampling_from_logits, wide, top_k, top_p, "top_k_first")
    elif top_k:
        run = lambda: sampling.top_k_sampling_from_probs(torch.softmax(wide, -1), top_k)  # noqa: E731
    elif top_p < 1.0:
        run = lambda: sampling.top_p_sampling_from_probs(torch.softmax(wide, -1), top_p)  # noqa: E731
    else:
        run = functools.partial(sampling.sampling_from_logits, wide)
    run()
    return run


def sweep() -> None:
    """Print microseconds, passes and wrong ids of every configuration, on flat and on peaked rows."""
    shape = harness.choose(FULL[0], TINY[0])
    for spread in (1.0, 3.0):
        logits, uniforms = _inputs(shape, spread, torch.float32)
        for name, how in list(SETTINGS.items())[:3]:
            truth = by_sort(logits.double(), uniforms.double(), **how)
            print(f"\nB{shape[0]} V{shape[1]} spread {spread} {name}", flush=True)
            functions = {
                str(tuple(config)): functools.partial(kernel.sample, logits, uniforms, config=config, **how)
                for config in kernel.CONFIGS
            }
            timed = harness.measure(
                {"ours": functools.partial(kernel.sample, logits, uniforms, **how)} | functions, samples=8
            )
            for config in kernel.CONFIGS:
                passes = kernel.passes_of(logits, uniforms, config=config, **how)
                wrong = int((functions[str(tuple(config))]() != truth).sum())
                print(
                    f"  {tuple(config)!s:44s} {timed[str(tuple(config))].median_ms * 1e3:8.1f} us, passes "
                    f"{int(passes.min())} to {int(passes.max())}, {wrong} ids differ",
                    flush=True,
                )


if __name__ == "__main__":
    sweep()

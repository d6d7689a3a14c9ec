"""Linear cross-entropy, forward and gradients of hidden states and head, beside Liger and CCE.

    python benchmarks/kernels/run_all.py --only linear_cross_entropy        the table
    python benchmarks/kernels/sweeping.py linear_cross_entropy              cuts and row kernels, to choose defaults by
    python benchmarks/kernels/bench_linear_cross_entropy.py --parts         the pieces that the time is made of

All ways of ours and all peers are timed against each other, once. Liger runs with its default chunks and with 16 times as
large ones, its fastest on an H200 by its own figures; CCE with its defaults, which skip small gradients.

"beyond the gradients" is the peak of one call less what was there before and less both gradients as returned. A bfloat16
gradient that is summed in float32 needs that sum (4 bytes for each weight of the head) beside it; a leaf with
`grad_dtype = torch.float32` takes the sum itself as its gradient, and nothing stands beside it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from harness import Function, Row, Timing, available, ceilings, choose, device, is_dry, is_warm_up, measure, peak_memory
from sweeping import Sweep

ROWS, WIDTH, VOCAB = choose((8192, 2048, 128256), (6, 16, 130))
GIB = 2**30


def inputs(grad_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, head and labels: random, so that the products run at the rate of real data."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, device=device(), dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(VOCAB, WIDTH, device=device()) / WIDTH**0.5).to(torch.bfloat16).requires_grad_()
    if grad_dtype is not None:
        head.grad_dtype = grad_dtype
    return hidden, head, torch.randint(0, VOCAB, (ROWS,), device=device())


def ours(hidden: Tensor, head: Tensor, labels: Tensor, **options: object) -> tuple[Tensor, ...]:
    """Return both gradients of the mean loss."""
    from tessera_kernels.triton.linear_cross_entropy import linear_cross_entropy

    loss, num_tokens = linear_cross_entropy(hidden, head, labels, **options)
    return torch.autograd.grad(loss / num_tokens, (hidden, head))


def _liger(hidden: Tensor, head: Tensor, labels: Tensor) -> Function:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of = LigerFusedLinearCrossEntropyLoss()
    return lambda: torch.autograd.grad(loss_of(head, hidden, labels), (hidden, head))


def _liger_wide(hidden: Tensor, head: Tensor, labels: Tensor) -> Function:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    options = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False, None, None, 16)

    def run() -> tuple[Tensor, ...]:
        loss = LigerFusedLinearCrossEntropyFunction.apply(hidden, head, labels, *options)[0]
        return torch.autograd.grad(loss, (hidden, head))

    return run


def _cce(hidden: Tensor, head: Tensor, labels: Tensor) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: torch.autograd.grad(linear_cross_entropy(hidden, head, labels), (hidden, head))


def beyond_gradients(function: Callable[[], tuple[Tensor, ...]]) -> float:
    """Return the peak of one call less its results, in GiB; 0 in a dry run or a warm-up."""
    if is_warm_up():
        return 0.0
    results = function()
    returned = sum(grad.numel() * grad.element_size() for grad in results)
    del results
    return max(0, peak_memory(function) - returned) / GIB


def errors() -> dict[str, tuple[float, float]]:
    """Return relative errors of loss and gradients near convergence, on few rows of the full width, against float64."""
    from tessera_kernels.reference import linear_cross_entropy as plain
    from tessera_kernels.triton.linear_cross_entropy import linear_cross_entropy

    rows, vocab = choose((512, 16384), (4, 50))
    torch.manual_seed(1)
    hidden = torch.randn(rows, WIDTH, device=device()).bfloat16()
    head = 0.02 * torch.randn(vocab, WIDTH, device=device())
    labels = torch.randperm(vocab, device=device())[:rows]
    head[labels] += hidden.float() * (14.0 / hidden.float().square().sum(-1, keepdim=True))
    head = head.bfloat16()
    found = []
    for op, dtype in ((linear_cross_entropy, torch.bfloat16), (plain.linear_cross_entropy, torch.float64)):
        x, w = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        loss, count = op(x, w, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss / count, (x, w))))
    seen = [float((a.double() - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]
    names = ("loss error near convergence", "gradient error, hidden", "gradient error, head")
    return {name: (value, most) for name, value, most in zip(names, seen, (1e-6, 2.5e-3, 2.5e-3), strict=True)}


def rows() -> Iterator[Row]:
    """Yield one row for each way to sum the head's gradient, and one without logits."""
    given = inputs()
    makers = {"liger": partial(_liger, *given), "liger C16": partial(_liger_wide, *given), "cce": partial(_cce, *given)}
    calls = {
        "head's gradient float32": partial(ours, *inputs(torch.float32)),
        "head's gradient bfloat16, summed in float32": partial(ours, *given),
        "head's gradient bfloat16, summed in bfloat16": partial(ours, *given, accumulate="head"),
        "no logits": partial(ours, *given, mode="no_logits"),
    }
    if is_dry():
        calls = dict(list(calls.items())[:2])
    first, *others = calls
    timed = measure({"ours": calls[first], **{name: calls[name] for name in others}, **available(makers)}, graph=False)
    peers = {name: timing for name, timing in timed.items() if name in makers}
    for name, call in calls.items():
        yield _row(name, timed["ours" if name == first else name], peers, call, is_first=name == first)


def _row(name: str, timing: Timing, peers: Mapping[str, Timing], call: Function, *, is_first: bool) -> Row:
    tiled = name == "no logits"
    most = 0.0625 if tiled else 0.6
    if name.endswith("summed in float32"):
        most += 4 * VOCAB * WIDTH / GIB
    at_most = {"GiB beyond the gradients": (beyond_gradients(call), most)}  # type: ignore[arg-type]
    return Row(
        op="linear_cross_entropy",
        shape=f"fwd+bwd {ROWS} x {WIDTH} x {VOCAB} bfloat16, {name}",
        ours=timing,
        peers=peers,
        flops=(8.0 if tiled else 6.0) * float(ROWS) * WIDTH * VOCAB,
        limit="cublas",
        must={"share": 0.8} if tiled else {"liger": 1.35, "share": 0.8},
        at_most=at_most | (errors() if is_first and not is_warm_up() else {}),
        notes=f"{8 if tiled else 6} X D V operations",
    )


def cuts() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield names and options: chunks of powers, chunks of float32 logits, row kernels behind these, tiles."""
    from tessera_kernels.triton.linear_cross_entropy import CONFIGS, LossConfig

    yield "default", {}
    yield "default, head", {"accumulate": "head"}
    for rows_, splits, stages in ((2048, 1, 3), (2048, 2, 4), (1664, 1, 4), (1408, 3, 4), (1024, 2, 4), (4096, 1, 4)):
        config = LossConfig(rows=rows_, hidden_splits=splits, stages=stages, product=2)
        yield f"powers {rows_} splits {splits} stages {stages}", {"config": config}
    for rows_, logit_rows, splits in ((1024, 512, 2), (1664, 336, 1), (1792, 256, 1), (4096, 512, 1)):
        config = LossConfig(
            rows=rows_, logit_rows=logit_rows, hidden_splits=splits, block=8192, num_warps=16, stages=1, product=1
        )
        yield f"logits {logit_rows} of rows {rows_} splits {splits}", {"config": config}
    for config in CONFIGS:
        if config.product == 1:
            yield str(config), {"config": config}
    for megabytes in (32, 64, 128, 256):
        yield f"no logits {megabytes} MiB", {"mode": "no_logits", "chunk_bytes": megabytes * 2**20}


def parts() -> Iterator[tuple[str, Function, float]]:
    """Yield the pieces that the time is made of: each product of one chunk and the row kernel, with their operations."""
    from tessera_kernels.triton._cross_entropy_rows import row_kernel
    from tessera_kernels.triton._gradient_sums import add_product, product
    from tessera_kernels.triton._label_logits import label_logits
    from tessera_kernels.triton._logit_tiles import multiply_and_finish
    from tessera_kernels.triton._loss_plans import padded_columns
    from tessera_kernels.triton.linear_cross_entropy import CONFIGS

    hidden, head, labels = inputs()
    hidden, head = hidden.detach(), head.detach()
    padded = padded_columns(VOCAB)
    total = {d: torch.zeros(VOCAB, WIDTH, device=device(), dtype=d) for d in (torch.float32, torch.bfloat16)}
    for count in (256, 512, 1024, 1664, 2048):
        logits = torch.empty(count, padded, device=device(), dtype=torch.float32)
        slopes = 1e-3 * torch.randn(count, padded, device=device(), dtype=torch.bfloat16)
        out = torch.empty(count, WIDTH, device=device(), dtype=torch.float32)
        flops, few = 2.0 * count * VOCAB * WIDTH, hidden[:count]
        yield f"logits float32 {count}", partial(product, few, head.T, logits[:, :VOCAB]), flops
        yield f"d hidden {count}", partial(product, slopes[:, :VOCAB], head, out), flops
        for dtype, into in total.items():
            yield f"d head += {count} {dtype}", partial(add_product, into, slopes[:, :VOCAB].T, few), flops
        yield f"d head first {count}", partial(product, slopes[:, :VOCAB].T, few, total[torch.float32]), flops
    losses, one = torch.empty(ROWS, device=device()), torch.ones((), device=device())
    product(few, head.T, logits[:, :VOCAB])
    exact = label_logits(hidden, head, labels)
    yield "label logits", partial(label_logits, hidden, head, labels), 2.0 * ROWS * WIDTH
    for count in (1024, 2048):
        slopes = torch.empty(count, padded, device=device(), dtype=torch.bfloat16)
        of_rows = labels[:count], exact[:count], losses[:count], one
        call = partial(multiply_and_finish, hidden[:count], head, slopes, of_rows, (-100, 0.0, 0.0), True, 4)
        yield f"powers and slopes {count}", call, 2.0 * count * VOCAB * WIDTH
    for config in (config for config in CONFIGS if config.block):
        call = partial(
            row_kernel[(256,)], logits, slopes, labels, exact, losses, one, VOCAB, padded, -100, 0.0, 0.0, CAPPED=False,
            SHORT=True, WRITE=True, BLOCK=config.block, STAGES=config.stages, num_warps=config.num_warps,
        )  # fmt: skip
        yield f"row kernel, 256 rows, {config.block}/{config.num_warps}/{config.stages}", call, 256.0 * VOCAB * 6


def sweeps() -> Iterator[Sweep]:
    """Yield chunk sizes and row kernels over the whole loss, without logits too."""
    from tessera_kernels.triton.linear_cross_entropy import CONFIGS

    wide, narrow = inputs(torch.float32), inputs()
    plans: dict[str, dict[str, dict[str, object]]] = {"chunks": {}, "row kernel": {}, "no logits": {}}
    for name, options in cuts():
        plans["no logits" if name.startswith("no logits") else "chunks"][name] = options
    plans["chunks"] = {name: options for name, options in plans["chunks"].items() if not name.startswith("LossConfig")}
    plans["row kernel"] = {str(config): {"config": config} for config in CONFIGS if config.product == 1}
    for part, candidates in plans.items():
        calls = {}
        for name, options in candidates.items():
            own = narrow if options.get("accumulate") or options.get("mode") else wide
            calls[name] = partial(ours, *own, **options)
        yield Sweep(
            part=part, key=f"vocabulary {VOCAB}", shape=f"{ROWS} x {WIDTH} x {VOCAB}",
            current={"chunks": "default", "row kernel": _row_kernel(), "no logits": "no logits 32 MiB"}[part], candidates=calls,
            work=(8.0 if part == "no logits" else 6.0) * ROWS * WIDTH * VOCAB, limit="cublas", graph=False,
        )  # fmt: skip
        if is_dry():
            return


def _row_kernel() -> str:
    from tessera_kernels.triton.linear_cross_entropy import choose_config

    return str(choose_config(VOCAB)._replace(product=1))


def print_parts() -> None:
    """Print the time of each piece."""
    print({name: round(value) for name, value in ceilings().items()})
    for name, call, work in parts():
        timing = measure({"ours": call}, samples=10)["ours"]
        what = "GB/s of 6 bytes an id" if name.startswith("row") else "TFLOP/s"
        rate = work / timing.median_ms / (1e6 if name.startswith("row") else 1e9)
        print(f"{name:48s} {timing.median_ms * 1e3:9.1f} us  {rate:6.0f} {what}", flush=True)


if __name__ == "__main__":
    if "--parts" in sys.argv:
        print_parts()
    else:
        for row in rows():
            print(
                f"{row.shape}: {row.ours.median_ms:.2f} ms; " + "; ".join(text for text, _ in row.verdicts(ceilings()))
            )

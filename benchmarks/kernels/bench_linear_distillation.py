"""Linear distillation losses, forward and gradients of the student, beside Liger's chunked JSD and TRL's divergences.

    python benchmarks/kernels/run_all.py --only linear_distillation
    python benchmarks/kernels/bench_linear_distillation.py --sweep      # cuts and row kernels, to choose defaults by

Memory: the peak of one call less what was there before and less the gradients that it returns, ours and the peers' alike.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from bench_linear_cross_entropy import beyond_gradients
from harness import Function, Row, available, ceilings, choose, device, is_dry, measure, say

ROWS, WIDTH, TEACHER, VOCAB = choose((8192, 2048, 4096, 128256), (6, 16, 24, 130))
DIVERGENCES = choose(
    ("forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl"), ("forward_kl", "generalized_jsd")
)
FLOPS = 2.0 * ROWS * VOCAB * (3 * WIDTH + TEACHER)
TILED_FLOPS = 2.0 * ROWS * VOCAB * (4 * WIDTH + 2 * TEACHER)


def inputs(grad_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Return student, its head, teacher, its head, labels."""
    torch.manual_seed(0)

    def head(width: int) -> Tensor:
        return (torch.randn(VOCAB, width, device=device()) / width**0.5).to(torch.bfloat16)

    def states(width: int) -> Tensor:
        return torch.randn(ROWS, width, device=device(), dtype=torch.bfloat16)

    student_head = head(WIDTH).requires_grad_()
    if grad_dtype is not None:
        student_head.grad_dtype = grad_dtype
    labels = torch.randint(0, VOCAB, (ROWS,), device=device())
    return states(WIDTH).requires_grad_(), student_head, states(TEACHER), head(TEACHER), labels


def ours(*given: Tensor, **options: object) -> tuple[Tensor, ...]:
    """Return both gradients of the mean loss."""
    from tessera_kernels.triton.linear_distillation import linear_distillation

    loss, num_tokens = linear_distillation(*given, **options)
    return torch.autograd.grad(loss / num_tokens, given[:2])


def _liger_jsd(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.5)
    return lambda: torch.autograd.grad(loss_of(student, head, teacher, teacher_head, labels), (student, head))


def _trl(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, *, beta: float) -> Function:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> tuple[Tensor, ...]:
        divergence, _ = ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, beta)
        return torch.autograd.grad(divergence.mean(), (student, head))

    return run


def peers_of(divergence: str, given: tuple[Tensor, ...]) -> dict[str, Function]:
    """Return who computes this divergence: TRL has both KL and the JSD, Liger the JSD; for skew the JSD stands beside."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(divergence, 0.5)
    makers = {"trl": partial(_trl, *given[:4], beta=beta), "liger jsd": partial(_liger_jsd, *given)}
    return available(makers)


def errors(divergence: str) -> dict[str, tuple[float, float]]:
    """Return relative errors of loss and gradients against float64, the teacher within some 1e-3 nats of the student."""
    from tessera_kernels.reference import linear_distillation as plain
    from tessera_kernels.triton.linear_distillation import linear_distillation

    rows, vocab, more = choose((512, 16384, 64), (4, 50, 4))
    torch.manual_seed(1)
    student = torch.randn(rows, WIDTH, device=device()).bfloat16()
    head = (2.0 * torch.randn(vocab, WIDTH, device=device()) / WIDTH**0.5).bfloat16()
    teacher = torch.cat([student, 0.05 * torch.randn(rows, more, device=device()).bfloat16()], 1)
    teacher_head = torch.cat([head, torch.randn(vocab, more, device=device()).bfloat16() / more**0.5], 1)
    labels = torch.zeros(rows, dtype=torch.int64, device=device())
    found = []
    for op, dtype in ((linear_distillation, torch.bfloat16), (plain.linear_distillation, torch.float64)):
        x, w = student.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
        loss, count = op(x, w, teacher.to(dtype), teacher_head.to(dtype), labels, divergence=divergence)
        found.append((loss.detach(), *torch.autograd.grad(loss / count, (x, w))))
    seen = [float((a.double() - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]
    names = ("loss error near convergence", "gradient error, student", "gradient error, head")
    return {name: (value, most) for name, value, most in zip(names, seen, (1e-6, 2.5e-3, 2.5e-3), strict=True)}


def rows() -> list[Row]:
    """Return a row for each divergence, one for bfloat16 gradients, and one for each KL without logits."""
    given, wide = inputs(), inputs(torch.float32)
    result = [_row(divergence, given, wide, {}) for divergence in DIVERGENCES]
    result.append(_row("generalized_jsd", given, given, {}))
    result.append(_row("generalized_jsd", given, given, {"accumulate": "head"}))
    if not is_dry():
        result += [_row(divergence, given, given, {"mode": "no_logits"}) for divergence in ("forward_kl", "reverse_kl")]
    return result


def _row(divergence: str, given: tuple[Tensor, ...], own: tuple[Tensor, ...], options: dict[str, object]) -> Row:
    peers = peers_of(divergence, given)
    call = partial(ours, *own, divergence=divergence, **options)
    timings = measure({"ours": call, **peers}, samples=30, graph=False)
    mine = timings.pop("ours")
    tiled = options.get("mode") == "no_logits"
    must = {"share": 0.75}
    if timings and not tiled:
        must[min(timings, key=lambda name: timings[name].median_ms)] = 1.5
    grads = "float32" if own is not given else "bfloat16"
    words = ", ".join(f"{name} {value}" for name, value in options.items())
    return Row(
        op="linear_distillation",
        shape=f"{divergence} fwd+bwd {ROWS} x ({WIDTH}, {TEACHER}) x {VOCAB} bfloat16, head's gradient {grads} {words}".strip(),
        ours=mine,
        peers=timings,
        flops=TILED_FLOPS if tiled else FLOPS,
        limit="cublas",
        must=must,
        at_most=_memory(call, {name: peers[name] for name in timings}) | ({} if options else errors(divergence)),
        notes="2 X V (4 D + 2 F) operations" if tiled else "2 X V (3 D + F) operations",
    )


def _memory(call: Function, peers: Mapping[str, Function]) -> dict[str, tuple[float, float]]:
    seen = beyond_gradients(call)  # type: ignore[arg-type]
    least = min((beyond_gradients(peer) for peer in peers.values()), default=0.0)  # type: ignore[arg-type]
    return {"GiB beyond the gradients": (seen, least / 4)} if least else {}


def cuts() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield names and options: chunk sizes first, then row kernels of two and of three walks."""
    from tessera_kernels.triton.linear_distillation import CONFIGS, LossConfig

    yield "default jsd", {"divergence": "generalized_jsd"}
    yield "default jsd, head", {"divergence": "generalized_jsd", "accumulate": "head"}
    for rows_, logit_rows in ((832, 256), (1024, 128), (1024, 256), (1024, 512), (2048, 256), (2048, 512), (4096, 512)):
        for splits in (1, 2, 4) if rows_ < 2048 else (1, 2):
            config = LossConfig(
                rows=rows_, logit_rows=logit_rows, hidden_splits=splits, block=4096, num_warps=16, stages=1
            )
            yield f"rows {rows_} logits {logit_rows} splits {splits}", {"config": config, "chunk_bytes": 2**34}
    for divergence in ("forward_kl", "generalized_jsd"):
        for config in CONFIGS:
            yield f"{divergence} {config.block}/{config.num_warps}/{config.stages}", {
                "divergence": divergence, "config": config,
            }  # fmt: skip
    for megabytes in (96, 192, 384):
        yield f"no logits {megabytes} MiB", {"mode": "no_logits", "chunk_bytes": megabytes * 2**20}


def sweep() -> None:
    """Print time and memory of every cut, then of the row kernels alone."""
    limits = ceilings()
    print({name: round(value) for name, value in limits.items()})
    wide, narrow = inputs(torch.float32), inputs()
    for name, options in cuts():
        if is_dry() and "rows" in name:
            continue
        own = narrow if options.get("accumulate") or options.get("mode") else wide
        call = partial(ours, *own, **options)
        timing = measure({"ours": call}, samples=6, graph=False)["ours"]
        rate = FLOPS / timing.median_ms / 1e9
        print(
            f"{name:48s} {timing.median_ms:7.2f} ms  {rate:6.0f} TFLOP/s  {rate / limits['cublas']:.2f} of cuBLAS  "
            f"{beyond_gradients(call):.3f} GiB beyond the gradients",
            flush=True,
        )
    if not is_dry():
        _row_kernels()


def _row_kernels() -> None:
    from tessera_kernels.triton._divergence_rows import row_kernel
    from tessera_kernels.triton._divergence_series import DIVERGENCES as KINDS
    from tessera_kernels.triton._divergence_series import coefficients
    from tessera_kernels.triton._linear_loss import padded_columns
    from tessera_kernels.triton.linear_distillation import CONFIGS

    count, padded = 256, padded_columns(VOCAB)
    logits = torch.randn(2, count, padded, device=device())
    slopes = torch.empty(count, padded, device=device(), dtype=torch.bfloat16)
    labels, losses = torch.zeros(count, dtype=torch.int64, device=device()), torch.empty(count, device=device())
    one = torch.ones((), device=device())
    for kind in (0, 1, 4):
        terms, slopes_of = coefficients(KINDS[kind], 0.5)
        for config in CONFIGS:
            call = partial(
                row_kernel[(count,)], logits[0], logits[1], slopes, labels, losses, one, VOCAB, padded, -100, 1.0, 0.5, 1.0,
                0.0, 0.0, *terms, *slopes_of, KIND=kind, HARD=False, COLD=False, WRITE=True, BLOCK=config.block,
                STAGES=config.stages, num_warps=config.num_warps,
            )  # fmt: skip
            timing = measure({"ours": call}, samples=10)["ours"]
            rate = 10.0 * count * VOCAB / timing.median_ms / 1e6
            print(
                f"row kernel {KINDS[kind]} {config.block}/{config.num_warps}/{config.stages}: {timing.median_ms * 1e3:.1f} us, "
                f"{rate:.0f} GB/s of 10 bytes an id",
                flush=True,
            )


if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep()
    else:
        for row in rows():
            say(f"{row.shape}: {row.ours.median_ms:.2f} ms; " + "; ".join(text for text, _ in row.verdicts(ceilings())))

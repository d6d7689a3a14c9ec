"""Linear distillation losses, forward and gradients of the student, beside Liger's chunked loss and TRL's divergences.

    python benchmarks/kernels/run_all.py --only linear_distillation        the table
    python benchmarks/kernels/sweeping.py linear_distillation              cuts and row kernels, to choose defaults by

Both peers compute all of forward KL, reverse KL and JSD: TRL by its beta, Liger by the beta of its compiled JSD loss, whose ends are
the two KL. All ways of ours and both peers are timed against each other, once for each divergence. Nobody else computes the skew
divergences: the peers' JSD of the same run, the same products and a similar row, stands beside them. Memory: the peak of one call
less what was there before and less the gradients that it returns, ours and the peers' alike.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from bench_linear_cross_entropy import beyond_gradients
from harness import (
    UNKNOWN,
    Function,
    Row,
    Timing,
    available,
    best_of,
    ceilings,
    choose,
    device,
    is_dry,
    is_warm_up,
    measure,
    turn,
)
from sweeping import Sweep

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


def _liger(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor, *, beta: float
) -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta)
    return lambda: torch.autograd.grad(loss_of(student, head, teacher, teacher_head, labels), (student, head))


def _trl(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, *, beta: float) -> Function:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> tuple[Tensor, ...]:
        divergence, _ = ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, beta)
        return torch.autograd.grad(divergence.mean(), (student, head))

    return run


PEERS = ("trl", "liger")
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}


def peers_of(divergence: str, given: tuple[Tensor, ...]) -> dict[str, Callable[[], Function]]:
    """Return the makers of who computes this divergence."""
    beta = BETAS[divergence]
    return {"trl": partial(_trl, *given[:4], beta=beta), "liger": partial(_liger, *given, beta=beta)}


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


def rows() -> Iterator[Row]:
    """Yield rows of the JSD, both KL and the skew divergences: gradients in float32, in bfloat16, and without logits."""
    given, wide = inputs(), inputs(torch.float32)
    found: dict[str, tuple[dict[str, Timing], float]] = {}
    order = sorted(DIVERGENCES, key=lambda name: (name not in BETAS, name != "generalized_jsd"))
    for divergence in turn(order):
        calls = _calls(divergence, given, wide)
        peers = available(peers_of(divergence, given)) if divergence in BETAS else {}
        timed = measure({"ours": calls["float32"], **_without_first(calls), **peers}, graph=False)
        if divergence in BETAS:
            beside = {name: timing for name, timing in timed.items() if name in PEERS}
            beside |= best_of("the better of liger and trl", timed, PEERS)
            found[divergence] = beside, _least_memory([peers[name] for name in PEERS if name in timed])
        beside, least = found.get(divergence, found.get("generalized_jsd", ({}, UNKNOWN)))
        for grads, call in calls.items():
            timing = timed["ours" if grads == "float32" else grads]
            yield _row(divergence, grads, timing, beside, (call, least))


def _calls(divergence: str, given: tuple[Tensor, ...], wide: tuple[Tensor, ...]) -> dict[str, Function]:
    """Return our ways by what the head's gradient is summed in."""
    calls: dict[str, Function] = {"float32": partial(ours, *wide, divergence=divergence)}
    if divergence == "generalized_jsd":
        calls["bfloat16"] = partial(ours, *given, divergence=divergence)
        calls["bfloat16, summed in bfloat16"] = partial(ours, *given, divergence=divergence, accumulate="head")
    if divergence in ("forward_kl", "reverse_kl") and not is_dry():
        calls["bfloat16, no logits"] = partial(ours, *given, divergence=divergence, mode="no_logits")
        calls["bfloat16, no logits, labels 0.3"] = partial(calls["bfloat16, no logits"], label_weight=0.3)
    return calls


def _without_first(calls: Mapping[str, Function]) -> dict[str, Function]:
    return {name: call for name, call in calls.items() if name != "float32"}


def _least_memory(peers: list[Function]) -> float:
    """Return the peers' least bytes in GiB, unknown unless both are here."""
    if is_dry() or len(peers) < len(PEERS):
        return UNKNOWN
    return min(beyond_gradients(peer) for peer in peers)  # type: ignore[arg-type]


def _row(
    divergence: str, grads: str, timing: Timing, peers: Mapping[str, Timing], memory: tuple[Function, float]
) -> Row:
    tiled, own = "no logits" in grads, divergence in BETAS
    call, least = memory
    at_most = {"GiB beyond the gradients": (beyond_gradients(call), least / 4)}  # type: ignore[arg-type]
    if "," not in grads and not is_warm_up():
        at_most |= errors(divergence)
    return Row(
        op="linear_distillation",
        shape=f"{divergence} fwd+bwd {ROWS} x ({WIDTH}, {TEACHER}) x {VOCAB} bfloat16, head's gradient {grads}",
        ours=timing,
        peers=dict(peers),
        flops=TILED_FLOPS if tiled else FLOPS,
        limit="cublas",
        must={"share": 0.75} | ({} if tiled else {"the better of liger and trl": 1.5}),
        at_most=at_most,
        notes=("2 X V (4 D + 2 F) operations" if tiled else "2 X V (3 D + F) operations")
        + ("" if own else "; beside it the peers' JSD: they have no skew"),
    )


def cuts() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield names and options: chunk sizes first, then row kernels of two and of three walks."""
    from tessera_kernels.triton.linear_distillation import CONFIGS, LossConfig

    yield "default forward_kl", {}
    yield "default forward_kl, head", {"accumulate": "head"}
    for rows_, logit_rows, splits in ((768, 256, 8), (768, 256, 2), (960, 240, 2), (1024, 256, 2), (640, 128, 3), (2048, 256, 1),
                                      (2048, 512, 1)):  # fmt: skip
        config = LossConfig(rows=rows_, logit_rows=logit_rows, hidden_splits=splits, block=4096, num_warps=16, stages=1)
        yield f"rows {rows_} logits {logit_rows} splits {splits}", {"config": config}
    for divergence in ("forward_kl", "generalized_jsd"):
        for config in CONFIGS:
            yield f"{divergence} {_name(config)}", {
                "divergence": divergence, "config": config,
            }  # fmt: skip
    for megabytes in (96, 192, 384):
        yield f"no logits {megabytes} MiB", {"mode": "no_logits", "chunk_bytes": megabytes * 2**20}


def sweeps() -> Iterator[Sweep]:
    """Yield chunk sizes over the whole loss, row kernels of two and of three walks, and tiles without logits."""
    wide, narrow = inputs(torch.float32), inputs()
    plans: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for name, options in cuts():
        divergence = str(options.get("divergence", "forward_kl"))
        is_row = "/" in name
        part = "no logits" if name.startswith("no logits") else "row kernel" if is_row else "chunks"
        plans.setdefault((part, divergence), {})[name.rpartition(" ")[2] if is_row else name] = options
    for (part, divergence), candidates in plans.items():
        calls = {}
        for name, options in candidates.items():
            own = narrow if options.get("accumulate") or options.get("mode") else wide
            calls[name] = partial(ours, *own, **options)
        yield Sweep(
            part=part, key=f"vocabulary {VOCAB}", shape=f"{divergence} {ROWS} x ({WIDTH}, {TEACHER}) x {VOCAB}",
            current=_current(part, divergence), candidates=calls,
            work=TILED_FLOPS if part == "no logits" else FLOPS, limit="cublas", graph=False,
        )  # fmt: skip
        if is_dry():
            return


def _current(part: str, divergence: str) -> str:
    from tessera_kernels.triton.linear_distillation import choose_config

    chosen = choose_config(VOCAB, 2 if divergence == "forward_kl" else 3)
    return {
        "chunks": f"default {divergence}", "row kernel": _name(chosen._replace(product=2)), "no logits": "no logits 96 MiB",
    }[part]  # fmt: skip


def _name(config: Any) -> str:
    return f"{config.block}/{config.num_warps}/{config.stages}/{('', 'library', 'own')[config.product]}"


if __name__ == "__main__":
    for row in rows():
        print(f"{row.shape}: {row.ours.median_ms:.2f} ms; " + "; ".join(text for text, _ in row.verdicts(ceilings())))

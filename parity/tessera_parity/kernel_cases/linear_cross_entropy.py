"""Cases of the linear cross-entropy: chunks and tiles of odd sizes, ignored rows, softcap, z-loss, padded vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference import linear_cross_entropy as plain
from tessera_kernels.triton import linear_cross_entropy as fused
from tessera_kernels.triton._linear_loss import MODES
from tessera_kernels.triton._loss_plans import COLUMN_MULTIPLE, LossConfig, padded_columns
from tessera_parity.kernel_cases.case import (
    KernelOp,
    Tensors,
    draw,
    dtypes,
    generator,
    lay_out,
    layouts,
    seeds,
    sizes,
    value_kinds,
)
from tessera_parity.loading import Patch

KERNELS = "tessera_kernels/triton/_cross_entropy_rows.py"
SHARED = "tessera_kernels/triton/_gradient_sums.py"
LABELS = "tessera_kernels/triton/_label_logits.py"
MATH = "tessera_kernels/triton/_row_math.py"
TILES = "tessera_kernels/triton/_logit_tiles.py"
STRIPES = "tessera_kernels/triton/_cross_entropy_tiles.py"
SMALL_BLOCKS = LossConfig(block=32, num_warps=1, stages=1)
TILED = LossConfig(product=2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` hidden states of `width` under a head of `vocab` rows; `ignored` is the share of labels that do not count.

    `chunk_rows` rows fit the byte budget of the chunked mode; of the no-logits mode, as many tiles of 64 ids.
    """

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"
    seed: int = 0
    rows: int = 7
    width: int = 16
    vocab: int = 65
    ignored: float = 0.2
    chunk_rows: int = 1000
    mode: str = "chunked"
    accumulate: str = "float32"
    z_loss: float = 0.0
    softcap: float | None = None
    padding: int = 0  # of the head's rows, ids that do not exist
    frozen: str = ""  # "hidden" or "head"
    config: LossConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=dtypes(),
        layout=layouts(),
        values=value_kinds("normal", "small", "large", "mixed", "constant", "ties"),
        seed=seeds(),
        rows=sizes(tile=128 if gpu else 8, most=700 if gpu else 24, least=0),
        width=sizes(tile=64 if gpu else 16, most=300 if gpu else 40),
        vocab=sizes(tile=2048 if gpu else 64, most=9000 if gpu else 260),
        ignored=st.sampled_from([0.2, 0.0, 1.0]),
        chunk_rows=st.sampled_from([1000, 1, 3, 5, 17] if not gpu else [1000, 3, 16, 128, 200]),
        mode=st.sampled_from(MODES),
        z_loss=st.sampled_from([0.0, 1e-2]),
        softcap=st.sampled_from([None, 5.0]),
        padding=st.sampled_from([0, 1, 7]),
        frozen=st.sampled_from(["", "", "hidden", "head"]),
        config=st.sampled_from([None, TILED] if gpu else [None, SMALL_BLOCKS, TILED]),
    )


def labels_of(seed: int, rows: int, vocab: int, ignored: float) -> Tensor:
    """Return labels below `vocab`, this share of them -100; of more than one, the first and the last id are in use."""
    stream = generator(seed, "labels")
    labels = torch.randint(0, vocab, (rows,), generator=stream)
    labels[:2] = torch.tensor([vocab - 1, 0])[:rows]
    labels[torch.rand(rows, generator=stream) < ignored] = -100
    return lay_out(labels, "contiguous")


def budget_of(case: Case, *, models: int, mode: str) -> int:
    """Return the byte budget that gives the case its chunks or tiles."""
    cell: int = 4 * models + getattr(torch, case.dtype).itemsize
    if mode == "no_logits":  # and some for what a row takes beside its tile
        return max(1, case.rows) * (4 * models * COLUMN_MULTIPLE * min(case.chunk_rows, 4) + 64)
    return case.chunk_rows * cell * padded_columns(case.vocab)


def _tensors(case: Case) -> Tensors:
    return {
        "hidden": draw(case, "hidden", (case.rows, case.width)),
        "head": draw(case, "head", (case.vocab + case.padding, case.width), values="normal"),
        "labels": labels_of(case.seed, case.rows, case.vocab, case.ignored),
        "cotangent": torch.tensor(0.37),
    }


def differentiate(
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    hidden: Tensor,
    head: Tensor,
    cotangent: Tensor,
    frozen: str,
) -> Tensors:
    """Return loss, count and the gradients of loss * cotangent by what is not frozen."""
    with torch.enable_grad():
        hidden, head = (x.detach().requires_grad_(name != frozen) for name, x in (("hidden", hidden), ("head", head)))
        loss, count = loss_of(hidden, head)
        wanted = {f"grad {name}": x for name, x in (("hidden", hidden), ("head", head)) if name != frozen}
        grads = torch.autograd.grad(loss * cotangent.to(loss.dtype), tuple(wanted.values()))
    return {"loss": loss.detach(), "count": count, **dict(zip(wanted, grads, strict=True))}


def _options(case: Case) -> dict[str, object]:
    return {
        "z_loss": case.z_loss, "softcap": case.softcap, "vocab_size": case.vocab if case.padding else None,
        "chunk_bytes": budget_of(case, models=1, mode=case.mode), "mode": case.mode, "accumulate": case.accumulate,
        "config": case.config,
    }  # fmt: skip


def _kernel(case: Case, given: Tensors) -> Tensors:
    def loss_of(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return fused.linear_cross_entropy(hidden, head, given["labels"], **_options(case))  # type: ignore[arg-type]

    return differentiate(loss_of, given["hidden"], given["head"], given["cotangent"], case.frozen)


def _reference(case: Case, given: Tensors) -> Tensors:
    def loss_of(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return plain.linear_cross_entropy(hidden, head, given["labels"], **_options(case))  # type: ignore[arg-type]

    return differentiate(loss_of, given["hidden"], given["head"], given["cotangent"], case.frozen)


def magnitudes_of(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    cotangent: Tensor,
    slopes_of: Callable[[Tensor], Tensor],
    *,
    wide: bool,
) -> dict[str, float]:
    """Return the sizes of the terms behind loss and gradients, from float64 operands.

    A row's loss is a difference of logits, each a sum of products. A gradient is a sum over ids or rows of slopes, which
    add up to nothing over a row; with `wide` (float32) a slope also has its logit's own error, times its probability.
    """
    if hidden.numel() == 0 or labels.eq(-100).all():
        return {}
    logits = hidden @ head.T
    sizes_XV = hidden.abs() @ head.abs().T
    slopes = slopes_of(logits).abs() * cotangent.abs()
    if wide:
        slopes = slopes + torch.softmax(logits, -1) * sizes_XV.amax(-1, keepdim=True) * cotangent.abs()
    return {
        "loss": float(sizes_XV.amax(-1).sum()),
        "grad hidden": float((slopes @ head.abs()).max()),
        "grad head": float((slopes.T @ hidden.abs()).max()),
    }


def _magnitudes(case: Case, given: Tensors) -> dict[str, float]:
    def slopes_of(logits: Tensor) -> Tensor:
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            loss, _ = plain.linear_cross_entropy(z, eye, given["labels"], z_loss=case.z_loss, softcap=case.softcap)
            return torch.autograd.grad(loss, z)[0]

    hidden, head = given["hidden"].double(), given["head"][: case.vocab].double()
    wide = case.dtype == "float32"
    return magnitudes_of(hidden, head, given["labels"], given["cotangent"].double(), slopes_of, wide=wide)


def _bug(file: str, find: str, replace: str) -> Patch:
    return Patch(file=file, find=find, replace=replace)


OP = KernelOp(
    name="linear_cross_entropy",
    cases=_cases,
    tensors=_tensors,
    kernel=_kernel,
    reference=_reference,
    configs=lambda: fused.CONFIGS,
    magnitudes=_magnitudes,
    examples=(
        Case(),
        Case(rows=9, vocab=257, dtype="float16", softcap=5.0, z_loss=1e-2, chunk_rows=5, config=TILED),
        Case(dtype="bfloat16", rows=13, chunk_rows=3, config=SMALL_BLOCKS),
        Case(dtype="bfloat16", rows=5, vocab=199, mode="no_logits", chunk_rows=1, config=SMALL_BLOCKS),
        Case(dtype="float16", vocab=129, padding=7, softcap=5.0, z_loss=1e-2, layout="transposed", config=SMALL_BLOCKS),
        Case(rows=9, ignored=1.0, mode="no_logits"),
        Case(rows=0),
        Case(rows=1, vocab=1, width=1, ignored=0.0),
        Case(rows=17, values="large", layout="sliced", chunk_rows=5, ignored=0.0),
        Case(rows=6, values="constant", vocab=64, dtype="bfloat16", mode="no_logits", frozen="head"),
        Case(rows=8, dtype="bfloat16", chunk_rows=4, accumulate="head", layout="offset1", frozen="hidden"),
        Case(rows=140, width=64, vocab=5003, dtype="bfloat16", chunk_rows=64, padding=5),
        Case(rows=140, width=72, vocab=260, dtype="bfloat16", padding=5, config=TILED),
        Case(rows=9, width=40, vocab=2300, dtype="bfloat16", mode="no_logits", chunk_rows=1, z_loss=1e-2, padding=5, config=TILED),
        Case(rows=131, width=16, vocab=300, dtype="float16", mode="no_logits", chunk_rows=2, softcap=5.0, config=TILED),
        Case(rows=3, width=24, vocab=1, dtype="bfloat16", mode="no_logits", config=TILED),
    ),
    bug_cases=(
        Case(dtype="bfloat16", rows=7, vocab=70, chunk_rows=3, ignored=0.0, config=SMALL_BLOCKS),
        Case(rows=5, vocab=199, mode="no_logits", chunk_rows=1, z_loss=1e-2, config=SMALL_BLOCKS),
        Case(rows=5, vocab=70, softcap=5.0, values="large", ignored=0.5),
        Case(dtype="bfloat16", rows=5, vocab=199, mode="no_logits", chunk_rows=2, ignored=0.0, config=SMALL_BLOCKS),
    ),
    bug_cases_of={
        TILES: (
            Case(dtype="bfloat16", rows=5, vocab=300, ignored=0.0, config=TILED),
            Case(dtype="bfloat16", rows=5, vocab=3, ignored=0.0, config=TILED),
        ),
        STRIPES: (
            Case(dtype="bfloat16", rows=9, vocab=3, mode="no_logits", ignored=0.0, config=TILED),
            Case(dtype="bfloat16", seed=2, rows=5, vocab=2300, mode="no_logits", chunk_rows=1, ignored=0.5, config=TILED),
        ),
    },
    bugs=(
        _bug(KERNELS, "rests, moments = rests * fade, moments * fade", "moments = moments * fade"),  # missing rescale
        _bug(KERNELS, "z = tl.where(columns < width, z, -float(\"inf\"))", "z = z"),
        _bug(KERNELS, "slope *= slope_of_cap(z, softcap)", "slope *= 1.0"),
        _bug(KERNELS, "whole, own_id = width // BLOCK * BLOCK, (label - first_id).to(tl.int32)",
              "whole, own_id = width // BLOCK * BLOCK, label.to(tl.int32)"),
        _bug(KERNELS, "raw = tl.load(exact + row)\n        found", "raw = tl.load(exact)\n        found"),
        _bug(LABELS, "tl.where(known, label, 0) * stride_vx", "tl.where(known, label, 0) * stride_vd"),
        _bug(SHARED, "halves[:, columns:] if at_end else", "halves[:, :columns] if at_end else"),  # over unread logits
        _bug(KERNELS, "loss + z_loss * normalizer * normalizer", "loss + z_loss * normalizer"),
        _bug(KERNELS, "        tl.store(losses + row, 0.0)\n        if WRITE:\n            write_zeros(dz, padded, BLOCK)\n",
              "        tl.store(losses + row, 0.0)\n"),  # stale slopes of the chunk before
        _bug(SHARED, "add_product(into, slopes_XV.T, hidden_XD)", "product(slopes_XV.T, hidden_XD, into)"),
        _bug(SHARED, "            self.head_VD[vocab:].zero_()\n", "            self.head_VD[vocab + 1 :].zero_()\n"),
        _bug(TILES, "is_own | (ids >= left)", "ids >= left"),
        _bug(TILES, "powers.store([row, column + half], kept)", "powers.store([row, column], kept)"),
        _bug(TILES, "rest = tl.sum(fall * tl.load(place + step,", "rest = tl.sum(tl.load(place + step,"),
        _bug(TILES, "e * (exp(some_tops - top) * factor)[:, None]", "e * factor"),
        _bug(MATH, "total = rest + exp(-gap)", "total = rest + 1.0"),
        _bug(STRIPES, "rest = past * rest +", "rest = rest +"),
        _bug(STRIPES, "fall = exp(others - top)", "fall = exp(top - top)"),
        _bug(STRIPES, "tl.where(counts, factor, 0.0)", "factor"),
        _bug(STRIPES, "_slopes(second, ids + half,", "_slopes(second, ids,"),
        _bug(STRIPES, "sums.room_behind(ids.stop) if in_head", "sums.room_behind(0) if in_head"),  # over finished gradients
        _bug(STRIPES, "head[ids], slopes, labels - ids.start", "head[ids], slopes, labels"),
    ),
)  # fmt: skip
"""The linear cross-entropy's cases."""

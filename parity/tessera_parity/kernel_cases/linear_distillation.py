"""Cases of the linear distillation loss: divergences, temperatures, near and far teachers of another width, label mix."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_kernels.reference import linear_distillation as plain
from tessera_kernels.triton import linear_distillation as fused
from tessera_kernels.triton._divergence_series import DIVERGENCES
from tessera_kernels.triton._linear_loss import MODES
from tessera_kernels.triton._loss_plans import COLUMN_MULTIPLE, LossConfig, padded_columns
from tessera_parity.kernel_budget import finer, roundoff
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

ROWS = "tessera_kernels/triton/_divergence_rows.py"
MATH = "tessera_kernels/triton/_row_math.py"
SERIES = "tessera_kernels/triton/_divergence_series.py"
TILES = "tessera_kernels/triton/_logit_tiles.py"
STRIPES = "tessera_kernels/triton/_divergence_tiles.py"
STRIPE_KERNELS = "tessera_kernels/triton/_divergence_tile_kernels.py"
SMALL_BLOCKS = LossConfig(block=32, num_warps=1, stages=1)
TILED = LossConfig(block=32, num_warps=1, stages=1, product=2)
"""The product with sums in its epilogue, where the widths are multiples of 8 and the dtype is half a float32."""
NEAR = 1e-2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A student of `width` and a teacher `wider` by so much; `near` teachers agree with the student but for 1 %.

    `chunk_rows` rows fit the byte budget of the chunked mode; of the no-logits mode (KL only), as many tiles of 64 ids.
    """

    dtype: str = "float32"
    layout: str = "contiguous"
    values: str = "normal"  # of the student's hidden states
    seed: int = 0
    rows: int = 7
    width: int = 16
    wider: int = 5
    vocab: int = 65
    near: bool = False
    divergence: str = "forward_kl"
    temperature: float = 1.0
    squared: bool = True
    weight: float = 0.3  # beta of the JSD, alpha of the skewed
    label_weight: float = 0.0
    z_loss: float = 0.0
    ignored: float = 0.2
    chunk_rows: int = 1000
    mode: str = "chunked"
    accumulate: str = "float32"
    padding: int = 0  # of the student head's rows, ids that do not exist
    frozen: str = ""  # "student" or "head"
    config: LossConfig | None = None


def _cases(gpu: bool) -> SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=dtypes(),
        layout=layouts(),
        values=value_kinds("normal", "small", "constant", "ties"),
        seed=seeds(),
        rows=sizes(tile=128 if gpu else 8, most=500 if gpu else 16, least=0),
        width=sizes(tile=64 if gpu else 16, most=200 if gpu else 40),
        wider=st.sampled_from([0, 5, 32, 8]),
        vocab=sizes(tile=2048 if gpu else 64, most=5000 if gpu else 200),
        near=st.booleans(),
        divergence=st.sampled_from(DIVERGENCES),
        temperature=st.sampled_from([1.0, 2.5, 0.7]),
        squared=st.booleans(),
        weight=st.sampled_from([0.3, 0.0, 1.0, 0.5, 0.9]),
        label_weight=st.sampled_from([0.0, 0.3, 1.0]),
        z_loss=st.sampled_from([0.0, 1e-2]),
        ignored=st.sampled_from([0.2, 0.0, 1.0]),
        chunk_rows=st.sampled_from([1000, 1, 3, 5] if not gpu else [1000, 3, 16, 128, 200]),
        mode=st.sampled_from(MODES),
        padding=st.sampled_from([0, 7]),
        frozen=st.sampled_from(["", "", "student", "head"]),
        config=st.none() if gpu else st.sampled_from([None, SMALL_BLOCKS, TILED]),
    )


def _tensors(case: Case) -> Tensors:
    student = draw(case, "student", (case.rows, case.width), layout="contiguous")
    head = draw(case, "head", (case.vocab + case.padding, case.width), values="normal", layout="contiguous")
    dtype = student.dtype

    def more(name: str, count: int) -> Tensor:
        noise = torch.randn(count, case.wider, generator=generator(case.seed, name))
        return (noise * (NEAR if case.near else 1.0)).to(dtype)

    teacher, teacher_head = student, head[: case.vocab]
    if not case.near:
        teacher = draw(case, "teacher", tuple(student.shape), layout="contiguous")
        teacher_head = draw(case, "teacher head", tuple(teacher_head.shape), values="normal", layout="contiguous")
    stream = generator(case.seed, "labels")
    labels = torch.randint(0, case.vocab, (case.rows,), generator=stream)
    labels[torch.rand(case.rows, generator=stream) < case.ignored] = -100
    return {
        "student": lay_out(student, case.layout),
        "head": lay_out(head, case.layout),
        "teacher": lay_out(torch.cat([teacher, more("more", case.rows)], 1), case.layout),
        "teacher head": lay_out(torch.cat([teacher_head, more("more head", case.vocab)], 1), case.layout),
        "labels": lay_out(labels, "contiguous"),
        "cotangent": torch.tensor(0.37),
    }


def _options(case: Case) -> dict[str, Any]:
    cell = 8 + getattr(torch, case.dtype).itemsize
    mode = case.mode if case.divergence in DIVERGENCES[:2] else "chunked"
    budget = case.chunk_rows * cell * padded_columns(case.vocab)
    if mode == "no_logits":
        budget = max(1, case.rows) * cell * COLUMN_MULTIPLE * min(case.chunk_rows, 4)
    return {
        "divergence": case.divergence, "temperature": case.temperature, "temperature_squared": case.squared,
        "beta": case.weight, "alpha": case.weight, "label_weight": case.label_weight, "z_loss": case.z_loss,
        "vocab_size": case.vocab if case.padding else None, "chunk_bytes": budget, "mode": mode,
        "accumulate": case.accumulate, "config": case.config,
    }  # fmt: skip


def run(op: Callable[..., tuple[Tensor, Tensor]], case: Case, given: Tensors) -> Tensors:
    """Return the loss, the count, and the gradients that the case asks for, by one implementation."""
    with torch.enable_grad():
        inputs = {name: given[name].detach().requires_grad_(name != case.frozen) for name in ("student", "head")}
        loss, count = op(
            inputs["student"],
            inputs["head"],
            given["teacher"],
            given["teacher head"],
            given["labels"],
            **_options(case),
        )
        wanted = {f"grad {name}": x for name, x in inputs.items() if x.requires_grad}
        grads = torch.autograd.grad(loss * given["cotangent"].to(loss.dtype), tuple(wanted.values()))
    return {"loss": loss.detach(), "count": count, **dict(zip(wanted, grads, strict=True))}


def _magnitudes(case: Case, given: Tensors) -> dict[str, float]:
    """Return the sizes of the terms behind loss and gradients: logits, and slopes, which add up to nothing over a row.

    A slope also has the error of its logits, which are kept in float32, times its probability: in a half dtype as much
    less than its own rounding as float32 is finer. The loss of half numbers feels half the square of that error, sqrt(width)
    u32 of the logit's terms: where both models are the same one, and their logits come from two kernels, nothing else is left.
    """
    student, head = given["student"].double(), given["head"][: case.vocab].double()
    teacher, teacher_head = given["teacher"].double(), given["teacher head"].double()
    if student.numel() == 0 or given["labels"].eq(-100).all():
        return {}
    logits, theirs = student @ head.T, teacher @ teacher_head.T
    eye = torch.eye(case.vocab, dtype=torch.float64, device=logits.device)
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        loss, _ = plain.linear_distillation(
            z, eye, theirs, eye, given["labels"], **(_options(case) | {"vocab_size": None})
        )
        slopes = torch.autograd.grad(loss, z)[0].abs()
    size_X1 = (student.abs() @ head.abs().T).amax(-1, keepdim=True) + (teacher.abs() @ teacher_head.abs().T).amax(
        -1, keepdim=True
    )
    scale = max(1.0, case.temperature, 1.0 / case.temperature)
    found = {}
    q = torch.softmax(logits / case.temperature, -1) + torch.softmax(theirs / case.temperature, -1)
    slopes = slopes + finer(getattr(torch, case.dtype)) * scale * size_X1 * (q + torch.softmax(logits, -1))
    felt_X1 = 0.5 * roundoff(torch.float32) * (student.shape[1] + case.wider) * (scale * size_X1) ** 2
    found["loss"] = float((scale * size_X1 if case.dtype == "float32" else felt_X1).sum())
    factor = given["cotangent"].double().abs()
    found["grad student"] = float((factor * slopes @ head.abs()).max())
    found["grad head"] = float((factor * slopes.T @ student.abs()).max())
    return found


_SUMMED = Case(dtype="bfloat16", wider=8, rows=9, vocab=597, config=TILED)
_STRIPED = replace(_SUMMED, width=64, mode="no_logits", chunk_rows=1)  # stripes, the first within d head
_BUGS_OF_STRIPES = (
    replace(_STRIPED, vocab=5, label_weight=0.3, temperature=2.5, rows=5, ignored=0.0),
    replace(_STRIPED, divergence="reverse_kl", seed=7, rows=5, vocab=1200),  # a row's maximum in the ninth tile
    replace(_STRIPED, divergence="reverse_kl", vocab=70, label_weight=0.3, temperature=2.5, rows=5, ignored=0.0),
)
_LONG = LossConfig(product=2)  # blocks as for a GPU: few rows of few blocks keep the interpreter longer
_BUGS_OF_TILES = (
    replace(_SUMMED, vocab=5, label_weight=1.0, ignored=0.0),
    replace(_SUMMED, divergence="generalized_jsd", temperature=2.5, label_weight=0.3, rows=3, vocab=300, ignored=0.0),
)
_NEAR_BF16 = Case(dtype="bfloat16", near=True, rows=5, vocab=70, config=SMALL_BLOCKS, ignored=0.0)


def _bug(file: str, find: str, replace: str) -> Patch:
    return Patch(file=file, find=find, replace=replace)


OP = KernelOp(
    name="linear_distillation",
    cases=_cases,
    tensors=_tensors,
    kernel=lambda case, tensors: run(fused.linear_distillation, case, tensors),
    reference=lambda case, tensors: run(plain.linear_distillation, case, tensors),
    configs=lambda: fused.CONFIGS,
    magnitudes=_magnitudes,
    examples=(
        Case(),
        Case(divergence="generalized_jsd", dtype="bfloat16", rows=9, chunk_rows=3, config=SMALL_BLOCKS),
        Case(divergence="skew_reverse_kl", dtype="bfloat16", rows=2, width=1, wider=0, vocab=2, squared=False, weight=1.0),  # 0
        Case(divergence="reverse_kl", mode="no_logits", chunk_rows=1, vocab=199, temperature=2.5, config=SMALL_BLOCKS),
        Case(divergence="skew_kl", near=True, dtype="bfloat16", label_weight=0.3, z_loss=1e-2, padding=7),
        Case(divergence="skew_reverse_kl", dtype="float16", layout="transposed", temperature=0.7, squared=False),
        Case(divergence="forward_kl", mode="no_logits", chunk_rows=1, vocab=129, label_weight=0.3, layout="sliced"),
        Case(divergence="generalized_jsd", weight=1.0, near=True, frozen="head"),
        Case(divergence="skew_kl", weight=1.0, rows=3),
        Case(divergence="reverse_kl", label_weight=1.0, frozen="student", accumulate="head", dtype="bfloat16"),
        Case(rows=5, ignored=1.0, divergence="generalized_jsd"),
        Case(rows=0),
        Case(rows=1, vocab=1, width=1, wider=0, ignored=0.0),
        Case(rows=70, vocab=2003, width=64, dtype="bfloat16", chunk_rows=64, divergence="generalized_jsd", near=True),
        _SUMMED,
        replace(_SUMMED, divergence="generalized_jsd", chunk_rows=3, near=True),
        replace(_SUMMED, divergence="reverse_kl", near=True, wider=0, accumulate="head"),
        replace(_SUMMED, divergence="skew_kl", label_weight=0.3, z_loss=1e-2, temperature=0.7, padding=7, weight=1e-6),
        replace(_SUMMED, divergence="skew_reverse_kl", dtype="float16", temperature=2.5, label_weight=1.0, frozen="student"),
        replace(_SUMMED, divergence="forward_kl", near=True, label_weight=0.3, vocab=600, rows=130, layout="sliced", config=_LONG),
        replace(_STRIPED, label_weight=0.3, z_loss=1e-2, temperature=0.7, padding=7, dtype="float16"),
        replace(_STRIPED, divergence="reverse_kl", rows=131, width=16, vocab=300, near=True, wider=0),
        replace(_STRIPED, divergence="reverse_kl", label_weight=1.0, temperature=2.5, frozen="head", rows=3),
        replace(_STRIPED, vocab=1, rows=3),
    ),
    bug_cases=(
        Case(divergence="generalized_jsd", rows=3, vocab=70, config=SMALL_BLOCKS, ignored=0.0),
        Case(divergence="skew_kl", seed=5, rows=6, vocab=70, temperature=2.5, label_weight=0.3, config=SMALL_BLOCKS, ignored=0.0),
        Case(divergence="reverse_kl", rows=3, vocab=130, mode="no_logits", chunk_rows=1, config=SMALL_BLOCKS, ignored=0.0),
        _NEAR_BF16,
        *_BUGS_OF_TILES,
    ),
    bug_cases_of={
        TILES: _BUGS_OF_TILES,
        STRIPES: _BUGS_OF_STRIPES,
        STRIPE_KERNELS: _BUGS_OF_STRIPES,
    },
    bugs=(
        _bug(ROWS, "* moves + change * masses", "* moves"),  # missing rescale
        _bug(ROWS, "masses = s_fall * masses\n", "masses = masses\n"),
        _bug(ROWS, "else q * (slope - slope_sum))", "else q * slope)"),
        _bug(MATH, "mask=columns < padded, other=0.0), fill)", "mask=columns < padded, other=0.0), 0.0)"),
        _bug(ROWS, "scale * soft_weight * inv_tau, scale * label_weight, z_loss, inv_tau, HARD",
              "scale * soft_weight, scale * label_weight, z_loss, inv_tau, HARD"),  # dropped scale
        _bug(ROWS, "return term, q * kept.to(tl.float32)", "return term, q * slope"),
        _bug(ROWS, "kept.to(tl.float32) * per_ratio - offset", "kept.to(tl.float32) * per_ratio"),
        _bug(ROWS, "exp((tops - top) * inv_tau) * tl.load(", "exp(tops - top) * tl.load("),
        _bug(ROWS, "rest = tl.sum(fall * tl.load(", "rest = tl.sum(tl.load("),
        _bug(TILES, "cold = tl.where(is_own, 0.0, exp(below) if COLD else e)", "cold = exp(below) if COLD else e"),
        _bug(TILES, "exp(below) if COLD else e)", "e)"),
        _bug(TILES, "total = tl.where(tl.arange(0, BLOCK_V)[None, :] < left, total, LOWEST)", "pass"),
        _bug(TILES, "logits.store([row, column + quarter], b)", "logits.store([row, column], b)"),
        _bug(ROWS, "loss += share if first_id == 0 else soft_weight * divergence", "loss = share"),  # lost tiles
        _bug(ROWS, "means = s_fall * (means + tl.where(masses == 0.0, 0.0, turn * masses))", "means = s_fall * means"),
        _bug(STRIPE_KERNELS, "mass = past * mass +", "mass = mass +"),
        _bug(STRIPE_KERNELS, "mean = past * (mean + (their_rise - rise) * scale * mass)", "mean = past * mean"),
        _bug(STRIPE_KERNELS, "(b_mean + b_fall * b_own)", "b_mean"),
        _bug(STRIPE_KERNELS, "q * (slope - slope_sum[:, None])", "q * slope"),
        _bug(STRIPE_KERNELS, "before + ((term_a + term_b)", "((term_a + term_b)"),  # lost stripes
        _bug(STRIPE_KERNELS, "counts & (ids < left)", "counts"),
        _bug(STRIPES, "sums.room_behind(ids.stop).view(torch.uint8)", "sums.room_behind(0).view(torch.uint8)"),
        _bug(SERIES, "return _sum((weight, teacher), (weight - 1.0, mixture)), _sum((weight - 1.0, mixture))",
              "return _sum((weight, teacher), (weight - 1.0, mixture)), _sum((weight, mixture))"),
    ),
)  # fmt: skip
"""The linear distillation loss's cases."""

"""One case of one kernel, judged: kernel, plain implementation and float64 truth on the same numbers.

The rule is in `kernel_budget`; NaN and infinities must stand where the truth (rounded to the output's dtype) or the plain
implementation has them. Beside the numbers: outputs that were poisoned before, fences and inputs that must be intact,
repeats bit for bit, a row alone against the same row in its batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera_parity.kernel_budget import kernel_limit
from tessera_parity.kernel_cases.case import KernelOp, Tensors
from tessera_parity.kernel_memory import disturbed, fenced_memory, lifted, moved_all, same_bits, whole_storage

_LOST = ("illegal memory access", "illegal instruction", "misaligned address", "launch failure", "device-side assert")
"""Words of CUDA errors after which a context answers nothing else."""


class KernelFault(Exception):
    """A kernel broke a promise in a case; the message says which, where and by how much."""


class DeviceLost(BaseException):
    """The GPU's context is gone after an illegal access; nothing else can be learned in this process."""


@dataclass(kw_only=True)
class Judged:
    """What was compared in one case: the largest share of its limit that any output used, and how many numbers."""

    compared: int = 0
    observed: float = 0.0
    where: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # output: (its largest error, the plain one's)


UNORDERED_RUNS = 3
"""Further runs of a case whose numbers are compared anew, where their bits need not repeat."""


def judge(op: KernelOp, case: Any, *, device: str = "cpu", repeats: int = 0, rows: int = 0) -> Judged:
    """Run `case` and compare; `repeats` further runs must give the same bits, `rows` rows alone too.

    Where an output's sums have no fixed order, the first of those runs must keep the rule instead.
    Raises `KernelFault` for a broken promise and whatever the kernel raises.
    """
    given = op.tensors(case)
    tensors = moved_all(given, device)
    truth = _detached(op.reference(case, lifted(tensors)))
    plain = _detached(op.reference(case, moved_all(tensors, device)))
    ours = run_fenced(op, case, moved_all(tensors, device), tensors)
    judged = compare(op, case, tensors, ours, plain, truth)
    unordered = op.unordered(case)
    for repeat in range(repeats if set(ours) - unordered else min(repeats, UNORDERED_RUNS)):
        again = run_kernel(op, case, moved_all(tensors, device))
        if unordered and repeat < UNORDERED_RUNS:
            compare(op, case, tensors, _detached(again), plain, truth)
        for name in sorted(set(ours) - unordered):
            if not same_bits(again[name], ours[name]):
                raise KernelFault(f"{name}: run {repeat + 2} differs in its bits from run 1: expected the same answer")
    check_rows(op, case, tensors, ours, rows)
    return judged


def run_fenced(op: KernelOp, case: Any, tensors: Tensors, before: Tensors) -> Tensors:
    """Run the kernel with poisoned memory; raise `KernelFault` for a write where none was allowed."""
    with fenced_memory() as fences:
        ours = run_kernel(op, case, tensors)
        if tensors and next(iter(tensors.values())).is_cuda:
            torch.cuda.synchronize()
    if broken := fences.broken():
        raise KernelFault(f"fences = {broken} of {len(fences.allocations)} broken: a write past an allocation's end")
    for name, tensor in tensors.items():
        if disturbed(before[name], tensor, may_write=name in op.writes):
            part = "memory around it" if name in op.writes else "it or memory around it"
            raise KernelFault(f"input {name}: {part} was changed by the kernel")
    return _detached(ours)


def _detached(outputs: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in outputs.items()}


def run_kernel(op: KernelOp, case: Any, tensors: Tensors) -> Tensors:
    """Run the kernel; an illegal access becomes `DeviceLost`, because every later call would repeat it.

    The interpreter is NumPy, whose warnings about infinities are no fault: kernels make them on purpose.
    """
    try:
        with np.errstate(all="ignore"):
            ours = op.kernel(case, tensors)
        if tensors and next(iter(tensors.values())).is_cuda:
            torch.cuda.synchronize()
    except RuntimeError as error:
        if any(words in str(error) for words in _LOST):
            raise DeviceLost(str(error).splitlines()[0]) from error
        raise
    return ours


def compare(op: KernelOp, case: Any, tensors: Tensors, ours: Tensors, plain: Tensors, truth: Tensors) -> Judged:
    """Hold every output against the rule. Raises `KernelFault` with the worst place of the first that breaks it."""
    if not set(ours) == set(plain) == set(truth):
        raise KernelFault(f"outputs = {sorted(ours)}: expected {sorted(truth)}, as the reference gives")
    judged = Judged()
    magnitudes = op.magnitudes(case, tensors) if op.magnitudes else {}
    terms = op.terms(case, tensors) if op.terms else {}
    lengths = op.lengths(case, tensors) if op.lengths else {}
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=1)
    for name in ours:
        _expect_like(name, ours[name], plain[name])
        if name in op.exact or not ours[name].is_floating_point():
            _compare_exact(name, ours[name], truth[name], judged)
            continue
        sizes = Sizes(scale=magnitudes.get(name, 0.0), terms=terms.get(name), length=lengths.get(name, longest))
        _compare_numbers(name, ours[name], plain[name], truth[name], sizes, judged)
    return judged


def _expect_like(name: str, ours: Tensor, plain: Tensor) -> None:
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        raise KernelFault(
            f"{name} = {ours.dtype} {list(ours.shape)}: expected {plain.dtype} {list(plain.shape)}, as the reference gives"
        )


def _compare_exact(name: str, ours: Tensor, truth: Tensor, judged: Judged) -> None:
    wrong = (ours.to(truth.dtype) != truth) & ~(ours.isnan() & truth.isnan())
    judged.compared += ours.numel()
    if bool(wrong.any()):
        place = tuple(int(index) for index in wrong.nonzero()[0])
        raise KernelFault(
            f"{name}{list(place)} = {ours[place].item()}: expected {truth[place].item()} exactly; "
            f"{int(wrong.sum())} of {ours.numel()} differ"
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is known of an output beside its numbers: see `kernel_budget`."""

    scale: float  # of its largest number or of what cancels in it; 0 = the number itself
    terms: Tensor | None  # what float32 adds up for each number
    length: int  # of its longest sum

    def largest(self, dtype: torch.dtype, error: float, size: float, terms: float) -> float:
        """Return the limit of the largest error: the plain one's, the largest number, the largest terms."""
        return kernel_limit(error, dtype, magnitude=max(size, self.scale), length=self.length, terms=terms)

    def mean(self, dtype: torch.dtype, error: float, size: float, terms: float, largest: float) -> float:
        """Return the limit of the mean error; what cancels is taken to be as much smaller on average as the output is."""
        spread = max(1.0, self.scale / largest) if largest else 1.0
        magnitude = size * spread if largest else self.scale
        return kernel_limit(error, dtype, magnitude=magnitude, length=self.length, terms=terms)


def _compare_numbers(name: str, ours: Tensor, plain: Tensor, truth: Tensor, sizes: Sizes, judged: Judged) -> None:
    if ours.numel() == 0:
        return
    finite = torch.isfinite(ours) & torch.isfinite(plain) & torch.isfinite(truth)
    count, dtype = max(1, int(finite.sum())), ours.dtype
    own = torch.where(finite, ours.double() - truth, 0.0).abs()
    usual = torch.where(finite, plain.double() - truth, 0.0).abs()
    size = torch.where(finite, truth, 0.0).abs()
    terms = torch.zeros_like(size) if sizes.terms is None else sizes.terms
    at_edge = sizes.largest(dtype, float(usual.max()), torch.finfo(dtype).max, float(terms.max()))
    _compare_kinds(name, ours, plain, truth, at_edge)
    terms = torch.where(finite, terms, 0.0)
    largest = float(size.max())
    limits = (
        sizes.largest(dtype, float(usual.max()), largest, float(terms.max())),
        sizes.mean(dtype, float(usual.sum()) / count, float(size.sum()) / count, float(terms.sum()) / count, largest),
    )
    for word, error, usual_error, limit in (
        ("largest", float(own.max()), float(usual.max()), limits[0]),
        ("mean", float(own.sum()) / count, float(usual.sum()) / count, limits[1]),
    ):
        if not error <= limit:
            place = tuple(int(index) for index in torch.unravel_index(own.argmax(), own.shape))
            raise KernelFault(
                f"{name}: {word} error {error:.3g} > limit {limit:.3g} (plain {usual_error:.3g}); worst at {list(place)}: "
                f"{float(ours[place]):.6g}, float64 {float(truth[place]):.6g}"
            )
        if error / limit > judged.observed:
            judged.observed, judged.where = error / limit, f"{name}, {word} error"
    judged.compared += int(finite.sum())
    judged.errors[name] = (float(own.max()), float(usual.max()))


def _compare_kinds(name: str, ours: Tensor, plain: Tensor, truth: Tensor, limit: float) -> None:
    kinds = _kind(ours)
    wrong = (kinds != _kind(truth.to(ours.dtype))) & (kinds != _kind(plain))
    if ours.dtype == torch.float16:  # where the plain one overflowed inside, it says nothing of what is to be expected
        wrong &= ~(plain.isnan() & truth.isfinite())
    if bool(wrong.any()):
        wrong &= ~_at_edge(ours.double(), truth, torch.finfo(ours.dtype).max, limit)
    if bool(wrong.any()):
        place = tuple(int(index) for index in wrong.nonzero()[0])
        raise KernelFault(
            f"{name}{list(place)} = {float(ours[place]):.6g}: expected {float(truth[place]):.6g} (float64), plain "
            f"{float(plain[place]):.6g}; {int(wrong.sum())} of {ours.numel()} are NaN or infinite in one and not in the other"
        )


def _at_edge(ours: Tensor, truth: Tensor, most: float, limit: float) -> Tensor:
    """Where float64 is so near the dtype's largest number that a legal error decides between that and infinity."""
    near = truth.abs() + limit >= most
    return near & torch.where(ours.isinf(), ours.sign() == truth.sign(), (ours - truth).abs() <= limit)


def _kind(tensor: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 infinity, 3 minus infinity."""
    return tensor.isnan() * 1 + tensor.isposinf() * 2 + tensor.isneginf() * 3


def check_rows(op: KernelOp, case: Any, tensors: Tensors, ours: Mapping[str, Tensor], rows: int) -> None:
    """Run up to `rows` rows alone and compare with the same rows of `ours`, bit for bit."""
    if not op.row_independent or rows == 0:
        return
    count = tensors[op.row_inputs[0]].shape[0]
    chosen = sorted({0, count // 2, count - 1, *range(min(rows - 3, count))})[:rows] if count > 1 else []
    for row in chosen:
        alone = {name: _row(t, row) if name in op.row_inputs else t for name, t in tensors.items()}
        answer = run_kernel(op, case, moved_all(alone, next(iter(tensors.values())).device))
        for name in op.row_independent:
            if not same_bits(answer[name][0].contiguous(), ours[name][row].contiguous()):
                raise KernelFault(
                    f"{name}[{row}]: the row alone differs in its bits from the row in a batch of {count}"
                )


def _row(tensor: Tensor, row: int) -> Tensor:
    """Return one row over the same storage, so that the other rows stay around it."""
    return whole_storage(tensor).as_strided(
        (1, *tensor.shape[1:]), tensor.stride(), tensor.storage_offset() + row * tensor.stride(0)
    )

"""What the losses of a linear head share on the host: how rows are cut under a byte budget, products that accumulate in
float32, the running sums of both gradients, and their last scaling.

    hidden [X, D]          one gradient chunk           logits   float32, `logit_rows` at a time   (HBM, reused)
    +-----------+ rows     +--------------------+       slopes   input dtype, `rows` at a time     (HBM, reused)
    |           | ----->   | logits -> slopes   | ----> d hidden, one product for each chunk
    +-----------+          +--------------------+       d head   float32 [V, D], a running sum over chunks
         ...                logit_rows, repeated

Logits stay float32 (in bfloat16 they carry an error of 1 part in 500 of their own size, which is the whole of a loss
near convergence); slopes, the derivatives of the loss by the logits, round once to the input dtype, because tensor
cores read them. Everything runs in a fixed order without atomics: the same call gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera_kernels.checks import expect_choice, expect_dtype, expect_rank, expect_same_device, expect_same_dtype
from tessera_kernels.triton._launch import FLOATS, num_sms, on_device
from tessera_shared.errors import KernelError

COLUMN_MULTIPLE = 64
"""Rows of logits and slopes start at multiples of this many elements: 128 bytes at least, as TMA and wide loads want."""

MODES = ("chunked", "no_logits")
ACCUMULATE = ("float32", "head")


class LossConfig(NamedTuple):
    """How one call is cut up; 0 = chosen from the shapes. Integers only: it travels through a custom op's schema."""

    rows: int = 0  # rows whose slopes are kept for one pair of gradient products
    logit_rows: int = 0  # rows whose float32 logits exist at a time
    hidden_splits: int = 0  # pieces that the vocabulary is cut into for d hidden, multiplied side by side, then added
    block: int = 0  # columns of a tile of the row kernel
    num_warps: int = 0
    stages: int = 0  # depth of the row kernel's prefetch; 1 = none
    product: int = (
        0  # 1 = the library's, 2 = that of `_logit_tiles`, which takes softmax sums in its epilogue, 3 = CUDA C++'s
    )


MOST_LOGIT_ROWS = 512
"""Rows of a product with the head from which on reading the head is no longer what takes the time."""

LOGITS_SHARE = 60
"""Percent of a budget that float32 logits may take. A product of 128 rows reads the head for half the work of one of 256,
which costs more than what few large chunks save: reading and writing d head once for each."""

TILE, TILES_AT_ONCE = (128, 256), 132
"""What a library's product gives one multiprocessor of a Hopper at a time, and how many of those there are."""


class Chunks(NamedTuple):
    """The cut that `plan_chunks` found."""

    rows: int
    logit_rows: int


def padded_columns(columns: int) -> int:
    """Return the length of a row of logits or slopes in memory."""
    return _up(columns, COLUMN_MULTIPLE)


def plan_chunks(num_rows: int, vocab: int, *, models: int, slope_bytes: int, budget: int) -> Chunks:
    """Return the fewest gradient chunks, all of about the same size, that fit into `budget` bytes.

    A chunk takes `rows` x `slope_bytes` (0 without gradients) and `logit_rows` x 4 for each of `models`, per column of
    the vocabulary. Raises `KernelError` when not even one row fits.
    """
    units = budget // padded_columns(vocab)
    for quantum in (128, 16, 1):
        whole = units // (4 * models + slope_bytes)  # rows that fit with their slopes
        logit_rows = _down(min(LOGITS_SHARE * units // (400 * models), whole, MOST_LOGIT_ROWS), quantum) or quantum
        room = units - 4 * models * logit_rows
        most = _down(room // slope_bytes, quantum) if slope_bytes else _down(units // (4 * models), quantum)
        most = _down(most, logit_rows) if quantum > 16 else most  # no piece that is not full
        if most < logit_rows or room < 0:
            continue
        rows = min(most, _up(triton.cdiv(num_rows, triton.cdiv(num_rows, most)), quantum))
        if not slope_bytes:
            return Chunks(rows, rows)
        widest = _down((units - slope_bytes * rows) // (4 * models), quantum)
        pieces = triton.cdiv(rows, max(1, min(widest, rows)))
        return Chunks(rows, _up(triton.cdiv(rows, pieces), quantum))
    least = padded_columns(vocab) * (4 * models + slope_bytes)
    raise KernelError(
        f"chunk_bytes = {budget}: expected at least {least}, because one row of {vocab} logits with its slopes takes that; "
        f"try chunk_bytes={256 * least}"
    )


def plan_rows(num_rows: int, row_bytes: int, budget: int) -> int:
    """Return how many rows a chunk has when each takes `row_bytes`: the fewest chunks, all of about the same size."""
    most = budget // row_bytes
    if most == 0:
        raise KernelError(
            f"chunk_bytes = {budget}: expected at least {row_bytes}, because one row's slopes and sums take that; "
            f"try chunk_bytes={256 * row_bytes}"
        )
    quantum = 128 if most >= 128 else 1
    return min(_down(most, quantum), _up(triton.cdiv(num_rows, triton.cdiv(num_rows, _down(most, quantum))), quantum))


def plan_columns(num_rows: int, vocab: int, *, models: int, state: int, budget: int) -> int:
    """Return how many columns of the vocabulary one tile of the no-logits mode has, for all rows at once.

    A column takes 4 bytes a row for each model: slopes take the place of logits. `state` is what a row takes beside them.
    """
    per_column = 4 * models * num_rows
    room = (budget - state * num_rows) // per_column
    columns = min(_down(room, COLUMN_MULTIPLE if room < COARSE_COLUMNS else 16), padded_columns(vocab))
    if columns <= 0:
        least = per_column * COLUMN_MULTIPLE + state * num_rows
        raise KernelError(
            f"chunk_bytes = {budget}: expected at least {least}, because a tile has {num_rows} rows and {COLUMN_MULTIPLE} "
            f"columns; try chunk_bytes={8 * least}"
        )
    return columns


COARSE_COLUMNS = 512
"""From so many columns on a tile takes every 16 that fit, 64 bytes: of a power of two less a little, 64 would leave more."""


def choose_splits(rows: int, width: int, vocab: int) -> int:
    """Return into how many pieces to cut a product over the whole vocabulary, so that its tiles fill the device."""
    tiles = -(-rows // TILE[0]) * -(-width // TILE[1])

    def busy(splits: int) -> float:
        return tiles * splits / _up(tiles * splits, TILES_AT_ONCE)

    splits = [count for count in (1, 2, 3, 4, 6, 8) if vocab % count == 0]
    return max(splits, key=lambda count: busy(count) - 0.02 * count)


def slopes_within(tile_XV: Tensor, dtype: torch.dtype, *, at_end: bool) -> Tensor:
    """Return where a tile's slopes are written: over its logits, in the half of each row that a walk leaves behind it.

    A walk from the row's end (`at_end`) writes to the second half, one from its beginning to the first.
    """
    columns = tile_XV.shape[1]
    if dtype == torch.float32:
        return tile_XV
    halves = tile_XV.view(dtype)
    return halves[:, columns:] if at_end else halves[:, :columns]


def pieces(total: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover range(total)."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b into `out`, accumulated in float32; `out` has the operands' dtype or float32."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to `total` in place, in one product's epilogue; `total` has the operands' dtype or float32."""
    if total.dtype == a.dtype:
        return torch.addmm(total, a, b, out=total)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


def hidden_sum_dtype(hidden_XD: Tensor) -> torch.dtype:
    """Return the dtype in which d hidden is kept: the input's, but for float16, where what is not divided yet overflows."""
    return torch.float32 if hidden_XD.dtype == torch.float16 else hidden_XD.dtype


class GradientSums:
    """The gradients of hidden states and head as they grow, both times `unit` (see `unit_of`).

    Without a need for one of them its product is left out and its tensor is empty.
    """

    def __init__(
        self,
        hidden_XD: Tensor,
        head_VD: Tensor,
        vocab: int,
        *,
        for_hidden: bool,
        for_head: bool,
        head_dtype: torch.dtype,
        tiled: bool,
    ) -> None:
        self._head_VD, self._vocab, self._dtype = head_VD, vocab, hidden_sum_dtype(hidden_XD)
        self._for_hidden, self._for_head, self._started = for_hidden, for_head, False
        held = torch.float32 if tiled else self._dtype  # a sum over columns; over rows each part is finished at once
        self._rows = list(pieces(len(hidden_XD), triton.cdiv(len(hidden_XD), 2 if held != self._dtype else 1)))
        self._hidden = [
            torch.empty(part.stop - part.start, hidden_XD.shape[1], dtype=held, device=hidden_XD.device)
            for part in self._rows * for_hidden
        ]
        empty = hidden_XD.new_empty(0)
        self.head_VD = torch.empty(head_VD.shape, dtype=head_dtype, device=head_VD.device) if for_head else empty
        if for_head:
            self.head_VD[vocab:].zero_()

    def add_rows(self, slopes_XV: Tensor, hidden_XD: Tensor, rows: slice, splits: int = 1) -> None:
        """Take in the slopes of some rows over the whole vocabulary."""
        if self._for_hidden:
            _split_product(slopes_XV, self._head_VD[: self._vocab], self._hidden[0][rows], splits)
        if self._for_head:
            into = self.head_VD[: self._vocab]
            if self._started:
                add_product(into, slopes_XV.T, hidden_XD)
            else:
                product(slopes_XV.T, hidden_XD, into)
        self._started = True

    def add_columns(self, slopes_XV: Tensor, hidden_XD: Tensor, ids: slice) -> None:
        """Take in the slopes of all rows over a part of the vocabulary."""
        for rows, into in zip(self._rows, self._hidden, strict=False):
            if self._started:
                add_product(into, slopes_XV[rows], self._head_VD[ids])
            else:
                product(slopes_XV[rows], self._head_VD[ids], into)
        if self._for_head:
            product(slopes_XV.T, hidden_XD, self.head_VD[ids])
        self._started = True

    def take_hidden(self) -> Tensor:
        """Return d hidden and forget it; a sum in another dtype is given back in halves while it is rounded."""
        if not self._for_hidden:
            return self.head_VD.new_empty(0, dtype=self._dtype)
        parts = []
        while self._hidden:
            parts.append(self._hidden.pop(0).to(self._dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def unit_of(num_tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what slopes are multiplied by before they round: 1 / num_tokens, or 1 in float16, where that underflows.

    The usual caller divides the loss sum by `num_tokens`: then what is left to multiply by in the backward is one, and
    finished gradients stay as they are instead of being read, written and rounded once more.
    """
    one = torch.ones((), dtype=torch.float32, device=num_tokens.device)
    return one if dtype == torch.float16 else one / num_tokens.clamp(min=1)


def finish(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * factor in `dtype`: in the same memory when that is the dtype already, else rounded once."""
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    if gradient.dtype != dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    with on_device(gradient):
        _scale[(4 * num_sms(gradient.device),)](gradient, factor, gradient.numel(), BLOCK=8192, num_warps=8)
    torch.autograd.graph.increment_version(gradient)  # a second backward must find out, not scale twice
    return gradient


@triton.jit
def _scale(numbers, factor_pointer, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_pointer)
    if not (tl.abs(factor - 1.0) <= 2.0**-22):  # two roundings of num_tokens * (1 / num_tokens), and no NaN
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, tl.num_programs(0) * BLOCK):
            places = start + tl.arange(0, BLOCK)
            x = tl.load(numbers + places, mask=places < count, other=0.0)
            tl.store(numbers + places, (x.to(tl.float32) * factor).to(x.dtype), mask=places < count)


def head_sum_dtype(head_VD: Tensor, mode: str, accumulate: str) -> torch.dtype:
    """Return the dtype in which d head is summed over chunks; without logits each row of it is one product."""
    return head_VD.dtype if mode == "no_logits" or accumulate == "head" else torch.float32


def head_grad_dtype(head_VD: Tensor) -> torch.dtype:
    """Return the dtype in which autograd wants d head: the leaf's `grad_dtype` where it has one, else its own."""
    if torch.compiler.is_compiling() or not (head_VD.is_leaf and head_VD.requires_grad):
        return head_VD.dtype
    return getattr(head_VD, "grad_dtype", None) or head_VD.dtype


class LinearLoss(torch.autograd.Function):
    """Autograd's view of a loss whose forward computes both gradients. Its first two inputs are hidden states and head.

    A forward gives what its launcher returned to `keep`: (loss, num_tokens, unit, d hidden and d head in that unit).
    """

    @staticmethod
    def keep(ctx: Any, hidden_XD: Tensor, head_VD: Tensor, result: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Save for the backward and return (loss, num_tokens)."""
        loss, num_tokens, *saved = result
        ctx.save_for_backward(*saved)
        ctx.dtypes = hidden_XD.dtype, head_grad_dtype(head_VD)
        ctx.mark_non_differentiable(num_tokens)
        return loss, num_tokens

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply what is kept by the incoming derivative of the loss."""
        unit, *kept = ctx.saved_tensors
        factor = grad / unit
        needed = ctx.needs_input_grad
        grads = (
            finish(gradient, factor, dtype) if need else None
            for gradient, dtype, need in zip(kept, ctx.dtypes, needed, strict=False)
        )
        return *grads, *(None,) * (len(needed) - 2)


def fake_result(
    hidden_XD: Tensor, head_VD: Tensor, labels_X: Tensor, *, for_hidden: bool, for_head: bool, head_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors of what a launcher returns (see `LinearLoss`)."""
    scalar = hidden_XD.new_empty((), dtype=torch.float32)
    d_head = hidden_XD.new_empty(0)
    d_hidden = hidden_XD.new_empty(hidden_XD.shape if for_hidden else 0, dtype=hidden_sum_dtype(hidden_XD))
    if for_head:
        d_head = head_VD.new_empty(head_VD.shape, dtype=head_dtype)
    return scalar, labels_X.new_empty((), dtype=torch.int32), torch.empty_like(scalar), d_hidden, d_head


def check_pair(hidden: str, hidden_XD: Tensor, head: str, head_VD: Tensor) -> None:
    """Raise unless hidden states `[X, D]` and head `[V, D]` fit each other and the products can read them in place."""
    expect_rank(hidden, hidden_XD, 2)
    expect_rank(head, head_VD, 2)
    expect_dtype(hidden, hidden_XD, *FLOATS)
    expect_same_device({hidden: hidden_XD, head: head_VD})
    expect_same_dtype({hidden: hidden_XD, head: head_VD})
    if head_VD.shape[1] != hidden_XD.shape[1]:
        raise KernelError(
            f"{head}.shape = {list(head_VD.shape)}: expected [any, {hidden_XD.shape[1]}], because {hidden} has that width; "
            "try the head that belongs to these hidden states"
        )
    if head_VD.numel() == 0:
        raise KernelError(
            f"{head}.shape = {list(head_VD.shape)}: expected a vocabulary and a width of at least 1, because a softmax over "
            "nothing has no value; try a head with rows"
        )
    if 1 not in head_VD.stride() and min(head_VD.shape) > 1:
        raise KernelError(
            f"{head}.stride() = {list(head_VD.stride())}: expected 1 in one dimension, because every chunk would copy the "
            f"whole head otherwise; try {head}.contiguous()"
        )


def check_labels(labels_X: Tensor, hidden_XD: Tensor) -> None:
    """Raise unless there is one integer label for each row."""
    expect_dtype("labels_X", labels_X, torch.int64, torch.int32)
    expect_same_device({"hidden states": hidden_XD, "labels_X": labels_X})
    if labels_X.shape != hidden_XD.shape[:1]:
        raise KernelError(
            f"labels_X.shape = {list(labels_X.shape)}: expected [{hidden_XD.shape[0]}], because each row of the hidden states "
            "has one label; try labels.reshape(-1)"
        )


def check_vocab(vocab_size: int | None, rows: int) -> int:
    """Return how many ids are real; ids at or above have probability 0 and no gradient."""
    vocab = rows if vocab_size is None else vocab_size
    if not 1 <= vocab <= rows:
        raise KernelError(
            f"vocab_size = {vocab}: expected 1 to {rows}, because the head has {rows} rows; try vocab_size=None for all of them"
        )
    return vocab


def check_options(mode: str, accumulate: str, dtype: torch.dtype, chunk_bytes: int | None) -> None:
    """Raise unless the words are known and go together."""
    expect_choice("mode", mode, MODES)
    expect_choice("accumulate", accumulate, ACCUMULATE)
    if accumulate == "head" and dtype == torch.float16:
        raise KernelError(
            "accumulate = 'head' with float16: expected 'float32', because a sum over tokens leaves float16's range; "
            "try accumulate='float32'"
        )
    if chunk_bytes is not None and chunk_bytes < 1:
        raise KernelError(
            f"chunk_bytes = {chunk_bytes}: expected at least 1, because it is a size; try None, the measured default"
        )


def readable(hidden_XD: Tensor) -> Tensor:
    """Return hidden states that a product reads in place: themselves, or a copy when neither stride is 1."""
    return hidden_XD if 1 in hidden_XD.stride() else hidden_XD.contiguous()


def _split_product(slopes: Tensor, head: Tensor, out: Tensor, splits: int) -> None:
    """One product whose K is the vocabulary has few tiles: cut along K it fills the device, and the sum is in order."""
    if splits == 1 or head.shape[0] % splits or not slopes.is_cuda:
        product(slopes, head, out)
        return
    part = head.shape[0] // splits
    rows, width = out.shape
    a = slopes.as_strided((splits, rows, part), (part, slopes.stride(0), 1))
    b = head.as_strided((splits, part, width), (part * head.stride(0), *head.stride()))
    parts = torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
    total, *others = parts.unbind()
    for other in others:
        total += other
    out.copy_(total)


def _down(number: int, multiple: int) -> int:
    return number // multiple * multiple


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

"""The running sums of both gradients of a linear head's loss: products that accumulate in float32, and their last scaling.

Slopes, the derivatives of the loss by the logits, round once to the input dtype, because tensor cores read them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera_kernels.triton._launch import num_sms, on_device
from tessera_kernels.triton._loss_plans import pieces


def slopes_within(tile_XV: Tensor, dtype: torch.dtype, *, at_end: bool) -> Tensor:
    """Return where a tile's slopes are written: over its logits, in the half of each row that a walk leaves behind it.

    A walk from the row's end (`at_end`) writes to the second half, one from its beginning to the first.
    """
    columns = tile_XV.shape[1]
    if dtype == torch.float32:
        return tile_XV
    halves = tile_XV.view(dtype)
    return halves[:, columns:] if at_end else halves[:, :columns]


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

    def room_behind(self, first_id: int) -> Tensor:
        """Return d head's memory from that id on, flat: free for all that is read before `add_columns` gets there."""
        return self.head_VD[first_id : self._vocab].view(-1)

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

"""Row kernels of the linear cross-entropy: online sums over a row of logits, then loss and slopes.

A row is walked forward for its sums and from its end for its slopes. The label is left out of the sums: its logit is a dot
product of its own (`_label_logits`), and its term is added where it does not hide the others (`_row_math.label_loss`).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._row_math import LOWEST, exp, found_logit, label_loss, tanh, without_shortfall, write_zeros


@triton.jit
def _capped(z, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * tanh(z / softcap)
    return z


@triton.jit
def _sums(
    row, first_id, width, padded, label, top, rest, moment, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry a row's sums over one more stretch of it, the label left out of both: (maximum, sum of e^(z - maximum), the
    same sum with each term times what z grows by when h W^T grows by itself)."""
    lanes = tl.arange(0, BLOCK)
    rests, moments = tl.where(lanes == 0, rest, 0.0), tl.where(lanes == 0, moment, 0.0)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = start + lanes
        raw = tl.where(columns < width, tl.load(row + columns, mask=columns < padded, other=0.0), 0.0)
        capped = _capped(raw, softcap, CAPPED)
        z = tl.where(columns < width, capped, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        fade = exp(top - new_top)
        e = tl.where(first_id + columns == label, 0.0, exp(z - new_top))
        growth = raw * _slope_of_cap(capped, softcap) if CAPPED else raw
        rests = rests * fade + e
        moments = moments * fade + tl.where(e > 0.0, e * growth, 0.0)
        top = new_top
    return top, tl.sum(rests, 0), tl.sum(moments, 0)


@triton.jit
def _slope_of_cap(z, softcap):
    return (1.0 - z / softcap) * (1.0 + z / softcap)


@triton.jit
def _write_slopes(
    row, slopes, first_id, width, padded, label, top, rest, label_logit, scale, z_loss, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Walk a stretch of a row from its end to its beginning and write scale * dz, rounded to the slopes' dtype."""
    _, total = label_loss(top, rest, label_logit)
    share = 2.0 * z_loss * (top + tl.log(total))
    factor = scale * (1.0 + share) / total
    own = scale * (share * exp(label_logit - top) - rest) / total
    steps = (padded + BLOCK - 1) // BLOCK
    for step in tl.range(0, steps, num_stages=STAGES):
        columns = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
        is_label = first_id + columns == label
        z = tl.where(columns < width, tl.load(row + columns, mask=columns < padded, other=0.0), 0.0)
        z = tl.where(columns < width, _capped(z, softcap, CAPPED), top)
        slope = tl.where(is_label, own, exp(z - top) * factor)
        if CAPPED:
            slope *= _slope_of_cap(tl.where(is_label, label_logit, z), softcap)
        slope = tl.where(columns < width, slope, 0.0)
        if IN_PLACE:
            tl.debug_barrier()  # the slopes of these columns lie over logits of others among them
        tl.store(slopes + columns, slope.to(slopes.dtype.element_ty), mask=columns < padded)


@triton.jit
def _row_loss(top, rest, label_logit, label, vocab, z_loss):
    """Return the row's loss; NaN when the label is no id."""
    loss, total = label_loss(top, rest, label_logit)
    normalizer = top + tl.log(total)
    known = (label >= 0) & (label < vocab)
    return tl.where(known, loss + z_loss * normalizer * normalizer, float("nan"))


@triton.jit
def row_kernel(
    logits, slopes, labels, exact, losses, unit, vocab, padded, ignore_index, z_loss, softcap,
    CAPPED: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row: its loss and, with WRITE, its slopes."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    z, dz = logits + row * padded, slopes + row * padded
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE:
            write_zeros(dz, padded, BLOCK)
    else:
        zero = tl.full((), 0.0, tl.float32)
        raw = tl.load(exact + row)
        found = found_logit(z, 0, vocab, label, zero)
        top, rest, moment = _sums(z, 0, vocab, padded, label, zero + LOWEST, zero, zero, softcap, CAPPED, BLOCK, STAGES)
        rest = without_shortfall(rest, moment, raw, found)
        label_logit = _capped(raw, softcap, CAPPED)
        loss = _row_loss(top, rest, label_logit, label, vocab, z_loss)
        tl.store(losses + row, loss)
        if WRITE:
            scale = tl.where(loss == loss, tl.load(unit), float("nan"))
            _write_slopes(
                z, dz, 0, vocab, padded, label, top, rest, label_logit, scale, z_loss, softcap, CAPPED, BLOCK, STAGES,
                False,
            )  # fmt: skip


@triton.jit
def tile_sums(
    logits, labels, state, first_id, width, padded, num_rows, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry one row's sums over one tile of the vocabulary; the first tile starts them."""
    row = tl.program_id(0).to(tl.int64)
    begun = first_id > 0
    z, place = logits + row * padded, state + row
    top = tl.load(place, mask=begun, other=LOWEST)
    rest = tl.load(place + num_rows, mask=begun, other=0.0)
    moment = tl.load(place + 2 * num_rows, mask=begun, other=0.0)
    found = tl.load(place + 3 * num_rows, mask=begun, other=0.0)
    label = tl.load(labels + row)
    found = found_logit(z, first_id, width, label, found)
    top, rest, moment = _sums(z, first_id, width, padded, label, top, rest, moment, softcap, CAPPED, BLOCK, STAGES)
    tl.store(place, top)
    tl.store(place + num_rows, rest)
    tl.store(place + 2 * num_rows, moment)
    tl.store(place + 3 * num_rows, found)


@triton.jit
def tile_losses(
    state, labels, exact, losses, vocab, num_rows, ignore_index, z_loss, softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn the finished sums of ROWS rows into their losses, and leave the sum that the slopes need in the state."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    top = tl.load(state + rows, mask=inside, other=0.0)
    rest = tl.load(state + num_rows + rows, mask=inside, other=0.0)
    moment = tl.load(state + 2 * num_rows + rows, mask=inside, other=0.0)
    found = tl.load(state + 3 * num_rows + rows, mask=inside, other=0.0)
    label = tl.load(labels + rows, mask=inside, other=0)
    raw = tl.load(exact + rows, mask=inside, other=0.0)
    rest = without_shortfall(rest, moment, raw, found)
    loss = _row_loss(top, rest, _capped(raw, softcap, CAPPED), label, vocab, z_loss)
    tl.store(state + num_rows + rows, rest, mask=inside)
    tl.store(losses + rows, tl.where(label == ignore_index, 0.0, loss), mask=inside)


@triton.jit
def tile_slopes(
    logits, slopes, slope_stride, labels, exact, losses, state, unit, first_id, width, padded, num_rows,
    ignore_index, z_loss, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row's slopes in one tile of the vocabulary, from the finished sums, over its logits."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    dz = slopes + row * slope_stride
    if label == ignore_index:
        write_zeros(dz, padded, BLOCK)
    else:
        top, rest = tl.load(state + row), tl.load(state + num_rows + row)
        loss = tl.load(losses + row)
        scale = tl.where(loss == loss, tl.load(unit), float("nan"))
        _write_slopes(
            logits + row * padded, dz, first_id, width, padded, label, top, rest,
            _capped(tl.load(exact + row), softcap, CAPPED), scale, z_loss, softcap, CAPPED, BLOCK, STAGES, True,
        )  # fmt: skip

"""Row kernels of the linear cross-entropy: online sums over a row of logits, then loss and slopes.

A row is walked forward for its sums and from its end for its slopes. The label is left out of the sums: its logit is a dot
product of its own (`_label_logits`), and its term is added where it does not hide the others (`_row_math.label_loss`).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._row_math import (
    LOWEST,
    exp,
    found_logit,
    label_loss,
    read_logits,
    tanh,
    without_shortfall,
    write_slopes_of,
    write_zeros,
)


@triton.jit
def capped(z, softcap, CAPPED: tl.constexpr):
    """Return logits as the softmax sees them."""
    if CAPPED:
        return softcap * tanh(z / softcap)
    return z


@triton.jit
def slope_of_cap(z, softcap):
    """Return by how much a capped logit z grows when the product grows by 1."""
    return (1.0 - z / softcap) * (1.0 + z / softcap)


@triton.jit
def _tile_sums(
    row, columns, width, padded, own_id, top, rests, moments, softcap, CAPPED: tl.constexpr, LAST: tl.constexpr
):
    """Carry the sums over one tile; they fade only where it has a new maximum, which few tiles have."""
    raw = read_logits(row, columns, width, padded, 0.0, LAST)
    z = capped(raw, softcap, CAPPED)
    growth = raw * slope_of_cap(z, softcap) if CAPPED else raw
    if LAST:
        z = tl.where(columns < width, z, -float("inf"))
    new_top = tl.maximum(top, tl.max(z, 0))
    if new_top > top:
        fade = exp(top - new_top)
        rests, moments = rests * fade, moments * fade
    e = tl.where(columns == own_id, 0.0, exp(z - new_top))
    return new_top, rests + e, moments + tl.where(e > 0.0, e * growth, 0.0)


@triton.jit
def _sums(
    row, first_id, width, padded, label, top, rest, moment, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Carry a row's sums over one more stretch of it, the label left out of both: (maximum, sum of e^(z - maximum), the
    same sum with each term times what z grows by when h W^T grows by itself)."""
    lanes = tl.arange(0, BLOCK)
    rests, moments = tl.where(lanes == 0, rest, 0.0), tl.where(lanes == 0, moment, 0.0)
    whole, own_id = width // BLOCK * BLOCK, (label - first_id).to(tl.int32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        top, rests, moments = _tile_sums(
            row, start + lanes, width, padded, own_id, top, rests, moments, softcap, CAPPED, False
        )
    if whole < width:
        top, rests, moments = _tile_sums(
            row, whole + lanes, width, padded, own_id, top, rests, moments, softcap, CAPPED, True
        )
    return top, tl.sum(rests, 0), tl.sum(moments, 0)


@triton.jit
def _write_tile(
    row, slopes, columns, width, padded, own_id, top, factor, own, softcap,
    CAPPED: tl.constexpr, IN_PLACE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Write one tile's slopes."""
    z = capped(read_logits(row, columns, width, padded, 0.0, LAST), softcap, CAPPED)
    if LAST:
        z = tl.where(columns < width, z, top)
    slope = exp(z - top) * factor
    if CAPPED:
        slope *= slope_of_cap(z, softcap)
    slope = tl.where(columns == own_id, own, slope)
    if IN_PLACE:
        tl.debug_barrier()  # the slopes of these columns lie over logits of others among them
    write_slopes_of(slopes, columns, slope, width, padded, LAST)


@triton.jit
def _write_slopes(
    row, slopes, first_id, width, padded, label, top, rest, label_logit, scale, z_loss, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Walk a stretch of a row from its end to its beginning and write scale * dz, rounded to the slopes' dtype."""
    factor, own = factors(top, rest, label_logit, scale, z_loss, softcap, CAPPED)
    lanes, own_id = tl.arange(0, BLOCK), (label - first_id).to(tl.int32)
    whole, steps = width // BLOCK, (padded + BLOCK - 1) // BLOCK
    for step in range(steps - whole):
        _write_tile(
            row, slopes, (steps - 1 - step) * BLOCK + lanes, width, padded, own_id, top, factor, own, softcap, CAPPED,
            IN_PLACE, True,
        )  # fmt: skip
    for step in tl.range(0, whole, num_stages=STAGES):
        _write_tile(
            row, slopes, (whole - 1 - step) * BLOCK + lanes, width, padded, own_id, top, factor, own, softcap, CAPPED,
            IN_PLACE, False,
        )  # fmt: skip


@triton.jit
def factors(top, rest, label_logit, scale, z_loss, softcap, CAPPED: tl.constexpr):
    """Return what every e^(z - top) is multiplied by to be scale * dz, and the label's slope."""
    _, total = label_loss(top, rest, label_logit)
    share = 2.0 * z_loss * (top + tl.log(total))
    own = scale * (share * exp(label_logit - top) - rest) / total
    if CAPPED:
        own *= slope_of_cap(label_logit, softcap)
    return scale * (1.0 + share) / total, own


@triton.jit
def row_loss(top, rest, label_logit, label, vocab, z_loss):
    """Return the row's loss; NaN when the label is no id."""
    loss, total = label_loss(top, rest, label_logit)
    normalizer = top + tl.log(total)
    known = (label >= 0) & (label < vocab)
    return tl.where(known, loss + z_loss * normalizer * normalizer, float("nan"))


@triton.jit
def row_kernel(
    logits, slopes, labels, exact, losses, unit, vocab, padded, ignore_index, z_loss, softcap,
    CAPPED: tl.constexpr, SHORT: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
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
        rest = without_shortfall(rest, moment, raw, found, SHORT)
        label_logit = capped(raw, softcap, CAPPED)
        loss = row_loss(top, rest, label_logit, label, vocab, z_loss)
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
    CAPPED: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr,
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
    rest = without_shortfall(rest, moment, raw, found, SHORT)
    loss = row_loss(top, rest, capped(raw, softcap, CAPPED), label, vocab, z_loss)
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
            capped(tl.load(exact + row), softcap, CAPPED), scale, z_loss, softcap, CAPPED, BLOCK, STAGES, True,
        )  # fmt: skip

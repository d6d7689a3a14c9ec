"""Device code of `rms_norm`: rows in registers (`forward`, `backward`), and looped when a row is wider than a tile."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from tessera_kernels.triton._launch import read, write


@triton.jit
def _unit_to_output(unit, gain, dtype: tl.constexpr, GAIN_AFTER_CAST: tl.constexpr):
    if GAIN_AFTER_CAST:
        return unit.to(dtype).to(tl.float32) * gain
    return unit * gain


@triton.jit
def _kept_gain(gain, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The gain as [1, BLOCK_D]: every row asks for it, so that it should stay in L1 while the rows pass by."""
    if D != BLOCK_D:
        value = tl.load(gain + columns, mask=columns < D, other=0.0, eviction_policy="evict_last")
    else:
        value = tl.load(gain + columns, eviction_policy="evict_last")
    return value[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def forward(
    x, residual, gain, y, total, rstd, x_stride, residual_stride, num_rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, EVEN_ROWS: tl.constexpr, ADD: tl.constexpr,
    GAIN_AFTER_CAST: tl.constexpr,
):  # fmt: skip
    """One pass over a block of ROWS rows. Everything is asked for before the first sum, and the gain stays packed until
    it is needed: a program waits for memory once, and several fit a multiprocessor."""
    MASKED: tl.constexpr = not (EVEN_ROWS and D == BLOCK_D)
    dtype: tl.constexpr = y.dtype.element_ty
    columns = tl.arange(0, BLOCK_D)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
    dense = rows[:, None] * D + columns[None, :]
    numbers = read(x + rows[:, None] * x_stride + columns[None, :], inside, MASKED)
    if ADD:
        others = read(residual + rows[:, None] * residual_stride + columns[None, :], inside, MASKED)
    gain_D = _kept_gain(gain, columns, D, BLOCK_D)
    lifted = numbers.to(tl.float32)
    if ADD:
        rounded = (lifted + others.to(tl.float32)).to(dtype)
        write(total + dense, rounded, inside, MASKED)
        lifted = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(lifted * lifted, axis=1) / D + eps)
    write(rstd + rows, scale, rows < num_rows, not EVEN_ROWS)
    unit = lifted * scale[:, None]
    write(y + dense, _unit_to_output(unit, gain_D.to(tl.float32), dtype, GAIN_AFTER_CAST), inside, MASKED)


@triton.jit
def forward_wide(
    x, residual, gain, y, total, rstd, x_stride, residual_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr, GAIN_AFTER_CAST: tl.constexpr,
):  # fmt: skip
    """One row a program, in pieces: first the squares, then (the row now comes from L2) the result."""
    MASKED: tl.constexpr = D % BLOCK_D != 0
    dtype: tl.constexpr = y.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        lifted = read(x + row * x_stride + columns, columns < D, MASKED).to(tl.float32)
        if ADD:
            lifted += read(residual + row * residual_stride + columns, columns < D, MASKED).to(tl.float32)
            lifted = lifted.to(dtype).to(tl.float32)
        squares += lifted * lifted
    scale = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    tl.store(rstd + row, scale)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        gain_D = read(gain + columns, inside, MASKED).to(tl.float32)
        lifted = read(x + row * x_stride + columns, inside, MASKED).to(tl.float32)
        if ADD:
            lifted += read(residual + row * residual_stride + columns, inside, MASKED).to(tl.float32)
            rounded = lifted.to(dtype)
            write(total + row * D + columns, rounded, inside, MASKED)
            lifted = rounded.to(tl.float32)
        write(y + row * D + columns, _unit_to_output(lifted * scale, gain_D, dtype, GAIN_AFTER_CAST), inside, MASKED)


@triton.jit
def _unit_gradient(dy, gain, dtype: tl.constexpr, GAIN_AFTER_CAST: tl.constexpr):
    if GAIN_AFTER_CAST:
        return (dy * gain).to(dtype).to(tl.float32)
    return dy * gain


@triton.jit
def _rounded_unit(unit, dtype: tl.constexpr, GAIN_AFTER_CAST: tl.constexpr):
    if GAIN_AFTER_CAST:
        return unit.to(dtype).to(tl.float32)
    return unit


@triton.jit(do_not_specialize=["num_rows"])
def backward(
    dy, x, gain, rstd, dtotal, dx, partial, dy_stride, x_stride, dtotal_stride, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, EVEN_ROWS: tl.constexpr, ADD: tl.constexpr,
    GAIN_AFTER_CAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx of every num_programs-th block of rows, and this program's float32 sum for the gain, [num_programs, D].

    What is alive across the row's sum decides how many programs fit: unit, dunit and dgain, and nothing else.
    """
    MASKED: tl.constexpr = not (EVEN_ROWS and D == BLOCK_D)
    dtype: tl.constexpr = dx.dtype.element_ty
    columns = tl.arange(0, BLOCK_D)
    dgain = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < D)[None, :]
        scale = read(rstd + rows, rows < num_rows, not EVEN_ROWS)[:, None]
        unit = read(x + rows[:, None] * x_stride + columns[None, :], inside, MASKED).to(tl.float32) * scale
        upstream = read(dy + rows[:, None] * dy_stride + columns[None, :], inside, MASKED).to(tl.float32)
        gain_D = tl.zeros([1, BLOCK_D], gain.dtype.element_ty)
        if block >= 0:  # always: what is read under a condition is not read ahead, but from L1 when it is needed
            gain_D = _kept_gain(gain, columns, D, BLOCK_D)
        dunit = _unit_gradient(upstream, gain_D.to(tl.float32), dtype, GAIN_AFTER_CAST)
        dgain += upstream * _rounded_unit(unit, dtype, GAIN_AFTER_CAST)
        mean = tl.sum(dunit * unit, axis=1)[:, None] / D
        change = ((dunit - unit * mean) * scale).to(dtype)
        if ADD:
            passed = read(dtotal + rows[:, None] * dtotal_stride + columns[None, :], inside, MASKED).to(tl.float32)
            change = (change.to(tl.float32) + passed).to(dtype)
        write(dx + rows[:, None] * D + columns[None, :], change, inside, MASKED)
    write(partial + tl.program_id(0) * D + columns, tl.sum(dgain, axis=0), columns < D, D != BLOCK_D)


@triton.jit
def backward_wide(
    dy, x, gain, rstd, dtotal, dx, dy_stride, x_stride, dtotal_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr, GAIN_AFTER_CAST: tl.constexpr,
):  # fmt: skip
    """dx of one row a program, in pieces, in two passes of which the second reads from L2."""
    MASKED: tl.constexpr = D % BLOCK_D != 0
    dtype: tl.constexpr = dx.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(rstd + row)
    products = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        gain_D = read(gain + columns, columns < D, MASKED).to(tl.float32)
        unit = read(x + row * x_stride + columns, columns < D, MASKED).to(tl.float32) * scale
        upstream = read(dy + row * dy_stride + columns, columns < D, MASKED).to(tl.float32)
        products += _unit_gradient(upstream, gain_D, dtype, GAIN_AFTER_CAST) * unit
    mean = tl.sum(products, axis=0) / D
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = columns < D
        gain_D = read(gain + columns, inside, MASKED).to(tl.float32)
        unit = read(x + row * x_stride + columns, inside, MASKED).to(tl.float32) * scale
        upstream = read(dy + row * dy_stride + columns, inside, MASKED).to(tl.float32)
        change = ((_unit_gradient(upstream, gain_D, dtype, GAIN_AFTER_CAST) - unit * mean) * scale).to(dtype)
        if ADD:
            passed = read(dtotal + row * dtotal_stride + columns, inside, MASKED).to(tl.float32)
            change = (change.to(tl.float32) + passed).to(dtype)
        write(dx + row * D + columns, change, inside, MASKED)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def gain_partials_wide(
    dy, x, rstd, partial, dy_stride, x_stride, num_rows, rows_per_program,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GAIN_AFTER_CAST: tl.constexpr,
):  # fmt: skip
    """Sum of dy * unit over a run of rows, for BLOCK_D columns: partial [runs, D] in float32."""
    dtype: tl.constexpr = x.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * rows_per_program
    dgain = tl.zeros([BLOCK_D], tl.float32)
    for step in tl.range(0, tl.minimum(rows_per_program, num_rows - first)):
        row = first.to(tl.int64) + step
        unit = read(x + row * x_stride + columns, columns < D, True).to(tl.float32) * tl.load(rstd + row)
        upstream = read(dy + row * dy_stride + columns, columns < D, True).to(tl.float32)
        dgain += upstream * _rounded_unit(unit, dtype, GAIN_AFTER_CAST)
    write(partial + tl.program_id(1).to(tl.int64) * D + columns, dgain, columns < D, True)


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials(
    partial, dgain, num_partials, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dgain = sum of partial [num_partials, D] over its rows, always in the same order."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in tl.range(0, num_partials, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = (rows < num_partials)[:, None] & (columns < D)[None, :]
        total += read(partial + rows[:, None].to(tl.int64) * D + columns[None, :], inside, True)
    write(dgain + columns, tl.sum(total, axis=0), columns < D, True)

"""Packed words of a weight -> numbers that the tensor cores take, in registers.

A word of 16 bits has a bfloat16's width, two words a register, so each instruction here works on two weights and none
moves bits between words (layout: `tessera_kernels.quant_weight`).

    4 bits   bfloat16 keeps 7 bits of fraction, so 0x4300 (128.0) with a code or-ed into the fraction *is* 128 + q:
             shift, (mask, or), and one exact subtraction (0x4300 | q) - (128 + z) = q - z. No conversion instruction.
             (Kim et al. 2022, arXiv 2211.10017, section 3.3, there for float16.)      11 instructions for 8 weights
    8 bits   sign and magnitude where bfloat16 has its sign and its fraction, the exponent masked to 0: the subnormal
             number q 2^-133. Times 2^127 that is q / `SHRUNK`, exactly; the scale takes the rest. For the second code
             the word's two bytes change places first.                                  5 instructions for 4 weights

Other dtypes and the interpreter take the plain path: integer arithmetic and a conversion, nothing shrunk. Both give the
same numbers after the scale, since a power of two changes no rounding.
"""

import triton
import triton.language as tl

SHRUNK = 64
"""The bit trick for 8 bits gives codes divided by so much."""

_NIBBLES = tl.constexpr(
    "{ .reg .b32 q, r, s; shr.u32 q, $4, 4; shr.u32 r, $4, 8; shr.u32 s, $4, 12; "
    "lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA; lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA; "
    "lop3.b32 r, r, 0x000F000F, 0x43004300, 0xEA; lop3.b32 s, s, 0x000F000F, 0x43004300, 0xEA; "
    "sub.rn.bf16x2 $0, $0, $5; sub.rn.bf16x2 $1, q, $5; sub.rn.bf16x2 $2, r, $6; sub.rn.bf16x2 $3, s, $6; }"
)
_BYTES = tl.constexpr(
    "{ .reg .b32 p, q, big; mov.b32 big, 0x7F007F00; prmt.b32 q, $2, 0, 0x2301; "
    "and.b32 p, $2, 0x807F807F; and.b32 q, q, 0x807F807F; "
    "mul.rn.bf16x2 $0, p, big; mul.rn.bf16x2 $1, q, big; }"
)


@triton.jit
def nibbles(words, low_zero, high_zero, dtype: tl.constexpr, TRICK: tl.constexpr):
    """Return the four codes of int16 words, less their zero points (int32, broadcastable), as `dtype`."""
    if TRICK:
        a, b, c, d = tl.inline_asm_elementwise(
            _NIBBLES, "=&r,=&r,=&r,=&r,r,r,r", [words, _above_128(low_zero), _above_128(high_zero)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        a, b = ((wide & 15) - low_zero).to(tl.float32), ((wide >> 4 & 15) - low_zero).to(tl.float32)
        c, d = ((wide >> 8 & 15) - high_zero).to(tl.float32), ((wide >> 12 & 15) - high_zero).to(tl.float32)
        a, b, c, d = a.to(dtype), b.to(dtype), c.to(dtype), d.to(dtype)
    return a, b, c, d


@triton.jit
def _above_128(zero):
    return (zero | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def signed_bytes(words, dtype: tl.constexpr, TRICK: tl.constexpr):
    """Return the two codes of int16 words as `dtype`, divided by `SHRUNK` if TRICK."""
    if TRICK:
        low, high = tl.inline_asm_elementwise(
            _BYTES, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        wide = words.to(tl.int32)
        low, high = (wide & 0x7F).to(tl.float32), (wide >> 8 & 0x7F).to(tl.float32)
        low = tl.where(wide < 0, -low, low).to(dtype)
        high = tl.where((wide & 0x80) != 0, -high, high).to(dtype)
    return low, high


@triton.jit
def times(values, scales, dtype: tl.constexpr, TRICK: tl.constexpr):
    """Return values * scales rounded once to `dtype`; exact integers times bfloat16 scales, two at a time."""
    if TRICK:
        value = tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [values, scales.to(tl.bfloat16)],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        value = (values.to(tl.float32) * scales.to(tl.float32)).to(dtype)
    return value

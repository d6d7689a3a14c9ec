"""Codes of a packed weight -> numbers that the tensor cores take, in registers.

bfloat16 keeps 7 bits of fraction, so 0x4300 (128.0) with a code of up to 7 bits or-ed into the fraction *is* 128 + code:
no conversion instruction, two numbers at a time. (The trick is Kim et al. 2022, arXiv 2211.10017, section 3.3, there for
float16.) What is left is one exact subtraction:

    4 bits   (0x4300 | q) - (128 + z) = q - z
    8 bits   (0x4300 | low 7 bits) - (0x4300 | sign bit) = (128 + low7) - (128 or 256) = the signed code

The sign bit of a byte falls on the lowest bit of bfloat16's exponent, which turns 128 into 256: two's complement for free.
`prmt 0x3120` swaps the middle bytes of four codes, so that masks pick neighbors into the two halves of one register.
Other dtypes and the interpreter take the plain path: integer arithmetic and a conversion. Both give the same numbers.
"""

import triton
import triton.language as tl

_NIBBLES = tl.constexpr(
    "{ .reg .b32 p, q, r, s; prmt.b32 p, $4, 0, 0x3120; shr.u32 q, p, 8; shr.u32 r, p, 4; shr.u32 s, p, 12; "
    "lop3.b32 p, p, 0x000F000F, 0x43004300, 0xEA; lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA; "
    "lop3.b32 r, r, 0x000F000F, 0x43004300, 0xEA; lop3.b32 s, s, 0x000F000F, 0x43004300, 0xEA; "
    "sub.rn.bf16x2 $0, p, $5; sub.rn.bf16x2 $1, q, $6; sub.rn.bf16x2 $2, r, $7; sub.rn.bf16x2 $3, s, $8; }"
)
_BYTES = tl.constexpr(
    "{ .reg .b32 p, q, r, s; prmt.b32 p, $2, 0, 0x3120; shr.u32 q, p, 8; "
    "lop3.b32 r, p, 0x00800080, 0x43004300, 0xEA; lop3.b32 s, q, 0x00800080, 0x43004300, 0xEA; "
    "lop3.b32 p, p, 0x007F007F, 0x43004300, 0xEA; lop3.b32 q, q, 0x007F007F, 0x43004300, 0xEA; "
    "sub.rn.bf16x2 $0, p, r; sub.rn.bf16x2 $1, q, s; }"
)


@triton.jit
def nibbles(codes, low_zero, high_zero, dtype: tl.constexpr, TRICK: tl.constexpr):
    """Return low and high nibbles of uint8 codes, less their zero points (int32, broadcastable), as `dtype`."""
    if TRICK:
        low, high = tl.inline_asm_elementwise(
            _NIBBLES, "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [codes, (low_zero + 128).to(tl.bfloat16), (high_zero + 128).to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = codes.to(tl.int32)
        low = ((wide & 15) - low_zero).to(tl.float32).to(dtype)
        high = ((wide >> 4) - high_zero).to(tl.float32).to(dtype)
    return low, high


@triton.jit
def bytes_as(codes, dtype: tl.constexpr, TRICK: tl.constexpr):
    """Return int8 codes as `dtype`."""
    if TRICK:
        value = tl.inline_asm_elementwise(_BYTES, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        value = codes.to(tl.float32).to(dtype)
    return value


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

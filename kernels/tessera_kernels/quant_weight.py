"""Weights in 8 or 4 bits: the quantizers, the packed layout, and the way back. Plain PyTorch, done once, off the clock.

w8 (symmetric):  s = max |w| / 127,            q = round(w / s)                    w ~ s q
w4 (AWQ's form): s = (max(w,0) - min(w,0)) / 15, z = round(-min(w,0) / s), q = clamp(round(w / s) + z, 0, 15)
                                                                                    w ~ s (q - z)
w4 without zero points: s = max |w| / 7, z = 8.   (Lin et al. 2023, "AWQ", equation 1; rounding is to nearest even.)

One scale for each output (w8) or for each output and group of inputs. Scales of groups are bfloat16, rounded *up*, so
that no code is ever clipped by the rounding of its scale; scales of whole rows are float32, rounded up too. Hence the
bound that the tests hold: |w - dequantize(w)| <= s / 2 for every number. A group of zeros gets s = 1 and is exact.

Packed layout, tile = 128 consecutive inputs, outputs side by side inside a tile, words of 16 bits (int16):

    w8   codes [tiles, F, 64]    word j of tile t:   bits 0-6 |q| of input 128 t + j,        bit 15 its sign
                                                     bits 8-14 |q| of input 128 t + 64 + j,  bit 7 its sign
    w4   codes [tiles, F, 32]    word j of tile t:   bits 4 i to 4 i + 3 q of input 128 t + 32 i + j

A program that owns some outputs reads one contiguous piece a tile, 16 bytes a thread. Words have the width of the numbers
that the tensor cores take, so neighbors j, j + 1 lie in one register already side by side: unpacking moves nothing within
a thread or between threads, and gives contiguous pieces of 64 (w8) or 32 (w4) inputs. Sign and magnitude of w8 lie where
bfloat16 has its sign and its fraction (the second input's after the word's two bytes change places): see `_unpack`.
Inputs past the width (the last tile) hold the zero point, that is: the weight 0. Scale and zero point of a group share
one 32-bit word (a bfloat16 scale above, the zero point below): 4 bytes are the least that an asynchronous copy moves.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera_kernels.checks import expect_choice, expect_dtype, expect_multiple, expect_rank
from tessera_shared.errors import KernelError

TILE = 128
"""Inputs in one tile of the packed layout."""

HALF = TILE // 2
"""Inputs between the two codes of a w8 word; groups are multiples of it."""

WORD_BITS = 16
"""Bits of a packed word."""

_SYMMETRIC_ZERO = {8: 0, 4: 8}
_TOP = {8: 127, 4: 7}


@dataclass(frozen=True, kw_only=True)
class QuantWeight:
    """A weight of `num_outputs` x `width` in the packed layout above."""

    codes: Tensor  # int16 [tiles, F, 64] (w8) or [tiles, F, 32] (w4)
    steps: Tensor  # one scale an output: float32 [1, F]; groups: int32 [groups, F], scale and zero point in one word
    bits: int  # 8 or 4
    group: int | None  # inputs that share a scale; None: all of them
    width: int  # D, without the padding of the last tile

    def __post_init__(self) -> None:
        expect_choice("bits", self.bits, (8, 4))
        _expect_group(self.group, self.bits)
        expect_dtype("codes", self.codes, torch.int16)
        expect_rank("codes", self.codes, 3)
        groups, outputs = num_groups(self.width, self.group), self.codes.shape[1]
        wanted = {
            "codes": (math.ceil(self.width / TILE), outputs, TILE * self.bits // WORD_BITS),
            "steps": (groups, outputs),
        }
        for name, shape in wanted.items():
            part: Tensor = getattr(self, name)
            if tuple(part.shape) != shape or not part.is_contiguous():
                raise KernelError(
                    f"{name}.shape = {list(part.shape)}: expected {list(shape)}, contiguous, because the weight has {outputs} "
                    f"outputs, {self.width} inputs and groups of {self.group or self.width}; try quantize_w8 or quantize_w4"
                )

    @property
    def num_outputs(self) -> int:
        """F, the rows of the weight."""
        return int(self.codes.shape[1])

    @property
    def num_bytes(self) -> int:
        """Bytes that a product must read of it."""
        return sum(part.numel() * part.element_size() for part in (self.codes, self.steps))

    @property
    def scales(self) -> Tensor:
        """The scale of each group, float32 [groups, F]."""
        return self.steps if self.group is None else (self.steps & -0x10000).view(torch.float32)

    @property
    def zeros(self) -> Tensor:
        """The code that means 0 in each group, int32 [groups, F]."""
        return torch.zeros_like(self.steps, dtype=torch.int32) if self.group is None else self.steps & 0xFFFF

    def to(self, device: torch.device | str) -> "QuantWeight":
        """Return the same weight on another device."""
        return replace(self, codes=self.codes.to(device), steps=self.steps.to(device))


def num_groups(width: int, group: int | None) -> int:
    """Return how many scales one output has; the last group may be short."""
    return 1 if group is None else max(1, math.ceil(width / group))


def quantize_w8(weight_FD: Tensor, *, group: int | None = None) -> QuantWeight:
    """Return `weight_FD` (float16, bfloat16 or float32) in signed 8 bits: one scale an output, or one a `group` of inputs.

    Waits for the device. Raises `KernelError` for NaN, infinities, no elements, and groups that the layout cannot hold.
    """
    grouped_FGC = _grouped(weight_FD, group, 8)
    scales_FG = _scales(grouped_FGC.abs().amax(-1), _TOP[8], group)
    codes_FGC = torch.round(grouped_FGC / scales_FG.double()[..., None])
    return pack(_ungrouped(codes_FGC, weight_FD), scales_FG, None, bits=8, group=group)


def quantize_w4(weight_FD: Tensor, *, group: int | None = TILE, zero_points: bool = True) -> QuantWeight:
    """Return `weight_FD` (float16, bfloat16 or float32) in 4 bits, one scale (and zero point) a `group` of inputs.

    Waits for the device. Raises `KernelError` for NaN, infinities, no elements, and groups that the layout cannot hold.
    """
    grouped_FGC = _grouped(weight_FD, group, 4)
    if not zero_points:
        scales_FG = _scales(grouped_FGC.abs().amax(-1), _TOP[4], group)
        codes_FGC = torch.round(grouped_FGC / scales_FG.double()[..., None]) + _SYMMETRIC_ZERO[4]
        return pack(_ungrouped(codes_FGC, weight_FD), scales_FG, None, bits=4, group=group)
    low_FG, high_FG = grouped_FGC.amin(-1).clamp(max=0.0), grouped_FGC.amax(-1).clamp(min=0.0)
    scales_FG = _scales(high_FG - low_FG, 15, group)
    zeros_FG = torch.round(-low_FG / scales_FG.double())
    codes_FGC = (torch.round(grouped_FGC / scales_FG.double()[..., None]) + zeros_FG[..., None]).clamp(0, 15)
    return pack(_ungrouped(codes_FGC, weight_FD), scales_FG, zeros_FG, bits=4, group=group)


def pack(codes_FD: Tensor, scales_FG: Tensor, zeros_FG: Tensor | None, *, bits: int, group: int | None) -> QuantWeight:
    """Return codes (w8: -127..127; w4: 0..15), scales and zero points of one output a row in the packed layout."""
    outputs, width = codes_FD.shape
    tiles = math.ceil(width / TILE)
    padded_FD = torch.empty((outputs, tiles * TILE), dtype=torch.int32, device=codes_FD.device)
    padded_FD[:, :width] = codes_FD.to(torch.int32)
    rest = padded_FD[:, width:]
    rest[:] = _SYMMETRIC_ZERO[bits] if zeros_FG is None else zeros_FG[:, -1:].to(torch.int32)
    tiled = padded_FD.view(outputs, tiles, TILE).transpose(0, 1)
    codes = _words_of_8(tiled) if bits == 8 else _words_of_4(tiled)
    steps = scales_FG.float().t().contiguous()
    if group is not None:
        zeros = _SYMMETRIC_ZERO[bits] if zeros_FG is None else zeros_FG.t().to(torch.int32)
        steps = steps.view(torch.int32) | zeros  # a bfloat16 scale leaves the lower 16 bits of float32 empty
    return QuantWeight(codes=codes.contiguous(), steps=steps, bits=bits, group=group, width=width)


def _words_of_8(tiled: Tensor) -> Tensor:
    first, second = tiled[..., :HALF], tiled[..., HALF:]
    signs = (first < 0).int() << 15 | (second < 0).int() << 7
    return (signs | first.abs() | second.abs() << 8).to(torch.int16)


def _words_of_4(tiled: Tensor) -> Tensor:
    words, quarter = tiled[..., : HALF // 2], HALF // 2
    for i in range(1, 4):
        words = words | tiled[..., i * quarter : (i + 1) * quarter] << 4 * i
    return words.to(torch.int16)


def unpack(weight: QuantWeight) -> Tensor:
    """Return the codes less their zero points, int32 [F, D]: what the scales multiply."""
    words = weight.codes.to(torch.int32)
    if weight.bits == 8:
        first, second = words & 0x7F, words >> 8 & 0x7F
        parts = [torch.where(words < 0, -first, first), torch.where(words & 0x80 != 0, -second, second)]
    else:
        parts = [words >> 4 * i & 15 for i in range(4)]
    codes_FD = torch.cat(parts, -1).transpose(0, 1).reshape(weight.num_outputs, -1)[:, : weight.width]
    return codes_FD - _spread(weight.zeros, weight)


def dequantize(weight: QuantWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the weight [F, D]: code times scale, computed in float32 (float64 if asked for) and rounded once."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return (unpack(weight).to(working) * _spread(weight.scales.to(working), weight)).to(dtype)


def _spread(values_GF: Tensor, weight: QuantWeight) -> Tensor:
    """Return a value of each group for each of its inputs, [F, D]."""
    if weight.group is None:
        return values_GF.t()
    return values_GF.t().repeat_interleave(weight.group, dim=1)[:, : weight.width]


def _grouped(weight_FD: Tensor, group: int | None, bits: int) -> Tensor:
    """Return float64 [F, groups, inputs of a group], the last group filled with zeros, after checking all that can be wrong."""
    expect_rank("weight_FD", weight_FD, 2)
    expect_dtype("weight_FD", weight_FD, torch.bfloat16, torch.float16, torch.float32)
    _expect_group(group, bits)
    if weight_FD.numel() == 0:
        raise KernelError(
            f"weight_FD.shape = {list(weight_FD.shape)}: expected at least one output and one input, because a scale comes "
            "from the largest weight; try leaving this weight out"
        )
    wrong = ~torch.isfinite(weight_FD)
    if bool(wrong.any()):
        row, column = (int(place) for place in wrong.nonzero()[0])
        raise KernelError(
            f"weight_FD[{row}, {column}] = {float(weight_FD[row, column])}: expected finite numbers, because a scale comes from "
            f"the largest weight ({int(wrong.sum())} are not finite); try the checkpoint before the one that diverged"
        )
    outputs, width = weight_FD.shape
    groups = num_groups(width, group)
    padded = torch.zeros((outputs, groups * (group or width)), dtype=torch.float64, device=weight_FD.device)
    padded[:, :width] = weight_FD
    return padded.view(outputs, groups, -1)


def _ungrouped(codes_FGC: Tensor, weight_FD: Tensor) -> Tensor:
    return codes_FGC.reshape(codes_FGC.shape[0], -1)[:, : weight_FD.shape[1]]


def _scales(range_FG: Tensor, steps: int, group: int | None) -> Tensor:
    """Return range / steps rounded up to the dtype that is stored, never below its smallest normal; 1 where range is 0."""
    dtype = torch.float32 if group is None else torch.bfloat16
    exact = range_FG / steps
    stored = exact.to(dtype)
    above = torch.nextafter(stored, torch.full_like(stored, torch.inf))
    stored = torch.where(stored.double() < exact, above, stored).clamp(min=torch.finfo(dtype).smallest_normal)
    return torch.where(range_FG == 0.0, torch.ones_like(stored), stored)


def _expect_group(group: int | None, bits: int) -> None:
    if group is None and bits == 4:
        raise KernelError(
            f"group = None: expected a multiple of {HALF}, because one step for a whole row is too coarse for 16 codes; try "
            f"group={TILE}"
        )
    if group is not None:
        expect_multiple("group", group, HALF, f"one scale serves a whole half tile of {HALF} inputs")

"""What a kernel must bring to be fuzzed, and the draws that all kernels share: sizes, layouts, values.

A case is a frozen dataclass of plain values: its repr is the repro. Tensors are built from it alone, on the CPU; the
judge moves them to the device with strides, offset and surroundings kept. Everything around a tensor inside its storage
is NaN (or the dtype's least integer): a read that leaves the tensor poisons the answer, a write is seen afterwards.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from tessera_parity.loading import Patch

Tensors = dict[str, Tensor]


class Case(Protocol):
    """The least that a case says. Add sizes and options as fields of your own; all of them hashable."""

    @property
    def dtype(self) -> str:
        """The working dtype: float16, bfloat16 or float32."""

    @property
    def layout(self) -> str:
        """One of `LAYOUTS`."""

    @property
    def values(self) -> str:
        """One of `VALUES`, or a word of the op's own."""

    @property
    def seed(self) -> int:
        """Seed of every number in the case."""

    @property
    def config(self) -> Any:
        """Which configuration the kernel must take; None (the field's default) lets it choose.

        The GPU lane sets it, with `dataclasses.replace`, to each of `KernelOp.configs()`.
        """


@dataclass(frozen=True, kw_only=True)
class KernelOp:
    """A kernel, its reference, and the cases between them.

    `kernel` and `reference` take sizes from the tensors, not from the case: the judge also runs single rows. A
    configuration that does not fit a case is refused with `KernelError`; each must run somewhere.
    """

    name: str  # "rms_norm": the file's name in tessera_kernels.triton, tessera_kernels.reference and kernel_cases
    cases: Callable[[bool], SearchStrategy[Any]]  # True = sizes for a GPU, False = for the interpreter
    tensors: Callable[[Any], Tensors]  # CPU tensors in the case's dtype, laid out: see `draw`
    kernel: Callable[[Any, Tensors], Tensors]  # outputs by name, gradients as "grad x"
    reference: Callable[[Any, Tensors], Tensors]  # the same names, in the dtype of what it is handed
    bugs: tuple[Patch, ...]  # planted in the kernel's source, each caught by a few small cases
    examples: tuple[Any, ...]  # cases that always run: whatever failed once, and the known traps
    exact: frozenset[str] = frozenset()  # outputs that equal the float64 answer's bit for bit
    row_independent: tuple[str, ...] = ()  # outputs whose row alone equals the row in the batch, bit for bit
    row_inputs: tuple[str, ...] = ()  # tensors that have those rows as their first dimension; the others are kept whole
    writes: frozenset[str] = frozenset()  # tensors that the kernel changes in place; all others must stay as they were
    configs: Callable[[], Sequence[Any]] = tuple  # every configuration that can be chosen; the GPU lane runs each
    magnitudes: Callable[[Any, Tensors], Mapping[str, float]] | None = None
    """Size of the terms that cancel in an output, where that is larger than the output (see `kernel_budget`)."""
    terms: Callable[[Any, Tensors], Mapping[str, Tensor]] | None = None
    """What float32 adds up for each number of an output, without the signs (float64, the output's shape)."""
    lengths: Callable[[Any, Tensors], Mapping[str, int]] | None = None
    """Terms of an output's longest sum; default: the largest dimension of any tensor of the case."""
    unordered: Callable[[Any], frozenset[str]] = lambda case: frozenset()
    """Outputs whose sums run in no fixed order in this case (atomic adds); all others repeat bit for bit."""
    cpu_bugs: tuple[Patch, ...] = ()
    """Bugs that are planted on a CPU alone, where the interpreter and the emulator show them: at a missing wait a GPU hangs,
    faults, or is right by its timing, and it has a program for every tile of a small case."""
    bug_cases: tuple[Any, ...] = ()  # small cases that the bugs must be caught by; default: `examples`
    bug_cases_of: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Cases that come before these for the bugs of a file: those that run its code, where most others do not."""

    def bugs_on(self, device: str) -> tuple[Patch, ...]:
        """Return the bugs that are planted on a device."""
        return self.bugs + (self.cpu_bugs if device == "cpu" else ())

    def cases_for(self, bug: Patch) -> tuple[Any, ...]:
        """Return the cases that a bug must be caught by, in the order in which they are tried."""
        return (*self.bug_cases_of.get(bug.file, ()), *(self.bug_cases or self.examples))

    def __post_init__(self) -> None:
        if bool(self.row_independent) != bool(self.row_inputs):
            raise ValueError(f"{self.name}: row_independent and row_inputs belong together; give both or none")


DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("contiguous", "transposed", "sliced", "offset1")
VALUES = ("normal", "small", "large", "mixed", "extreme", "constant", "ties", "inf_rows")

GUARD = 64
"""Elements of NaN before and after every tensor: more than a vector load, a multiple of 16 bytes in every dtype."""


def dtypes(*names: str) -> SearchStrategy[str]:
    """Draw a working dtype, float32 first (it is what a case shrinks to)."""
    return st.sampled_from(names or DTYPES)


def layouts(*names: str) -> SearchStrategy[str]:
    """Draw a layout; shrinks to contiguous."""
    return st.sampled_from(names or LAYOUTS)


def value_kinds(*names: str) -> SearchStrategy[str]:
    """Draw a kind of values; shrinks to normal. -inf rows only where an op names them: few ops have logits."""
    return st.sampled_from(names or VALUES[:-1])


def seeds() -> SearchStrategy[int]:
    """Draw the seed of a case's numbers."""
    return st.integers(0, 2**31 - 1)


def sizes(*, tile: int, most: int, least: int = 1) -> SearchStrategy[int]:
    """Draw a size where kernels break: 0 (when `least` is), 1, 3, primes, 199, around one and two `tile`s, or any."""
    known = (0, 1, 2, 3, 7, 13, 31, tile - 1, tile, tile + 1, 2 * tile + 1, 199, 1021, most)
    picked = sorted({size for size in known if least <= size <= most})
    return st.sampled_from(picked) | st.integers(least, most)


def generator(seed: int, name: str) -> torch.Generator:
    """Return the stream of one tensor of one case."""
    return torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)


def draw(
    case: Case, name: str, shape: Sequence[int], *, values: str | None = None, layout: str | None = None
) -> Tensor:
    """Return the case's tensor called `name`: its values, rounded to its dtype, in its layout."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    numbers = drawn_values(shape, case.values if values is None else values, generator(case.seed, name))
    return lay_out(numbers.clamp(-65504.0, 65504.0).to(dtype), case.layout if layout is None else layout)


def drawn_values(shape: Sequence[int], kind: str, stream: torch.Generator) -> Tensor:
    """Return float32 numbers of a kind of `VALUES`. The last dimension is a row."""
    x = torch.randn(tuple(shape), generator=stream)
    rows = (*shape[:-1], 1) if shape else ()
    if kind == "small":
        return x * 1e-4
    if kind == "large":
        return x * 1e2
    if kind == "mixed":  # a scale from 1e-4 to 1e2 for each row
        return x * 10.0 ** (torch.rand(rows, generator=stream) * 6.0 - 4.0)
    if kind == "extreme":  # one number in sixteen is +-6e4, near float16's largest
        huge = torch.rand(tuple(shape), generator=stream) < 1 / 16
        return torch.where(huge, 6e4 * x.sign(), x)
    if kind == "constant":
        return torch.full(tuple(shape), 10.0)
    if kind == "ties":  # few different numbers, all exact in every dtype
        return (x * 2.0).round() / 2.0
    if kind == "inf_rows":  # most of some rows is -inf, and one row in four is nothing else
        hidden = torch.rand(tuple(shape), generator=stream) < torch.rand(rows, generator=stream)
        return x.masked_fill(hidden | (torch.rand(rows, generator=stream) < 0.25), -torch.inf)
    if kind == "normal":
        return x
    raise ValueError(f"values = {kind!r}: expected one of {', '.join(VALUES)}")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return a copy of `tensor` with `GUARD` poisoned elements before and after it, and strides as `layout` says.

    contiguous | transposed (the last two dimensions change places in memory) | sliced (rows have 16 poisoned elements
    between them) | offset1 (contiguous, one element past an aligned address).
    """
    shape = tuple(tensor.shape)
    padded = shape
    if layout == "sliced" and shape:
        padded = (*shape[:-1], shape[-1] + 16)
    elif layout == "transposed" and len(shape) > 1:
        padded = (*shape[:-2], shape[-1], shape[-2])
    elif layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: expected one of {', '.join(LAYOUTS)}")
    strides = torch.empty(padded, device="meta").stride()
    if layout == "transposed" and len(shape) > 1:
        strides = (*strides[:-2], strides[-1], strides[-2])
    count = torch.Size(padded).numel()
    storage = torch.full((count + 2 * GUARD + 1,), poison_of(tensor.dtype), dtype=tensor.dtype)
    view = storage.as_strided(shape, strides, GUARD + (layout == "offset1"))
    return view.copy_(tensor)


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """Return what unwritten or foreign memory is filled with: NaN, the least integer, or True."""
    if dtype.is_floating_point:
        return torch.nan
    return True if dtype == torch.bool else int(torch.iinfo(dtype).min)

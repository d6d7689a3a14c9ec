"""What a kernel looks at on the host before any launch. Each check raises one line: *what = value: expected ...,
because ...; try ...*.

None of them reads a tensor's values, hence none waits for the device; `expect_page_table` does both and says so.
"""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tessera_shared.errors import KernelError, MissingDependency


def is_interpreting() -> bool:
    """Do Triton kernels run in the interpreter (`TRITON_INTERPRET=1`, read when triton is imported)?"""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def expect_triton_device(what: str, tensor: Tensor) -> None:
    """Raise `MissingDependency` unless a Triton kernel can run where `tensor` lies."""
    if tensor.device.type != "cuda" and not is_interpreting():
        raise MissingDependency(
            f"{what} on device {tensor.device}: expected cuda, because Triton compiles for a GPU; "
            "try kernels='reference', or TRITON_INTERPRET=1 to step through the kernel on the CPU"
        )


def expect_shape(what: str, tensor: Tensor, shape: Sequence[int | None], because: str = "") -> None:
    """Raise unless `tensor` has this shape; None stands for any size of that dimension."""
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))
    if not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise KernelError(
            f"{what}.shape = {list(found)}: expected {wanted}, because {because or 'its other operands have that size'}; "
            "try the shapes of the docstring"
        )


def expect_rank(what: str, tensor: Tensor, rank: int) -> None:
    """Raise unless `tensor` has `rank` dimensions."""
    if tensor.ndim != rank:
        raise KernelError(
            f"{what}.shape = {list(tensor.shape)}: expected {rank} dimensions, because that is what the kernel's tiles "
            "cover; try reshape"
        )


def expect_dtype(what: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise unless `tensor` has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        names = " or ".join(_plain(dtype) for dtype in dtypes)
        raise KernelError(
            f"{what}.dtype = {_plain(tensor.dtype)}: expected {names}, because the kernel is compiled for those; "
            f"try {what}.to(torch.{_plain(dtypes[0])})"
        )


def expect_same_dtype(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors have the first one's dtype."""
    (first, one), *rest = tensors.items()
    for what, tensor in rest:
        if tensor.dtype != one.dtype:
            raise KernelError(
                f"{what}.dtype = {_plain(tensor.dtype)}: expected {_plain(one.dtype)}, because {first} has it and the "
                f"kernel does not convert in between; try {what}.to({first}.dtype)"
            )


def expect_same_device(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors lie on the first one's device."""
    (first, one), *rest = tensors.items()
    for what, tensor in rest:
        if tensor.device != one.device:
            raise KernelError(
                f"{what}.device = {tensor.device}: expected {one.device}, because {first} lies there and a kernel runs "
                f"on one device; try {what}.to({first}.device)"
            )


def expect_contiguous(what: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise KernelError(
            f"{what}.stride() = {list(tensor.stride())}: expected a contiguous tensor, because the kernel walks it as one "
            f"flat buffer; try {what}.contiguous()"
        )


def expect_unit_stride(what: str, tensor: Tensor) -> None:
    """Raise unless the last dimension has stride 1 (or at most one element)."""
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelError(
            f"{what}.stride(-1) = {tensor.stride(-1)}: expected 1, because rows are read in 16-byte pieces; "
            f"try {what}.contiguous()"
        )


def expect_choice(what: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        names = ", ".join(str(choice) for choice in choices)
        raise KernelError(
            f"{what} = {value!r}: expected one of {names}, because these are what the kernel knows; try {choices[0]!r}"
        )


def expect_between(what: str, value: float, low: float, high: float, because: str) -> None:
    """Raise unless low <= value <= high (a NaN never is)."""
    if not low <= value <= high:
        raise KernelError(
            f"{what} = {value}: expected {low} to {high}, because {because}; try {max(low, min(value, high))}"
        )


def expect_multiple(what: str, value: int, of: int, because: str) -> None:
    """Raise unless `value` is a positive multiple of `of`."""
    if value <= 0 or value % of:
        nearest = max(of, round(value / of) * of)
        raise KernelError(f"{what} = {value}: expected a positive multiple of {of}, because {because}; try {nearest}")


def expect_page_table(page_table_BM: Tensor, lengths_B: Tensor, *, num_pages: int, page_size: int) -> None:
    """Raise unless every row's length fits its pages and every page that it uses exists. Waits for the device."""
    rows, pages = page_table_BM.shape
    expect_shape("lengths_B", lengths_B, (rows,), "each row of page_table_BM has one length")
    if rows == 0:
        return
    longest, shortest = int(lengths_B.max()), int(lengths_B.min())
    if shortest < 0 or longest > pages * page_size:
        raise KernelError(
            f"lengths_B = {shortest} to {longest}: expected 0 to {pages * page_size}, because page_table_BM gives each row "
            f"{pages} pages of {page_size}; try a wider page table"
        )
    used_BM = torch.arange(pages, device=page_table_BM.device) * page_size < lengths_B[:, None]
    wrong_BM = used_BM & ((page_table_BM < 0) | (page_table_BM >= num_pages))
    if bool(wrong_BM.any()):
        row, column = (int(place) for place in wrong_BM.nonzero()[0])
        raise KernelError(
            f"page_table_BM[{row}, {column}] = {int(page_table_BM[row, column])}: expected 0 to {num_pages - 1}, because "
            f"there are {num_pages} pages; try the table that goes with these pages"
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

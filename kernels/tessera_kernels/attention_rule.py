"""What an attention kernel computes, as the launchers of every room take it from the host: scale, soft cap, window, mask,
how exactly products are taken, and which tensors fit each other."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import (
    expect_dtype,
    expect_multiple,
    expect_rank,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    is_interpreting,
)
from tessera_shared.errors import KernelError

WIDEST_HEAD = 256

CACHE_BYTES = 24 * 2**20
"""Of K and V that the heads running at one time may share; the L2 of an H200 has 60 MB."""


FAR = 2**29
"""A window is not taken to be wider: no sequence is as long, and no sum of it and a position overflows."""


class Rule(NamedTuple):
    """The rule of one call. Integers and floats only: it travels through a custom op's schema."""

    scale: float
    softcap: float  # 0 = none
    window: int  # 0 = none
    causal: bool = True

    @property
    def unit(self) -> float:
        """What a score is multiplied by before exp: the cap, when there is one, else the scale."""
        return self.softcap or self.scale

    @property
    def inner(self) -> float:
        """What the product is multiplied by before tanh."""
        return self.scale / self.softcap if self.softcap else 0.0

    @property
    def flags(self) -> dict[str, bool]:
        """The constants of a dense kernel that follow from the rule."""
        return {"CAUSAL": self.causal, "WINDOW": self.window > 0, "SOFTCAP": self.softcap > 0.0}


def rule_of(
    head_width: int, scale: float | None, softcap: float | None, window: int | None, causal: bool = True
) -> Rule:
    """Return the rule of what a caller gave; no scale is 1 / sqrt(head width). `KernelError` says what cannot be."""
    scale = head_width**-0.5 if scale is None else float(scale)
    for what, value in (("scale", scale), ("softcap", 1.0 if softcap is None else float(softcap))):
        if not 0.0 < value < math.inf:
            raise KernelError(
                f"{what} = {value}: expected a positive finite number, because the running maximum is taken before it is "
                "applied; try its absolute value on negated queries"
            )
    if window is not None and window < 1:
        raise KernelError(
            f"window = {window}: expected at least 1, because a query sees itself; try 1, or None for no window"
        )
    return Rule(
        scale, 0.0 if softcap is None else float(softcap), 0 if window is None else min(int(window), FAR), causal
    )


def expect_groups(heads: int, kv_heads: int) -> None:
    """Raise unless the query heads share the key/value heads in equal groups."""
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise KernelError(
            f"query heads = {heads}, key/value heads = {kv_heads}: expected a multiple, because heads share keys in equal "
            f"groups; try {kv_heads or 1} or {2 * kv_heads or 2} query heads"
        )


def check_dense(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless queries, keys and values of equally long sequences fit each other."""
    tensors = {"q_BTNH": q_BTNH, "k_BSKH": k_BSKH, "v_BSKH": v_BSKH}
    for what, tensor in tensors.items():
        expect_rank(what, tensor, 4)
    rows, _, _, width = q_BTNH.shape
    expect_shape("k_BSKH", k_BSKH, (rows, None, None, width), "rows and head width are the queries'")
    _check_heads(tensors, dtypes)


def check_packed(
    q_XNH: Tensor, k_YKH: Tensor, v_YKH: Tensor, query_starts: Tensor, key_starts: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """Raise unless packed queries, keys and values and the starts of their sequences fit each other."""
    tensors = {"q_XNH": q_XNH, "k_YKH": k_YKH, "v_YKH": v_YKH}
    for what, tensor in tensors.items():
        expect_rank(what, tensor, 3)
    expect_shape("k_YKH", k_YKH, (None, None, q_XNH.shape[2]), "the head width is the queries'")
    _check_heads(tensors, dtypes)
    expect_rank("query_starts", query_starts, 1)
    expect_shape("key_starts", key_starts, tuple(query_starts.shape), "each sequence has queries and keys")
    for what, starts in (("query_starts", query_starts), ("key_starts", key_starts)):
        expect_dtype(what, starts, torch.int32)
        expect_same_device({"q_XNH": q_XNH, what: starts})


def _check_heads(tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> None:
    (q_name, q), (_, k), (v_name, v) = tensors.items()
    expect_dtype(q_name, q, *dtypes)
    expect_same_device(tensors)
    expect_same_dtype(tensors)
    expect_shape(v_name, v, tuple(k.shape), "each key has one value of the head width")
    expect_multiple("head width", q.shape[-1], 16, "a tensor-core product takes 16 columns at a time")
    if q.shape[-1] > WIDEST_HEAD:
        raise KernelError(
            f"head width = {q.shape[-1]}: expected at most {WIDEST_HEAD}, because a head is one tile; try more heads"
        )
    expect_groups(q.shape[-2], k.shape[-2])


def unit_rows(x: Tensor) -> Tensor:
    """Return x with unit stride within a head: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def outer_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of sequence, position and head; a packed tensor is one sequence."""
    return (x.stride(0) if x.ndim == 4 else 0), x.stride(-3), x.stride(-2)


def heads_at_once(bytes_a_head: int, *, group: int = 1, most: int) -> int:
    """How many heads may run at one time so that the keys and values of each `group` stay in the L2 cache.

    No more than `most`, as many as there are: programs are counted in 32 bits.
    """
    return min(most, max(1, CACHE_BYTES // max(1, bytes_a_head)) * group)


def describable(*tensors: Tensor) -> bool:
    """Can the copy engine read these as they lie? 16-byte rows and base; no zero strides."""
    return all(
        x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def precision(q: Tensor) -> str:
    """Return how the kernels take products of this dtype: "lift" (interpreter), "ieee" or "tf32"."""
    if q.dtype == torch.bfloat16 and is_interpreting():
        return "lift"
    return "ieee" if q.dtype == torch.float32 else "tf32"  # half-precision products are exact either way

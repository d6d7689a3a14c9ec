"""What an attention kernel computes, as dense and paged launchers take it from the host: scale, soft cap, window, mask,
and how exactly products are taken."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import is_interpreting
from tessera_shared.errors import KernelError


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
    return Rule(scale, 0.0 if softcap is None else float(softcap), 0 if window is None else int(window), causal)


def expect_groups(heads: int, kv_heads: int) -> None:
    """Raise unless the query heads share the key/value heads in equal groups."""
    if heads and (kv_heads == 0 or heads % kv_heads):
        raise KernelError(
            f"query heads = {heads}, key/value heads = {kv_heads}: expected a multiple, because heads share keys in equal "
            f"groups; try {kv_heads or 1} or {2 * kv_heads or 2} query heads"
        )


def precision(q: Tensor) -> str:
    """Return how the kernels take products of this dtype: "lift" (interpreter), "ieee" or "tf32"."""
    if q.dtype == torch.bfloat16 and is_interpreting():
        return "lift"
    return "ieee" if q.dtype == torch.float32 else "tf32"  # half-precision products are exact either way

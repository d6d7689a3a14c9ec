"""Where each cast happens, as data. Both halves and the oracle read this and nothing else decides a dtype.

"Up" means to at least float32, so that every policy also has a wholly-float64 twin (question 1 of `parity`).
Dtypes are names (`"float64"`, `"float32"`, `"bfloat16"`) because no framework is known here.
"""

from dataclasses import dataclass, fields

from tessera_shared.errors import SpecError

DTYPES = ("float64", "float32", "bfloat16")

UNIT_ROUNDOFF: dict[str, float] = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}
"""Largest relative error of one rounding to nearest (Higham 2002, section 2.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """A numerics policy. The sentence beside each field is the contract that `reference/` spells out."""

    param: str  # weights as stored and as the optimizer updates them
    compute: str  # weights and activations inside matrix products; every tapped activation unless said otherwise
    norm: str  # mean square, its root and the normalized value, before the cast back to compute
    softmax: str  # attention scores (operands lifted before the product), mask, exponentials and their sum
    rope: str  # rotation angles, sines and cosines; the tables are then cast to compute
    activation: str  # silu(gate) * up, cast to compute once
    logits: str  # operands of the unembedding lifted to this; the logits themselves
    loss: str  # log-softmax, divergences, their sums
    grad_reduce: str  # sums of gradients over micro-batches and ranks
    norm_gain_after_cast: bool = True  # Llama in Hugging Face: cast to compute, then multiply by the gain

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "norm_gain_after_cast" and value not in DTYPES:
                raise SpecError(
                    f"numerics.{field.name} = {value!r}: expected one of {', '.join(DTYPES)}, because every cast must be "
                    "known to both halves; try 'float32'"
                )


def _policy(param: str, compute: str, up: str) -> Numerics:
    return Numerics(
        param=param, compute=compute, norm=up, softmax=up, rope=up, activation=up, logits=up, loss=up, grad_reduce=up
    )


FLOAT64 = _policy("float64", "float64", "float64")
FLOAT32 = _policy("float32", "float32", "float32")
BFLOAT16 = _policy("float32", "bfloat16", "float32")


def numerics_for(dtype: str) -> Numerics:
    """Return the standard policy whose compute dtype is `dtype`."""
    policies = {"float64": FLOAT64, "float32": FLOAT32, "bfloat16": BFLOAT16}
    if dtype not in policies:
        raise SpecError(
            f"dtype = {dtype!r}: expected one of {', '.join(policies)}, because each has a calibrated policy; try 'float32'"
        )
    return policies[dtype]

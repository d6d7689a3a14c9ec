"""`--weights`: the formats in which generation can hold projections, known before any framework is loaded. What they
mean: `tessera_torch.fast.packed_weights`."""

from tessera_shared.errors import KernelError

WEIGHT_FORMATS = ("w8", "w8g128", "w4", "fp8")


def check_weights(weights: str | None, *, backend: str, dtype: str) -> None:
    """Raise `KernelError` for an unknown format, for the JAX half, and for float64. None stands for weights as stored."""
    if weights is None:
        return
    if weights not in WEIGHT_FORMATS:
        raise KernelError(
            f"weights = {weights!r}: expected one of {', '.join(WEIGHT_FORMATS)}, because these exist; try 'w8'"
        )
    if backend != "torch":
        raise KernelError(
            f"weights = {weights!r} with backend {backend}: expected weights as stored, because the products with packed "
            "weights belong to the torch half; try --backend torch"
        )
    if dtype == "float64":
        raise KernelError(
            f"dtype = 'float64' with weights = {weights!r}: expected float32 or bfloat16, because the products with packed "
            "weights sum in float32; try --dtype float32"
        )

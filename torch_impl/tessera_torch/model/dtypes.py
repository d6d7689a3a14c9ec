"""Names of dtypes to torch's."""

import torch

from tessera_shared.errors import SpecError
from tessera_shared.numerics import DTYPES


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype called `name`. Raises SpecError for a name that no numerics policy may use."""
    if name not in DTYPES:
        raise SpecError(
            f"dtype = {name!r}: expected one of {', '.join(DTYPES)}, because every cast must be known to both halves; "
            "try 'float32'"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype

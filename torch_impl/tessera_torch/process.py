"""What a command needs of the framework before and around the work: precision, device, arrays in and out."""

import numpy as np
import torch
from torch import Tensor

from tessera_shared.errors import SpecError
from tessera_shared.numerics import Numerics


def prepare_process(numerics: Numerics, *, device: str) -> None:
    """Set the process up for a policy on a device ("cpu", "cuda"): float32 products in full float32, not TF32.

    SpecError where the device is not there.
    """
    known = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    if device not in known:
        raise SpecError(
            f"device = {device!r}: expected one of {', '.join(sorted(known))}, because torch sees no other here; "
            "try --device cpu"
        )
    if numerics.compute != "float64":
        torch.set_float32_matmul_precision("highest")


def array_from_numpy(value: np.ndarray, *, device: str) -> Tensor:
    """Copy an array to a device, dtype as it is."""
    return torch.from_numpy(np.array(value)).to(device)


def array_to_numpy(value: Tensor) -> np.ndarray:
    """Copy an array out; integers and float32 or float64."""
    array: np.ndarray = value.detach().cpu().numpy()
    return array

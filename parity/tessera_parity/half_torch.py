"""The torch half behind the common face."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tessera_parity.half_numpy import is_float
from tessera_parity.halves import Array
from tessera_parity.loading import FreshModules
from tessera_shared.errors import MissingDependency


class TorchHalf:
    """See `tessera_parity.halves.Half`."""

    name = "torch"

    def __init__(self, fresh: FreshModules, device: str = "cpu") -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MissingDependency(
                f"device = {device!r}: expected an NVIDIA GPU with a driver that this torch can use, because the half runs "
                "there; try --device cpu"
            )
        self._fresh = fresh
        self.device = device

    def module(self, path: str) -> ModuleType:
        """Return this copy's `tessera_torch.<path>`."""
        return self._fresh.load(f"tessera_torch.{path}")

    def shared(self, path: str) -> ModuleType:
        """Return `tessera_shared.<path>` as this half's own modules see it: patched where a planted bug is in
        shared."""
        return self._fresh.load(f"tessera_shared.{path}")

    def array(self, value: np.ndarray[Any, Any], dtype: str | None = None) -> Array:
        """Return a tensor on the half's device that owns its memory. Floats become `dtype`, default float64."""
        value = np.asarray(value)
        if is_float(value):
            wide = torch.from_numpy(np.array(value, dtype=np.float64))
            return wide.to(device=self.device, dtype=getattr(torch, dtype or "float64"))
        return torch.from_numpy(np.array(value)).to(self.device)

    def numpy(self, value: Array) -> np.ndarray[Any, Any]:
        """Return floats as float64 (exact for the narrower ones), the rest as it is."""
        if not isinstance(value, torch.Tensor):
            value = np.asarray(value)
            return np.array(value, np.float64) if is_float(value) else value
        value = value.detach().cpu()
        return np.array(
            (value.double() if value.is_floating_point() else value).numpy()
        )  # a copy: state may be written in place

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` itself."""
        return function

    def value_and_grad(
        self, function: Callable[[Mapping[str, Array]], Array], params: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Return value and gradients; a parameter that the value does not depend on has gradient zero."""
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        value = function(leaves)
        if not value.requires_grad:
            return value, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found = zip(leaves.items(), grads, strict=True)
        return value.detach(), {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in found}

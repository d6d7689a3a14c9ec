"""Python source for repro files: values as literals, and the few lines in which the three sides differ."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_INLINE = 400
"""Numbers written into a repro file; more go into an `.npz` beside it."""

PACKAGES = {"numpy": "tessera_shared.reference", "torch": "tessera_torch", "jax": "tessera_jax"}


class Source:
    """Renders values as Python expressions and remembers what they need imported; large arrays are put aside."""

    def __init__(self) -> None:
        self.imports: dict[str, set[str]] = {}
        self.aside: dict[str, np.ndarray] = {}

    def of(self, value: Any, name: str = "value") -> str:
        """Return an expression that makes `value` again, bit for bit."""
        if isinstance(value, np.ndarray):
            return self._array(value, name)
        if isinstance(value, enum.Enum):
            return f"{self._need(type(value))}.{value.name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._need(type(value))}({', '.join(self.of(item, name) for item in value)})"
        if isinstance(value, Mapping):
            rows = (f"{key!r}: {self.of(item, f'{name}.{key}')}" for key, item in value.items())
            return "{" + ", ".join(rows) + "}"
        if isinstance(value, tuple | list):
            inside = ", ".join(self.of(item, name) for item in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
        if isinstance(value, np.generic):
            return repr(value.item())
        return repr(value)

    def needs(self, module: str, *names: str) -> None:
        """Remember that names of a module are needed."""
        self.imports.setdefault(module, set()).update(names)

    def import_lines(self) -> list[str]:
        """Return the import statements that the expressions need."""
        return [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(self.imports.items())]

    def _need(self, kind: type) -> str:
        self.imports.setdefault(kind.__module__, set()).add(kind.__name__)
        return kind.__name__

    def _dataclass(self, value: Any) -> str:
        given = []
        for field in dataclasses.fields(value):
            item, default = getattr(value, field.name), field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is dataclasses.MISSING or item != default:
                given.append(f"{field.name}={self.of(item, field.name)}")
        return f"{self._need(type(value))}({', '.join(given)})"

    def _array(self, value: np.ndarray, name: str) -> str:
        if value.size > MAX_INLINE:
            self.aside[name] = value
            return f"ASIDE[{name!r}]"
        dtype = "" if value.dtype in (np.float64, np.bool_) else f", np.{value.dtype.name}"
        literal = repr(value.tolist()).replace("nan", "np.nan").replace("inf", "np.inf")
        shape = f".reshape{value.shape}" if value.size == 0 else ""
        return f"np.array({literal}{dtype}){shape}"


PRELUDES: dict[str, list[str]] = {
    "torch": [
        "import torch",
        "",
        "array = torch.tensor",
        "number = float",
        "",
        "",
        "def cast(value, dtype):",
        "    return value.to(getattr(torch, str(dtype).removeprefix('torch.')))",
        "",
        "",
        "def plain(value):",
        "    return value.detach().cpu().double().numpy()",
        "",
        "",
        "def gradient(function, named):",
        "    leaves = {name: value.detach().clone().requires_grad_() for name, value in named.items()}",
        "    value = function(leaves)",
        "    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True) if value.requires_grad else None",
        "    found = found or [None] * len(leaves)",
        "    pairs = zip(leaves.items(), found, strict=True)",
        "    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}",
        "",
        "",
    ],
    "jax": [
        "import jax",
        "",
        'jax.config.update("jax_enable_x64", True)',
        "array = jax.numpy.asarray",
        "number = float",
        "",
        "",
        "def cast(value, dtype):",
        "    return value.astype(dtype)",
        "",
        "",
        "def plain(value):",
        "    return np.asarray(value).astype(np.float64)",
        "",
        "",
        "def gradient(function, named):",
        "    return jax.grad(function)(dict(named))",
        "",
        "",
    ],
    "numpy": [
        "",
        "array = np.asarray",
        "number = float",
        "",
        "",
        "def cast(value, dtype):",
        "    return value  # the oracle computes in float64 and rounds where the policy casts",
        "",
        "",
        "def plain(value):",
        "    return np.asarray(value, np.float64)",
        "",
        "",
        "def gradient(function, named):",
        "    found = {name: np.zeros(value.shape) for name, value in named.items()}",
        "    for name, value in named.items():",
        "        for where in np.ndindex(value.shape):",
        "            step = np.zeros(value.shape, complex)",
        "            step[where] = 1e-30j  # a complex step: the slope without cancellation",
        "            found[name][where] = np.imag(function({**named, name: value + step})) / 1e-30",
        "    return found",
        "",
        "",
    ],
}
"""What a file of each side starts with: its framework, `array` (NumPy in), `number` (one number out), `cast` (to a
dtype), `plain` (float64 NumPy out), `gradient` (of a scalar function of named arrays, by name)."""

BRING = [
    "",
    "",
    "def bring(value):",
    "    if isinstance(value, np.ndarray):",
    "        return array(value)",
    "    if isinstance(value, dict):",
    "        return {name: bring(item) for name, item in value.items()}",
    "    return value",
    "",
    "",
]


def module_of(side: str, path: str) -> str:
    """Return the dotted module of a mirrored path on a side: `model.norms` -> `tessera_torch.model.norms`."""
    if side == "numpy" and "." not in path:
        return f"tessera_shared.{path}"  # the oracle has none of its own: shared code is the truth (randomness)
    return f"{PACKAGES[side]}.{path.rpartition('.')[2] if side == 'numpy' else path}"

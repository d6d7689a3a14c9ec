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


def side_lines(side: str) -> list[str]:
    """Return the lines that import a side's framework and define `array` (NumPy in) and `number` (one number out)."""
    if side == "torch":
        return ["import torch", "", "array = torch.tensor", "number = float"]
    if side == "jax":
        return [
            "import jax",
            "",
            'jax.config.update("jax_enable_x64", True)',
            "array = jax.numpy.asarray",
            "number = float",
        ]
    return ["", "array = np.asarray", "number = float"]


def module_of(side: str, path: str) -> str:
    """Return the dotted module of a mirrored path on a side: `model.norms` -> `tessera_torch.model.norms`."""
    return f"{PACKAGES[side]}.{path.rpartition('.')[2] if side == 'numpy' else path}"

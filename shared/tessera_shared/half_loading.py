"""The one upward reach: a half's module by name, so that a flag can become an import."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from tessera_shared.errors import MissingDependency, SpecError

_NEEDS = {"torch": ("torch",), "jax": ("jax", "flax", "optax")}


def load_half_module(half: str, module: str) -> ModuleType:
    """Import `module` of the half called `half`: `load_half_module("jax", "train.loop")` is `tessera_jax.train.loop`.

    SpecError for an unknown half. MissingDependency when its framework is not installed; an error inside the half
    comes through as it is.
    """
    _check_known(half)
    package = f"tessera_{half}"
    try:
        return importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in (*_NEEDS[half], package) or error.name not in (missing,):
            raise
        raise _missing(missing, half) from None


def check_half(half: str) -> None:
    """Look for the half's framework without importing it, which takes seconds.

    SpecError for an unknown half, MissingDependency when its framework is not installed.
    """
    _check_known(half)
    for package in _NEEDS[half]:
        if find_spec(package) is None:
            raise _missing(package, half)


def _check_known(half: str) -> None:
    if half not in _NEEDS:
        raise SpecError(
            f"half = {half!r}: expected torch or jax, because these are the two implementations; try 'torch'"
        )


def _missing(package: str, half: str) -> MissingDependency:
    return MissingDependency(
        f"{package} = not installed: expected it, because the {half} half runs on it; try pip install "
        f"'tessera-testbed[{half}]', or the other half"
    )

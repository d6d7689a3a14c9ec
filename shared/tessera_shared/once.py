"""What a process has once, however often the module that needs it is loaded: parity loads kernels anew for every planted bug."""

from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")

_KEPT: dict[str, object] = {}


def once(name: str, make: Callable[[], T]) -> T:
    """Return what `make` gave when this process first asked for `name`."""
    if name not in _KEPT:
        _KEPT[name] = make()
    return cast(T, _KEPT[name])

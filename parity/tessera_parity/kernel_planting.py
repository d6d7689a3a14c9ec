"""Plant a bug in a kernel: its package is copied to a temporary directory, patched there and imported from there.

`triton.jit` reads a function's source from its file, so patching in memory (`loading.FreshModules`) would compile the
clean kernel. While a bug is planted, `sys.modules` holds the patched modules and the op's cases over them; afterwards it
holds what it held before. Custom operators get a namespace of their own, because torch keeps one of each name.
"""

import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch as replaced

from tessera_parity.kernel_cases.case import KernelOp
from tessera_parity.loading import Patch
from tessera_shared.errors import ParityError

OPERATORS = "tessera::"
"""Namespace of the kernels' custom operators, as it stands in their source."""

_numbers = count(1)


@contextmanager
def planted(name: str, patch: Patch) -> Iterator[KernelOp]:
    """Give the op called `name` over kernels with `patch` applied. Raises `ParityError` unless it applies once."""
    root = patch.module.partition(".")[0]
    package = Path(str(importlib.import_module(root).__file__)).parent
    with tempfile.TemporaryDirectory(prefix="tessera-bug-") as folder:
        copy = Path(folder) / package.name
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        _apply(copy, patch)
        _rename_operators(copy, next(_numbers))
        with replaced.object(sys, "path", [folder, *sys.path]), _own_modules(name, root):
            importlib.invalidate_caches()
            yield load_op(name)


def load_op(name: str) -> KernelOp:
    """Import the cases of one op."""
    op: KernelOp = importlib.import_module(f"tessera_parity.kernel_cases.{name}").OP
    return op


@contextmanager
def _own_modules(name: str, root: str) -> Iterator[None]:
    """Forget the patched package, the kernels and the op's cases for the while; `case` itself stays."""
    own = {f"tessera_parity.kernel_cases.{name}", root, "tessera_kernels"}

    def is_own(module: str) -> bool:
        return any(module == prefix or module.startswith(prefix + ".") for prefix in own)

    before = {key: module for key, module in sys.modules.items() if is_own(key)}
    package = sys.modules.get("tessera_parity.kernel_cases")
    attribute = getattr(package, name, None)
    for key in before:
        del sys.modules[key]
    try:
        yield
    finally:
        for key in [key for key in sys.modules if is_own(key)]:
            del sys.modules[key]
        sys.modules.update(before)
        if package is not None and attribute is not None:
            setattr(package, name, attribute)


def _apply(copy: Path, patch: Patch) -> None:
    relative = Path(*patch.module.split(".")[1:]).with_suffix(".py")
    path = copy / relative
    source = path.read_text(encoding="utf-8") if path.exists() else ""
    found = source.count(patch.find)
    if found != 1:
        raise ParityError(
            f"patch of {patch.file}: find = {patch.find!r} occurs {found} times: expected exactly 1, because a planted bug "
            "that does not apply would count as one that was looked for; try a longer or newer piece of the source"
        )
    path.write_text(source.replace(patch.find, patch.replace), encoding="utf-8")


def _rename_operators(copy: Path, number: int) -> None:
    own = OPERATORS.removesuffix("::") + f"_bug{number}"
    for path in copy.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        renamed = source.replace(OPERATORS, f"{own}::").replace("torch.ops.tessera.", f"torch.ops.{own}.")
        if renamed != source:
            path.write_text(renamed, encoding="utf-8")

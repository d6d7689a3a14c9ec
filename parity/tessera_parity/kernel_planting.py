"""Plant a bug in a kernel: packages are copied to a temporary directory, patched there and imported from there.

`triton.jit` reads a function's source from its file, so patching in memory (`loading.FreshModules`) would compile the
clean kernel, and a CUDA kernel is a file of its own. While a bug is planted, `sys.modules` holds the patched modules and
the op's cases over them; afterwards it holds what it held before. Custom operators get a namespace of their own, because
torch keeps one of each name: a second registration would end the first, and its own end would leave the clean kernel
without an operator. So the kernels are copied whether or not the bug is theirs.
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

KERNELS = "tessera_kernels"

OPERATORS = "tessera::"
"""Namespace of the kernels' custom operators, as it stands in their source."""

_numbers = count(1)


@contextmanager
def planted(name: str, patch: Patch) -> Iterator[KernelOp]:
    """Give the op called `name` over kernels with `patch` applied. Raises `ParityError` unless it applies once."""
    packages = {patch.parts[0], KERNELS}
    with tempfile.TemporaryDirectory(prefix="tessera-bug-") as folder:
        for package in packages:
            source = Path(str(importlib.import_module(package).__file__)).parent
            shutil.copytree(source, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        patch.plant_in(Path(folder))
        _rename_operators(Path(folder), next(_numbers))
        with replaced.object(sys, "path", [folder, *sys.path]), _own_modules(name, packages):
            importlib.invalidate_caches()
            yield load_op(name)


def load_op(name: str) -> KernelOp:
    """Import the cases of one op."""
    op: KernelOp = importlib.import_module(f"tessera_parity.kernel_cases.{name}").OP
    return op


@contextmanager
def _own_modules(name: str, packages: set[str]) -> Iterator[None]:
    """Forget the copied packages and the op's cases for the while; `case` itself stays."""
    own = {f"tessera_parity.kernel_cases.{name}", *packages}

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


def _rename_operators(folder: Path, number: int) -> None:
    own = OPERATORS.removesuffix("::") + f"_bug{number}"
    for path in folder.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        renamed = source.replace(OPERATORS, f"{own}::").replace("torch.ops.tessera.", f"torch.ops.{own}.")
        if renamed != source:
            path.write_text(renamed, encoding="utf-8")

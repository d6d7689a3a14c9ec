"""Load a half from source into modules of its own, with or without planted bugs, beside the clean copy in
`sys.modules`.

A fresh module gets builtins of its own whose `__import__` answers the half's names with fresh modules and everything
else with what Python has loaded. So imports inside functions stay inside the copy too, and `sys.modules` is never
touched.
"""

import builtins
import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tessera_parity.halves import Half
from tessera_shared.errors import MissingDependency, ParityError

NAMES = ("numpy", "torch", "jax")
PACKAGES = {"numpy": "tessera_shared.reference", "torch": "tessera_torch", "jax": "tessera_jax"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One replacement in one source file; `find` must occur in it exactly once."""

    file: str  # "tessera_torch/model/norms.py"; a room in front ("torch_impl/...") is allowed
    find: str
    replace: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The file's path from its package on: ("tessera_kernels", "cuda", "rms_norm.cu")."""
        parts = Path(self.file).parts
        starts = [index for index, part in enumerate(parts) if part.startswith("tessera_")]
        if not starts:
            raise self._refusal("a file")
        return parts[starts[0] :]

    @property
    def module(self) -> str:
        """The dotted name of the module that this file is."""
        if not self.file.endswith(".py"):
            raise self._refusal("a Python file")
        return ".".join(self.parts).removesuffix(".py").removesuffix(".__init__")

    def _refusal(self, wanted: str) -> ParityError:
        return ParityError(
            f"patch file = {self.file!r}: expected {wanted} of a tessera_ package, because only those are loaded from "
            "source; try 'tessera_torch/model/norms.py'"
        )

    def applied_to(self, source: str) -> str:
        """Return the source with the replacement made. Raises `ParityError` unless it can be made exactly once."""
        count = source.count(self.find)
        if count != 1:
            raise ParityError(
                f"patch of {self.file}: find = {self.find!r} occurs {count} times: expected exactly 1, because a planted "
                "bug that does not apply would count as one that was looked for; try a longer or newer piece of the source"
            )
        return source.replace(self.find, self.replace)

    def plant_in(self, folder: Path) -> None:
        """Apply it to the file, Python or not, of a copy of its package that lies in `folder`."""
        file = folder.joinpath(*self.parts)
        file.write_text(self.applied_to(file.read_text(encoding="utf-8") if file.exists() else ""), encoding="utf-8")


class FreshModules:
    """Modules imported from source for one half alone: those under `prefix`, and every module that a patch names.

    A patched module outside `prefix` (`tessera_shared.schedule`) is seen in its patched form by this half's modules
    only.
    """

    def __init__(self, prefix: str, patches: Sequence[Patch] = ()) -> None:
        self.prefix = prefix
        self.modules: dict[str, ModuleType] = {}
        self._sources = _patched_sources(patches)
        self._roots = {name.split(".", 1)[0] for name in (prefix, *self._sources)}
        self._builtins = dict(vars(builtins)) | {"__import__": self._import}

    def load(self, name: str) -> ModuleType:
        """Return the module called `name`, fresh where it belongs to this half; its parents are loaded first."""
        parts = name.split(".")
        module = self._one(parts[0], None)
        for end in range(2, len(parts) + 1):
            module = self._one(".".join(parts[:end]), module)
        return module

    def _one(self, name: str, parent: ModuleType | None) -> ModuleType:
        if name not in self.modules:
            if self._is_fresh(name):
                self._execute(name, parent)
            else:
                self.modules[name] = importlib.import_module(name)
        module = self.modules[name]
        if parent is not None:
            setattr(parent, name.rpartition(".")[2], module)
        return module

    def _is_fresh(self, name: str) -> bool:
        """Is this module executed anew? The half's own, the patched ones, and the packages above either."""
        if name == self.prefix or name.startswith(self.prefix + "."):
            return True
        return any(fresh == name or fresh.startswith(name + ".") for fresh in (self.prefix, *self._sources))

    def _execute(self, name: str, parent: ModuleType | None) -> None:
        """Run a module's source in a namespace of its own. Finding it imports nothing: its parent's path says where."""
        spec = importlib.util.find_spec(name) if parent is None else PathFinder.find_spec(name, parent.__path__)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        source = self._sources.get(name)
        code = _compile(source if source is not None else Path(spec.origin).read_text(encoding="utf-8"), spec.origin)
        module = ModuleType(name)
        module.__file__, module.__spec__, module.__loader__ = spec.origin, spec, spec.loader
        is_package = spec.submodule_search_locations is not None
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = list(spec.submodule_search_locations or ())
        vars(module)["__builtins__"] = self._builtins
        self.modules[name] = module
        try:
            exec(code, vars(module))
        except BaseException:
            del self.modules[name]  # half-executed modules must not be found by the next import
            raise

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Iterable[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level:
            name = importlib.util.resolve_name("." * level + name, str((globals or {}).get("__package__", "")))
        if name.split(".", 1)[0] not in self._roots:
            return builtins.__import__(name, globals, locals, tuple(fromlist or ()), 0)
        module = self.load(name)
        if not fromlist:
            return self.modules[name.split(".", 1)[0]]
        for item in fromlist if hasattr(module, "__path__") else ():
            if PathFinder.find_spec(f"{name}.{item}", module.__path__) is not None:
                self.load(f"{name}.{item}")
        return module


def load_half(name: str, *, device: str = "cpu", patches: Sequence[Patch] = ()) -> Half:
    """Return a fresh copy of a half: `numpy` (the oracle), `torch` or `jax`, with `patches` applied to its source.

    Raises `MissingDependency` when the framework is not installed and `ParityError` for an unknown half or a patch that
    does not occur exactly once. Loading `jax` switches 64-bit types on for the process, because question 1 needs them.
    """
    if name not in PACKAGES:
        raise ParityError(f"half = {name!r}: expected one of {', '.join(NAMES)}, because these exist; try 'torch'")
    fresh = FreshModules(PACKAGES[name], tuple(patches))
    if name == "numpy":
        from tessera_parity.half_numpy import NumpyHalf

        return NumpyHalf(fresh)
    require(name)
    if name == "torch":
        from tessera_parity.half_torch import TorchHalf

        return TorchHalf(fresh, device)
    from tessera_parity.half_jax import JaxHalf

    return JaxHalf(fresh, device)


def require(package: str) -> None:
    """Raise `MissingDependency` when `package` cannot be imported here."""
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"{package} = not installed: expected the package, because this half is written in it; "
            f"try installing tessera-testbed[{package}]"
        )


def _patched_sources(patches: Sequence[Patch]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for patch in patches:
        if patch.module not in sources:
            sources[patch.module] = _source_of(patch)
        sources[patch.module] = patch.applied_to(sources[patch.module])
    return sources


def _source_of(patch: Patch) -> str:
    spec = importlib.util.find_spec(patch.module) if _exists(patch.module) else None
    if spec is None or spec.origin is None:
        raise ParityError(
            f"patch file = {patch.file!r}: expected a file of an installed package, because its source is patched in "
            "memory; try the path from the package on, such as 'tessera_jax/model/norms.py'"
        )
    return Path(spec.origin).read_text(encoding="utf-8")


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


@lru_cache(maxsize=1024)
def _compile(source: str, filename: str) -> CodeType:
    return compile(source, filename, "exec", dont_inherit=True)

"""`PAIR.py`: a user's file that names two implementations. Its protocol; reading it; blaming it by file and line.

| name in the file | what it is |
|---|---|
| `frameworks` | two words out of numpy, torch, jax: what `left` and `right` compute in |
| `left`, `right` | callables `(params, inputs)` or `(params, inputs, tap)`; return an array, tuple or dict |
| `inputs` | `inputs(rng)` or `inputs(rng, size)`: NumPy arrays (dict, tuple or one) from a NumPy Generator |
| `params` | optional `params(rng)`: dict of NumPy arrays, the weights in one common layout |
| `to_left`, `to_right` | optional weight mappings: common dict (arrays of that side) to what the side wants |
| `reference` | optional third callable in float64 NumPy, of the same signature, that says which side moved |
| `grad` | optional `True`: compare gradients by parameter too, through torch's and jax's own differentiation |
| `depth` | optional: how many reductions follow one another from inputs to outputs; default: the number of taps |

Floats arrive as float64 and must stay float64: the question is *same mathematics*. `tap(name, value)` returns the value
to go on with; taps of one name on both sides are compared one by one, outside of `jit`.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tessera_parity.halves import Half
from tessera_parity.loading import load_half
from tessera_shared.errors import ParityError, TesseraError

FRAMEWORKS = ("numpy", "torch", "jax")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation of the pair."""

    role: str  # left | right | reference
    half: Half  # only its array verbs: bring in, bring out, differentiate
    function: Callable[..., Any]
    mapping: Callable[[dict[str, Any]], Any] | None
    takes_tap: bool

    @property
    def label(self) -> str:
        """What reports call this side: `left (torch)`."""
        return f"{self.role} ({self.half.name})"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A loaded adapter, checked."""

    path: Path
    left: Side
    right: Side
    reference: Side | None
    params: Callable[..., Any] | None
    inputs: Callable[..., Any]
    takes_size: bool
    grad: bool
    depth: int | None

    @property
    def sides(self) -> list[Side]:
        """Left, right and, where there is one, the reference."""
        return [side for side in (self.left, self.right, self.reference) if side is not None]


@contextmanager
def open_pair(path: Path) -> Iterator[Pair]:
    """Load a pair file; its neighbors can be imported while it is open. Afterwards they, and JAX's x64, are undone.

    Raises `ParityError` with file and line for a file that is missing, does not parse, raises, or lacks a name.
    """
    path = path.resolve()
    if not path.is_file():
        raise ParityError(
            f"pair = {shown(path)}: expected a Python file, because it names both sides; see docs/check.md"
        )
    before = set(sys.modules)
    restore_x64 = _jax_x64()
    sys.path.insert(0, str(path.parent))
    try:
        with blame(path, "loading the pair"):
            module = _module(path)
        yield _pair(module, path)
    finally:
        sys.path.remove(str(path.parent))
        restore_x64()
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).resolve().parent == path.parent:
                del sys.modules[name]


@contextmanager
def blame(path: Path, doing: str) -> Iterator[None]:
    """Turn whatever a user's code raises into a one-line `ParityError`: file, line, what was being done, message."""
    try:
        yield
    except TesseraError:
        raise
    except (Exception, SystemExit) as error:  # a stranger's program: anything may come out, and a person wants one line
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        raise ParityError(f"{_where(error, path)}: {doing} raised {type(error).__name__}: {text}") from error


def line_of(function: Callable[..., Any], path: Path) -> str:
    """Return `file:line` of a callable's definition, of the pair file's first line where Python does not know it."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{shown(Path(code.co_filename))}:{code.co_firstlineno}" if code else f"{shown(path)}:1"


def shown(path: Path) -> str:
    """Return a path as people gave it: relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"parity_pair_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ParityError(
            f"pair = {shown(path)}: expected a file that ends in .py, because it is Python; try renaming it"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickling in the user's file look it up
    spec.loader.exec_module(module)
    return module


def _pair(module: ModuleType, path: Path) -> Pair:
    names = _frameworks(module, path)
    reference = getattr(module, "reference", None)
    depth = getattr(module, "depth", None)
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise ParityError(
            f"{shown(path)}:1: depth = {depth!r}: expected a positive integer, because limits grow with it"
        )
    inputs = _callable(module, "inputs", path)
    grad = bool(getattr(module, "grad", False))
    if grad and "numpy" in names:
        raise ParityError(
            f"{shown(path)}:1: grad = True: expected torch and jax sides, because numpy has no gradients; drop it"
        )
    return Pair(
        path=path,
        left=_side(module, "left", names[0], path),
        right=_side(module, "right", names[1], path),
        reference=None if reference is None else _side(module, "reference", "numpy", path),
        params=_callable(module, "params", path) if hasattr(module, "params") else None,
        inputs=inputs,
        takes_size="size" in _parameters(inputs, path),
        grad=grad,
        depth=depth,
    )


def _frameworks(module: ModuleType, path: Path) -> tuple[str, str]:
    names = getattr(module, "frameworks", None)
    if not isinstance(names, tuple | list) or len(names) != 2 or not set(names) <= set(FRAMEWORKS):
        raise ParityError(
            f"{shown(path)}:1: frameworks = {names!r}: expected two of {', '.join(FRAMEWORKS)}, because arrays are "
            'brought to each side in its own type; try frameworks = ("torch", "jax")'
        )
    return names[0], names[1]


def _side(module: ModuleType, role: str, framework: str, path: Path) -> Side:
    function = _callable(module, role, path)
    mapping = _callable(module, f"to_{role}", path) if hasattr(module, f"to_{role}") else None
    with blame(path, f"reading the signature of {role}"):
        accepts = [count for count in (3, 2) if _accepts(function, count)]
    if not accepts:
        raise ParityError(
            f"{line_of(function, path)}: {role}{inspect.signature(function)}: expected (params, inputs) or "
            "(params, inputs, tap), because the check calls it so; try a lambda"
        )
    half = load_half(framework)
    return Side(role=role, half=half, function=function, mapping=mapping, takes_tap=accepts[0] == 3)


def _accepts(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def _callable(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    value = getattr(module, name, None)
    if not callable(value):
        found = "missing" if value is None else repr(value)
        raise ParityError(
            f"{shown(path)}:1: {name} = {found}: expected a callable, because the pair file must name it; "
            "see docs/check.md"
        )
    found_callable: Callable[..., Any] = value
    return found_callable


def _parameters(function: Callable[..., Any], path: Path) -> list[str]:
    with blame(path, "reading a signature"):
        return list(inspect.signature(function).parameters)


def _where(error: BaseException, path: Path) -> str:
    """Return `file:line` of the deepest frame in the user's folder."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown(Path(error.filename))}:{error.lineno or 1}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(path.parent)]
    return f"{shown(Path(theirs[-1].filename))}:{theirs[-1].lineno}" if theirs else f"{shown(path)}:1"


def _jax_x64() -> Callable[[], None]:
    """Return what puts JAX's 64-bit switch back: a caller's other tests must not change because a pair was checked."""
    if importlib.util.find_spec("jax") is None:
        return lambda: None
    import jax

    config: Any = jax.config
    switched_on = bool(config.jax_enable_x64)
    config.update("jax_enable_x64", True)
    return lambda: config.update("jax_enable_x64", switched_on)

"""Which functions are twins. Nothing is registered: same path, same name, same parameters in torch, in JAX and in the
oracle.

What has no twin stands in `unpaired.toml` with a reason; what stands there and has a twin after all is an error too.
"""

import importlib.util
import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from tessera_parity.halves import Half
from tessera_parity.loading import PACKAGES
from tessera_shared.errors import ParityError

SIDES = ("torch", "jax", "numpy")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One public function and its twins. `functions` has the oracle's under "numpy" where the oracle has one."""

    module: str  # "model.norms"
    name: str  # "rms_norm"
    functions: dict[str, Callable[..., Any]]

    @property
    def path(self) -> str:
        """The dotted path: `model.norms.rms_norm`."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Unpaired:
    """One entry of `unpaired.toml`: a module or function, the sides that have it, and why the others do not."""

    path: str
    sides: tuple[str, ...]
    reason: str


def read_unpaired() -> dict[str, Unpaired]:
    """Return the entries of `unpaired.toml` by path. Raises `ParityError` for an entry without sides or reason."""
    text = resources.files("tessera_parity").joinpath("unpaired.toml").read_text(encoding="utf-8")
    entries: dict[str, Unpaired] = {}
    for path, table in tomllib.loads(text).items():
        sides, reason = tuple(table.get("sides", ())), str(table.get("reason", ""))
        if not reason or not sides or not set(sides) <= set(SIDES):
            raise ParityError(
                f"unpaired.toml [{path!r}] = {table}: expected sides out of {', '.join(SIDES)} and a reason, because "
                "an exception without a reason cannot be judged; try sides = ['torch'] and a sentence"
            )
        entries[path] = Unpaired(path=path, sides=sides, reason=reason)
    return entries


def module_paths(side: str) -> list[str]:
    """Return the public modules of one half's package as mirrored paths (`model.norms`), from its files. Imports
    nothing."""
    spec = importlib.util.find_spec(PACKAGES[side])
    if spec is None or not spec.submodule_search_locations:
        raise ParityError(f"package = {PACKAGES[side]}: expected a package on the path, because its modules are paired")
    root = Path(spec.submodule_search_locations[0])
    paths = [file.relative_to(root).with_suffix("").parts for file in sorted(root.rglob("*.py"))]
    return [".".join(parts) for parts in paths if not any(part.startswith("_") for part in parts)]


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Return the functions that a module defines itself and does not hide behind an underscore."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", None) == module.__name__
    }


def find_pairs(halves: Mapping[str, Half], unpaired: Mapping[str, Unpaired] | None = None) -> list[Pair]:
    """Return every paired function of the given halves (keys `torch`, `jax`, `numpy`), checked.

    Raises `ParityError` naming the first function whose twin is missing without an entry, whose entry is out of date,
    or whose parameters differ. With one framework installed, only it and the oracle are held together.
    """
    pairs, problems = collect_pairs(halves, unpaired)
    if problems:
        raise problems[0]
    return pairs


def collect_pairs(
    halves: Mapping[str, Half], unpaired: Mapping[str, Unpaired] | None = None
) -> tuple[list[Pair], list[ParityError]]:
    """Return the functions that are properly paired, and what is wrong with the others."""
    entries = read_unpaired() if unpaired is None else unpaired
    frameworks = [side for side in ("torch", "jax") if side in halves]
    by_side = {side: set(module_paths(side)) for side in frameworks}
    pairs: list[Pair] = []
    problems: list[ParityError] = []
    used: set[str] = set()
    for path in sorted(set().union(*by_side.values())):
        present = [side for side in frameworks if path in by_side[side]]
        if len(present) == len(frameworks):
            _pair_module(path, halves, frameworks, entries, used, pairs, problems)
        elif path in entries:
            used.add(path)
            problems += _entry_problems(entries[path], present, frameworks)
        else:
            problems.append(_missing(path, present, frameworks))
    stale = sorted(set(entries) - used) if len(frameworks) == 2 and "numpy" in halves else []
    problems += [_stale(path) for path in stale]
    return pairs, problems


def _pair_module(
    path: str,
    halves: Mapping[str, Half],
    frameworks: list[str],
    entries: Mapping[str, Unpaired],
    used: set[str],
    pairs: list[Pair],
    problems: list[ParityError],
) -> None:
    """Pair the functions of a module that every framework has."""
    functions = {side: public_functions(halves[side].module(path)) for side in frameworks}
    oracle = _oracle_functions(path, halves) if "numpy" in halves else {}
    expected = frameworks + (["numpy"] if "numpy" in halves else [])
    if path in entries:
        used.add(path)
    for name in sorted(set().union(*functions.values())):
        full = f"{path}.{name}"
        twins = {side: functions[side][name] for side in frameworks if name in functions[side]}
        twins |= {"numpy": oracle[name]} if name in oracle else {}
        entry = entries.get(full) or entries.get(path)
        used |= {full} & set(entries)
        if entry is not None:
            found = _entry_problems(entry, list(twins), expected)
        else:
            found = [_missing(full, list(twins), expected)] if len(twins) < len(expected) else []
        found += _signature_problems(full, twins)
        problems += found
        if not found and set(frameworks) <= set(twins):
            pairs.append(Pair(module=path, name=name, functions=twins))


def _oracle_functions(path: str, halves: Mapping[str, Half]) -> dict[str, Callable[..., Any]]:
    try:
        return public_functions(halves["numpy"].module(path))
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("tessera_shared"):
            raise
        return {}


def _signature_problems(path: str, twins: Mapping[str, Callable[..., Any]]) -> list[ParityError]:
    """Return the first parameter that differs in name, order, kind or default between two twins, if any does.

    The oracle may take one more: a keyword `numerics` with a default, where the halves read the dtype off the arrays.
    """
    sides = list(twins)
    first = _parameters(twins[sides[0]])
    for side in sides[1:]:
        other = _parameters(twins[side])
        if side == "numpy" and not any(parameter.name == "numerics" for parameter in first):
            other = [parameter for parameter in other if parameter.name != "numerics"]
        for index in range(max(len(first), len(other))):
            mine = _shown(first[index]) if index < len(first) else "nothing"
            theirs = _shown(other[index]) if index < len(other) else "nothing"
            if mine != theirs:
                return [
                    ParityError(
                        f"{path}: parameter {index + 1} is {mine} in {sides[0]} and {theirs} in {side}: expected the same "
                        "name, order, kind and default, because twins are called alike; try copying the signature"
                    )
                ]
    return []


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _shown(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
    return f"{parameter.name}{default} ({parameter.kind.description})"


def _entry_problems(entry: Unpaired, present: list[str], known: list[str]) -> list[ParityError]:
    """An entry names exactly the sides that have the thing, of those looked at."""
    if set(entry.sides) & set(known) == set(present):
        return []
    return [
        ParityError(
            f"unpaired.toml [{entry.path!r}] sides = {list(entry.sides)}: expected {sorted(present)}, because these sides have "
            "it now; try correcting or removing the entry"
        )
    ]


def _stale(path: str) -> ParityError:
    return ParityError(
        f"unpaired.toml [{path!r}]: expected a module or function of that path, because entries must not outlive what they "
        "excuse; try removing the entry"
    )


def _missing(path: str, present: list[str], expected: list[str]) -> ParityError:
    lacking = [side for side in expected if side not in present]
    return ParityError(
        f"{path} = only in {', '.join(present)}: expected a twin in {', '.join(lacking)}, because public functions are "
        f"mirrored; try writing it there, an underscore in front, or an entry in unpaired.toml with the reason"
    )

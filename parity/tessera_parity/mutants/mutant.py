"""`Mutant`: one planted bug, as data."""

from dataclasses import dataclass

from tessera_parity.loading import Patch


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One planted bug: a replacement in one file that must occur exactly once, and the operation it breaks."""

    name: str
    half: str  # torch | jax | reference | shared | harness
    kind: str  # algebra, mask, index, precision, optimizer, reduction, cache, sampling, loss, rope, gradient, harness
    file: str  # from the package on: "tessera_torch/model/norms.py"
    find: str
    replace: str
    expected_op: str  # what localization must put at rank 1
    hints: tuple[str, ...] = ()  # subjects to ask first; the others are asked all the same
    note: str = ""  # where a bug like this was real

    @property
    def patch(self) -> Patch:
        """The replacement, as the loader takes it."""
        return Patch(file=self.file, find=self.find, replace=self.replace)


_ASKED_FIRST = {"loss": ("losses",), "optimizer": ("optimizer",), "sampling": ("sampling",)}


def named(
    prefix: str, half: str, package: str, rows: tuple[tuple[str, str, str, str, str, str], ...]
) -> tuple[Mutant, ...]:
    """Return mutants from rows of name, kind, file, find, replace, expected operation."""
    return tuple(
        Mutant(
            name=f"{prefix}-{name}", half=half, kind=kind, file=f"{package}/{file}", find=find, replace=replace,
            expected_op=op, hints=_ASKED_FIRST.get(kind, ()),
        )
        for name, kind, file, find, replace, op in rows
    )  # fmt: skip

"""Errors that a person meets: *what = value: expected ..., because ...; try ...*.

Every command catches `TesseraError` at its edge, prints the one line and leaves with `exit_code`; a traceback is a
defect.
"""

from typing import ClassVar


class TesseraError(Exception):
    """A mistake in the input, told in one line. `exit_code` is the exit status of the commands."""

    exit_code: ClassVar[int] = 2


class SpecError(TesseraError, ValueError):
    """A model description is contradictory or names something that Tessera does not understand."""


class FormatError(TesseraError, ValueError):
    """A file on disk is missing, torn, altered, or does not hold what its description says."""


class DataError(TesseraError, ValueError):
    """Text, token ids, labels or a corpus cannot be used as they are."""


class ParityError(TesseraError, ValueError):
    """`parity` was asked for something that it cannot do: unknown subject, broken adapter, unusable report
    directory."""


class MissingDependency(TesseraError, ImportError):
    """A framework or optional package that this command needs is not installed."""

    exit_code: ClassVar[int] = 4


class KernelError(TesseraError, ValueError):
    """A kernel was handed what it cannot take: shapes, dtypes, devices, strides, a page table out of range.

    A compiler or GPU that is not there is `MissingDependency`.
    """

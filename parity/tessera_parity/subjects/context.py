"""What a subject is given and what it must be: a name, a sentence, and a generator of checks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tessera_parity.halves import Half
from tessera_parity.result import Check

QUICK, DEFAULT, FULL = "quick", "default", "full"


@dataclass(frozen=True, kw_only=True)
class Context:
    """One run's halves and sizes. `cases` overrides the lane's number of generated cases where a subject generates
    any."""

    numpy: Half
    torch: Half | None  # None where the framework is not installed (said in `Run.left_out`)
    jax: Half | None
    seed: int = 0
    lane: str = DEFAULT
    cases: int | None = None
    dtype: str | None = None  # None = every dtype of the lane
    device: str = "cpu"
    model: str | None = None  # preset name or Hugging Face directory
    advance: Callable[[str], None] = lambda what: None  # progress: called with a short phrase

    @property
    def halves(self) -> list[Half]:
        """The installed halves, without the oracle."""
        return [half for half in (self.torch, self.jax) if half is not None]

    def budget(self, *, quick: int, default: int, full: int) -> int:
        """Return this run's number of cases: `cases` when the user gave it, else the lane's."""
        return self.cases if self.cases is not None else {QUICK: quick, DEFAULT: default, FULL: full}[self.lane]

    def as_one(self, half: Half, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays compiled as one in the quick lane, as it is in the others.

        JAX compiles every operation of every new shape; that repays where many cases share shapes, and few do not.
        """
        return half.compiled(function) if self.lane == QUICK else function


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing that `parity run` looks at."""

    name: str
    about: str  # one line for `parity list`
    run: Callable[[Context], Iterator[Check]]

"""`parity mutants`: plant bugs and show which the harness notices, names and shrinks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tessera_parity.halves import Half
from tessera_parity.loading import load_half, require
from tessera_parity.mutants.engine import Proof, check_choice, prove_all
from tessera_parity.mutants.equivalents import prove_equivalents
from tessera_parity.mutants.shrinking import Shrinking, figures, read_results, shrink_all
from tessera_parity.result import MutantOutcome, Verdict
from tessera_parity.store import check_writable
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK, Context
from tessera_shared.cli.edge import Interrupted, remembered_interrupts
from tessera_shared.errors import MissingDependency, ParityError

DIRECTORY = Path("parity-runs") / "planted"
KILL_RATE = 0.95
"""Share of planted bugs that must be caught (parity anchors, G4)."""


def mutants(
    names: Annotated[list[str] | None, typer.Argument(help="Names of planted bugs; none = all.")] = None,
    half: Annotated[list[str] | None, typer.Option(help="torch, jax, reference, shared or harness.")] = None,
    quick: Annotated[bool, typer.Option(help="A rotating sample that fits a few seconds.")] = False,
    full: Annotated[bool, typer.Option(help="Also shrink each caught bug's case.")] = False,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Shrink every caught bug to a repro file a side, and run the files.")
    ] = False,
    repros: Annotated[
        Path, typer.Option(help="Directory of --shrink; what it already holds is kept, so it resumes.")
    ] = DIRECTORY,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the inputs and of the rotation.")] = 0,
) -> None:
    """Prove that the harness can fail: planted bugs must be caught, clean halves must not."""
    console = Console()
    chosen = check_choice(names or None, half or None)
    if shrink and quick:
        raise ParityError("--shrink with --quick: expected one of them, because shrinking takes minutes; try --half")
    if names or half:  # asked for, so not to be left out with a word
        for framework in sorted({mutant.half for mutant in chosen} & {"torch", "jax"}):
            require(framework)
    context = installed_context(lane=QUICK if quick else FULL if full else DEFAULT, seed=seed)
    if shrink:
        _shrink(context, console, repros, names or None, half or None)
    proof = prove_all(context, names=names or None, halves=half or None)
    equivalent = [] if quick or names else prove_equivalents(context)
    console.print(table_of(proof.outcomes))
    for line in (*summary(proof), *proof.left_out[:3]):
        console.print(line, markup=False)
    for line in equivalent:
        console.print(line, markup=False)
    raise typer.Exit(0 if passes(proof) else 1)


def _shrink(
    context: Context, console: Console, out: Path, names: list[str] | None, halves: list[str] | None
) -> NoReturn:
    """Print the table of repros and its figures; leave with 1 unless enough is caught and every repro tells."""
    check_writable(out, option="--repros")
    with remembered_interrupts() as is_interrupted:
        try:
            with _bar(is_interrupted) as advance:
                found = shrink_all(context, out, names=names, halves=halves, advance=advance)
        except KeyboardInterrupt:
            raise Interrupted(
                f"{len(read_results(out))} repros are in {out}; go on with: parity mutants --shrink --repros {out}"
            ) from None
    console.print(shrink_table(found))
    for line in figures(found):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"files: {out}", markup=False, soft_wrap=True)
    good = all(one.reproduced for one in found if one.shrinkable)
    raise typer.Exit(0 if good and sum(one.killed for one in found) >= KILL_RATE * len(found) else 1)


@contextmanager
def _bar(is_interrupted: Callable[[], bool]) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, where a person watches; and Ctrl-C that is never lost."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())

    def advance(name: str, done: int, total: int) -> None:
        if is_interrupted():
            raise KeyboardInterrupt
        progress.update(task, description=name, completed=done, total=total)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        yield advance


def shrink_table(found: Sequence[Shrinking]) -> Table:
    """Return one row per planted bug: what named it, what is left of its case, whether the files tell."""
    table = Table("planted bug", "kind", "named by", "layers", "tokens", "files", "s")
    for one in sorted(found, key=lambda one: (one.half, one.kind, one.name)):
        said = "reproduced" if one.reproduced else "none" if one.reason else "NOT reproduced"
        layers, tokens = ("-" if size is None else str(size) for size in (one.layers, one.tokens))
        style = None if one.reproduced or (one.reason and one.killed) else "red"
        table.add_row(one.name, one.kind, one.question or "-", layers, tokens, said, f"{one.seconds:.1f}", style=style)
    return table


def installed_context(*, lane: str, seed: int, device: str = "cpu") -> Context:
    """Return a context of the halves that can be loaded here."""
    halves: dict[str, Half | None] = {}
    for name in ("torch", "jax"):
        try:
            halves[name] = load_half(name, device=device)
        except MissingDependency:
            halves[name] = None  # said by the engine, by name, in `left_out`
    return Context(
        numpy=load_half("numpy"), torch=halves["torch"], jax=halves["jax"], lane=lane, seed=seed, device=device
    )


def passes(proof: Proof) -> bool:
    """Is the proof good: enough killed, every patch applied, no alarm on a clean half?"""
    rate = proof.kill_rate
    clean = all(check.verdict is Verdict.PARITY for check in proof.clean)
    return rate is not None and rate >= KILL_RATE and not proof.not_applied and clean


def table_of(outcomes: list[MutantOutcome]) -> Table:
    """Return one row per planted bug."""
    table = Table("planted bug", "kind", "caught by", "expected", "named", "repro", "s")
    for outcome in sorted(outcomes, key=lambda one: (one.half, one.kind, one.name)):
        named = outcome.named_op or "-"
        sizes = ((outcome.repro_layers, "layers"), (outcome.repro_tokens, "tokens"))
        size = ", ".join(f"{number} {word}" for number, word in sizes if number is not None)
        table.add_row(
            outcome.name, outcome.kind, outcome.killed_by or "NOT CAUGHT", outcome.expected_op or "-", named, size,
            f"{outcome.seconds:.2f}", style=None if outcome.killed and named == outcome.expected_op else "red",
        )  # fmt: skip
    return table


def summary(proof: Proof) -> list[str]:
    """Return the lines below the table: rates, sizes, seconds, the clean side."""
    caught = sum(outcome.killed for outcome in proof.outcomes)
    lines = [f"caught {caught} of {len(proof.outcomes)} planted bugs"]
    if proof.localization_rate is not None:
        lines.append(f"named the right operation first for {proof.localization_rate:.1%} of those caught")
    layers = [outcome.repro_layers for outcome in proof.outcomes if outcome.repro_layers is not None]
    tokens = [outcome.repro_tokens for outcome in proof.outcomes if outcome.repro_tokens is not None]
    if layers and tokens:
        lines.append(f"median repro: {median(layers):g} layers, {median(tokens):g} tokens")
    seconds = sorted(outcome.seconds for outcome in proof.outcomes)
    if seconds:
        lines.append(f"{sum(seconds) / len(seconds):.2f} s a bug on average, {seconds[-1]:.2f} s the slowest")
        lines.append(f"{proof.seconds:.1f} s in all, {proof.clean_seconds:.1f} s of them the clean halves' first pass")
    lines += [f"{check.name}: {check.verdict} over {check.cases} probes {check.detail}" for check in proof.clean]
    return lines + [f"does not apply any more: {name}" for name in proof.not_applied]

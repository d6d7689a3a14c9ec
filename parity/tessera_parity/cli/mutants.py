"""`parity mutants`: plant bugs and show which the harness notices, names and shrinks."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tessera_parity.halves import Half
from tessera_parity.loading import load_half, require
from tessera_parity.mutants.engine import Proof, check_choice, prove_all
from tessera_parity.mutants.equivalents import prove_equivalents
from tessera_parity.result import MutantOutcome, Verdict
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK, Context
from tessera_shared.errors import MissingDependency

KILL_RATE = 0.95
"""Share of planted bugs that must be caught (parity anchors, G4)."""


def mutants(
    names: Annotated[list[str] | None, typer.Argument(help="Names of planted bugs; none = all.")] = None,
    half: Annotated[list[str] | None, typer.Option(help="torch, jax, reference, shared or harness.")] = None,
    quick: Annotated[bool, typer.Option(help="A rotating sample that fits a few seconds.")] = False,
    full: Annotated[bool, typer.Option(help="Also shrink each caught bug's case.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the inputs and of the rotation.")] = 0,
) -> None:
    """Prove that the harness can fail: planted bugs must be caught, clean halves must not."""
    console = Console()
    chosen = check_choice(names or None, half or None)
    if names or half:  # asked for, so not to be left out with a word
        for framework in sorted({mutant.half for mutant in chosen} & {"torch", "jax"}):
            require(framework)
    context = installed_context(lane=QUICK if quick else FULL if full else DEFAULT, seed=seed)
    proof = prove_all(context, names=names or None, halves=half or None)
    equivalent = [] if quick or names else prove_equivalents(context)
    console.print(table_of(proof.outcomes))
    for line in (*summary(proof), *proof.left_out[:3]):
        console.print(line, markup=False)
    for line in equivalent:
        console.print(line, markup=False)
    raise typer.Exit(0 if passes(proof) else 1)


def installed_context(*, lane: str, seed: int) -> Context:
    """Return a context of the halves that can be loaded here."""
    halves: dict[str, Half | None] = {}
    for name in ("torch", "jax"):
        try:
            halves[name] = load_half(name)
        except MissingDependency:
            halves[name] = None  # said by the engine, by name, in `left_out`
    return Context(numpy=load_half("numpy"), torch=halves["torch"], jax=halves["jax"], lane=lane, seed=seed)


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
        size = "" if outcome.repro_layers is None else f"{outcome.repro_layers} layers, {outcome.repro_tokens} tokens"
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
    sizes = sorted((o.repro_layers, o.repro_tokens or 0) for o in proof.outcomes if o.repro_layers is not None)
    if sizes:
        tokens = sorted(size[1] for size in sizes)
        lines.append(f"median repro: {sizes[len(sizes) // 2][0]} layers, {tokens[len(tokens) // 2]} tokens")
    seconds = sorted(outcome.seconds for outcome in proof.outcomes)
    if seconds:
        lines.append(f"{sum(seconds) / len(seconds):.2f} s a bug on average, {seconds[-1]:.2f} s the slowest")
        lines.append(f"{proof.seconds:.1f} s in all, {proof.clean_seconds:.1f} s of them the clean halves' first pass")
    lines += [f"{check.name}: {check.verdict} over {check.cases} probes {check.detail}" for check in proof.clean]
    return lines + [f"does not apply any more: {name}" for name in proof.not_applied]

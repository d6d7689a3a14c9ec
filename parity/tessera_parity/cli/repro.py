"""`parity repro`: from a report to files that show each divergence by themselves."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tessera_parity.cli.mutants import installed_context
from tessera_parity.repro import replay
from tessera_parity.subjects.context import DEFAULT
from tessera_shared.errors import ParityError


def repro(
    result: Annotated[Path, typer.Argument(help="A run's result.json, or its directory.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: repro/ beside the report.")] = None,
) -> None:
    """Replay the worst case of each divergence, shrink it, and write one file a side that shows it."""
    console = Console()
    path, run = read_run(result)
    context = installed_context(lane=DEFAULT, seed=int(run.get("seed", 0)))
    halves = {half.name: half for half in (context.numpy, *context.halves)}
    repros = replay(run["checks"], halves, out or path.parent / "repro")
    if not repros:
        console.print(f"{path}: no divergence to reproduce")
    for one in repros:
        size = "" if one.layers is None else f", {one.layers} layers, {one.tokens} tokens"
        console.print(
            f"{one.name}: {'reproduced' if one.reproduced else 'NOT reproduced'}{size}: {one.detail}", markup=False
        )
        for file in one.files:
            console.print(f"    python {file}", markup=False)
    raise typer.Exit(0 if all(one.reproduced for one in repros) else 1)


def read_run(result: Path) -> tuple[Path, dict[str, Any]]:
    """Return the report's path and contents. Raises `ParityError` where there is none."""
    path = result / "result.json" if result.is_dir() else result
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParityError(
            f"report = {path}: expected a result.json that parity run wrote, because it holds the cases ({error}); try "
            "parity run first"
        ) from None
    if not isinstance(run, dict) or "checks" not in run:
        raise ParityError(f"report = {path}: expected checks in it, because those are replayed; try another file")
    return path, run

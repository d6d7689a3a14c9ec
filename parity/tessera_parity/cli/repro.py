"""`parity repro`: from a report to files that show each divergence by themselves."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tessera_parity.cli.mutants import installed_context
from tessera_parity.repro import Repro, replay
from tessera_parity.store import STATE_FILE, Settings, check_writable
from tessera_parity.subjects.context import DEFAULT
from tessera_shared.cli.edge import Interrupted, remembered_interrupts
from tessera_shared.errors import ParityError


def repro(
    result: Annotated[Path, typer.Argument(help="A run's result.json, or its directory.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: repro/ beside the report.")] = None,
) -> None:
    """Replay each divergence, shrink it, and write one file a side that shows it; run the files.

    Leaves with 0 when every divergence was shown again by its files, or has no smaller form than its subject (the
    command that runs it is printed then), and with 1 otherwise.
    """
    console = Console()
    path, run = read_run(result)
    settings = read_settings(path.parent, run)
    context = installed_context(lane=DEFAULT, seed=settings.seed, device=settings.device)
    halves = {half.name: half for half in (context.numpy, *context.halves)}
    folder, found = out or path.parent / "repro", []
    check_writable(folder, option="--out")
    with remembered_interrupts() as is_interrupted:
        try:
            for one in replay(run["checks"], halves, folder, settings=settings):
                _print(one, console)
                found.append(one)
                if is_interrupted():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise Interrupted(f"{len(found)} repros are in {folder}; again: parity repro {result}") from None
    if not found:
        console.print(f"{path}: no divergence to reproduce", markup=False, soft_wrap=True)
    elif len(found) > 1:
        console.print(_summary(found), markup=False, soft_wrap=True)
    raise typer.Exit(0 if all(one.reproduced or one.command is not None for one in found) else 1)


def _print(one: Repro, console: Console) -> None:
    sizes = [f"{size} {word}" for size, word in ((one.layers, "layers"), (one.tokens, "tokens")) if size is not None]
    said = "reproduced" if one.reproduced else "no smaller form" if one.command is not None else "NOT reproduced"
    if one.same_as is not None:
        console.print(f"{one.name}: {one.detail}: the same files as {one.same_as}", markup=False, soft_wrap=True)
        return
    console.print(f"{one.name}: {', '.join([said, *sizes])}: {one.detail}", markup=False, soft_wrap=True)
    for file in one.files:
        console.print(f"    python {file}", markup=False, soft_wrap=True)


def _summary(found: list[Repro]) -> str:
    own = [one for one in found if one.same_as is None]
    files = sum(len(one.files) for one in own)
    return (
        f"{len(found)} divergences: {sum(one.reproduced for one in found)} reproduced by {files} files, "
        f"{sum(one.command is not None for one in found)} with no smaller form than their subject, "
        f"{sum(not one.reproduced and one.command is None for one in found)} not reproduced"
    )


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


def read_settings(directory: Path, run: dict[str, Any]) -> Settings:
    """Return what the run was asked for: from its state file, or as far as the report itself knows."""
    lane, seed = str(run.get("lane", DEFAULT)), int(run.get("seed", 0))
    try:
        stored = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))["settings"]
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        return Settings(**fields)
    except (OSError, KeyError, TypeError, ValueError):
        return Settings(subjects=(), lane=lane, seed=seed)

"""Compile the CUDA kernels beforehand, for a GPU that need not be here:

    python -m tessera_kernels.cuda.build [--arch sm_90a] [--op rms_norm] [--verbose]

Every file here that is an op lists its specializations (`specializations() -> Sequence[Kernel]`). What is not compiled
beforehand is compiled at its first launch, by the same function, into the same cache.
"""

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tessera_kernels.cuda._compile import ARCHS, Built, Kernel, build
from tessera_shared.cli.edge import run_commands
from tessera_shared.errors import KernelError

app = typer.Typer(add_completion=False)

Row = tuple[Kernel, str, Built]


def ops() -> list[str]:
    """Return the ops that have CUDA kernels, in alphabetical order."""
    here = Path(__file__)
    return sorted(path.stem for path in here.parent.glob("*.py") if path.stem[0] != "_" and path != here)


def specializations(op: str) -> Sequence[Kernel]:
    """Return every specialization that an op may launch, as its file lists them."""
    if op not in ops():
        raise KernelError(
            f"op = {op!r}: expected one of {', '.join(ops())}, because these have CUDA kernels; try rms_norm"
        )
    found: Sequence[Kernel] = import_module(f"tessera_kernels.cuda.{op}").specializations()
    return found


@app.command()
def compile_kernels(
    arch: Annotated[list[str] | None, typer.Option(help=f"May be repeated (default {', '.join(ARCHS)}).")] = None,
    op: Annotated[list[str] | None, typer.Option(help="May be repeated (default: every op).")] = None,
    verbose: Annotated[bool, typer.Option(help="Name each kernel and its file as it is compiled.")] = False,
) -> None:
    """Compile the kernels into the user's cache and print what each takes of the GPU. Needs no GPU."""
    wanted = list(arch or ARCHS)
    for one in wanted:
        if not one.startswith("sm_"):
            raise KernelError(
                f"arch = {one!r}: expected a target such as sm_90a, because NVRTC compiles for one; try sm_90a"
            )
    jobs = [(kernel, one) for name in op or ops() for kernel in specializations(name) for one in wanted]
    rows = list(_compiled([job for job in jobs if job[0].needs in ("sm_80", job[1])], verbose))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(rows))
    spilled = [row for row in rows if row[2].spill_bytes or row[2].stack_bytes]
    compiled = sum(built.seconds > 0.0 for *_, built in rows)
    console.print(
        f"{len(rows)} kernels: {compiled} compiled, {len(rows) - compiled} from the cache; "
        f"{len(spilled) or 'none'} with a stack frame or spilled registers",
        highlight=False,
    )


def _compiled(jobs: Sequence[tuple[Kernel, str]], verbose: bool) -> Iterator[Row]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for kernel, arch in jobs:
            progress.update(task, description=kernel.entry)
            built = build(kernel, arch)
            if verbose:
                progress.console.print(f"{kernel.title} {arch} -> {built.path}", highlight=False, soft_wrap=True)
            progress.advance(task)
            yield kernel, arch, built


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("kernel", "arch", "registers", "stack bytes", "spill bytes", "seconds"):
        table.add_column(title, justify="left" if title in ("kernel", "arch") else "right", overflow="fold")
    for kernel, arch, built in rows:
        seconds = f"{built.seconds:.2f}" if built.seconds else "cached"
        numbers = (built.registers, built.stack_bytes, built.spill_bytes)
        table.add_row(kernel.title, arch, *(str(number) for number in numbers), seconds)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_commands(
        app, sys.argv[1:] if arguments is None else arguments, program="python -m tessera_kernels.cuda.build"
    )


if __name__ == "__main__":
    sys.exit(main())

"""`parity check PAIR.py`: two implementations that are not ours."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tessera_parity.result import EXIT_CODES


def check(
    pair: Annotated[Path, typer.Argument(help="Python file that names both sides (docs/check.md).")],
    cases: Annotated[int, typer.Option(min=1, help="Generated cases.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and inputs.")] = 0,
    case: Annotated[int | None, typer.Option(min=0, help="Only the case of this number.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Size given to inputs(rng, size).")] = None,
    report: Annotated[Path | None, typer.Option(help="Directory of the results.")] = None,
) -> None:
    """Compare your own two implementations in float64: outputs, taps, gradients; name the first tap that departs."""
    from tessera_parity.pair_check import check_pair
    from tessera_parity.report import write_reports
    from tessera_parity.store import default_directory
    from tessera_parity.terminal import print_run

    with Console(stderr=True).status("") as status:
        result = check_pair(pair, seed=seed, cases=cases, case=case, size=size, advance=status.update)
    directory = report or default_directory(seed)
    write_reports(result, directory)
    print_run(result, directory, Console())
    raise typer.Exit(EXIT_CODES[result.verdict])

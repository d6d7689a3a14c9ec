"""The `parity` command: every subcommand is one function in its own file, named here. Errors are one line and an exit
code."""

import os
import sys
from collections.abc import Sequence

import typer

from tessera_parity.cli.calibrate import calibrate
from tessera_parity.cli.check import check
from tessera_parity.cli.explain import explain
from tessera_parity.cli.list_command import list_subjects
from tessera_parity.cli.mutants import mutants
from tessera_parity.cli.repro import repro
from tessera_parity.cli.run import run
from tessera_shared.cli.edge import run_commands

app = typer.Typer(
    name="parity",
    help="Hold two implementations of one model against each other and against a float64 oracle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("list")(list_subjects)
app.command("explain")(explain)
app.command("repro")(repro)
app.command("mutants")(mutants)
app.command("calibrate")(calibrate)
app.command("check")(check)


def run_command_line(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    0 parity, 1 divergence, 2 wrong usage or input, 3 inconclusive or uncalibrated, 4 environment, 130 interrupted.
    """
    return run_commands(app, arguments, program="parity")


def main() -> None:
    """Entry point of the console script and of `python -m tessera_parity`."""
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # before any framework is loaded: more threads, other summation orders
    sys.exit(run_command_line(sys.argv[1:]))

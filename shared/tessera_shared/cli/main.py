"""The `tessera` command."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from tessera_shared.cli.convert import convert
from tessera_shared.cli.edge import run_commands
from tessera_shared.cli.generate import generate
from tessera_shared.cli.info import info
from tessera_shared.cli.init_command import init
from tessera_shared.cli.train import train
from tessera_shared.cli.verify import verify

app = typer.Typer(
    name="tessera",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Example: tessera init tiny student && tessera verify student",
)
app.command(epilog="Example: tessera info")(info)
app.command(epilog="Example: tessera init tiny student --seed 1 --dtype bfloat16")(init)
app.command(epilog="Example: tessera convert student student-bf16 --dtype bfloat16 --max-shard-bytes 2GB")(convert)
app.command(epilog="Example: tessera verify student --report json")(verify)
app.command(
    epilog="Example: tessera train run --preset nano --steps 200, then tessera train run --resume --backend jax"
)(train)
app.command(epilog='Example: tessera generate run/model --prompt "def " --tokens 40')(generate)


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return run_commands(app, arguments, program="tessera")


def show_version(wanted: bool) -> None:
    """Print the version and leave, if it is wanted."""
    if wanted:
        typer.echo(f"tessera {_version()}")
        raise typer.Exit


@app.callback()
def tessera(
    _version_wanted: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Distil and serve a language model written twice, in PyTorch and in JAX."""


def _version() -> str:
    try:
        return version("tessera-testbed")
    except PackageNotFoundError:
        return "(not installed; run from its source)"

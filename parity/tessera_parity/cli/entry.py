"""Where the `parity` script begins; see `tessera_shared.cli.entry`."""

from tessera_shared.cli.entry import ended_by_interrupt


def main() -> None:
    """Import the command line, then run it."""
    with ended_by_interrupt():
        from tessera_parity.cli.main import main as run
    run()

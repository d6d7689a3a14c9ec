"""`python -m tessera_parity`."""

from tessera_parity.cli.entry import main

main()

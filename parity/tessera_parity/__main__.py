"""`python -m tessera_parity`."""

from tessera_parity.cli.main import main

main()

"""`parity list`: what can be run."""

from rich.console import Console
from rich.table import Table

from tessera_parity.runner import NOT_IN_QUICK, ONLY_BY_NAME
from tessera_parity.subjects import SUBJECTS


def list_subjects() -> None:
    """List the subjects in the order in which they run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("subject", no_wrap=True)
    table.add_column("what is compared")
    for subject in SUBJECTS:
        why = (NOT_IN_QUICK | ONLY_BY_NAME).get(subject.name)
        note = f" ({why})" if why else ""
        table.add_row(subject.name, subject.about + note)
    Console().print(table)

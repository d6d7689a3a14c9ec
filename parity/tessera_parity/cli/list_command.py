"""`parity list`: what can be run."""

from rich.console import Console
from rich.table import Table

from tessera_parity.runner import NOT_IN_QUICK
from tessera_parity.subjects import SUBJECTS


def list_subjects() -> None:
    """List the subjects in the order in which they run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("subject", no_wrap=True)
    table.add_column("what is compared")
    for subject in SUBJECTS:
        note = f" ({NOT_IN_QUICK[subject.name]})" if subject.name in NOT_IN_QUICK else ""
        table.add_row(subject.name, subject.about + note)
    Console().print(table)

"""Where the `tessera` script begins: Ctrl-C is one line from the first moment, also while everything else is imported.

Nothing heavy is imported here. Raised while an extension module loads, a KeyboardInterrupt comes out as that module's
ImportError, so until the imports are done an interrupt ends the process at once: nothing is open yet.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Import the command line, then run it."""
    with ended_by_interrupt():
        from tessera_shared.cli.main import main as run
    run()


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Within, Ctrl-C says one line and ends the process with 130. A SIGINT that is ignored or handled stays so."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"interrupted before it began; nothing was written\n")
    os._exit(INTERRUPTED)

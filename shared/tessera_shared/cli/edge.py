"""The edge of a command line: every mistake becomes one line on standard error and an exit code, never a traceback."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer

from tessera_shared.cli.entry import INTERRUPTED
from tessera_shared.errors import TesseraError

USAGE, BROKEN_PIPE = 2, 141

AGAIN_SECONDS = 0.05
"""After which an interrupt that was lost comes again: the callback that lost it is over by then."""

# typer may bring its own copy of click or use the installed one; either way its usage errors descend from this class.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Interrupted(Exception):
    """A command was interrupted and has something to say: what is kept, or how to go on."""


def run_commands(app: typer.Typer, arguments: Sequence[str], *, program: str) -> int:
    """Run one command line and return its exit code: 0, a TesseraError's, 2 for usage and files, 130 if interrupted."""
    with remembered_interrupts() as is_interrupted:
        try:
            return _run(app, arguments, program)
        except ImportError:
            if not is_interrupted():
                raise
            return _say_interrupted()


@contextmanager
def remembered_interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C raise KeyboardInterrupt as usual, and yield a function that tells whether it was pressed.

    For the exception may be lost: an extension module that is being loaded turns it into its ImportError, and Python drops
    it inside a destructor, a weak reference's or the collector's callback, of which frameworks have many. What Python
    says of one that it drops, with a traceback, is not printed: the interrupt comes again `AGAIN_SECONDS` later, unless
    the function was asked in between.
    """
    before, complain = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False  # only the main thread may say what a signal does; an ignored one stays ignored
        return
    seen: list[int] = []
    settled = threading.Event()  # somebody acts on the interrupt, or it is too late for it

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        before(number, frame)

    def dropped(lost: "sys.UnraisableHookArgs") -> None:
        if seen and lost.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(again, ())  # takes no lock that the dropped code may hold
        else:
            complain(lost)

    def again() -> None:
        if not settled.wait(AGAIN_SECONDS):
            os.kill(os.getpid(), signal.SIGINT)

    def is_interrupted() -> bool:
        if seen:
            settled.set()
        return bool(seen)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = dropped
    try:
        yield is_interrupted
    finally:
        settled.set()
        sys.unraisablehook = complain
        signal.signal(signal.SIGINT, before)


def _run(app: typer.Typer, arguments: Sequence[str], program: str) -> int:
    try:
        result = app(list(arguments), prog_name=program, standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:
            return _say_interrupted()
        return result if isinstance(result, int) else 0
    except TesseraError as error:
        return _say(str(error), error.exit_code)
    except Interrupted as told:
        return _say_interrupted(str(told))
    except (KeyboardInterrupt, typer.Abort):
        return _say_interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would complain again
        return BROKEN_PIPE
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich has met it first
            return BROKEN_PIPE
        raise
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _say(f"{name}{error.strerror or error}", USAGE)
    except _UsageError as error:
        return _say_usage(error, program)


def _say(message: str, exit_code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _say_usage(error: Exception, program: str) -> int:
    message = str(getattr(error, "message", "") or error)
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return USAGE
    path = context.command_path if context is not None else program
    describe = getattr(error, "format_message", lambda: message)
    return _say(f"{describe()} (try `{path} --help`)", USAGE)


def _say_interrupted(what: str = "nothing was left half-written") -> int:
    print(f"interrupted; {what}", file=sys.stderr)
    _mark_handled()
    return INTERRUPTED


def _mark_handled() -> None:
    """Let the process leave with its own exit code.

    CPython remembers a KeyboardInterrupt that went through an `exec` of source text (what `dataclass` and `namedtuple`
    do while a module is imported) as unhandled, whoever caught it since, and ends `python -m` by SIGINT instead. The
    next text that runs to its end makes it forget.
    """
    exec("")

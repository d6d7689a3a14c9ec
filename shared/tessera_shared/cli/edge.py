"""The edge of a command line: every mistake becomes one line on standard error and an exit code, never a traceback."""

import os
import sys
from collections.abc import Sequence

import typer

from tessera_shared.errors import TesseraError

USAGE, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

# typer may bring its own copy of click or use the installed one; either way its usage errors descend from this class.
_UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run_commands(app: typer.Typer, arguments: Sequence[str], *, program: str) -> int:
    """Run one command line and return its exit code: 0, a TesseraError's, 2 for usage and files, 130 if interrupted."""
    try:
        result = app(list(arguments), prog_name=program, standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:
            return _say_interrupted()
        return result if isinstance(result, int) else 0
    except TesseraError as error:
        return _say(str(error), error.exit_code)
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


def _say_interrupted() -> int:
    print("interrupted; nothing was left half-written", file=sys.stderr)
    return INTERRUPTED

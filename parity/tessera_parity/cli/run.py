"""`parity run`: the harness itself."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tessera_parity import store as stores
from tessera_parity.cli.flags import check_device
from tessera_parity.loading import require
from tessera_parity.processes import settle_process
from tessera_parity.result import EXIT_CODES
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK
from tessera_shared.cli.edge import Interrupted, remembered_interrupts
from tessera_shared.errors import MissingDependency, ParityError


def run(
    subjects: Annotated[list[str] | None, typer.Argument(help="What to compare; default: all of the lane.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute on two cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Many more cases, all planted bugs, shrinking.")] = False,
    model: Annotated[str | None, typer.Option(help="Preset or Hugging Face directory for subject `model`.")] = None,
    against: Annotated[str | None, typer.Option(help="`hf`: transformers as third witness.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Working dtype of the rounding question; default: the lane's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every generated case.")] = 0,
    cases: Annotated[int | None, typer.Option(min=1, help="Cases per subject instead of the lane's.")] = None,
    report: Annotated[Path | None, typer.Option(help="Directory of the results.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run.")] = None,
    only_half: Annotated[str | None, typer.Option(help="torch or jax: one half against the oracle.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes side by side; default: two on a CPU with two cores, else one.")
    ] = None,
) -> None:
    """Compare the halves with each other and the oracle, then prove that the comparison can fail."""
    if resume is not None:
        store, explicit = stores.reopen(resume), False
    else:
        settings, explicit = _settings(
            subjects or [], quick, full, model, against, device, dtype, seed, cases, only_half
        )
        store = stores.create(report or stores.default_directory(seed), settings)
    _go(store, explicit=explicit, workers=workers)


def _settings(
    subjects: list[str],
    quick: bool,
    full: bool,
    model: str | None,
    against: str | None,
    device: str,
    dtype: str | None,
    seed: int,
    cases: int | None,
    only_half: str | None,
) -> tuple[stores.Settings, bool]:
    """Check what was asked for before any work."""
    from tessera_parity.runner import chosen_subjects
    from tessera_shared.numerics import numerics_for

    if quick and full:
        raise ParityError("--quick with --full: expected one of them, because they are two lanes; try --quick")
    if against not in (None, "hf"):
        raise ParityError(
            f"against = {against!r}: expected 'hf', because transformers is the only witness; try --against hf"
        )
    if only_half not in (None, "torch", "jax"):
        raise ParityError(f"only-half = {only_half!r}: expected torch or jax, because these are the halves; try torch")
    check_device(device)
    if dtype is not None:
        numerics_for(dtype)
    lane = QUICK if quick else FULL if full else DEFAULT
    chosen, left_out = chosen_subjects(subjects, lane=lane, against_hf=against == "hf", model=model)
    if model is not None:
        _check_model(model, subjects)
    _check_installed(only_half)
    settings = stores.Settings(
        subjects=tuple(subject.name for subject in chosen),
        lane=lane,
        seed=seed,
        cases=cases,
        dtype=dtype,
        device=device,
        model=model,
        only_half=only_half,
        left_out=tuple(left_out),
    )
    return settings, bool(subjects)


def _check_model(model: str, subjects: list[str]) -> None:
    """Refuse a model that nothing here reads: a run that looked at something else would be green."""
    from tessera_parity.given_model import check_model
    from tessera_parity.rounding_cases import SHAPES

    readers = {"trajectory": ("nano", "tiny"), "rounding": tuple(SHAPES)}
    read = not subjects or "model" in subjects or any(model in readers.get(name, ()) for name in subjects)
    if not read:
        raise ParityError(
            f"model = {model!r}: expected a subject that reads it, because {', '.join(subjects)} would not look at it; "
            f"try subject model (or trajectory with nano or tiny, or rounding with {' or '.join(SHAPES)})"
        )
    check_model(model)


def _check_installed(only_half: str | None) -> None:
    """Raise `MissingDependency` before anything is written; nothing is imported."""
    if only_half is not None:
        require(only_half)
    elif find_spec("torch") is None and find_spec("jax") is None:
        raise MissingDependency(
            "halves = none: expected torch or jax, because there is nothing to hold against the oracle; "
            "try installing tessera-testbed[torch] or tessera-testbed[jax]"
        )


def _go(store: stores.Store, *, explicit: bool, workers: int | None) -> None:
    """Execute, report, and leave with the verdict's exit code."""
    from tessera_parity.report import write_reports
    from tessera_parity.runner import execute
    from tessera_parity.terminal import print_run

    console = Console()
    num_workers = _num_workers(store.settings, workers)
    with remembered_interrupts() as is_interrupted:
        try:
            with _progress(is_interrupted) as advance:
                if num_workers == 1:  # workers settle themselves, and here nothing else needs the frameworks
                    settle_process()
                result = execute(store, advance=advance, explicit=explicit, num_workers=num_workers)
        except (KeyboardInterrupt, ImportError) as error:
            if isinstance(error, ImportError) and not is_interrupted():
                raise
            raise Interrupted(
                f"{len(store.checks)} checks are in {store.directory}; "
                f"go on with: parity run --resume {store.directory}"
            ) from None
    write_reports(result, store.directory)
    print_run(result, store.directory, console)
    raise typer.Exit(EXIT_CODES[result.verdict])


@contextmanager
def _progress(is_interrupted: Callable[[], bool]) -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done, on standard error, where a person watches; and Ctrl-C that is never lost: each
    step raises one that was swallowed."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())

    def advance(what: str) -> None:
        if is_interrupted():
            raise KeyboardInterrupt
        progress.update(task, description=what)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting")
        yield advance


def _num_workers(settings: stores.Settings, asked: int | None) -> int:
    """Two by default where there are two cores and more than one subject; one GPU is not shared unless asked."""
    if asked is not None:
        return asked
    return 2 if settings.device == "cpu" and (os.cpu_count() or 1) > 1 and len(settings.subjects) > 1 else 1

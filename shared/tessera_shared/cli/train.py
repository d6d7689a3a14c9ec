"""`tessera train`: train or distil a model, on text that is already here, in either half."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tessera_shared.cli.edge import Interrupted
from tessera_shared.cli.entry import INTERRUPTED
from tessera_shared.errors import FormatError, SpecError
from tessera_shared.half_loading import check_half
from tessera_shared.kernel_choice import check_kernels, tell_choice
from tessera_shared.run_directory import (
    MODEL,
    TOKENIZER,
    create_run,
    load_state,
    locked_run,
    read_settings,
    refuse_existing_run,
    resumed_settings,
    write_settings,
)
from tessera_shared.run_settings import RunSettings, check_settings, numerics_of
from tessera_shared.training_run import (
    HalfModules,
    Pace,
    Sources,
    TrainingRun,
    check_pinned,
    load_half,
    load_sources,
    pinned,
    with_kernels,
)

_DEFAULTS = RunSettings()


def train(
    run_dir: Annotated[Path, typer.Argument(help="The run's directory: new, or with --resume an old one.")],
    backend: Annotated[str, typer.Option(help="torch or jax.")] = "torch",
    preset: Annotated[
        str | None, typer.Option(help=f"Shape of a new model, from `tessera info` (default {_DEFAULTS.preset}).")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Start from this model directory instead of a preset.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text: files, folders, .jsonl, .parquet; may be repeated (default: Python's own library)."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json (default: the teacher's or model's, else trained here).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help=f"Updates of the whole run (default {_DEFAULTS.steps}).")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Rows an update (default {_DEFAULTS.batch_size}).")] = None,
    seq_len: Annotated[int | None, typer.Option(help=f"Tokens a row (default {_DEFAULTS.seq_len}).")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help=f"Micro-batches an update (default {_DEFAULTS.accumulate}).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help=f"Peak learning rate (default {_DEFAULTS.lr}).")] = None,
    schedule: Annotated[
        str | None, typer.Option(help=f"constant, cosine, linear or wsd (default {_DEFAULTS.schedule}).")
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Updates of warm-up (default: a twentieth of the steps).")] = None,
    decay: Annotated[int | None, typer.Option(help="Updates of wsd's decay (default: a fifth of the steps).")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help=f"AdamW's decay of matrices (default {_DEFAULTS.weight_decay}).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"float64, float32 or bfloat16 (default {_DEFAULTS.dtype}).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Of initial weights and sample order (default {_DEFAULTS.seed}).")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="Distil from this model directory.")] = None,
    distil: Annotated[str | None, typer.Option(help=f"The divergence (default {_DEFAULTS.distil}).")] = None,
    temperature: Annotated[
        float | None, typer.Option(help=f"Divides both logits (default {_DEFAULTS.temperature}).")
    ] = None,
    hard_weight: Annotated[
        float | None, typer.Option(help=f"Share of the cross-entropy (default {_DEFAULTS.hard_weight}).")
    ] = None,
    beta: Annotated[float | None, typer.Option(help=f"Of generalized_jsd (default {_DEFAULTS.beta}).")] = None,
    alpha: Annotated[float | None, typer.Option(help=f"Of the skew divergences (default {_DEFAULTS.alpha}).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the teacher's k likeliest tokens (default: all).")] = None,
    top_k_form: Annotated[str | None, typer.Option(help=f"How, with --top-k (default {_DEFAULTS.top_k_form}).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save, in either half.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the step (default: JAX yes, torch no).")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="What the torch half computes with: triton, cuda, reference (default auto).")
    ] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Recompute activations to save memory.")] = False,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Updates between held-out losses; 0: at the end.")] = 100,
    held_out_batches: Annotated[int, typer.Option(min=1, help="Batches of a held-out loss.")] = 16,
    save_every: Annotated[int, typer.Option(min=0, help="Updates between saves; 0: only at the end.")] = 500,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Save and stop after this many updates.")] = None,
) -> int:
    """Train a model, or distil one from --teacher. Ctrl-C saves; --resume goes on as if nothing had happened."""
    flags = {
        "preset": preset,
        "model": _absolute(model),
        "data": None if data is None else tuple(str(path.resolve()) for path in data),
        "tokenizer": _absolute(tokenizer),
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "accumulate": accumulate,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "decay": decay,
        "weight_decay": weight_decay,
        "dtype": dtype,
        "seed": seed,
        "teacher": _absolute(teacher),
        "distil": distil,
        "temperature": temperature,
        "hard_weight": hard_weight,
        "beta": beta,
        "alpha": alpha,
        "top_k": top_k,
        "top_k_form": top_k_form,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    pace = Pace(
        device=device,
        compiled=backend == "jax" if compiled is None else compiled,
        recompute=recompute,
        evaluate_every=evaluate_every,
        held_out_batches=held_out_batches,
        save_every=save_every,
        stop_after=stop_after,
    )
    check_kernels(kernels or "auto", backend=backend)
    return _resume(run_dir, given, backend, pace, kernels) if resume else _begin(run_dir, given, backend, pace, kernels)


def _begin(run_dir: Path, given: dict[str, Any], backend: str, pace: Pace, kernels: str | None) -> int:
    _refuse_below_a_file(run_dir)
    refuse_existing_run(run_dir)
    settings = _new_settings(given)
    check_half(backend)  # importing it takes seconds, which a mistake in the sources should not cost
    sources = load_sources(settings)
    half = load_half(backend)
    half = _prepared(half, kernels, settings, sources, pace)
    pins = pinned(sources)
    create_run(run_dir, settings, pins, sources.tokenizer.text)
    with locked_run(run_dir), _told_how_to_go_on(run_dir, backend):
        _tell_corpus(pins["corpus"])
        run = TrainingRun(run_dir, settings, pins, sources, half, pace, typer.echo)
        return _go(run, None)


def _refuse_below_a_file(run_dir: Path) -> None:
    place = next(path for path in run_dir.absolute().parents if path.exists())
    if not place.is_dir():
        raise FormatError(
            f"{run_dir}: below {place}, a file: expected a place for a directory, because the run is kept there; try "
            "another one"
        )


def _resume(run_dir: Path, given: dict[str, Any], backend: str, pace: Pace, kernels: str | None) -> int:
    recorded, pins = read_settings(run_dir)
    check_half(backend)
    with locked_run(run_dir), _told_how_to_go_on(run_dir, backend):
        saved = load_state(run_dir)
        step = 0 if saved is None else saved.step
        settings = resumed_settings(recorded, given, steps_made=step)
        sources = load_sources(settings, tokenizer_file=run_dir / TOKENIZER)
        check_pinned(pinned(sources), pins)
        half = load_half(backend)
        half = _prepared(half, kernels, settings, sources, pace)
        if settings != recorded:
            write_settings(run_dir, settings, pins)
            typer.echo(f"{recorded.steps} steps become {settings.steps}: the schedule is that of {settings.steps} now")
        typer.echo(f"going on after step {step} in {half.name}")
        run = TrainingRun(run_dir, settings, pins, sources, half, pace, typer.echo)
        return _go(run, saved)


def _prepared(
    half: HalfModules, kernels: str | None, settings: RunSettings, sources: Sources, pace: Pace
) -> HalfModules:
    """Return the half set up for the device, with the kernels that were chosen; say once which and why."""
    half.process.prepare_process(numerics_of(settings), device=pace.device)
    half, why = with_kernels(half, kernels or "auto", settings=settings, sources=sources, pace=pace)
    tell_choice(why, kernels, device=pace.device, say=partial(typer.echo, err=True))
    return half


def _go(run: TrainingRun, saved: Any) -> int:
    step = 0 if saved is None else saved.step
    with _bar(step, run.settings.steps) as on_update:
        finished = run.run(saved, on_update=on_update)
    last = run.saved_step
    typer.echo(f"saved {run.directory / MODEL} at step {last} of {run.settings.steps}")
    if finished:
        return 0
    typer.echo(_how_to_go_on(run.directory, run.half.name))
    return INTERRUPTED if run.is_interrupted else 0


@contextmanager
def _told_how_to_go_on(run_dir: Path, backend: str) -> Iterator[None]:
    """Say how to go on after a Ctrl-C that the run itself does not meet: while the corpus is encoded, or the second."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"the run is as it was last saved; {_how_to_go_on(run_dir, backend)}") from None


def _how_to_go_on(run_dir: Path, backend: str) -> str:
    return f"go on with: tessera train {run_dir} --backend {backend} --resume"


def _new_settings(given: dict[str, Any]) -> RunSettings:
    if "model" in given and "preset" in given:
        raise SpecError(
            f"model = {given['model']}, preset = {given['preset']!r}: expected one of them, because both give the "
            "shape; try leaving --preset out"
        )
    for name in ("distil", "temperature", "hard_weight", "beta", "alpha", "top_k", "top_k_form"):
        if name in given and "teacher" not in given:
            raise SpecError(
                f"{name} = {given[name]!r}: expected --teacher with it, because distillation has one; try --teacher DIR"
            )
    if "top_k_form" in given and "top_k" not in given:
        raise SpecError(f"top_k_form = {given['top_k_form']!r}: expected --top-k with it; try --top-k 64")
    settings = RunSettings(**({"preset": None} if "model" in given else {}) | given)
    check_settings(settings)
    return settings


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _tell_corpus(manifest: dict[str, Any]) -> None:
    source = manifest["source"] + (f" of Python {manifest['python']}" if manifest["python"] else "")
    size = (
        f"{manifest['documents']} documents, {manifest['bytes'] / 1e6:.2f} MB, {manifest['held_out_bytes'] / 1e6:.2f}"
    )
    typer.echo(f"corpus: {source}, {size} MB held out, xxh3 {manifest['xxh3_128']}")
    if manifest["skipped"]:
        typer.echo(f"left out, because not text: {len(manifest['skipped'])} files, such as {manifest['skipped'][0]}")


@contextmanager
def _bar(done: int, total: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """Show a progress bar on a terminal's standard error, and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tok/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("train", total=total, completed=done, loss=float("nan"), speed=0.0)

        def on_update(record: dict[str, float]) -> None:
            progress.update(task, completed=record["step"], loss=record["loss"], speed=record["tokens_per_s"])

        yield on_update

"""One `tessera train`, from settings to saved weights, in whichever half was asked for."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash

from tessera_shared.batch import Batch
from tessera_shared.checksums import raw_bytes, spec_digest
from tessera_shared.corpus import Corpus, load_corpus
from tessera_shared.errors import DataError, SpecError
from tessera_shared.half_loading import load_half_module
from tessera_shared.init import initial_weights
from tessera_shared.kernel_choice import check_kernels
from tessera_shared.packing import TokenStream, batch_at, batches_in_order
from tessera_shared.presets import preset
from tessera_shared.run_directory import (
    SavedState,
    append_metrics,
    forget_metrics_after,
    save_state,
)
from tessera_shared.run_settings import RunSettings, check_settings, numerics_of, objective_of, options_of, schedule_of
from tessera_shared.spec import ModelSpec
from tessera_shared.token_cache import cached_stream, token_folder
from tessera_shared.tokens import Tokenizer
from tessera_shared.validate_text import check_vocabulary
from tessera_shared.weights import LoadedModel, load_model

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfModules:
    """The modules of one half that a run uses; their functions have the same names in both."""

    name: str
    loop: ModuleType
    step: ModuleType
    optim: ModuleType
    params: ModuleType
    teacher: ModuleType
    process: ModuleType
    ops: Any = None  # the kernels that `loop` is built of; None in the plain half


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What the settings name, loaded and checked against each other."""

    corpus: Corpus
    tokenizer: Tokenizer
    spec: ModelSpec
    start: LoadedModel | None  # weights to begin with; None = initial weights from the seed
    teacher: LoadedModel | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a run goes about it; nothing here changes the weights that come out (compiled: but for rounding)."""

    device: str = "cpu"
    compiled: bool = False
    recompute: bool = False
    evaluate_every: int = 100  # updates between held-out losses; 0 = only at the end
    held_out_batches: int = 16  # of batch_size rows, spread over the held-out text
    save_every: int = 500  # updates between saves; 0 = only at the end
    stop_after: int | None = None  # updates of this call; None = to the end


def load_half(name: str) -> HalfModules:
    """Import what a run needs of a half. MissingDependency where its framework is not installed."""
    return HalfModules(
        name=name,
        loop=load_half_module(name, "train.loop"),
        step=load_half_module(name, "train.step"),
        optim=load_half_module(name, "train.optim"),
        params=load_half_module(name, "model.params"),
        teacher=load_half_module(name, "distil.teacher"),
        process=load_half_module(name, "process"),
    )


def with_kernels(
    half: HalfModules, kernels: str, *, settings: RunSettings, sources: Sources, pace: Pace
) -> tuple[HalfModules, str]:
    """Return the half with what `--kernels` chose for this run, and the line that says what and why (JAX: none).

    Raises `KernelError` or `MissingDependency` for a choice by name that cannot run here.
    """
    check_kernels(kernels, backend=half.name)
    if half.name != "torch":
        return half, ""
    choice = load_half_module("torch", "kernels").choose(
        kernels,
        device=pace.device,
        numerics=numerics_of(settings),
        spec=sources.spec,
        objective=objective_of(settings),
        teacher=None if sources.teacher is None else sources.teacher.spec,
        compiled=pace.compiled,
    )
    if choice.ops is None:
        return half, choice.why
    return replace(half, loop=load_half_module("torch", "fast.loop"), ops=choice.ops), choice.why


def load_sources(settings: RunSettings, *, tokenizer_file: Path | None = None) -> Sources:
    """Load what the settings name. With `tokenizer_file` (a run's own) no tokenizer is trained or looked for.

    A new model's vocabulary is exactly its tokenizer's, or its teacher's. DataError and SpecError where two of them do
    not fit each other.
    """
    check_settings(settings)
    teacher = None if settings.teacher is None else load_model(settings.teacher)
    start = None if settings.model is None else load_model(settings.model)
    base = start.spec if start is not None else preset(settings.preset or "nano")
    if settings.seq_len > min([base.max_positions] + ([teacher.spec.max_positions] if teacher else [])):
        raise SpecError(
            f"seq_len = {settings.seq_len}: expected at most {base.max_positions} positions of the model and of its "
            "teacher, because they were made for no more; try --seq-len 256"
        )
    corpus = load_corpus(settings.data)
    tokenizer = _tokenizer(settings, tokenizer_file, corpus, base, teacher or start)
    spec = base if start is not None else _sized(base, tokenizer, teacher)
    for side in (spec, teacher.spec if teacher is not None else spec):
        check_vocabulary(tokenizer.vocab_size, side.real_vocab_size or side.vocab_size, "tokenizer")
    if teacher is not None and teacher.spec.vocab_size != spec.vocab_size:
        raise SpecError(
            f"vocab_size = {spec.vocab_size}, the teacher's = {teacher.spec.vocab_size}: expected the same, because "
            "probabilities are compared id by id; try --preset, which takes the teacher's"
        )
    return Sources(corpus=corpus, tokenizer=tokenizer, spec=spec, start=start, teacher=teacher)


def pinned(sources: Sources) -> dict[str, Any]:
    """Return what a run began with, as checksums and a manifest, to be held against when it is resumed."""
    return {
        "spec_sha256": spec_digest(sources.spec),
        "tokenizer_xxh3_128": sources.tokenizer.checksum,
        "corpus": sources.corpus.manifest,
        "teacher_xxh3_128": None if sources.teacher is None else _weights_checksum(sources.teacher),
    }


def check_pinned(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Raise DataError or SpecError, naming which, where a run's sources are no longer what it began with."""
    pairs = {key: (found[key], recorded.get(key)) for key in ("tokenizer_xxh3_128", "teacher_xxh3_128", "spec_sha256")}
    pairs["corpus"] = (found["corpus"]["xxh3_128"], recorded.get("corpus", {}).get("xxh3_128"))
    for key, (now, then) in pairs.items():
        if now != then:
            kind = SpecError if key == "spec_sha256" else DataError
            raise kind(
                f"{key} = {now}: expected {then}, because the run began with it; try the same files (and for the "
                "standard library the same Python), or a new run"
            )


class TrainingRun:
    """A run in progress: the half's state, where its batches come from, and what is written while it goes."""

    def __init__(
        self,
        directory: Path,
        settings: RunSettings,
        pins: dict[str, Any],
        sources: Sources,
        half: HalfModules,
        pace: Pace,
        say: Say,
    ) -> None:
        """Encode the corpus, or take its tokens from the user's cache."""
        self.directory, self.settings, self.pins, self.half, self.pace = directory, settings, pins, half, pace
        self.spec, self.numerics = sources.spec, numerics_of(settings)
        self._say = say
        self._stream = self._encoded(sources, "train")
        self._held_out = self._encoded(sources, "held_out") if sources.corpus.held_out else None
        self._teacher = self._load_teacher(sources.teacher)
        self._start = sources.start
        self.saved_step: int | None = None
        self.is_interrupted = False

    def run(self, saved: SavedState | None, *, on_update: Callable[[dict[str, float]], None]) -> bool:
        """Train to the last step or until told to stop, and save. Return whether the run is complete.

        Ctrl-C ends it after the update in progress; a second one at once, where the last save is what counts.
        DataError for a loss that is not finite: the save before it stays.
        """
        state = self._initial_state() if saved is None else self._resumed_state(saved)
        done = int(state.step)
        self.saved_step = None if saved is None else done
        forget_metrics_after(self.directory, done)
        remaining = self.settings.steps - done
        num_steps = remaining if self.pace.stop_after is None else min(remaining, self.pace.stop_after)
        with _interruptible(self._stop):
            state = self._loop_function("train")(
                state,
                self._batch,
                num_steps=num_steps,
                spec=self.spec,
                numerics=self.numerics,
                schedule=schedule_of(self.settings),
                options=options_of(self.settings),
                objective=objective_of(self.settings),
                accumulation=self.settings.accumulate,
                teacher=self._teacher,
                recompute=self.pace.recompute,
                compiled=self.pace.compiled,
                on_step=self._after_step(on_update),
            )
            if int(state.step) == self.settings.steps:
                self._evaluate(state)
            self._save(state)
        return int(state.step) == self.settings.steps

    def _after_step(self, on_update: Callable[[dict[str, float]], None]) -> Callable[[int, Any, dict[str, Any]], bool]:
        clock = time.perf_counter()

        def after_step(step: int, state: Any, metrics: dict[str, Any]) -> bool:
            nonlocal clock
            values = {name: float(value) for name, value in metrics.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                kept = "nothing was saved yet" if self.saved_step is None else f"step {self.saved_step} is saved"
                raise DataError(
                    f"loss = {values['loss']}, grad_norm = {values['grad_norm']} at update {step + 1}: expected finite "
                    f"numbers, because nothing comes back from here; {kept}; try a smaller --lr"
                )
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            record = {"step": step + 1, **values, "seconds": seconds, "tokens_per_s": values["num_tokens"] / seconds}
            append_metrics(self.directory, record)
            on_update(record)
            last = step + 1 == self.settings.steps
            if not last and _is_due(step + 1, self.pace.evaluate_every):
                self._evaluate(state)
            if not last and _is_due(step + 1, self.pace.save_every):
                self._save(state)
            clock = time.perf_counter()  # evaluating and saving are not training
            return not self.is_interrupted

        return after_step

    def _loop_function(self, name: str) -> Callable[..., Any]:
        """Return a function of the half's loop, bound to its kernels where it is built of them."""
        function: Callable[..., Any] = getattr(self.half.loop, name)
        return function if self.half.ops is None else partial(function, ops=self.half.ops)

    def _stop(self) -> None:
        self.is_interrupted = True

    def _batch(self, step: int) -> Batch:
        settings = self.settings
        return batch_at(self._stream, step, rows=settings.batch_size, length=settings.seq_len, seed=settings.seed)

    def _encoded(self, sources: Sources, side: str) -> TokenStream:
        documents = sources.corpus.train if side == "train" else sources.corpus.held_out
        end_id = sources.spec.eos_token_id
        return cached_stream(token_folder(), documents, sources.tokenizer, end_id=end_id, say=self._say)

    def _load_teacher(self, teacher: LoadedModel | None) -> Any:
        if teacher is None:
            return None
        params = self.half.params.params_from_numpy(
            teacher.arrays, dtype=self.numerics.compute, device=self.pace.device
        )
        return self.half.teacher.Teacher(params, teacher.spec, self.numerics)

    def _initial_state(self) -> Any:
        dtype = self.numerics.param
        arrays = (
            initial_weights(self.spec, seed=self.settings.seed, dtype=dtype)
            if self._start is None
            else self._start.arrays
        )
        params = self.half.params.params_from_numpy(arrays, dtype=dtype, device=self.pace.device)
        return self.half.step.init_state(params, options=options_of(self.settings))

    def _resumed_state(self, saved: SavedState) -> Any:
        bring = self.half.params.params_from_numpy
        params = bring(saved.params, dtype=self.numerics.param, device=self.pace.device)
        dtype = "float64" if self.numerics.param == "float64" else "float32"
        first, second = (bring(side, dtype=dtype, device=self.pace.device) for side in (saved.first, saved.second))
        optimizer = self.half.optim.state_from_moments(first, second, saved.step, options=options_of(self.settings))
        return self.half.step.TrainState(params, optimizer, self.half.optim.moments(optimizer)[2])

    def _evaluate(self, state: Any) -> None:
        if self._held_out is None:
            self._say("held-out loss: none, because the corpus is too small to divide")
            return
        settings = self.settings
        batches = batches_in_order(
            self._held_out, rows=settings.batch_size, length=settings.seq_len, limit=self.pace.held_out_batches
        )
        mean_loss = self._loop_function("held_out_loss")
        loss, num_tokens = mean_loss(state.params, batches, spec=self.spec, numerics=self.numerics)
        step = int(state.step)
        append_metrics(self.directory, {"step": step, "held_out_loss": loss, "held_out_tokens": num_tokens})
        self._say(f"step {step}: held-out loss {loss:.4f} nats a token over {num_tokens} tokens")

    def _save(self, state: Any) -> None:
        step = int(state.step)
        if step == self.saved_step:
            return
        out = self.half.params.params_to_numpy
        first, second, _ = self.half.optim.moments(state.optimizer)
        saved = SavedState(spec=self.spec, params=out(state.params), first=out(first), second=out(second), step=step)
        save_state(self.directory, saved, self.settings, self.pins)
        self.saved_step = step


def _tokenizer(
    settings: RunSettings, file: Path | None, corpus: Corpus, base: ModelSpec, owner: LoadedModel | None
) -> Tokenizer:
    """Return the run's own tokenizer, the one that is named, the teacher's or start's, or a new one."""
    named = file or (None if settings.tokenizer is None else Path(settings.tokenizer))
    if owner is not None and named is None and owner.tokenizer_file is None:
        raise DataError(
            f"{owner.directory}: no tokenizer.json: expected one, because text becomes ids with the model's own; try "
            "--tokenizer"
        )
    named = named or (None if owner is None else owner.tokenizer_file)
    if named is not None:
        return Tokenizer.load(named)
    return Tokenizer.train_bpe((document.text for document in corpus.train), base.vocab_size)


def _sized(base: ModelSpec, tokenizer: Tokenizer, teacher: LoadedModel | None) -> ModelSpec:
    if teacher is not None:
        theirs = teacher.spec
        return replace(
            base,
            vocab_size=theirs.vocab_size,
            real_vocab_size=theirs.real_vocab_size,
            bos_token_id=theirs.bos_token_id,
            eos_token_id=theirs.eos_token_id,
            pad_token_id=theirs.pad_token_id,
        )
    return replace(
        base, vocab_size=tokenizer.vocab_size, bos_token_id=None, eos_token_id=tokenizer.end_id, pad_token_id=None
    )


def _weights_checksum(model: LoadedModel) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(model.arrays):
        digest.update(name.encode())
        digest.update(raw_bytes(model.arrays[name]))
    return digest.hexdigest()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Turn the first Ctrl-C (or polite kill) into `stop()`, the second into what it was."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: object) -> None:
        del frame
        stop()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

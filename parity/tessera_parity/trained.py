"""Real text and really trained weights for the subjects that need them: the standard library's source, and `nano` on
it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity.halves import Half
from tessera_parity.subjects.context import Context
from tessera_shared.batch import Batch
from tessera_shared.corpus import Corpus, load_corpus
from tessera_shared.errors import ParityError
from tessera_shared.init import initial_weights
from tessera_shared.numerics import numerics_for
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.packing import TokenStream, batch_at, join_documents
from tessera_shared.presets import preset
from tessera_shared.schedule import Schedule, learning_rate
from tessera_shared.spec import ModelSpec
from tessera_shared.tokens import Tokenizer

Arrays = dict[str, np.ndarray[Any, Any]]
Stepper = Callable[[Any, Batch, float], tuple[Any, float]]
"""(state, batch, lr) -> (state, loss)."""

ROWS, LENGTH = 4, 64
TEXT_BYTES = 600_000
"""How much of the training side is tokenized: more than 200 steps of ROWS * LENGTH tokens read."""

OPTIONS = AdamWOptions()


@dataclass(frozen=True, kw_only=True)
class RealText:
    """A slice of the corpus as tokens."""

    corpus: Corpus
    tokenizer: Tokenizer
    stream: TokenStream

    def batch(self, step: int, seed: int) -> Batch:
        """Return the batch of a step: the same for everybody."""
        return batch_at(self.stream, step, rows=ROWS, length=LENGTH, seed=seed)


@lru_cache(maxsize=2)
def real_text(vocab_size: int, data: tuple[Path, ...] = ()) -> RealText:
    """Return the first documents of the corpus, up to TEXT_BYTES, with a tokenizer trained on them."""
    corpus = load_corpus(data)
    texts, total = [], 0
    for document in corpus.train:
        if total >= TEXT_BYTES:
            break
        texts.append(document.text[: TEXT_BYTES - total])
        total += len(texts[-1])
    tokenizer = Tokenizer.train_bpe(texts, vocab_size)
    stream = join_documents([tokenizer.encode(text) for text in texts], end_id=0)
    return RealText(corpus=corpus, tokenizer=tokenizer, stream=stream)


def schedule(steps: int) -> Schedule:
    """Return the schedule of every trajectory here: short warm-up, cosine to a tenth."""
    return Schedule(kind="cosine", peak=3e-3, total_steps=steps, warmup_steps=min(10, steps // 4), final=3e-4)


def stepper(half: Half, spec: ModelSpec, dtype: str) -> Stepper:
    """Return `step(state, batch, lr) -> (state, loss)` of a half in one dtype, compiled once where the half
    compiles."""
    module, numerics = half.module("train.step"), numerics_for(dtype)

    def train_step(state: Any, batch: Any, lr: Any) -> tuple[Any, Any]:
        state, metrics = module.train_step(
            state, [Batch(*batch)], lr=lr, spec=spec, numerics=numerics, objective=Objective(), options=OPTIONS
        )
        return state, metrics["loss"]

    compiled = half.compiled(train_step)

    def step(state: Any, batch: Batch, lr: float) -> tuple[Any, float]:
        rate = half.array(np.asarray(lr, dtype=np.float64), numerics.param)
        state, loss = compiled(state, tuple(half.array(field) for field in batch), rate)
        return state, float(half.numpy(loss))

    return step


def start(half: Half, arrays: Arrays, dtype: str) -> Any:
    """Return the state before the first step."""
    params = {name: half.array(value, numerics_for(dtype).param) for name, value in arrays.items()}
    return half.module("train.step").init_state(params, options=OPTIONS)


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """`nano` after some steps on the corpus, and prompts from the text that it did not see."""

    spec: ModelSpec
    arrays: Arrays  # float32 values
    text: RealText
    steps: int

    def prompts(self, rows: int, length: int, *, seed: int) -> np.ndarray[Any, Any]:
        """Return `ids_BT`: stretches of held-out text."""
        rng = np.random.default_rng((seed, 47))
        ids = self.text.tokenizer.encode("\n".join(d.text[:4000] for d in self.text.corpus.held_out[:20]))
        if len(ids) <= length:
            raise ParityError(f"held-out text = {len(ids)} tokens: expected more than {length}; try a larger --data")
        starts = rng.integers(0, len(ids) - length, rows)
        return np.array([ids[begin : begin + length] for begin in starts], dtype=np.int32)


_CACHE: dict[tuple[int, int], TrainedModel] = {}


def trained_model(context: Context, *, steps: int) -> TrainedModel:
    """Train `nano` in the torch half (or whichever is installed) in float32; once a process for each seed and
    length."""
    key = (context.seed, steps)
    if key not in _CACHE:
        spec, half = preset("nano"), context.halves[0]
        text = real_text(spec.vocab_size)
        state = start(half, initial_weights(spec, seed=context.seed), "float32")
        step = stepper(half, spec, "float32")
        for index in range(steps):
            state, _ = step(state, text.batch(index, context.seed), learning_rate(schedule(steps), index))
        arrays = {name: half.numpy(value) for name, value in state.params.items()}
        _CACHE[key] = TrainedModel(spec=spec, arrays=arrays, text=text, steps=steps)
    return _CACHE[key]

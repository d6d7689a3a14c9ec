"""Text: tokenizer, packing and sample order, which both halves share. What is checked is that they are pure functions
of their inputs.

A batch is a function of (seed, step) alone, whoever asks and in whatever order; an epoch is a permutation of the
windows; the tokenizer gives text back to the byte, reads its own file, and is trained the same twice.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tessera_parity.exact import Equalities
from tessera_parity.result import Check
from tessera_parity.subjects.context import FULL, Context, Subject
from tessera_parity.trained import LENGTH, ROWS, RealText, real_text
from tessera_shared.corpus import load_corpus
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.packing import batch_at, round_keys, shuffled
from tessera_shared.presets import preset
from tessera_shared.randomness import stream_key
from tessera_shared.tokens import Tokenizer

_VOCABULARY = preset("nano").vocab_size


def run(context: Context) -> Iterator[Check]:
    """Yield the tokenizer's, the order's, the packing's and the corpus's checks."""
    context.advance("text: reading the corpus")
    text = real_text(_VOCABULARY)
    yield _tokenizer(context, text)
    yield _order(context, text)
    yield _packing(context, text)
    if context.lane == FULL:
        again = Equalities("text", "corpus read twice", ("first", "second"))
        again.values(load_corpus().checksum, text.corpus.checksum, "content hash")
        yield again.check(f"{text.corpus.manifest['files']} files, xxh3_128 {text.corpus.checksum}")


def _tokenizer(context: Context, text: RealText) -> Check:
    equal = Equalities("text", "tokenizer", ("text", "tokens"))
    documents = text.corpus.held_out + text.corpus.train
    count = context.budget(quick=20, default=100, full=400)
    with TemporaryDirectory() as folder:
        text.tokenizer.save(Path(folder) / "tokenizer.json")
        loaded = Tokenizer.load(Path(folder) / "tokenizer.json")
    for document in documents[:count]:
        sample = document.text[:3000]
        ids = text.tokenizer.encode(sample)
        equal.values(text.tokenizer.decode(ids), sample, f"{document.name}: there and back")
        equal.sequences(loaded.encode(sample), ids, f"{document.name}: saved and loaded")
    if context.lane == FULL:
        samples = [document.text[:2000] for document in documents[:50]]
        first, second = (Tokenizer.train_bpe(samples, 300).encode(samples[0]) for _ in range(2))
        equal.sequences(first, second, "trained twice")
    return equal.check(f"{text.tokenizer.vocab_size} ids, {count} documents of the standard library")


def _order(context: Context, text: RealText) -> Check:
    equal = Equalities("text", "sample order", ("in order", "out of order"))
    steps = list(range(context.budget(quick=8, default=20, full=60)))
    forward = {step: text.batch(step, context.seed) for step in steps}
    for step in np.random.default_rng(context.seed).permutation(steps):
        again = text.batch(int(step), context.seed)
        for name, left, right in zip(again._fields, again, forward[int(step)], strict=True):
            equal.arrays(left, right, f"step {step}: {name}")
    keys = round_keys(stream_key(context.seed, "parity order"))
    for size in (1, 2, 5, 97, 256):
        equal.sequences(sorted(shuffled(index, size, keys) for index in range(size)), range(size), f"epoch of {size}")
    other = text.batch(0, context.seed + 1).token_ids_BT
    equal.values(bool(np.array_equal(other, forward[0].token_ids_BT)), False, "another seed gives another batch")
    return equal.check("a batch is a function of (seed, step); an epoch is a permutation")


def _packing(context: Context, text: RealText) -> Check:
    """Labels are the next token of the same document or ignored; positions restart with each segment."""
    equal = Equalities("text", "packing", ("rows", "documents"))
    stream = text.stream
    for step in range(context.budget(quick=4, default=12, full=40)):
        batch = batch_at(stream, step, rows=ROWS, length=LENGTH, seed=context.seed)
        for row, (ids_T, labels_T, positions_T, segments_T) in enumerate(zip(*batch, strict=True)):
            same_T = segments_T[:-1] == segments_T[1:]
            wanted_T = np.where(same_T & (segments_T[1:] >= 0), ids_T[1:], IGNORE_INDEX)
            equal.arrays(labels_T[:-1], wanted_T.astype(labels_T.dtype), f"step {step}, row {row}: labels")
            advanced = np.where(same_T, positions_T[:-1] + 1, 0)
            inside = segments_T[1:] >= 0
            equal.arrays(
                positions_T[1:][inside],
                advanced[inside].astype(positions_T.dtype),
                f"step {step}, row {row}: positions",
            )
    total = sum(1 for _ in islice(stream.starts, None))
    return equal.check(f"{total} documents, {stream.token_ids_X.size} tokens")


SUBJECT = Subject(
    name="text",
    about="tokenizer, packing and sample order on the standard library: pure functions, to the bit",
    run=run,
)

"""Witness: Hugging Face transformers, in float64, against each half and the oracle. What all three of ours share, it
can deny.

It also votes on *who moved*: where a half leaves the oracle, the witness says which of the two it still agrees with.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tessera_parity import hf_witness
from tessera_parity.budget import witness_limit
from tessera_parity.compare import relative_difference
from tessera_parity.exact import Equalities
from tessera_parity.families import family_spec, random_weights
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import Context, Subject
from tessera_parity.trained import real_text
from tessera_shared.numerics import FLOAT64
from tessera_shared.presets import preset
from tessera_shared.spec import ARCHITECTURES, ModelSpec
from tessera_shared.weights import load_model, save_model

_TOKENS = (2, 13)  # rows, positions: longer than every generated window


@dataclass
class _Tally:
    """The worst difference seen on one (family, side), with the case that showed it."""

    cases: int = 0
    compared: int = 0
    observed: float = 0.0
    limit: float = 0.0
    case: dict[str, Any] = field(default_factory=dict)

    def add(self, observed: float, limit: float, compared: int, case: dict[str, Any]) -> None:
        self.cases, self.compared = self.cases + 1, self.compared + compared
        if self.limit == 0.0 or observed * self.limit > self.observed * limit:
            self.observed, self.limit, self.case = observed, limit, case


def run(context: Context) -> Iterator[Check]:
    """Yield one check per family and side, then the round trips through Hugging Face's own files."""
    per_family = context.budget(quick=2, default=12, full=50)
    for family_index, family in enumerate(ARCHITECTURES):
        tallies = {half.name: _Tally() for half in (context.numpy, *context.halves)}
        for index in range(per_family):
            context.advance(f"witness: {family} {index + 1}/{per_family}")
            _one_case(context, family, (context.seed, 17, family_index, index), tallies)
        for half in (context.numpy, *context.halves):
            yield _check(family, half, tallies, context.device)
    yield _tokens(context)
    yield from _files(context)


def forward(
    half: Half, spec: ModelSpec, arrays: dict[str, np.ndarray[Any, Any]], token_ids_BT: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return `logits_BTV` of a half in float64."""
    module = half.module("model.transformer")
    params = {name: half.array(value) for name, value in arrays.items()}
    compiled = half.compiled(lambda params, ids: module.forward(params, ids, spec=spec, numerics=FLOAT64))
    return half.numpy(compiled(params, half.array(token_ids_BT)))


def _one_case(context: Context, family: str, seed: tuple[int, ...], tallies: dict[str, _Tally]) -> None:
    rng = np.random.default_rng(seed)
    spec = family_spec(family, rng)
    arrays = random_weights(spec, rng)
    token_ids_BT = rng.integers(0, spec.vocab_size, _TOKENS).astype(np.int32)
    truth_BTV = hf_witness.logits(hf_witness.build(spec, arrays), token_ids_BT)
    limit = witness_limit(spec, num_positions=_TOKENS[1])
    for half in (context.numpy, *context.halves):
        difference = relative_difference(forward(half, spec, arrays, token_ids_BT), truth_BTV)
        tallies[half.name].add(difference.value, limit, truth_BTV.size, {"family": family, "seed": list(seed)})


def _check(family: str, half: Half, tallies: dict[str, _Tally], device: str) -> Check:
    tally = tallies[half.name]
    diverged = not tally.observed <= tally.limit
    others = [side for side, other in tallies.items() if side != half.name and other.observed <= other.limit]
    return Check(
        subject="witness",
        name=f"{family} logits",
        question=Question.WITNESS,
        sides=("transformers", half.name),
        verdict=Verdict.DIVERGENCE if diverged else Verdict.PARITY,
        cases=tally.cases,
        compared=tally.compared,
        observed=tally.observed,
        limit=tally.limit,
        device=device,
        case=tally.case,
        who=(half.name if others else "all of ours, or transformers") if diverged else None,
        detail=f"transformers in float64 on {tally.cases} generated {family} configurations",
    )


def _files(context: Context) -> Iterator[Check]:
    """Directories written by each, opened by the other: same tensors to the bit, same logits."""
    for index, family in enumerate(ARCHITECTURES):
        context.advance(f"witness: files of {family}")
        rng = np.random.default_rng((context.seed, 19, index))
        spec = family_spec(family, rng)
        arrays = {name: value.astype(np.float32) for name, value in random_weights(spec, rng).items()}
        token_ids_BT = rng.integers(0, spec.vocab_size, _TOKENS).astype(np.int32)
        with tempfile.TemporaryDirectory() as folder:
            yield from _file_checks(context, spec, arrays, token_ids_BT, Path(folder))


def _tokens(context: Context) -> Check:
    """The same text through our tokenizer and through transformers' reading of its file."""
    context.advance("witness: tokenizer")
    transformers, text = hf_witness.require_transformers(), real_text(preset("nano").vocab_size)
    equal = Equalities("witness", "text through both tokenizers", ("transformers", "tokenizer"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        text.tokenizer.save(path)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for document in text.corpus.held_out[: context.budget(quick=10, default=40, full=200)]:
        sample = document.text[:3000]
        ids = text.tokenizer.encode(sample)
        equal.sequences(theirs.encode(sample, add_special_tokens=False), ids, document.name)
        equal.values(theirs.decode(ids, clean_up_tokenization_spaces=False), text.tokenizer.decode(ids), document.name)
    return replace(equal.check("held-out documents, there and back"), question=Question.WITNESS)


def _file_checks(
    context: Context,
    spec: ModelSpec,
    arrays: dict[str, np.ndarray[Any, Any]],
    token_ids_BT: np.ndarray[Any, Any],
    folder: Path,
) -> Iterator[Check]:
    save_model(folder / "ours", spec, arrays)
    theirs = hf_witness.open_directory(folder / "ours")
    theirs_BTV = hf_witness.logits(theirs, token_ids_BT)
    transformers_model = hf_witness.build(spec, arrays)
    import torch

    transformers_model.to(torch.float32).save_pretrained(folder / "theirs")
    loaded = load_model(folder / "theirs")
    unequal = _unequal_tensors(loaded.arrays, arrays)
    state = {name: value.to(torch.float32).numpy() for name, value in theirs.state_dict().items()}
    unequal += _unequal_tensors({name: state[name] for name in arrays}, arrays)
    yield Check(
        subject="witness",
        name=f"{spec.architecture} directories, bits both ways",
        question=Question.EXACT,
        sides=("transformers", "files"),
        verdict=Verdict.DIVERGENCE if unequal else Verdict.PARITY,
        cases=2,
        compared=2 * sum(value.size for value in arrays.values()),
        observed=float(len(unequal)),
        limit=0.0,
        unit="unequal tensors",
        dtype="float32",
        detail=f"first: {unequal[0]}" if unequal else "save_pretrained opens here, ours opens in from_pretrained",
    )
    wide = {name: np.asarray(value, dtype=np.float64) for name, value in loaded.arrays.items()}
    limit = witness_limit(spec, num_positions=_TOKENS[1])
    for half in context.halves:
        difference = relative_difference(forward(half, loaded.spec, wide, token_ids_BT), theirs_BTV)
        yield Check(
            subject="witness",
            name=f"{spec.architecture} logits through files",
            question=Question.WITNESS,
            sides=("transformers", half.name),
            verdict=Verdict.PARITY if difference.value <= limit else Verdict.DIVERGENCE,
            cases=1,
            compared=theirs_BTV.size,
            observed=difference.value,
            limit=limit,
            device=context.device,
        )


def _unequal_tensors(left: Any, right: dict[str, np.ndarray[Any, Any]]) -> list[str]:
    names = sorted(set(left) ^ set(right))
    return names + [
        name for name in right if name in left and np.asarray(left[name]).tobytes() != right[name].tobytes()
    ]


SUBJECT = Subject(
    name="witness",
    about="Hugging Face transformers, in float64, on generated Llama, Mistral, Qwen2, Qwen3 models and their files",
    run=run,
)

"""Make a failing case small while it still fails: fewer layers, narrower, fewer tokens, plainer values, fewer features.

A case is cut, not redrawn: arrays are sliced to the smaller spec's shapes, so that any failing case shrinks, whatever
made it. First a few leaps to the smallest models there are, the same ones for every case, because most bugs need no
more and JAX compiles each new shape; then greedy to a fixed point, largest cut first, within a bounded number of
attempts (Zeller & Hildebrandt 2002, ddmin, without its complement step: sizes here are few and ordered).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_shared.errors import SpecError
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.spec import ModelSpec, RopeSpec
from tessera_shared.tensors import layer_prefix, tensor_table

MAX_ATTEMPTS = 200
MAX_SECONDS = 90.0
"""After this long a case is small enough: a person waits for it."""

LEAP_TOKENS = (1, 2, 5)

Fails = Callable[[ModelCase], bool]
"""Does the divergence still show? Must be deterministic; it may not raise."""


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The smallest failing case found, what was cut on the way, and whether nothing more could be cut."""

    case: ModelCase
    cuts: tuple[str, ...]  # "layers 2 -> 1", in order
    attempts: int
    finished: bool  # False: the attempts ran out first
    values_seed: int | None = None  # parameters are `seeded_params(spec, seed)`; None = arbitrary numbers

    @property
    def layers(self) -> int:
        """Number of layers left."""
        return self.case.spec.num_layers

    @property
    def tokens(self) -> int:
        """Number of tokens left, over all rows."""
        return int(self.case.token_ids_BT.size)


T = TypeVar("T")
Stage = Callable[[T], Iterator[tuple[str, T]]]
"""One kind of cut: yields what was cut and the smaller thing, boldest first."""


@dataclass(frozen=True, kw_only=True)
class Cut(Generic[T]):
    """The smallest failing thing found, what was cut, how often it was asked, and whether nothing more could be cut."""

    thing: T
    cuts: tuple[str, ...]
    attempts: int
    finished: bool


def cut_down(
    thing: T, fails: Callable[[T], bool], stages: Sequence[Stage[T]], *, max_attempts: int, max_seconds: float
) -> Cut[T]:
    """Cut greedily while `fails` holds, each stage until it takes no more. The given thing is taken at its word."""
    cuts: list[str] = []
    attempts, progress, broken_off, started = 0, True, False, time.perf_counter()

    def spent() -> bool:
        return attempts >= max_attempts or time.perf_counter() - started > max_seconds

    while progress and not spent():
        progress = False
        for stage in stages:
            accepted = True
            while accepted and not spent():
                accepted = False
                for what, smaller in stage(thing):
                    if spent():
                        broken_off = True
                        break
                    attempts += 1
                    if fails(smaller):
                        thing, accepted, progress = smaller, True, True
                        cuts.append(what)
                        break
    return Cut(thing=thing, cuts=tuple(cuts), attempts=attempts, finished=not progress and not broken_off)


def shrink(
    case: ModelCase, fails: Fails, *, max_attempts: int = MAX_ATTEMPTS, max_seconds: float = MAX_SECONDS
) -> Shrunk:
    """Cut `case` greedily while `fails` holds. The given case itself is taken at its word and not tried again."""
    unseeded = replace(case, seed=())  # no longer as drawn
    found = cut_down(unseeded, fails, (leaps, *STAGES), max_attempts=max_attempts, max_seconds=max_seconds)
    seeded = replace(found.thing, params=seeded_params(found.thing.spec, 0))
    seed = 0 if fails(seeded) else None
    return Shrunk(
        case=seeded if seed is not None else found.thing,
        cuts=found.cuts,
        attempts=found.attempts + 1,
        finished=found.finished,
        values_seed=seed,
    )


def is_seeded(case: ModelCase) -> bool:
    """Are the parameters those that `seeded_params(spec, 0)` makes, so that a file need not carry them?"""
    plain = seeded_params(case.spec, 0)
    return all(np.array_equal(plain[name], case.params[name]) for name in plain)


def seeded_params(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    """Return parameters that a repro file makes again: normal, gains about 1, matrices over the root of their
    fan-in."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(info.shape) / np.sqrt(info.shape[-1])
        if len(info.shape) == 2
        else rng.standard_normal(info.shape) / 4 + (info.init == "ones")
        for name, info in tensor_table(spec).items()
    }


def leaps(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    """Yield one layer on one to five tokens: of the smallest model there is, bare, with this one's features, with
    grouped heads; then of this one's own sizes, bare and with its features.

    The order is that of what a reader would like best; a leap that is no smaller than the case is left out.
    """
    bare, whole = _bare(case.spec), replace(case.spec, num_layers=1, window_from_layer=0)
    sized = replace(
        bare, width=whole.width, ffn_width=whole.ffn_width, num_heads=whole.num_heads, vocab_size=whole.vocab_size,
        num_kv_heads=whole.num_kv_heads, head_width=whole.head_width,
    )  # fmt: skip
    for spec in (bare, _narrow(case.spec), replace(bare, num_heads=4, num_kv_heads=2), sized, whole):
        for tokens in LEAP_TOKENS:
            smaller = _placed(case, spec, tokens)
            if tokens <= case.token_ids_BT.size and _weight(smaller) < _weight(case):
                yield f"all at once to {spec.num_layers} layers, {tokens} tokens", smaller


def _narrow(spec: ModelSpec) -> ModelSpec:
    real = None if spec.real_vocab_size is None else 2
    return replace(
        spec, vocab_size=3, real_vocab_size=real, num_layers=1, width=2, ffn_width=2, num_heads=2, num_kv_heads=1,
        head_width=2, window_from_layer=0,
    )  # fmt: skip


def _bare(spec: ModelSpec) -> ModelSpec:
    return replace(
        _narrow(spec), architecture="llama", qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False,
        sliding_window=None, attention_softcap=None, logit_softcap=None, rope=RopeSpec(theta=spec.rope.theta),
        tie_embeddings=True, real_vocab_size=None,
    )  # fmt: skip


def _placed(case: ModelCase, spec: ModelSpec, tokens: int) -> ModelCase:
    """Return a seeded model of this spec on counting tokens: one row, one document, the next token as label."""
    ids_BT = (np.arange(tokens, dtype=np.int32) % spec.vocab_size)[None]
    positions_BT = np.arange(tokens, dtype=np.int32)[None]
    return replace(
        case, spec=spec, params=seeded_params(spec, 0), token_ids_BT=ids_BT,
        labels_BT=((ids_BT + 1) % spec.vocab_size).astype(np.int32), positions_BT=positions_BT,
        segments_BT=np.zeros_like(positions_BT),
    )  # fmt: skip


def _weight(case: ModelCase) -> int:
    spec = case.spec
    sizes = spec.num_layers * (spec.width + spec.ffn_width + spec.num_heads * spec.head_width) + spec.vocab_size
    features = sum(
        bool(value)
        for value in (
            spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.qk_norm, spec.sliding_window, spec.attention_softcap,
            spec.logit_softcap, spec.rope.scaling != "none", not spec.tie_embeddings,
        )
    )  # fmt: skip
    return int(case.token_ids_BT.size) * (sizes + features)


def _fewer_layers(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    for layers in _fewer(case.spec.num_layers):
        for first in (0, case.spec.num_layers - layers):
            spec = replace(case.spec, num_layers=layers, window_from_layer=max(0, case.spec.window_from_layer - first))
            params = {}
            for name in tensor_table(spec):
                source = name
                for layer in range(layers):
                    if name.startswith(layer_prefix(layer)):
                        source = layer_prefix(layer + first) + name.removeprefix(layer_prefix(layer))
                params[name] = case.params[source]
            yield f"layers {case.spec.num_layers} -> {layers}", replace(case, spec=spec, params=params)


def _fewer_rows(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    rows = case.token_ids_BT.shape[0]
    for kept in _fewer(rows):
        for first in (0, rows - kept):
            yield f"rows {rows} -> {kept}", _cut_tokens(case, slice(first, first + kept), slice(None))


def _fewer_tokens(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    tokens = case.token_ids_BT.shape[1]
    for kept in _fewer(tokens):
        for first in (0, tokens - kept):
            yield f"tokens {tokens} -> {kept}", _cut_tokens(case, slice(None), slice(first, first + kept))


def _cut_tokens(case: ModelCase, rows: slice, columns: slice) -> ModelCase:
    return replace(
        case,
        token_ids_BT=case.token_ids_BT[rows, columns],
        labels_BT=case.labels_BT[rows, columns],
        positions_BT=case.positions_BT[rows, columns],
        segments_BT=case.segments_BT[rows, columns],
    )


def _smaller_sizes(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    spec = case.spec
    for heads in _fewer(spec.num_heads):
        most = spec.num_kv_heads
        for kv_heads in sorted({size for size in (1, heads, most) if size <= most and heads % size == 0}):
            yield from _with_spec(case, f"heads {spec.num_heads} -> {heads}", num_heads=heads, num_kv_heads=kv_heads)
    for half_width in _fewer(spec.head_width // 2):
        yield from _with_spec(case, f"head width {spec.head_width} -> {2 * half_width}", head_width=2 * half_width)
    for width in _fewer(spec.width):
        yield from _with_spec(case, f"width {spec.width} -> {width}", width=width)
    for ffn_width in _fewer(spec.ffn_width):
        yield from _with_spec(case, f"ffn {spec.ffn_width} -> {ffn_width}", ffn_width=ffn_width)


def _smaller_vocabulary(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    for size in _fewer(case.spec.vocab_size):
        real = None if case.spec.real_vocab_size is None else min(size, case.spec.real_vocab_size)
        labels_BT = np.where(case.labels_BT == IGNORE_INDEX, IGNORE_INDEX, case.labels_BT % size)
        smaller = replace(
            case,
            token_ids_BT=(case.token_ids_BT % size).astype(case.token_ids_BT.dtype),
            labels_BT=labels_BT.astype(case.labels_BT.dtype),
        )
        what = f"vocabulary {case.spec.vocab_size} -> {size}"
        yield from _with_spec(smaller, what, vocab_size=size, real_vocab_size=real)


def _fewer_features(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    spec = case.spec
    for name in ("qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
        if getattr(spec, name):
            yield from _with_spec(case, f"no {name}", **{name: False})
    for name in ("sliding_window", "attention_softcap", "logit_softcap"):
        if getattr(spec, name) is not None:
            yield from _with_spec(case, f"no {name}", **{name: None})
    if spec.window_from_layer:
        yield from _with_spec(case, "window from layer 0", window_from_layer=0)
    if spec.rope.scaling != "none":
        yield from _with_spec(case, "no rope scaling", rope=RopeSpec(theta=spec.rope.theta))
    if not spec.tie_embeddings:
        yield from _with_spec(case, "tied embeddings", tie_embeddings=True)
    if spec.architecture != "llama":
        yield from _with_spec(case, "llama", architecture="llama")


def _plainer_positions(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    plain_BT = np.broadcast_to(np.arange(case.token_ids_BT.shape[1]), case.token_ids_BT.shape)
    for name, plain in (("segments_BT", np.zeros_like(plain_BT)), ("positions_BT", plain_BT)):
        old = getattr(case, name)
        if not np.array_equal(old, plain):
            changed = {name: plain.astype(old.dtype)}
            yield f"plain {name.removesuffix('_BT')}", replace(case, **changed)  # type: ignore[arg-type]
    if np.any(case.positions_BT < 0) or not np.any(case.positions_BT):
        return
    shifted = case.positions_BT - case.positions_BT.min(axis=1, keepdims=True)
    if not np.array_equal(shifted, case.positions_BT) and not np.array_equal(shifted, plain_BT):
        yield "positions from 0", replace(case, positions_BT=shifted.astype(case.positions_BT.dtype))


def _plainer_values(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    gains = {name for name, info in tensor_table(case.spec).items() if info.init == "ones"}
    biases = {name for name, info in tensor_table(case.spec).items() if info.init == "zeros"}
    for what, names, value in (("gains of 1", gains, 1.0), ("biases of 0", biases, 0.0)):
        if any(np.any(case.params[name] != value) for name in names):
            plain = {name: np.full_like(case.params[name], value) for name in names}
            yield what, replace(case, params=case.params | plain)
    rounded = {name: np.round(value * 8) / 8 for name, value in case.params.items()}
    if any(not np.array_equal(rounded[name], case.params[name]) for name in rounded):
        yield "values in eighths", replace(case, params=rounded)


def _with_spec(case: ModelCase, what: str, **changes: object) -> Iterator[tuple[str, ModelCase]]:
    """Yield the case under a changed spec, its parameters sliced to the new shapes; nothing without such a spec."""
    try:
        spec = replace(case.spec, **changes)  # type: ignore[arg-type]
    except SpecError:
        return
    params = {
        name: case.params[name][tuple(slice(length) for length in info.shape)]
        for name, info in tensor_table(spec).items()
    }
    yield what, replace(case, spec=spec, params=params)


def _fewer(number: int) -> list[int]:
    """Return smaller sizes to try, boldest first: 1, half, one less."""
    return sorted({1, number // 2, number - 1} & set(range(1, number)))


STAGES: tuple[Callable[[ModelCase], Iterator[tuple[str, ModelCase]]], ...] = (
    _fewer_layers, _fewer_rows, _fewer_tokens, _smaller_sizes, _smaller_vocabulary, _fewer_features, _plainer_positions,
    _plainer_values,
)  # fmt: skip
"""Kinds of cuts, boldest first; each is tried again until it takes no more before the next one is."""

SIZE_STAGES = (_fewer_layers, _smaller_sizes, _smaller_vocabulary, _fewer_features)
"""Cuts of the model alone, for callers whose tokens are fixed."""


def candidates(case: ModelCase, *, leaping: bool = True) -> Iterator[tuple[str, ModelCase]]:
    """Yield every smaller case that is one cut or, with `leaping`, one leap away."""
    for stage in (leaps, *STAGES) if leaping else STAGES:
        yield from stage(case)

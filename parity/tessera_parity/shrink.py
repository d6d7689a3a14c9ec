"""Make a failing case small while it still fails: fewer layers, narrower, fewer tokens, plainer values, fewer features.

A case is cut, not redrawn: arrays are sliced to the smaller spec's shapes, so that any failing case shrinks, whatever
made it. Greedy to a fixed point, largest cut first, within a bounded number of attempts (Zeller & Hildebrandt 2002,
ddmin, without its complement step: sizes here are few and ordered).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_shared.errors import SpecError
from tessera_shared.objectives import IGNORE_INDEX
from tessera_shared.spec import ModelSpec, RopeSpec
from tessera_shared.tensors import layer_prefix, tensor_table

MAX_ATTEMPTS = 200

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


def shrink(case: ModelCase, fails: Fails, *, max_attempts: int = MAX_ATTEMPTS) -> Shrunk:
    """Cut `case` greedily while `fails` holds. The given case itself is taken at its word and not tried again."""
    case = replace(case, seed=())  # no longer as drawn
    cuts: list[str] = []
    attempts, progress = 0, True
    while progress and attempts < max_attempts:
        progress = False
        for stage in STAGES:
            accepted = True
            while accepted and attempts < max_attempts:
                accepted = False
                for what, smaller in stage(case):
                    if attempts >= max_attempts:
                        break
                    attempts += 1
                    if fails(smaller):
                        case, accepted, progress = smaller, True, True
                        cuts.append(what)
                        break
    seeded = replace(case, params=seeded_params(case.spec, 0), seed=())
    seed = 0 if fails(seeded) else None
    return Shrunk(
        case=seeded if seed is not None else case,
        cuts=tuple(cuts),
        attempts=attempts + 1,
        finished=not progress,
        values_seed=seed,
    )


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


def candidates(case: ModelCase) -> Iterator[tuple[str, ModelCase]]:
    """Yield every smaller case that is one cut away."""
    for stage in STAGES:
        yield from stage(case)

"""Name the first operation that departs, so that accumulated error accuses no one.

Forward: every tap of a half is replaced by the oracle's value, so each operation is judged on what it makes of the
reference's inputs; the first tap whose own error exceeds the budget is the culprit. Backward: a zero is added at
every tap, and the gradient with respect to it is held, in reverse order, against the oracle's derivative; the nearest
departure to the loss names the operation that consumes that tap. The oracle has no autodiff and needs none: a complex
step along a direction is exact to rounding (Squire & Trapp 1998: f(x + ih).imag / h has no cancellation, so h may be
1e-30).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase
from tessera_parity.compare import relative_difference
from tessera_parity.halves import Array, Half
from tessera_shared.numerics import FLOAT64, Numerics
from tessera_shared.tensors import EMBEDDING, FINAL_NORM, UNEMBEDDING

SURPRISES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a broken half may raise instead of answering."""

FORWARD, BACKWARD, STATE = "forward", "backward", "state"
COMPLEX_STEP = 1e-30
DIRECTIONS = 2  # random directions along which every gradient is held against the oracle
COORDINATES = 32  # numbers of a departing gradient looked at singly, to tell the position
_DELTA = "tap:"  # prefix of the zero added at a tap, among the names of the parameters

_LETTERS = {
    "embed": "BTD", "attention.norm": "BTD", "attention.q": "BTNH", "attention.k": "BTKH", "attention.v": "BTKH",
    "attention.q_norm": "BTNH", "attention.k_norm": "BTKH", "attention.q_rope": "BTNH", "attention.k_rope": "BTKH",
    "attention.scores": "BNTS", "attention.probs": "BNTS", "attention.mix": "BTNH", "attention.out": "BTD",
    "residual": "BTD", "mlp.norm": "BTD", "mlp.gate": "BTF", "mlp.up": "BTF", "mlp.act": "BTF", "mlp.down": "BTD",
    "out": "BTD", "final_norm": "BTD", "logits": "BTV",
}  # fmt: skip
_WORDS = {
    "B": "row", "T": "token", "S": "key", "N": "head", "K": "kv head", "H": "dimension", "D": "feature", "F": "feature",
    "V": "id",
}  # fmt: skip
_CONSUMERS = {
    "embed": ("attention.norm", "residual"), "attention.norm": ("attention.q", "attention.k", "attention.v"),
    "attention.q": ("attention.q_norm", "attention.q_rope"), "attention.k": ("attention.k_norm", "attention.k_rope"),
    "attention.v": ("attention.mix",), "attention.q_norm": ("attention.q_rope",),
    "attention.k_norm": ("attention.k_rope",), "attention.q_rope": ("attention.scores",),
    "attention.k_rope": ("attention.scores",), "attention.scores": ("attention.probs",),
    "attention.probs": ("attention.mix",), "attention.mix": ("attention.out",), "attention.out": ("residual",),
    "residual": ("mlp.norm", "out"), "mlp.norm": ("mlp.gate", "mlp.up"), "mlp.gate": ("mlp.act",),
    "mlp.up": ("mlp.act",), "mlp.act": ("mlp.down",), "mlp.down": ("out",), "out": ("attention.norm", "final_norm"),
    "final_norm": ("logits",), "logits": ("cross_entropy",),
}  # fmt: skip
_OWNERS = {
    "input_layernorm": "attention.norm", "q_proj": "attention.q", "k_proj": "attention.k", "v_proj": "attention.v",
    "q_norm": "attention.q_norm", "k_norm": "attention.k_norm", "o_proj": "attention.out",
    "post_attention_layernorm": "mlp.norm", "gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """The first departing operation: whose, which, where, and by how much next to what was allowed."""

    half: str
    op: str  # "attention.q_rope", "attention_mask", "forward_kl", "adamw.second_moment", "sample.top_p", ...
    layer: int | None = None
    position: str | None = None  # "row 1, token 5, head 0"
    observed: float
    limit: float
    direction: str  # forward | backward | state
    detail: str = ""


def split_tap(name: str) -> tuple[int | None, str]:
    """Return a tap's layer and operation: `layers.3.attention.q` -> (3, "attention.q"), `embed` -> (None, "embed")."""
    if not name.startswith("layers."):
        return None, name
    _, layer, op = name.split(".", 2)
    return int(layer), op


def position_of(name: str, where: tuple[int, ...]) -> str | None:
    """Put an index into words by the tap's shape letters: `row 1, token 5, head 0, dimension 3`."""
    letters = _LETTERS.get(split_tap(name)[1], "")
    if len(letters) != len(where):
        return f"index {where}" if where else None
    return ", ".join(f"{_WORDS[letter]} {int(index)}" for letter, index in zip(letters, where, strict=True))


def owner_of(parameter: str) -> tuple[int | None, str]:
    """Return the layer and operation that a parameter belongs to: `model.layers.2.mlp.up_proj.weight` -> (2,
    "mlp.up")."""
    if parameter in (EMBEDDING, FINAL_NORM, UNEMBEDDING):
        return None, {EMBEDDING: "embed", FINAL_NORM: "final_norm", UNEMBEDDING: "logits"}[parameter]
    parts = parameter.split(".")
    return int(parts[2]), _OWNERS[parts[-2]]


def record_taps(
    half: Half, case: ModelCase, *, numerics: Numerics = FLOAT64, replace: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Run the whole model and return each tapped value in forward order (float64).

    With `replace`, each operation sees the replaced values of all earlier ones: the record holds every operation's
    *own* work. A tap that `replace` does not know is left alone; its name is in the record all the same, and judged a
    departure.
    """
    seen: dict[str, np.ndarray] = {}

    def tap(name: str, value: Array) -> Array:
        seen[name] = half.numpy(value)
        if replace is None or name not in replace or replace[name].shape != seen[name].shape:
            return value
        return half.array(replace[name], str(value.dtype).removeprefix("torch."))

    params = {name: half.array(value, numerics.param) for name, value in case.params.items()}
    half.module("model.transformer").forward(
        params,
        half.array(case.token_ids_BT),
        spec=case.spec,
        numerics=numerics,
        positions_BT=half.array(case.positions_BT),
        segments_BT=half.array(case.segments_BT),
        tap=tap,
    )
    return seen


def localize_forward(
    oracle: Half, half: Half, case: ModelCase, *, truth: Mapping[str, np.ndarray] | None = None
) -> Culprit | None:
    """Return the first operation of `half` that departs from the oracle on the oracle's own inputs, or None (float64).

    `truth` is the oracle's record of this case when the caller has it already.
    """
    truth = record_taps(oracle, case) if truth is None else truth
    own = record_taps(half, case, replace=truth)
    limit = op_limit(case)
    for name, value in truth.items():
        layer, op = split_tap(name)
        if name not in own:
            return _culprit(half, op, layer, None, float("inf"), limit, FORWARD, f"the half has no tap {name}")
        difference = relative_difference(own[name], value)
        if difference.value > limit:
            return _untapped_input(oracle, half, case, name) or _culprit(
                half, op, layer, position_of(name, difference.where), difference.value, limit, FORWARD
            )
    extra = next((name for name in own if name not in truth), None)
    if extra is None:
        return None
    layer, op = split_tap(extra)
    return _culprit(half, op, layer, None, float("inf"), limit, FORWARD, f"the oracle has no tap {extra}")


def _untapped_input(oracle: Half, half: Half, case: ModelCase, tap_name: str) -> Culprit | None:
    """Judge the tables and the mask, which no tap carries, when the operation that reads them is the first to
    depart."""
    layer, op = split_tap(tap_name)
    reader: Callable[[Half, ModelCase], list[np.ndarray]]
    if op in ("attention.q_rope", "attention.k_rope"):
        reader, names = _rope_tables, ["cos", "sin"]
    elif op == "attention.probs" and layer is not None:
        reader, names = _mask_of(layer), ["mask"]
    else:
        return None
    for name, mine, theirs in zip(names, reader(half, case), reader(oracle, case), strict=True):
        difference = relative_difference(mine, theirs)
        if difference.value > (limit := op_limit(case)):
            function = "rope_tables" if name != "mask" else "attention_mask"
            return _culprit(
                half,
                function,
                layer,
                f"{name}{difference.position}",
                difference.value,
                limit,
                FORWARD,
                f"read by {tap_name}",
            )
    return None


def _rope_tables(half: Half, case: ModelCase) -> list[np.ndarray]:
    tables = half.module("model.rope").rope_tables(half.array(case.positions_BT), spec=case.spec, numerics=FLOAT64)
    return [half.numpy(table) for table in tables]


def _mask_of(layer: int) -> Callable[[Half, ModelCase], list[np.ndarray]]:
    def masks(half: Half, case: ModelCase) -> list[np.ndarray]:
        positions_BT, segments_BT = half.array(case.positions_BT), half.array(case.segments_BT)
        mask_BTS = half.module("model.attention").attention_mask(
            positions_BT, positions_BT, segments_BT, segments_BT, window=case.spec.window_of(layer)
        )
        return [half.numpy(mask_BTS).astype(np.float64)]

    return masks


def tapped_gradients(half: Half, case: ModelCase) -> tuple[float, dict[str, np.ndarray]]:
    """Return the summed cross-entropy and its gradient by parameter and, under `tap:<name>`, by tapped value
    (float64)."""
    arrays = {name: half.array(value) for name, value in case.params.items()}
    arrays |= {_DELTA + name: half.array(np.zeros_like(value)) for name, value in record_taps(half, case).items()}
    loss, grads = half.value_and_grad(lambda named: _summed_loss(half, case, named), arrays)
    # in forward order: JAX hands dictionaries back sorted by name
    return float(half.numpy(loss)), {name: half.numpy(grads[name]) for name in arrays}


def _summed_loss(
    half: Half, case: ModelCase, named: Mapping[str, Array], frozen: Mapping[str, np.ndarray] | None = None
) -> Array:
    """Sum the cross-entropy with a delta added at each tap; a frozen tap is a constant, so that no gradient passes
    it."""

    def tap(name: str, value: Array) -> Array:
        if frozen is not None and name in frozen:
            value = half.array(frozen[name])
        return value + named[_DELTA + name] if _DELTA + name in named else value

    logits_BTV = half.module("model.transformer").forward(
        {name: value for name, value in named.items() if not name.startswith(_DELTA)},
        half.array(case.token_ids_BT),
        spec=case.spec,
        numerics=FLOAT64,
        positions_BT=half.array(case.positions_BT),
        segments_BT=half.array(case.segments_BT),
        tap=tap,
    )
    losses = half.module("distil.losses")
    loss_sum, _ = losses.cross_entropy(logits_BTV, half.array(case.labels_BT), numerics=FLOAT64)
    return loss_sum


def oracle_derivative(oracle: Half, case: ModelCase, name: str, direction: np.ndarray) -> float:
    """Return d loss along `direction` in a parameter or in `tap:<name>`, exact to rounding, by a complex step."""
    step = 1j * COMPLEX_STEP * direction
    named: dict[str, Any] = dict(case.params)
    named[name] = named[name] + step if name in named else step
    return float(np.imag(_summed_loss(oracle, case, named)) / COMPLEX_STEP)


def localize_backward(oracle: Half, half: Half, other: Half | None, case: ModelCase) -> Culprit | None:
    """Return the operation of `half` whose gradient departs nearest to the loss, or None (float64).

    Call it when the forward pass agrees: a gradient inherits every forward departure. Every gradient is held against
    the oracle along random directions, so it is the half that is wrong and not the other; the other half, when given,
    tells the position.
    """
    limit = gradient_limit(case)
    _, mine = tapped_gradients(half, case)
    floor = max(float(np.max(np.abs(grad))) for grad in mine.values())  # a structural zero has no magnitude of its own
    rng = np.random.default_rng(13)
    for name in _reverse_order(mine):
        grad = mine[name]
        for _ in range(DIRECTIONS):
            way = rng.standard_normal(grad.shape)
            own, truth = float(np.vdot(way, grad)), oracle_derivative(oracle, case, name, way)
            scale = max(abs(own), abs(truth), floor)  # 0 where nothing counts: then both are 0
            observed = abs(own - truth) / scale if scale > 0.0 else 0.0
            if not observed <= limit:
                where = _worst_coordinate(oracle, other, case, name, grad)
                return _backward_culprit(oracle, half, case, name, where, observed, limit)
    return None


def _worst_coordinate(
    oracle: Half, other: Half | None, case: ModelCase, name: str, grad: np.ndarray
) -> tuple[int, ...]:
    """Return where a gradient is worst: against another half everywhere, else against the oracle at its largest
    numbers."""
    if other is not None:
        return relative_difference(grad, tapped_gradients(other, case)[1][name]).where
    worst, where = -1.0, (0,) * grad.ndim
    for flat in np.argsort(-np.abs(grad), axis=None)[:COORDINATES]:
        unit = np.zeros(grad.size)
        unit[flat] = 1.0
        gap = abs(float(grad.flat[flat]) - oracle_derivative(oracle, case, name, unit.reshape(grad.shape)))
        if gap > worst:
            worst, where = gap, tuple(int(i) for i in np.unravel_index(int(flat), grad.shape))
    return where


def _backward_culprit(
    oracle: Half,
    half: Half,
    case: ModelCase,
    name: str,
    where: tuple[int, ...],
    observed: float,
    limit: float,
) -> Culprit:
    """Turn a departing gradient into the operation that made it: a tap's reader, or a parameter's owner."""
    if not name.startswith(_DELTA):
        layer, op = owner_of(name)
        return _culprit(half, op, layer, f"index {where}", observed, limit, BACKWARD, f"gradient of {name}")
    tap_name = name.removeprefix(_DELTA)
    taps = record_taps(oracle, case)
    blamed = _guilty_reader(oracle, half, case, tap_name, taps, limit)
    layer, op = split_tap(blamed)
    detail = f"gradient at {tap_name} departs"
    return _culprit(half, op, layer, position_of(tap_name, where), observed, limit, BACKWARD, detail)


def readers_of(tap_name: str, taps: Mapping[str, np.ndarray]) -> list[str]:
    """Return the taps whose operations read this one, of those that this model has."""
    layer, op = split_tap(tap_name)
    if op in ("embed", "out"):
        following = 0 if layer is None else layer + 1
        near = [f"layers.{following}.attention.norm", f"layers.{following}.residual"]
        return near if near[0] in taps else ["final_norm"]
    if op in ("final_norm", "logits"):
        return list(_CONSUMERS[op])
    readers = [f"layers.{layer}.{reader}" for reader in _CONSUMERS[op]]
    present = [reader for reader in readers if reader in taps]
    return (
        present[:1] if op in ("attention.q", "attention.k") else present
    )  # rope reads q only where no norm stands between


def _guilty_reader(
    oracle: Half, half: Half, case: ModelCase, tap_name: str, taps: Mapping[str, np.ndarray], limit: float
) -> str:
    """Return the reader of a tap whose own share of the gradient is wrong: all other readers are held constant in
    turn."""
    readers = readers_of(tap_name, taps)
    if len(readers) == 1:
        return readers[0]
    direction = np.random.default_rng(11).standard_normal(taps[tap_name].shape)
    for reader in readers:
        frozen = {other: taps[other] for other in readers if other != reader}
        own = _slope(half, case, tap_name, direction, frozen)
        step = {**case.params, _DELTA + tap_name: 1j * COMPLEX_STEP * direction}
        truth = float(np.imag(_summed_loss(oracle, case, step, frozen)) / COMPLEX_STEP)
        if abs(own - truth) > limit * max(abs(own), abs(truth)):
            return reader
    return readers[0]


def _slope(
    half: Half, case: ModelCase, tap_name: str, direction: np.ndarray, frozen: Mapping[str, np.ndarray]
) -> float:
    params = {name: half.array(value) for name, value in case.params.items()}
    delta = {_DELTA + tap_name: half.array(np.zeros(direction.shape))}
    _, grads = half.value_and_grad(lambda named: _summed_loss(half, case, {**params, **named}, frozen), delta)
    return float(np.vdot(direction, half.numpy(grads[_DELTA + tap_name])))


def _reverse_order(grads: Mapping[str, np.ndarray]) -> list[str]:
    """Taps from the loss backwards, each followed by the parameters that its operation owns."""
    taps = [name for name in grads if name.startswith(_DELTA)]
    owned: dict[tuple[int | None, str], list[str]] = {}
    for name in grads:
        if not name.startswith(_DELTA):
            owned.setdefault(owner_of(name), []).append(name)
    order: list[str] = []
    for name in reversed(taps):
        order += [name, *owned.pop(split_tap(name.removeprefix(_DELTA)), [])]
    return order + [name for names in owned.values() for name in names]


def op_limit(case: ModelCase) -> float:
    """Return what one operation may commit in float64 on the reference's inputs."""
    return budget.mathematics_limit(1, length=budget.longest_sum(case.spec, case.token_ids_BT.shape[1]))


def gradient_limit(case: ModelCase) -> float:
    """Return what a whole backward pass may commit in float64."""
    return budget.gradient_limit(case.spec, num_positions=case.token_ids_BT.shape[1])


def _culprit(
    half: Half,
    op: str,
    layer: int | None,
    position: str | None,
    observed: float,
    limit: float,
    direction: str,
    detail: str = "",
) -> Culprit:
    return Culprit(
        half=half.name, op=op, layer=layer, position=position, observed=observed, limit=limit, direction=direction,
        detail=detail,
    )  # fmt: skip

"""Metamorphic laws: what must hold of one side alone, whatever the other says.

Two halves and an oracle can share one misreading of the spec and agree; a law needs no second opinion. Everything runs
in float64, so that both sides of a law differ by rounding only, within the budget of a whole forward or backward pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tessera_parity.budget import law_limit
from tessera_parity.compare import relative_difference
from tessera_parity.families import family_spec, random_weights
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.spec import ARCHITECTURES, ModelSpec
from tessera_shared.tensors import tensor_table

Arrays = dict[str, np.ndarray[Any, Any]]

_ROWS, POSITIONS, _PART = 3, 8, 4  # few different shapes: JAX compiles each
_STEPS = 2  # of one token, after a prefill; JAX compiles each
OFFSET = 23  # of positions, for the law of relative positions


@dataclass(frozen=True, kw_only=True)
class LawModel:
    """One generated model on one half, with the few calls that laws are made of."""

    half: Half
    spec: ModelSpec
    arrays: Arrays
    token_ids_BT: np.ndarray[Any, Any]

    def logits(
        self,
        token_ids_BT: np.ndarray[Any, Any],
        positions_BT: np.ndarray[Any, Any] | None = None,
        segments_BT: np.ndarray[Any, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Return float64 logits [B, T, V]; without positions and segments every row is one document from position 0."""
        places = _places(*token_ids_BT.shape)
        positions_BT = places[0] if positions_BT is None else positions_BT
        segments_BT = places[1] if segments_BT is None else segments_BT
        inputs = (self.half.array(value) for value in (token_ids_BT, positions_BT, segments_BT))
        return self.half.numpy(self._forward(self.params, *inputs))

    @cached_property
    def params(self) -> dict[str, Any]:
        """The weights as the half's own arrays."""
        return {name: self.half.array(value) for name, value in self.arrays.items()}

    @cached_property
    def _forward(self) -> Callable[..., Any]:
        forward = self.half.module("model.transformer").forward
        return self.half.compiled(
            lambda params, ids, positions, segments: forward(
                params, ids, spec=self.spec, numerics=FLOAT64, positions_BT=positions, segments_BT=segments
            )
        )

    @cached_property
    def stepped(self) -> Callable[..., Any]:
        """Logits through the cache: a prefill, then one token a step."""
        module = self.half.module("serve.decode")
        return self.half.compiled(
            lambda params, ids: module.teacher_forced_logits(
                params, ids, spec=self.spec, numerics=FLOAT64, prefill=POSITIONS - _STEPS
            )
        )

    @cached_property
    def plain(self) -> Callable[..., Any]:
        """Loss and gradients, compiled once."""
        return self._loss_and_grads(recompute=False)

    @cached_property
    def recomputed(self) -> Callable[..., Any]:
        """The same with activations computed again on the way back."""
        return self._loss_and_grads(recompute=True)

    def _loss_and_grads(self, *, recompute: bool) -> Callable[..., Any]:
        step = self.half.module("train.step")
        compiled = self.half.compiled(
            lambda params, batch: step.loss_and_grads(
                params, Batch(*batch), spec=self.spec, numerics=FLOAT64, objective=Objective(z_loss=1e-3),
                recompute=recompute,
            )
        )  # fmt: skip
        return lambda params, batch: compiled(params, tuple(self.half.array(field) for field in batch))

    def gradients(self, batch: Batch, *, recompute: bool = False) -> tuple[float, Arrays]:
        """Return the number of counted labels, and the gradients and the loss by name."""
        loss, count, grads = (self.recomputed if recompute else self.plain)(self.params, batch)
        arrays = {name: self.half.numpy(value) for name, value in grads.items()}
        return float(self.half.numpy(count)), arrays | {"loss": np.atleast_1d(self.half.numpy(loss))}

    def batch(self, row: int | None = None) -> Batch:
        """Ragged on purpose: each row ignores another number of labels. With `row`, all labels but that row's are ignored."""
        labels_BT = np.roll(self.token_ids_BT, -1, axis=1).astype(np.int32)
        labels_BT[:, -1] = -100
        for index in range(_ROWS):
            labels_BT[index, : 2 * index] = -100
            if row not in (None, index):
                labels_BT[index] = -100
        return Batch(self.token_ids_BT, labels_BT, *_places(_ROWS, POSITIONS))

    def train(self, state: Any) -> Any:
        """Return the state after one update by the mean gradient of `batch()`."""
        _, count, grads = self.plain(state.params, self.batch())
        return self._update(state, grads, count)

    @cached_property
    def _update(self) -> Callable[..., Any]:
        step, options = self.half.module("train.step"), AdamWOptions()
        decay = {name: info.decay for name, info in tensor_table(self.spec).items()}

        def update(state: Any, grads: Any, count: Any) -> Any:
            mean = {name: value / count for name, value in grads.items()}
            return step.apply_gradients(state, mean, lr=1e-2, options=options, decay_mask=decay)[0]

        return self.half.compiled(update)


Sides = Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
"""What a law yields: pairs of arrays that must be equal up to rounding."""


def batch_split(model: LawModel) -> Sides:
    """A row's logits do not depend on its neighbors in the batch."""
    whole_BTV = model.logits(model.token_ids_BT)
    for row in range(_ROWS):
        alone_BT = np.broadcast_to(model.token_ids_BT[row], model.token_ids_BT.shape)
        yield whole_BTV[row], model.logits(alone_BT)[row - 1]


def causality(model: LawModel) -> Sides:
    """Logits before a changed token do not change."""
    changed_BT = model.token_ids_BT.copy()
    changed_BT[:, _PART:] = (changed_BT[:, _PART:] + 1) % model.spec.vocab_size
    yield model.logits(model.token_ids_BT)[:, :_PART], model.logits(changed_BT)[:, :_PART]


def padding(model: LawModel) -> Sides:
    """Positions of a negative segment are seen by nobody, wherever they stand and whatever they hold."""
    ids_BT, (positions_BT, segments_BT) = model.token_ids_BT, _places(_ROWS, POSITIONS)
    kept_BTV = model.logits(ids_BT)[:, :_PART]  # causal: later tokens do not matter
    segments_BT[:, _PART:] = -1
    other_BT = np.where(segments_BT < 0, (ids_BT + 1) % model.spec.vocab_size, ids_BT).astype(np.int32)
    yield kept_BTV, model.logits(other_BT, positions_BT, segments_BT)[:, :_PART]
    shift = POSITIONS - _PART
    positions_BT[:] = np.maximum(np.arange(POSITIONS) - shift, 0)
    segments_BT[:] = np.where(np.arange(POSITIONS) < shift, -1, 0)
    front_BT = np.concatenate([ids_BT[:, _PART:], ids_BT[:, :_PART]], axis=1)
    yield kept_BTV, model.logits(front_BT, positions_BT, segments_BT)[:, shift:]


def packing(model: LawModel) -> Sides:
    """Documents packed in one row, positions restarting, give the logits that each gives alone."""
    ids_BT, (positions_BT, segments_BT) = model.token_ids_BT, _places(_ROWS, POSITIONS)
    positions_BT[:, _PART:] -= _PART
    segments_BT[:, _PART:] = 1
    packed_BTV = model.logits(ids_BT, positions_BT, segments_BT)
    yield packed_BTV[:, :_PART], model.logits(ids_BT)[:, :_PART]
    second_BT = np.concatenate([ids_BT[:, _PART:], ids_BT[:, :_PART]], axis=1)
    yield packed_BTV[:, _PART:], model.logits(second_BT)[:, : POSITIONS - _PART]


def relative_positions(model: LawModel) -> Sides:
    """Rotary positions are relative: a common offset changes nothing."""
    positions_BT, _ = _places(_ROWS, POSITIONS)
    yield model.logits(model.token_ids_BT), model.logits(model.token_ids_BT, positions_BT + OFFSET)


def wide_window(model: LawModel) -> Sides:
    """A window as long as the text is no window."""
    wide = replace(model, spec=replace(model.spec, sliding_window=POSITIONS, window_from_layer=0))
    unlimited = replace(model.spec, sliding_window=None, window_from_layer=0)
    none = model if model.spec == unlimited else replace(model, spec=unlimited)
    yield wide.logits(model.token_ids_BT), none.logits(model.token_ids_BT)


def repeated_heads(model: LawModel) -> Sides:
    """Grouped-query attention is multi-head attention whose key/value heads are repeated, each for its group."""
    spec, arrays = model.spec, dict(model.arrays)
    for name, value in model.arrays.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads_KH = value.reshape(spec.num_kv_heads, spec.head_width, -1)
            arrays[name] = np.repeat(heads_KH, spec.group_size, axis=0).reshape(-1, *value.shape[1:])
    full = replace(model, spec=replace(spec, num_kv_heads=spec.num_heads), arrays=arrays)
    yield model.logits(model.token_ids_BT), full.logits(model.token_ids_BT)


def decode(model: LawModel) -> Sides:
    """Prefill and one-token steps through the cache give the full forward's logits."""
    stepped_BTV = model.stepped(model.params, model.half.array(model.token_ids_BT))
    yield model.logits(model.token_ids_BT), model.half.numpy(stepped_BTV)


def accumulation(model: LawModel) -> Sides:
    """Gradients of micro-batches add up to the gradient of the batch, tokens counted over all of it."""
    count, whole = model.gradients(model.batch())
    parts = [model.gradients(model.batch(row)) for row in range(_ROWS)]
    yield np.array([count]), np.array([sum(part[0] for part in parts)])
    for name, value in whole.items():
        yield value, np.sum([part[1][name] for part in parts], axis=0)


def recomputation(model: LawModel) -> Sides:
    """Activation checkpointing changes memory, not gradients."""
    _, plain = model.gradients(model.batch())
    _, again = model.gradients(model.batch(), recompute=True)
    for name, value in plain.items():
        yield value, again[name]


def resume(model: LawModel) -> Sides:
    """Optimizer state taken out and put back goes on as if nothing had happened."""
    step, optim, options = model.half.module("train.step"), model.half.module("train.optim"), AdamWOptions()
    state = model.train(model.train(step.init_state(model.params, options=options)))
    first, second, count = optim.moments(state.optimizer)
    resumed = state._replace(optimizer=optim.state_from_moments(first, second, count, options=options))
    for _ in range(2):
        state, resumed = model.train(state), model.train(resumed)
    for name in tensor_table(model.spec):
        yield model.half.numpy(state.params[name]), model.half.numpy(resumed.params[name])


LAWS: tuple[Callable[[LawModel], Sides], ...] = (
    batch_split, causality, padding, packing, relative_positions, wide_window, repeated_heads, decode, accumulation,
    recomputation, resume,
)  # fmt: skip


def run(context: Context) -> Iterator[Check]:
    """Yield one check per law and half."""
    cases = context.budget(quick=1, default=3, full=6)
    for half in context.halves:
        models = [model_of(half, (context.seed, 37, index), context.lane) for index in range(cases)]
        for law in LAWS:
            context.advance(f"laws: {half.name}, {law.__name__}")
            yield _check(context, half, law, models)


def _check(context: Context, half: Half, law: Callable[[LawModel], Sides], models: list[LawModel]) -> Check:
    compared, observed, limit, where = 0, 0.0, 0.0, 0
    for index, model in enumerate(models):
        limit = max(limit, law_limit(model.spec, num_positions=POSITIONS + OFFSET))
        for left, right in law(model):
            difference = relative_difference(left, right)
            compared += left.size
            if not difference.value <= observed:
                observed, where = difference.value, index
    return Check(
        subject="laws",
        name=law.__name__.replace("_", " "),
        question=Question.LAW,
        sides=(half.name,),
        verdict=Verdict.PARITY if compared and observed <= limit else Verdict.DIVERGENCE,
        cases=len(models),
        compared=compared,
        observed=observed,
        limit=limit,
        device=context.device,
        case={"law": law.__name__, "seed": [context.seed, 37, where]},
        detail=(law.__doc__ or "").strip(),
    )


def model_of(half: Half, seed: tuple[int, ...], lane: str) -> LawModel:
    """Draw the model that the laws of one case are tried on."""
    rng = np.random.default_rng(seed)
    spec = family_spec(ARCHITECTURES[(seed[0] + seed[-1]) % 4], rng)
    if lane == QUICK:  # one layer compiles in half the time, and every law but depth is about one layer
        spec = replace(spec, num_layers=1, window_from_layer=0)
    token_ids_BT = rng.integers(0, spec.vocab_size, (_ROWS, POSITIONS)).astype(np.int32)
    return LawModel(half=half, spec=spec, arrays=random_weights(spec, rng), token_ids_BT=token_ids_BT)


def _places(num_rows: int, num_positions: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    positions_BT = np.broadcast_to(np.arange(num_positions, dtype=np.int32), (num_rows, num_positions)).copy()
    return positions_BT, np.zeros_like(positions_BT)


SUBJECT = Subject(
    name="laws",
    about="batch split, causality, padding, packing, decode = forward, accumulation, recomputation, resume: one side alone",
    run=run,
)

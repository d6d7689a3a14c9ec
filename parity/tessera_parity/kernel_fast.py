"""The fast path's wiring: `tessera_torch.fast` over the kernels' references, all in float64, against oracle and plain
half. Packed weights are held against the oracle on the weights written out.

With references in place of kernels nothing rounds but float64, so the question is the first one: same mathematics. What
the kernels round is asked by the ops `fast_path` and `packed_decode` of `kernel_cases`.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from tessera_parity.budget import gradient_limit, model_limit, optimizer_limit
from tessera_parity.compare import relative_difference
from tessera_parity.exact import Equalities
from tessera_parity.families import family_spec, random_weights
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import Context
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import IGNORE_INDEX, AdamWOptions, DistilOptions, Divergence, Objective
from tessera_shared.spec import ARCHITECTURES, ModelSpec

Arrays = dict[str, np.ndarray[Any, Any]]

OBJECTIVES = (
    Objective(z_loss=1e-3),
    Objective(distil=DistilOptions(divergence=Divergence.FORWARD_KL, temperature=2.0)),
    Objective(distil=DistilOptions(divergence=Divergence.GENERALIZED_JSD, beta=0.3, hard_weight=0.25, temperature=1.5)),
    Objective(distil=DistilOptions(divergence=Divergence.SKEW_KL, alpha=0.2)),
)

PACKED = ("w4", "w8", "w8g128")
"""Formats whose products are exact in float64; `fp8` rounds activations."""

OPTIONS = AdamWOptions(clip_norm=0.5)
ROWS, LENGTH = 2, 9


class Worst:
    """The largest share of its limit that any tensor used."""

    def __init__(self, name: str, sides: tuple[str, str]) -> None:
        self.name, self.sides = name, sides
        self.cases, self.compared, self.observed, self.limit, self.where = 0, 0, 0.0, 1.0, ""

    def add(self, ours: Mapping[str, Any], truth: Mapping[str, Any], limit: float, where: str) -> None:
        """Compare tensors by name, relative to each one's largest magnitude."""
        self.cases += 1
        for name, value in truth.items():
            found = relative_difference(np.asarray(ours[name]), np.asarray(value)).value
            self.compared += np.asarray(value).size
            if not found / limit <= self.observed / self.limit:
                self.observed, self.limit, self.where = found, limit, f"{name}, {where}"

    def check(self) -> Check:
        """Return the verdict."""
        return Check(
            subject="kernels",
            name=f"fast path: {self.name}",
            question=Question.MATHEMATICS,
            sides=self.sides,
            verdict=Verdict.PARITY if self.compared and self.observed <= self.limit else Verdict.DIVERGENCE,
            cases=self.cases,
            compared=self.compared,
            observed=self.observed,
            limit=self.limit,
            detail=self.where,
        )


def fast_checks(context: Context) -> Iterator[Check]:
    """Yield logits, logits from packed weights, gradients, one update and generated tokens of the fast path's wiring."""
    half = context.torch
    assert half is not None, "the subject looked"
    logits = Worst("logits", ("numpy", "torch fast"))
    packed = Worst("steps with packed weights", ("numpy", "torch fast"))
    grads = Worst("loss and gradients", ("torch", "torch fast"))
    updates = Worst("weights and moments after an update", ("torch", "torch fast"))
    tokens = Equalities("kernels", "fast path: tokens", ("torch", "torch fast"))
    for index in range(context.budget(quick=2, default=8, full=24)):
        context.advance(f"kernels: fast path {index + 1}")
        rng = np.random.default_rng((context.seed, 61, index))
        spec = family_spec(ARCHITECTURES[index % 4], rng)
        arrays, batch = random_weights(spec, rng), packed_batch(spec, rng)
        where = f"case {index}"
        limit = model_limit(spec, num_positions=LENGTH)
        logits.add(
            fast_logits(half, spec, arrays, batch), oracle_logits(context.numpy, spec, arrays, batch), limit, where
        )
        objective = OBJECTIVES[index % len(OBJECTIVES)]
        form = PACKED[index % len(PACKED)]
        packed.add(*packed_and_written(context.numpy, half, spec, arrays, batch, form), limit, f"{where}, {form}")
        ours, theirs = (
            step_of(half, spec, arrays, batch, objective, rng_seed=index, fast=fast) for fast in (True, False)
        )
        limit = gradient_limit(spec, num_positions=LENGTH)
        grads.add(ours[0], theirs[0], limit, f"{where}, {objective}")
        updates.add(ours[1], theirs[1], limit + optimizer_limit(1), f"{where}, {objective}")
        tokens.arrays(
            tokens_of(half, spec, arrays, batch, fast=True), tokens_of(half, spec, arrays, batch, fast=False), where
        )
    yield logits.check()
    yield packed.check()
    yield grads.check()
    yield updates.check()
    yield tokens.check("greedy and sampled, one after another through pages")


def packed_batch(spec: ModelSpec, rng: np.random.Generator) -> Batch:
    """Return rows of one, two or three documents with padding at the end of some, and labels that count or not."""
    ids_BT = rng.integers(0, spec.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    segments_BT = np.zeros((ROWS, LENGTH), dtype=np.int32)
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    for row in range(ROWS):
        cuts = sorted(int(cut) for cut in rng.integers(1, LENGTH, rng.integers(0, 3)))
        for number, cut in enumerate(cuts, 1):
            segments_BT[row, cut:] = number
            positions_BT[row, cut:] = np.arange(LENGTH - cut)
        padding = int(rng.integers(0, 3))
        if padding:
            segments_BT[row, -padding:], positions_BT[row, -padding:] = -1, -1
    labels_BT = np.where(
        (segments_BT < 0) | (rng.random((ROWS, LENGTH)) < 0.2),
        IGNORE_INDEX,
        rng.integers(0, spec.vocab_size, (ROWS, LENGTH)),
    ).astype(np.int32)
    return Batch(ids_BT, labels_BT, positions_BT, segments_BT)


def fast_logits(half: Half, spec: ModelSpec, arrays: Arrays, batch: Batch) -> Arrays:
    """Return the fast path's logits of real positions, through the kernels' references."""
    given = {name: half.array(value) for name, value in arrays.items()}
    logits_BTV = half.module("fast.transformer").forward(
        given, half.array(batch.token_ids_BT), spec=spec, numerics=FLOAT64, ops=half.module("kernels").reference_ops(),
        positions_BT=half.array(batch.positions_BT), segments_BT=half.array(batch.segments_BT),
    )  # fmt: skip
    return {"logits": half.numpy(logits_BTV)[batch.segments_BT >= 0]}


def oracle_logits(oracle: Half, spec: ModelSpec, arrays: Arrays, batch: Batch) -> Arrays:
    """Return the oracle's logits of real positions."""
    logits_BTV = oracle.module("model.transformer").forward(
        arrays, batch.token_ids_BT, spec=spec, numerics=FLOAT64, positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
    )  # fmt: skip
    return {"logits": logits_BTV[batch.segments_BT >= 0]}


def packed_and_written(
    oracle: Half, half: Half, spec: ModelSpec, arrays: Arrays, batch: Batch, form: str
) -> tuple[Arrays, Arrays]:
    """Return logits from packed weights, one step a token after a prompt of 4, and the oracle's from the same weights
    written out."""
    from tessera_kernels.quant_weight import dequantize  # here, because the harness is read without torch too

    ids_BT = half.array(batch.token_ids_BT)
    held = half.module("fast.packed_weights").pack_model(
        arrays, weights=form, spec=spec, numerics=FLOAT64, device=half.device
    )
    ops = half.module("kernels").reference_ops()
    project = half.module("fast.projections").packed_projections(held.params, held.packed, ops.packed())
    ours_BTV = paged_logits(
        half.module("fast.decode"), held.params, ids_BT, prompt=4, spec=spec, numerics=FLOAT64, ops=ops, project=project
    )
    written = {name: half.numpy(dequantize(weight, ours_BTV.dtype)) for name, weight in held.packed.items()}
    theirs_BTV = oracle.module("model.transformer").forward(
        arrays | written, batch.token_ids_BT, spec=spec, numerics=FLOAT64
    )
    return {"logits": half.numpy(ours_BTV)}, {"logits": theirs_BTV[:, 3:]}


def paged_logits(decode: ModuleType, params: Mapping[str, Any], ids_BT: Any, *, prompt: int, **given: Any) -> Any:
    """Return the logits of the prompt's last position and of every later token, one step each, [B, 1 + steps, V].

    `decode` is `tessera_torch.fast.decode` of some copy of the half; `given` is what its `forward_paged` takes besides.
    """
    rows, length = ids_BT.shape
    cache = decode.empty_pages(params, spec=given["spec"], numerics=given["numerics"], batch=rows, capacity=length)
    given["tools"] = given["ops"].decode()
    bounds = [0, *range(prompt, length + 1)]
    return decode.torch.stack(
        [decode.forward_paged(params, ids_BT[:, a:b], cache, start=a, **given) for a, b in pairwise(bounds)], dim=1
    )


def step_of(
    half: Half, spec: ModelSpec, arrays: Arrays, batch: Batch, objective: Objective, *, rng_seed: int, fast: bool
) -> tuple[Arrays, Arrays]:
    """Return (loss and gradients, weights and moments after an update) from the same moments, by either path.

    The batch is cut into one micro-batch a row. Moments start away from zero: an update from zero is the gradient's sign.
    """
    rng = np.random.default_rng((rng_seed, 67))
    params = {name: half.array(value) for name, value in arrays.items()}
    first = {name: half.array(np.array(0.01 * rng.standard_normal(value.shape))) for name, value in arrays.items()}
    second = {name: half.array(np.array(rng.uniform(0.01, 0.1, value.shape))) for name, value in arrays.items()}
    state = half.module("train.step").TrainState(params, half.module("train.optim").AdamWState(first, second, 3), 3)
    teacher = half.module("distil.teacher").Teacher(
        {name: value + 0.1 for name, value in params.items()}, spec, FLOAT64
    ) if objective.distil else None  # fmt: skip
    batches = [Batch(*(field[row : row + 1] for field in batch)) for row in range(ROWS)]
    given = {"spec": spec, "numerics": FLOAT64, "objective": objective, "teacher": teacher}
    if not fast:
        sums = [half.module("train.step").loss_and_grads(params, one, **given) for one in batches]
        grads = {name: sum(half.numpy(one[2][name]) for one in sums) for name in params}
        grads["loss"], grads["denominator"] = (sum(half.numpy(one[part]) for one in sums) for part in (0, 1))
        state, metrics = half.module("train.step").train_step(state, batches, lr=0.01, options=OPTIONS, **given)
    else:
        step, ops = half.module("fast.step"), half.module("kernels").reference_ops()
        state = step.fast_state(params, state.optimizer, spec=spec, numerics=FLOAT64)
        loss_sum, denominator = step.accumulate(state, batches, ops=ops, **given)
        views = {name: view for group in state.groups for name, view in group.grads.views.items()}
        grads = {name: half.numpy(views[name]).copy() for name in params}
        grads["loss"], grads["denominator"] = half.numpy(loss_sum), half.numpy(denominator)
        state, metrics = step.train_step(state, batches, lr=0.01, options=OPTIONS, ops=ops, **given)
    after = {f"weight {name}": half.numpy(value) for name, value in state.params.items()}
    after |= {f"first {name}": half.numpy(value) for name, value in state.optimizer.first.items()}
    after |= {f"second {name}": half.numpy(value) for name, value in state.optimizer.second.items()}
    after |= {name: half.numpy(value) for name, value in metrics.items()}
    return {name: np.asarray(value) for name, value in grads.items()}, after


def tokens_of(half: Half, spec: ModelSpec, arrays: Arrays, batch: Batch, *, fast: bool) -> np.ndarray[Any, Any]:
    """Return greedy and sampled continuations, [2, B, new tokens]."""
    params = {name: half.array(value) for name, value in arrays.items()}
    prompt, found = half.array(batch.token_ids_BT[:, :4]), []
    uniforms = half.array(np.random.default_rng(5).random((ROWS, 5)))
    for law in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 11, "top_p": 0.9173, "min_p": 0.01}):
        given = {"spec": spec, "numerics": FLOAT64, "num_tokens": 5, "uniforms_BT": uniforms, **law}
        if fast:
            given["ops"] = half.module("kernels").reference_ops()
        decode = half.module("fast.decode" if fast else "serve.decode")
        found.append(np.stack([half.numpy(ids_B) for ids_B in decode.stream_tokens(params, prompt, **given)], axis=1))
    return np.stack(found)

"""Optimizer: ten updates from the same gradients, weights and both moments compared after each; then whole training
steps.

Gradients are given, not computed, so that nothing amplifies a difference on its way: what departs here departs in the
update.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase, case_seed, model_case
from tessera_parity.compare import NEVER, Difference, compare_results, flatten, relative_difference, total_difference
from tessera_parity.halves import Half
from tessera_parity.result import Check
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_parity.subjects.gradients import batch_of, objective_of, teacher_in
from tessera_parity.tally import Tally, attempt
from tessera_shared import schedule
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import IGNORE_INDEX, AdamWOptions
from tessera_shared.tensors import tensor_table

STEPS = 10
SHAPES: dict[str, tuple[int, ...]] = {"matrix": (5, 3), "gain": (7,), "one": (1, 1)}
WATCHED = ("params", "first moment", "second moment", "count", "norm before clipping", "learning rate")


def run(context: Context) -> Iterator[Check]:
    """Yield one check per watched quantity and half, then one per half for training steps."""
    for half in context.halves:
        tallies = {name: _tally(context, half, name) for name in WATCHED}
        for index in range(context.budget(quick=6, default=25, full=70)):
            context.advance(f"optimizer: {half.name}, case {index + 1}")
            _updates(context, half, case_seed(context.seed, "optimizer", index), tallies)
        for tally in tallies.values():
            yield tally.check()
        yield _train_steps(context, half)


def _tally(context: Context, half: Half, name: str) -> Tally:
    return Tally(subject="optimizer", name=name, sides=("numpy", half.name), device=context.device, op="train.optim")


def drawn_options(rng: np.random.Generator) -> AdamWOptions:
    """Return AdamW options with every field drawn; small norms meet the clip as well as large ones."""
    return AdamWOptions(
        beta1=float(rng.choice([0.0, 0.8, 0.9])),
        beta2=float(rng.choice([0.95, 0.999])),
        eps=float(rng.choice([1e-8, 1e-4])),
        weight_decay=float(rng.choice([0.0, 0.1])),
        clip_norm=[None, 1e-3, 1.0][int(rng.integers(3))],
    )


def drawn_schedule(rng: np.random.Generator) -> schedule.Schedule:
    """Return a schedule whose warm-up and end both lie within the steps taken."""
    kind = str(rng.choice(["constant", "cosine", "linear"]))
    return schedule.Schedule(kind=kind, peak=float(rng.choice([1e-3, 0.3])), total_steps=STEPS - 1, warmup_steps=3)


def _updates(context: Context, half: Half, seed: tuple[int, ...], tallies: dict[str, Tally]) -> None:
    """Take ten updates on both sides and compare after each."""
    rng = np.random.default_rng(seed)
    options, plan = drawn_options(rng), drawn_schedule(rng)
    params = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    gradients = [drawn_gradients(rng) for _ in range(STEPS)]
    decay_mask = {"matrix": True, "gain": False, "one": bool(rng.random() < 0.5)}
    case = {"kind": "optimizer", "seed": list(seed)}
    truth = watch_updates(context.numpy, params, gradients, plan, options, decay_mask)
    found, raised = attempt(lambda: watch_updates(half, params, gradients, plan, options, decay_mask))
    for step in range(len(truth)):
        for name in WATCHED:
            limit = budget.EXACT if name == "count" else budget.optimizer_limit(step + 1)
            difference = raised or _worst_since(truth[: step + 1], found[step], name)
            tallies[name].add(difference, limit, case=case, new_case=step == 0, detail=f"step {step + 1}")


def _worst_since(
    truth: list[dict[str, dict[str, np.ndarray]]], found: dict[str, dict[str, np.ndarray]], name: str
) -> Difference:
    """Compare the last of `truth` with `found`. What cancels in an update is as large as the tensor has ever been."""
    expected = truth[-1][name]
    if expected.keys() != found[name].keys():
        return NEVER
    floors = {key: max(float(np.max(np.abs(past[name][key]))) for past in truth) for key in expected}
    differences = [relative_difference(expected[key], found[name][key], floor=floors[key]) for key in expected]
    return total_difference(differences)


def drawn_gradients(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return gradients of one scale per step, 1e-6 to 1e2; now and then a tensor gets exactly zero."""
    scale = 10.0 ** rng.uniform(-6.0, 2.0)
    return {name: rng.standard_normal(shape) * scale * (rng.random() > 0.1) for name, shape in SHAPES.items()}


def watch_updates(
    half: Half,
    params: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
    plan: schedule.Schedule,
    options: AdamWOptions,
    decay_mask: dict[str, bool],
) -> list[dict[str, dict[str, np.ndarray]]]:
    """Return what is watched, as NumPy, after each update by the given gradients."""
    step, optim = half.module("train.step"), half.module("train.optim")
    rates = half.shared("schedule")
    state = step.init_state({name: half.array(value) for name, value in params.items()}, options=options)
    seen = []
    for index, grads in enumerate(gradients):
        lr = rates.learning_rate(plan, index)
        brought = {name: half.array(value) for name, value in grads.items()}
        state, norm = step.apply_gradients(state, brought, lr=lr, options=options, decay_mask=decay_mask)
        first, second, count = optim.moments(state.optimizer)
        values = (state.params, first, second, np.array(int(half.numpy(count))), norm, np.array(lr))
        seen.append({name: flatten(half, value) for name, value in zip(WATCHED, values, strict=True)})
        state = state._replace(optimizer=optim.state_from_moments(first, second, count, options=options))
    return seen


def _train_steps(context: Context, half: Half) -> Check:
    """Whole steps over two micro-batches against the oracle's update by this half's own gradients, divided once."""
    tally = Tally(
        subject="optimizer", name="train_step", sides=("numpy", half.name), device=context.device, op="train.step"
    )
    cases = _step_cases(context)
    for index in range(context.budget(quick=1, default=6, full=15)):
        context.advance(f"optimizer: {half.name}, train_step {index + 1}")
        case = next(cases)
        options = drawn_options(np.random.default_rng((*case.seed, 6)))
        result, raised = attempt(lambda c=case, o=options: _step_difference(context, half, c, o))  # type: ignore[misc]
        tally.add(raised or result, budget.optimizer_limit(2), case=case.to_json())
    return tally.check()


def _step_cases(context: Context) -> Iterator[ModelCase]:
    """Yield models for whole steps; in the quick lane of one layer, which JAX compiles in half the time."""
    for index in count():
        case = model_case(case_seed(context.seed, "train_step", index))
        if context.lane != QUICK or case.spec.num_layers == 1:
            yield case


def _step_difference(context: Context, half: Half, case: ModelCase, options: AdamWOptions) -> Difference:
    """Return the worst difference in weights, moments and metrics after one step."""
    oracle, objective, step = context.numpy, objective_of(case), half.module("train.step")
    batches = micro_batches(case)
    teacher = teacher_in(half, case, objective)
    params = {name: half.array(value) for name, value in case.params.items()}
    common: dict[str, Any] = {"spec": case.spec, "numerics": FLOAT64, "objective": objective, "teacher": teacher}
    train = context.as_one(
        half,
        lambda state, batches: step.train_step(
            state, [Batch(*batch) for batch in batches], lr=0.01, options=options, **common
        ),
    )
    part_of = context.as_one(half, lambda params, batch: step.loss_and_grads(params, Batch(*batch), **common))
    brought = [tuple(half.array(field) for field in batch) for batch in batches]
    parts = [part_of(params, batch) for batch in brought]
    new, metrics = train(step.init_state(params, options=options), brought)
    divisor = max(sum(float(half.numpy(part[1])) for part in parts), 1.0)
    total = {name: np.asarray(sum(half.numpy(part[2][name]) for part in parts) / divisor) for name in case.params}
    expected, norm = _oracle_update(oracle, case, total, options)
    first, second, _ = half.module("train.optim").moments(new.optimizer)
    counted = sum(int(np.sum(batch.labels_BT != IGNORE_INDEX)) for batch in batches)
    loss = sum(float(half.numpy(part[0])) for part in parts) / divisor
    scale = sum(abs(float(half.numpy(part[0]))) for part in parts) / divisor
    differences = [
        compare_results(flatten(oracle, expected.params), flatten(half, new.params))[1],
        compare_results(flatten(oracle, expected.optimizer.first), flatten(half, first))[1],
        compare_results(flatten(oracle, expected.optimizer.second), flatten(half, second))[1],
        relative_difference(np.array(norm), half.numpy(metrics["grad_norm"])),
        relative_difference(np.array(loss), half.numpy(metrics["loss"]), floor=scale),
        relative_difference(np.array(float(counted)), np.array(float(half.numpy(metrics["num_tokens"])))),
        NEVER if int(half.numpy(np.asarray(new.step))) != 1 else relative_difference(np.array(1), np.array(1)),
    ]
    return total_difference(differences)


def micro_batches(case: ModelCase) -> list[Batch]:
    """Return a case's batch and the same tokens backwards: two micro-batches with unequal numbers of counted labels."""
    batch = batch_of(case)
    few = np.where(np.arange(case.labels_BT.shape[1]) < 2, case.labels_BT[:, ::-1], IGNORE_INDEX)
    return [
        batch,
        Batch(case.token_ids_BT[:, ::-1].copy(), few.astype(np.int32), batch.positions_BT, batch.segments_BT),
    ]


def _oracle_update(
    oracle: Half, case: ModelCase, grads: dict[str, np.ndarray], options: AdamWOptions
) -> tuple[Any, Any]:
    step = oracle.module("train.step")
    mask = {name: info.decay for name, info in tensor_table(case.spec).items()}
    state = step.init_state(case.params, options=options)
    new, norm = step.apply_gradients(state, grads, lr=0.01, options=options, decay_mask=mask)
    return new, norm


SUBJECT = Subject(name="optimizer", about="weights and both moments over ten updates; whole training steps", run=run)

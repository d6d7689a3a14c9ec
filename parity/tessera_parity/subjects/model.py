"""Model: question 1 on the model that `--model` names, at its real size: every tap, every gradient, ten training steps.

Only with `--model`. Generated cases find more bugs a second; this one says that the sizes people use are right too, and
is what the GPU lane runs on real shapes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase
from tessera_parity.compare import relative_difference
from tessera_parity.given_model import given_case
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import Context, Subject
from tessera_parity.subjects.forward import compare_taps
from tessera_parity.subjects.gradients import batch_of, compare_gradients
from tessera_parity.tally import Tally
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.tensors import num_parameters, tensor_table

STEPS = 10
LARGEST_BACKWARD = 250_000_000
"""Parameters above which gradients and steps are taken through the first two layers only: float64, on three sides at once."""


def run(context: Context) -> Iterator[Check]:
    """Yield taps and gradients as `forward` and `gradients` do, then weights and moments after ten steps."""
    if context.model is None:
        return
    context.advance(f"model: reading {context.model}")
    case = given_case(context.model, seed=context.seed)
    for half in context.halves:
        context.advance(f"model: {half.name}, forward")
        taps: dict[str, Tally] = {}
        compare_taps(context, half, case, taps, subject="model")
        for tally in taps.values():
            yield tally.check()
    case = _fitting(case)
    context.advance(f"model: gradients through {case.spec.num_layers} layers")
    gradients: dict[tuple[str, tuple[str, str]], Tally] = {}
    compare_gradients(context, case, gradients, subject="model", objective=Objective())
    for tally in gradients.values():
        yield tally.check()
    if context.torch is not None and context.jax is not None:
        yield from _steps(context, context.torch, context.jax, case)


def _fitting(case: ModelCase) -> ModelCase:
    if num_parameters(case.spec) <= LARGEST_BACKWARD:
        return case
    spec = replace(case.spec, num_layers=min(2, case.spec.num_layers))
    return replace(case, spec=spec, params={name: case.params[name] for name in tensor_table(spec)})


def _steps(context: Context, torch: Half, jax: Half, case: ModelCase) -> Iterator[Check]:
    context.advance(f"model: {STEPS} steps")
    finals = [_trained(half, case) for half in (torch, jax)]
    limit = budget.trajectory_limit(STEPS)
    for name, left, right in zip(("weights", "first moments", "second moments", "losses"), *finals, strict=True):
        worst = max(relative_difference(left[key], right[key]).value for key in left)
        yield Check(
            subject="model",
            name=f"{name} after {STEPS} steps",
            question=Question.MATHEMATICS,
            sides=("torch", "jax"),
            verdict=Verdict.PARITY if worst <= limit else Verdict.DIVERGENCE,
            cases=STEPS,
            compared=sum(value.size for value in left.values()),
            observed=worst,
            limit=limit,
            device=context.device,
            detail=f"{context.model}, {case.spec.num_layers} layers",
        )


def _trained(half: Half, case: ModelCase) -> tuple[dict[str, np.ndarray[Any, Any]], ...]:
    step, options = half.module("train.step"), AdamWOptions()
    batch = type(batch_of(case))(*(half.array(field) for field in batch_of(case)))

    def train_step(state: Any, fields: Any) -> Any:
        return step.train_step(
            state,
            [type(batch)(*fields)],
            lr=1e-3,
            spec=case.spec,
            numerics=FLOAT64,
            objective=Objective(),
            options=options,
        )

    compiled = half.compiled(train_step)
    state = step.init_state({name: half.array(value) for name, value in case.params.items()}, options=options)
    losses = []
    for _ in range(STEPS):
        state, metrics = compiled(state, tuple(batch))
        losses.append(float(half.numpy(metrics["loss"])))
    first, second, _ = half.module("train.optim").moments(state.optimizer)
    arrays = tuple({name: half.numpy(value) for name, value in part.items()} for part in (state.params, first, second))
    return (*arrays, {"loss": np.array(losses)})


SUBJECT = Subject(
    name="model", about="question 1 at full size on the model that --model names: taps, gradients, ten steps", run=run
)

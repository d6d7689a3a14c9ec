"""Gradients: of the training loss by every parameter, float64, between the halves and along the oracle's exact slope.

Some gradients are zero by algebra and differ from zero by rounding alone: a bias on the keys shifts every score of a
query alike, and softmax does not see it; with one visible key nothing about queries or keys matters. Such a tensor has
no magnitude to be relative to. Its scale is that of the terms that cancel: with P the probabilities and g the gradient
arriving at them, the softmax's backward P (g - sum P g) subtracts numbers as large as P (|g| + sum P |g|); carried back
to the parameters with random signs they are what its rounding errors would be carried back to, in units of the
roundoff.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tessera_parity import budget, draws
from tessera_parity.cases import ModelCase, case_seed, model_case
from tessera_parity.compare import Difference, relative_difference
from tessera_parity.half_numpy import NumpyHalf
from tessera_parity.halves import Array, Half
from tessera_parity.result import Check
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_parity.subjects.forward import tapped_forward
from tessera_parity.tally import Tally, attempt
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import Objective
from tessera_shared.spec import ModelSpec

STRUCTURAL_ZEROS = ("self_attn.k_proj.bias",)
"""Zero by algebra in every model without q/k norm and rotation of the bias by equal angles; said in the check's
detail."""


def run(context: Context) -> Iterator[Check]:
    """Yield one check per parameter class and pair of sides, and one for losses."""
    tallies: dict[tuple[str, tuple[str, str]], Tally] = {}
    for index in range(context.budget(quick=3, default=40, full=120)):
        context.advance(f"gradients: case {index + 1}")
        case = model_case(case_seed(context.seed, "gradients", index), pool=2 if context.lane == QUICK else 5)
        compare_gradients(
            context, case, tallies, objective=objective_of(case), recompute=index % 3 == 2 and context.lane != QUICK
        )
    for tally in tallies.values():
        yield tally.check()


def compare_gradients(
    context: Context,
    case: ModelCase,
    tallies: dict[tuple[str, tuple[str, str]], Tally],
    *,
    objective: Objective,
    recompute: bool = False,
    subject: str = "gradients",
) -> None:
    """Add one case's loss and gradients to `tallies`, by parameter class and pair of sides."""
    limit = budget.gradient_limit(case.spec, num_positions=case.token_ids_BT.size)
    slope_limit = budget.directional_limit(case.spec, num_positions=case.token_ids_BT.size)
    floors = cancelling_scale(context.numpy, context.halves[0], case, objective)
    slopes, directions = oracle_slopes(context.numpy, case, objective)
    loss = float(np.real(oracle_loss(context.numpy, case, objective)(case.params)))
    loss_scale = budget.log_probability_scale({"x_BTV": tapped_forward(context.numpy, case)["logits"]})
    found: dict[str, dict[str, np.ndarray]] = {}

    def add(name: str, sides: tuple[str, str], difference: Difference, bound: float, new_case: bool) -> None:
        layer, kind = split_parameter(name)
        key = (kind, sides)
        if key not in tallies:
            tallies[key] = Tally(subject=subject, name=kind, sides=sides, device=context.device, op=f"d/d {kind}")
        detail = "zero by algebra" if kind in STRUCTURAL_ZEROS and not case.spec.qk_norm else ""
        tallies[key].add(difference, bound, case=case.to_json(), layer=layer, new_case=new_case, detail=detail)

    for half in context.halves:
        result, raised = attempt(
            lambda h=half: loss_and_grads(h, case, objective, recompute=recompute, as_one=context.as_one)  # type: ignore[misc]
        )
        if raised:
            add("loss", ("numpy", half.name), raised, limit, True)
            continue
        value, grads = result
        found[half.name] = grads
        scale = loss_scale * case.token_ids_BT.size
        add("loss", ("numpy", half.name), relative_difference(np.array(loss), value, floor=scale), limit, True)
        for name, grad in grads.items():
            terms = max(float(np.sum(np.abs(grad * directions[name]))), floors[name] * np.sqrt(grad.size))
            slope = np.array(np.sum(grad * directions[name]))
            difference = relative_difference(np.array(slopes[name]), slope, floor=terms)
            add(
                name,
                ("numpy", half.name),
                difference,
                slope_limit,
                not name.startswith("model.layers.") or ".0." in name,
            )
    if len(found) == 2:
        for name, grad in found["torch"].items():
            difference = relative_difference(grad, found["jax"][name], floor=floors[name])
            add(name, ("torch", "jax"), difference, limit, not name.startswith("model.layers.") or ".0." in name)


def objective_of(case: ModelCase) -> Objective:
    """Return the objective of a case, from its seed: cross-entropy with or without z-loss, or a drawn distillation."""
    rng = np.random.default_rng((*case.seed, 2))
    if rng.random() < 0.5:
        return draws.objective_of(None, rng)
    options = draws.distil_options(case.spec.vocab_size, rng)
    return draws.objective_of(replace(options, real_vocab_size=case.spec.real_vocab_size), rng)


def teacher_of(case: ModelCase) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """Return the teacher's spec and weights: a model of the student's shape whose weights are noisy copies."""
    rng = np.random.default_rng((*case.seed, 3))
    noise = {name: rng.standard_normal(value.shape) * np.std(value) for name, value in case.params.items()}
    return case.spec, {name: value + 0.5 * noise[name] for name, value in case.params.items()}


def batch_of(case: ModelCase) -> Batch:
    """Return a case's integers as the data side hands them over."""
    return Batch(case.token_ids_BT, case.labels_BT, case.positions_BT, case.segments_BT)


def teacher_in(half: Half, case: ModelCase, objective: Objective) -> Any:
    """Return the teacher as a half wants it, or None for cross-entropy."""
    if objective.distil is None:
        return None
    spec, params = teacher_of(case)
    module = half.module("train.step" if half.name == "numpy" else "distil.teacher")
    return module.Teacher({name: half.array(value) for name, value in params.items()}, spec, FLOAT64)


AsOne = Callable[[Half, Callable[..., Any]], Callable[..., Any]]
"""`Context.as_one`: may compile a function of arrays as one."""


def step_by_step(half: Half, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it is."""
    del half
    return function


def loss_and_grads(
    half: Half, case: ModelCase, objective: Objective, *, recompute: bool = False, as_one: AsOne = step_by_step
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return a half's loss sum and its gradients by parameter, as NumPy."""
    step, teacher = half.module("train.step"), teacher_in(half, case, objective)
    function = as_one(
        half,
        lambda params, batch: step.loss_and_grads(
            params, Batch(*batch), spec=case.spec, numerics=FLOAT64, objective=objective, teacher=teacher,
            recompute=recompute,
        ),
    )  # fmt: skip
    params = {name: half.array(value) for name, value in case.params.items()}
    loss, _, grads = function(params, tuple(half.array(field) for field in batch_of(case)))
    return half.numpy(loss), {name: half.numpy(grad) for name, grad in grads.items()}


def oracle_loss(
    oracle: Half, case: ModelCase, objective: Objective
) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Return the oracle's loss sum as a function of the parameters, real or complex."""
    step, teacher = oracle.module("train.step"), teacher_in(oracle, case, objective)

    def loss(params: Mapping[str, np.ndarray]) -> np.ndarray:
        total: np.ndarray = step.batch_loss(
            params, batch_of(case), spec=case.spec, numerics=FLOAT64, objective=objective, teacher=teacher
        )[0]
        return total

    return loss


def oracle_slopes(
    oracle: Half, case: ModelCase, objective: Objective
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return, for each parameter, the oracle's exact slope along a random direction, and that direction."""
    assert isinstance(oracle, NumpyHalf)
    rng = np.random.default_rng((*case.seed, 4))
    loss = oracle_loss(oracle, case, objective)
    directions = {name: rng.standard_normal(value.shape) for name, value in case.params.items()}
    slopes = {
        name: oracle.directional_derivative(loss, case.params, {name: direction})
        for name, direction in directions.items()
    }
    return slopes, directions


def cancelling_scale(oracle: Half, half: Half, case: ModelCase, objective: Objective) -> dict[str, float]:
    """Return for every parameter the magnitude of the softmax-backward terms carried back to it (module docstring)."""
    taps = tapped_forward(oracle, case)
    probs = {name: value for name, value in taps.items() if name.endswith("attention.probs")}
    zeros = {name: half.array(np.zeros(value.shape)) for name, value in probs.items()}
    fixed = {name: half.array(value) for name, value in case.params.items()}
    _, arriving = half.value_and_grad(lambda deltas: _loss_with(half, case, objective, fixed, deltas), zeros)
    rng = np.random.default_rng((*case.seed, 5))
    cotangents = {}
    for name, value in probs.items():
        g = np.abs(half.numpy(arriving[name]))
        terms = value * (g + np.sum(value * g, axis=-1, keepdims=True))
        signs = rng.choice([-1.0, 1.0], terms.shape)
        cotangents[name.replace("probs", "scores")] = half.array(terms * signs)
    _, carried = half.value_and_grad(lambda params: _weighted_scores(half, case, params, cotangents), fixed)
    return {name: float(np.max(np.abs(half.numpy(grad)))) for name, grad in carried.items()}


def _loss_with(
    half: Half, case: ModelCase, objective: Objective, params: Mapping[str, Array], deltas: Mapping[str, Array]
) -> Array:
    """Return the loss with `deltas` added to the tapped values that they name."""

    def tap(name: str, value: Array) -> Array:
        return value + deltas[name] if name in deltas else value

    logits_BTV = _forward(half, case, params, tap)
    teacher = teacher_in(half, case, objective)
    targets = None if teacher is None else half.module("distil.teacher").teacher_logits(teacher, batch_of(case))
    loss = half.module("distil.losses").training_loss(
        logits_BTV, targets, half.array(case.labels_BT), objective=objective, numerics=FLOAT64
    )
    return loss[0]


def _weighted_scores(
    half: Half, case: ModelCase, params: Mapping[str, Array], cotangents: Mapping[str, Array]
) -> Array:
    total: list[Array] = []

    def tap(name: str, value: Array) -> Array:
        if name in cotangents:
            total.append((value * cotangents[name]).sum())
        return value

    _forward(half, case, params, tap)
    return sum(total[1:], start=total[0])


def _forward(half: Half, case: ModelCase, params: Mapping[str, Array], tap: Callable[[str, Array], Array]) -> Array:
    return half.module("model.transformer").forward(
        params,
        half.array(case.token_ids_BT),
        spec=case.spec,
        numerics=FLOAT64,
        positions_BT=half.array(case.positions_BT),
        segments_BT=half.array(case.segments_BT),
        tap=tap,
    )


def split_parameter(name: str) -> tuple[int | None, str]:
    """Return (layer, class) of a parameter: `model.layers.1.mlp.up_proj.weight` -> (1, "mlp.up_proj.weight")."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return int(parts[2]), ".".join(parts[3:])
    return None, name


SUBJECT = Subject(name="gradients", about="gradients by every parameter: the halves and the oracle's slopes", run=run)

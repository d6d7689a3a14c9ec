"""Probes of whole models: forward passes, gradients, losses, decoding."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.compare import flatten
from tessera_parity.halves import Array, Half
from tessera_parity.mutants.battery import SIZES, Observed, Probe, bring, calling, differentiating, directions
from tessera_parity.mutants.cases import battery_cases, prepared_logits
from tessera_parity.repro_op import Call
from tessera_parity.repro_state import Generated, RaggedCache
from tessera_parity.repro_training import Gradients
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import (
    Denominator,
    DistilOptions,
    Divergence,
    Objective,
    TemperatureScale,
    TopKForm,
)

DEPTH = 20 * SIZES["L"]
"""Operations between the tokens and a gradient of the battery's models."""


def forward_probes(seed: int) -> Iterator[Probe]:
    """Yield the logits of every battery model."""
    for index, case in enumerate(battery_cases(seed)):
        yield Probe(subject="forward", op="logits", observe=_forward(case), depth=DEPTH, model=index)


def gradient_probes(seed: int) -> Iterator[Probe]:
    """Yield `loss_and_grads`: distillation from a teacher, and cross-entropy with blocks recomputed."""
    cases = battery_cases(seed)
    objectives = (
        (1, Objective(distil=DistilOptions(temperature=2.0, hard_weight=0.3)), False),
        (0, Objective(z_loss=1e-2), True),
    )
    for index, objective, recompute in objectives:
        teacher = cases[0] if objective.distil is not None else None
        observe = _loss_and_grads(cases[index], objective, teacher, recompute=recompute)
        yield Probe(
            subject="gradients",
            op="recompute" if recompute else "backward",
            observe=observe,
            depth=2 * DEPTH,
            gradient=True,
            model=index,
            program=Gradients(case=cases[index], objective=objective, recompute=recompute),
        )


def loss_probes(seed: int) -> Iterator[Probe]:
    """Yield every loss with its gradient, the shared log-softmax first."""
    student_BTV, teacher_BTV, labels_BT = prepared_logits(seed)
    observe = calling("distil.losses", "log_softmax", student_BTV * 50.0, numerics=FLOAT64)
    yield Probe(subject="losses", op="log_softmax", observe=observe)
    ignored_BT = np.full_like(labels_BT, -100)
    for z_loss, labels in ((0.0, labels_BT), (0.1, labels_BT), (0.1, ignored_BT)):
        inputs = {"logits_BTV": student_BTV, "labels_BT": labels, "z_loss": z_loss}
        yield _loss("cross_entropy", {"student": student_BTV}, _cross_entropy(labels, z_loss), inputs)
    for name, options in _PER_TOKEN:
        inputs = {"student_BTV": student_BTV, "teacher_BTV": teacher_BTV, **options}
        yield _loss(name, {"student": student_BTV}, _per_token(name, teacher_BTV, options), inputs)
    for distil in _DISTILLATION:
        inputs = {
            "student_BTV": student_BTV, "teacher_BTV": teacher_BTV, "labels_BT": labels_BT, "options": distil
        }  # fmt: skip
        yield _loss(
            "distillation_loss", {"student": student_BTV}, _distillation(teacher_BTV, labels_BT, distil), inputs
        )
    yield from _hidden_losses(seed, labels_BT)


_TAU = ({"temperature": 1.0}, {"temperature": 2.5})
_PER_TOKEN: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, tau) for name in ("forward_kl", "reverse_kl", "soft_cross_entropy", "total_variation") for tau in _TAU),
    *(
        ("generalized_jsd", {"beta": beta, "temperature": 1.5, "detach_mixture": detach})
        for beta, detach in ((0.0, False), (0.3, False), (1.0, False), (0.3, True))
    ),
    ("skew_kl", {"alpha": 0.2, "temperature": 1.5}),
    ("skew_reverse_kl", {"alpha": 0.2, "temperature": 1.5}),
    *(("top_k_kl", {"k": 5, "form": form, "temperature": 1.5}) for form in TopKForm if form is not TopKForm.FULL),
)
_DISTILLATION = (
    DistilOptions(temperature=2.0, hard_weight=0.25),
    DistilOptions(temperature=2.0, temperature_scale=TemperatureScale.NONE, denominator=Denominator.ROWS),
    DistilOptions(temperature=2.0, real_vocab_size=15),
    DistilOptions(divergence=Divergence.GENERALIZED_JSD, beta=0.3),
    DistilOptions(top_k=4, top_k_form=TopKForm.TAIL),
)


def decode_probes(seed: int) -> Iterator[Probe]:
    """Yield cached forward passes, cache contents and generated tokens."""
    for index, case in enumerate(battery_cases(seed)):
        observe = calling(
            "serve.decode", "teacher_forced_logits", case.params, case.token_ids_BT, spec=case.spec,
            numerics=FLOAT64, prefill=4,
        )  # fmt: skip
        yield Probe(subject="decode", op="cache", observe=observe, depth=DEPTH, model=index)
        yield Probe(
            subject="decode",
            op="cache",
            observe=_ragged_cache(case),
            depth=DEPTH,
            model=index,
            program=RaggedCache(case=case),
        )
    case = battery_cases(seed)[0]
    uniforms_BT = np.random.default_rng((seed, 6)).random((SIZES["B"], 4))
    observe = calling(
        "serve.decode", "generate", case.params, case.token_ids_BT[:, :3], spec=case.spec, numerics=FLOAT64,
        num_tokens=4, uniforms_BT=uniforms_BT, temperature=1.3,
    )  # fmt: skip
    prompt = Generated(case=prompt_of(case, 3), uniforms_BT=uniforms_BT, sampling={"temperature": 1.3})
    yield Probe(subject="decode", op="generate", observe=observe, program=prompt)


def prompt_of(case: ModelCase, length: int) -> ModelCase:
    """Return the first tokens of every row."""
    return replace(
        case, token_ids_BT=case.token_ids_BT[:, :length], labels_BT=case.labels_BT[:, :length],
        positions_BT=case.positions_BT[:, :length], segments_BT=case.segments_BT[:, :length],
    )  # fmt: skip


def _forward(case: ModelCase) -> Callable[[Half], Observed]:
    return calling(
        "model.transformer", "forward", case.params, case.token_ids_BT, spec=case.spec, numerics=FLOAT64,
        positions_BT=case.positions_BT, segments_BT=case.segments_BT,
    )  # fmt: skip


def batch_of(case: ModelCase) -> Batch:
    """Return the integers of a case as the training step takes them."""
    return Batch(case.token_ids_BT, case.labels_BT, case.positions_BT, case.segments_BT)


def _loss_and_grads(
    case: ModelCase, objective: Objective, teacher: ModelCase | None, *, recompute: bool
) -> Callable[[Half], Observed]:
    def objective_of(half: Half, named: Mapping[str, Array]) -> Array:
        logits_BTV = _logits(half, case, named)
        theirs = (
            None if teacher is None else _logits(half, replace(case, spec=teacher.spec), bring(half, teacher.params))
        )
        module = half.module("distil.losses")
        labels_BT = half.array(case.labels_BT)
        total, _ = module.training_loss(logits_BTV, theirs, labels_BT, objective=objective, numerics=FLOAT64)
        return total

    plain = differentiating(objective_of, case.params)

    def observe(half: Half) -> Observed:
        if half.name == "numpy":
            return plain(half)
        given = None
        if teacher is not None:
            given = half.module("distil.teacher").Teacher(bring(half, teacher.params), teacher.spec, FLOAT64)
        total, count, grads = half.module("train.step").loss_and_grads(
            bring(half, case.params), bring(half, batch_of(case)), spec=case.spec, numerics=FLOAT64,
            objective=objective, teacher=given, recompute=recompute,
        )  # fmt: skip
        del count
        return project({"value": half.numpy(total)}, {name: half.numpy(grad) for name, grad in grads.items()}, case)

    return observe


def project(out: Observed, grads: Mapping[str, np.ndarray], case: ModelCase) -> Observed:
    """Return gradients along the directions that `differentiating` drew for the parameters of `case`."""
    ways = directions(case.params)
    return out | {name: np.array([np.vdot(way[name], grad) for way in ways]) for name, grad in grads.items()}


def _logits(half: Half, case: ModelCase, params: Mapping[str, Array]) -> Array:
    return half.module("model.transformer").forward(
        params, half.array(case.token_ids_BT), spec=case.spec, numerics=FLOAT64,
        positions_BT=half.array(case.positions_BT), segments_BT=half.array(case.segments_BT),
    )  # fmt: skip


def _loss(
    op: str,
    named: Mapping[str, np.ndarray],
    function: Callable[[Half, Mapping[str, Array]], Array],
    inputs: Mapping[str, Any],
) -> Probe:
    moving = tuple(name for name in ("logits_BTV", "student_BTV", "student_BTD", "projection_FD") if name in inputs)
    weights_BT = _weights(next(iter(named.values())).shape[:2])
    call = Call(
        path="distil.losses", function=op, inputs={**inputs, "numerics": FLOAT64}, moving=moving, weights_BT=weights_BT
    )
    return Probe(
        subject="losses", op=op, observe=differentiating(function, named), gradient=True, depth=4, program=call
    )


def _weights(shape: tuple[int, ...]) -> np.ndarray:
    return 1.0 + np.arange(np.prod(shape)).reshape(shape) / 7


def _cross_entropy(labels_BT: np.ndarray, z_loss: float) -> Callable[[Half, Mapping[str, Array]], Array]:
    def total(half: Half, named: Mapping[str, Array]) -> Array:
        module = half.module("distil.losses")
        loss, count = module.cross_entropy(named["student"], half.array(labels_BT), z_loss=z_loss, numerics=FLOAT64)
        return loss + 0.5 * count

    return total


def _per_token(
    name: str, teacher_BTV: np.ndarray, options: Mapping[str, Any]
) -> Callable[[Half, Mapping[str, Array]], Array]:
    weights_BT = _weights(teacher_BTV.shape[:2])

    def total(half: Half, named: Mapping[str, Array]) -> Array:
        function = getattr(half.module("distil.losses"), name)
        loss_BT = function(named["student"], half.array(teacher_BTV), numerics=FLOAT64, **options)
        return (loss_BT * half.array(weights_BT)).sum()

    return total


def _distillation(
    teacher_BTV: np.ndarray, labels_BT: np.ndarray, options: DistilOptions
) -> Callable[[Half, Mapping[str, Array]], Array]:
    def total(half: Half, named: Mapping[str, Array]) -> Array:
        module = half.module("distil.losses")
        loss, denominator = module.distillation_loss(
            named["student"], half.array(teacher_BTV), half.array(labels_BT), options=options, numerics=FLOAT64
        )
        return loss + 0.5 * denominator

    return total


def _hidden_losses(seed: int, labels_BT: np.ndarray) -> Iterator[Probe]:
    rng = np.random.default_rng((seed, 9))
    student_BTD, teacher_BTF = rng.standard_normal((2, 6, 12)), rng.standard_normal((2, 6, 10))
    projection_FD = rng.standard_normal((10, 12)) / 3.0
    for name in ("hidden_mse", "hidden_cosine"):

        def total(half: Half, named: Mapping[str, Array], name: str = name) -> Array:
            function = getattr(half.module("distil.losses"), name)
            loss, count = function(
                named["student"], half.array(teacher_BTF), named["projection"], half.array(labels_BT), numerics=FLOAT64
            )
            return loss + 0.5 * count

        inputs = {
            "student_BTD": student_BTD, "teacher_BTF": teacher_BTF, "projection_FD": projection_FD,
            "labels_BT": labels_BT,
        }  # fmt: skip
        yield _loss(name, {"student": student_BTD, "projection": projection_FD}, total, inputs)


def _ragged_cache(case: ModelCase) -> Callable[[Half], Observed]:
    """Two cached calls with rows of unequal length: padding is not written, slots stay where positions say."""
    positions = (np.array([[0, 1, 2, 3], [0, 1, -1, -1]], np.int32), np.array([[4], [2]], np.int32))

    def observe(half: Half) -> Observed:
        module, params = half.module("model.cache"), bring(half, case.params)
        cache = module.empty_cache(params, spec=case.spec, numerics=FLOAT64, batch=2, capacity=6)
        out: Observed = {}
        for step, positions_BT in enumerate(positions):
            tokens_BT = case.token_ids_BT[:, step * 4 : step * 4 + positions_BT.shape[1]]
            logits_BTV, cache = module.forward_cached(
                params, half.array(tokens_BT), cache, spec=case.spec, numerics=FLOAT64,
                positions_BT=half.array(positions_BT),
            )  # fmt: skip
            out |= flatten(half, dict(cache), f"cache{step}")
            out[f"logits{step}"] = half.numpy(logits_BTV)[positions_BT >= 0]
        return out

    return observe

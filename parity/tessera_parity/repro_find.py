"""What a report's divergence can be replayed on: its own case again, else the smaller things that its subject is made
of.

Everything is drawn again from the seed that the report holds. A candidate is a model case (localized first) or a
program; whoever asks tries them in order and keeps the first that departs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tessera_parity.cases import ModelCase, OpCase, model_case_from_json, op_case
from tessera_parity.families import family_spec, random_weights
from tessera_parity.given_model import given_case
from tessera_parity.halves import Half
from tessera_parity.mutants.battery import program_of
from tessera_parity.mutants.cases import battery_cases
from tessera_parity.mutants.diagnose import every_probe
from tessera_parity.repro_op import Call
from tessera_parity.repro_program import Program
from tessera_parity.repro_state import Forward
from tessera_parity.repro_training import Gradients, TrainStep, Updates
from tessera_parity.subjects import optimizer, streams
from tessera_parity.subjects.context import QUICK
from tessera_parity.subjects.gradients import objective_of
from tessera_parity.subjects.losses import DIFFERENTIABLE
from tessera_shared.errors import ParityError
from tessera_shared.schedule import learning_rate
from tessera_shared.spec import ARCHITECTURES

Candidate = ModelCase | Program

PARTS: dict[str, tuple[str, ...]] = {
    "trajectory": ("losses", "optimizer", "gradients", "training"),
    "model": ("losses", "optimizer", "gradients", "training"),
    "decode": ("sampling", "decode"),
    "streams": ("randomness",),
    "gradients": ("losses",),
    "optimizer": ("optimizer", "losses"),
}
"""Subjects of `parity run` whose own case may be too large or not recorded: what of the battery they are made of."""

WITH_MODEL = ("trajectory", "decode")
"""Those of them that run a whole model, so that the battery's two are asked first."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a run's settings a replay needs."""

    seed: int = 0
    lane: str = "default"
    model: str | None = None


def own_candidates(check: Mapping[str, Any], oracle: Half, setting: Setting) -> Iterator[Candidate]:
    """Yield the check's own case, drawn again, in every form that may show what departed.

    Raises `ParityError` when this version draws another case from its seed.
    """
    case = check.get("case") or {}
    subject, kind = check["subject"], case.get("kind")
    if subject == "model" and setting.model is not None:
        yield from _of_model(check, given_case(setting.model, seed=setting.seed))
    elif kind == "model":
        yield from _of_model(check, model_case_from_json(case))
    elif kind == "op":
        yield from _of_op(case, oracle)
    elif kind == "optimizer":
        yield _updates(tuple(int(word) for word in case["seed"]))
    elif subject == "witness" and "family" in case:
        yield family_case(case["family"], tuple(int(word) for word in case["seed"]), rows=2, positions=13)
    elif subject == "decode" and check["name"] in ("teacher-forced logits", "cache contents"):
        for index in range(int(check["cases"])):
            quick = setting.lane == QUICK and index > 0  # as `decode` draws them
            family = ARCHITECTURES[index % 4]
            yield family_case(family, (setting.seed, 41, index), rows=2, positions=9, one_layer=quick)
    elif subject == "streams":
        yield from _known_answers()


def parts(check: Mapping[str, Any], oracle: Half, setting: Setting) -> Iterator[Candidate]:
    """Yield the battery's models and programs that a subject is made of."""
    subject = check["subject"]
    if subject in WITH_MODEL:
        yield from battery_cases(setting.seed)
    for probe in every_probe(setting.seed):
        if probe.subject in PARTS.get(subject, ()):
            program = program_of(oracle, probe)
            if program is not None:
                yield program


def family_case(family: str, seed: tuple[int, ...], *, rows: int, positions: int, one_layer: bool = False) -> ModelCase:
    """Return the model that `witness` and `decode` draw from a seed, on the same tokens."""
    rng = np.random.default_rng(seed)
    spec = family_spec(family, rng)
    spec = replace(spec, num_layers=1, window_from_layer=0) if one_layer else spec
    params = random_weights(spec, rng)
    token_ids_BT = rng.integers(0, spec.vocab_size, (rows, positions)).astype(np.int32)
    positions_BT = np.tile(np.arange(positions, dtype=np.int32), (rows, 1))
    return ModelCase(
        spec=spec, params=params, token_ids_BT=token_ids_BT, labels_BT=np.roll(token_ids_BT, -1, axis=1),
        positions_BT=positions_BT, segments_BT=np.zeros_like(positions_BT),
    )  # fmt: skip


def _of_model(check: Mapping[str, Any], case: ModelCase) -> Iterator[Candidate]:
    yield case
    if check["subject"] in ("gradients", "optimizer"):
        objective = objective_of(case)
        yield from (Gradients(case=case, objective=objective, recompute=recompute) for recompute in (False, True))
    if check["subject"] == "optimizer":
        options = optimizer.drawn_options(np.random.default_rng((*case.seed, 6)))
        yield TrainStep(case=case, options=options, lr=0.01)
    yield Forward(case=case)


def _of_op(case: Mapping[str, Any], oracle: Half) -> Iterator[Candidate]:
    path, _, function = case["function"].rpartition(".")
    signature = getattr(oracle.module(path), function, None)
    if signature is None:
        raise ParityError(
            f"function = {case['function']!r}: expected one that the oracle has, because a repro is held against it; try "
            "parity run ops"
        )
    drawn: OpCase = op_case(case["function"], signature, case["seed"], sizes=case["sizes"], style=case["style"])
    call = Call(path=path, function=function, inputs=drawn.inputs, sizes=drawn.sizes)
    yield call
    moving = tuple(name for name in DIFFERENTIABLE if drawn.inputs.get(name) is not None)
    if path == "distil.losses" and moving:
        rng = np.random.default_rng((*drawn.seed, 1))
        weights_BT = rng.standard_normal((drawn.sizes["B"], drawn.sizes["T"]))
        yield Call(
            path=path, function=function, inputs=drawn.inputs, sizes=drawn.sizes, moving=moving, weights_BT=weights_BT
        )


def _updates(seed: tuple[int, ...]) -> Updates:
    """Return what `optimizer` draws from a seed; the draws stand in the same order there."""
    rng = np.random.default_rng(seed)
    options, plan = optimizer.drawn_options(rng), optimizer.drawn_schedule(rng)
    params = {name: rng.standard_normal(shape) for name, shape in optimizer.SHAPES.items()}
    gradients = tuple(optimizer.drawn_gradients(rng) for _ in range(optimizer.STEPS))
    decay = {"matrix": True, "gain": False, "one": bool(rng.random() < 0.5)}
    rates = tuple(learning_rate(plan, index) for index in range(optimizer.STEPS))
    return Updates(params=params, gradients=gradients, rates=rates, options=options, decay=decay)


def _known_answers() -> Iterator[Candidate]:
    for counter, key, _ in streams.KNOWN_ANSWERS:
        inputs = {"key_2": np.array(key, np.uint32), "counters_X2": np.array([counter], np.uint32)}
        yield Call(path="randomness", function="threefry_2x32", inputs=inputs)

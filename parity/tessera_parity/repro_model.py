"""Repro files of a whole model: forward tap, cached decoding, or gradient, on the shrunk case."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.compare import relative_difference
from tessera_parity.halves import Half
from tessera_parity.localize import (
    SURPRISES,
    Culprit,
    gradient_limit,
    localize_backward,
    localize_forward,
    oracle_derivative,
    record_taps,
)
from tessera_parity.localize_decode import decoded_logits, localize_decode, prefill_of
from tessera_parity.repro_files import Point, point_of, write_file
from tessera_parity.repro_source import Source, module_of
from tessera_parity.shrink import Shrunk, shrink
from tessera_shared.batch import Batch
from tessera_shared.errors import ParityError
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import Objective


def write_model_repro(
    oracle: Half, half: Half, case: ModelCase, out: Path, *, name: str, max_attempts: int = 120
) -> tuple[list[Path], Shrunk, Culprit]:
    """Localize, shrink and write both files; return them with the shrunk case and the culprit.

    Raises `ParityError` when nothing departs on this case: a repro of nothing is not written.
    """
    culprit, question = _localize(oracle, half, case)
    if culprit is None or question is None:
        raise ParityError(
            f"repro of {name}: expected a divergence of {half.name} on this case, because a repro must show one; try "
            "the version and machine that wrote the report"
        )
    ask, op = question, culprit.op

    def fails(smaller: ModelCase) -> bool:
        try:
            found = ask(oracle, half, smaller)
        except SURPRISES:  # a broken half may also break on a cut case; that is another failure
            return False
        return found is not None and found.op == op

    shrunk = shrink(case, fails, max_attempts=max_attempts)
    found = ask(oracle, half, shrunk.case)
    assert found is not None, "the shrinker returns failing cases"
    writer = _forward_lines if ask is localize_forward else _decode_lines if ask is _decode else _gradient_lines
    paths = []
    for side in (half.name, "numpy"):
        source = Source()
        lines, point = writer(oracle, half, shrunk, found, side, source)
        paths.append(write_file(out, name, side, source, lines, point, found))
    return paths, shrunk, found


_Question = Callable[[Half, Half, ModelCase], Culprit | None]


def _backward(oracle: Half, half: Half, case: ModelCase) -> Culprit | None:
    return localize_backward(oracle, half, None, case)


def _decode(oracle: Half, half: Half, case: ModelCase) -> Culprit | None:
    """Localize through the cache, where the logits depart as well: a file shows what comes out."""
    culprit = localize_decode(oracle, half, case)
    if culprit is None:
        return None
    gap = relative_difference(decoded_logits(half, case), decoded_logits(oracle, case))
    return culprit if gap.value > culprit.limit else None


def _localize(oracle: Half, half: Half, case: ModelCase) -> tuple[Culprit | None, _Question | None]:
    questions: tuple[_Question, ...] = (localize_forward, _backward, _decode)
    for question in questions:
        culprit = question(oracle, half, case)
        if culprit is not None:
            return culprit, question
    return None, None


def _case_lines(shrunk: Shrunk, source: Source) -> list[str]:
    case = shrunk.case
    lines = [f"SPEC = {source.of(case.spec)}"]
    if shrunk.values_seed is not None:
        source.imports.setdefault("tessera_shared.tensors", set()).add("tensor_table")
        lines += [
            f"rng = np.random.default_rng({shrunk.values_seed})",
            "weights = {",
            "    name: rng.standard_normal(info.shape) / np.sqrt(info.shape[-1]) if len(info.shape) == 2",
            '    else rng.standard_normal(info.shape) / 4 + (info.init == "ones")',
            "    for name, info in tensor_table(SPEC).items()",
            "}",
        ]
    else:
        lines += ["weights = {"]
        lines += [f"    {name!r}: {source.of(value, name)}," for name, value in case.params.items()]
        lines += ["}"]
    source.imports.setdefault("tessera_shared.numerics", set()).add("FLOAT64")
    lines += [
        f"token_ids_BT = array({source.of(case.token_ids_BT, 'token_ids')})",
        f"labels_BT = array({source.of(case.labels_BT, 'labels')})",
        f"positions_BT = array({source.of(case.positions_BT, 'positions')})",
        f"segments_BT = array({source.of(case.segments_BT, 'segments')})",
        "params = {name: array(value) for name, value in weights.items()}",
    ]
    return lines


def _forward_lines(
    oracle: Half, half: Half, shrunk: Shrunk, culprit: Culprit, side: str, source: Source
) -> tuple[list[str], Point]:
    case = shrunk.case
    truth, own = record_taps(oracle, case), record_taps(half, case)
    gaps = {name: relative_difference(own[name], value) for name, value in truth.items() if name in own}
    tap = next((name for name, gap in gaps.items() if gap.value > culprit.limit), None)
    tap = tap if tap is not None else max(gaps, key=lambda name: gaps[name].value)
    gap = gaps[tap]
    where = gap.where or (0,) * truth[tap].ndim
    lines = [
        *_case_lines(shrunk, source),
        "result = {}",
        "forward(",
        "    params, token_ids_BT, spec=SPEC, numerics=FLOAT64, positions_BT=positions_BT, segments_BT=segments_BT,",
        "    tap=lambda name, value: result.setdefault(name, value),",
        ")",
    ]
    source.imports.setdefault(module_of(side, "model.transformer"), set()).add("forward")
    return lines, point_of(
        f"{tap}{list(where)}", f"result[{tap!r}][{where}]", own[tap][where], truth[tap][where], gap.scale, culprit
    )


def _decode_lines(
    oracle: Half, half: Half, shrunk: Shrunk, culprit: Culprit, side: str, source: Source
) -> tuple[list[str], Point]:
    case = shrunk.case
    prefill = prefill_of(case)
    own, truth = decoded_logits(half, case), decoded_logits(oracle, case)
    gap = relative_difference(own, truth)
    lines = [
        *_case_lines(shrunk, source),
        f"result = teacher_forced_logits(params, token_ids_BT, spec=SPEC, numerics=FLOAT64, prefill={prefill})",
    ]
    source.imports.setdefault(module_of(side, "serve.decode"), set()).add("teacher_forced_logits")
    return lines, point_of(
        f"logits{list(gap.where)} with prefill {prefill}", f"result[{gap.where}]", own[gap.where], truth[gap.where],
        gap.scale,
        culprit,
    )  # fmt: skip


def _gradient_lines(
    oracle: Half, half: Half, shrunk: Shrunk, culprit: Culprit, side: str, source: Source
) -> tuple[list[str], Point]:
    case = shrunk.case
    batch = Batch(case.token_ids_BT, case.labels_BT, case.positions_BT, case.segments_BT)
    _, _, grads = half.module("train.step").loss_and_grads(
        {name: half.array(value) for name, value in case.params.items()},
        Batch(*(half.array(field) for field in batch)),
        spec=case.spec, numerics=FLOAT64, objective=Objective(),
    )  # fmt: skip
    name, where, own, truth, scale = _worst_gradient(oracle, case, {n: half.numpy(g) for n, g in grads.items()})
    source.imports.setdefault("tessera_shared.batch", set()).add("Batch")
    source.imports.setdefault("tessera_shared.objectives", set()).add("Objective")
    lines = [*_case_lines(shrunk, source), "batch = Batch(token_ids_BT, labels_BT, positions_BT, segments_BT)"]
    if side == "numpy":
        source.imports.setdefault(module_of(side, "train.step"), set()).add("batch_loss")
        lines += [
            "step = np.zeros(weights[NAME].shape, complex)",
            "step[WHERE] = 1e-30j  # a complex step: the slope without cancellation",
            "loss, _ = batch_loss(",
            "    {**params, NAME: params[NAME] + step}, batch, spec=SPEC, numerics=FLOAT64, objective=Objective()",
            ")",
            "result = np.imag(loss) / 1e-30",
        ]
    else:
        source.imports.setdefault(module_of(side, "train.step"), set()).add("loss_and_grads")
        lines += ["_, _, grads = loss_and_grads(params, batch, spec=SPEC, numerics=FLOAT64, objective=Objective())"]
        lines += ["result = grads[NAME][WHERE]"]
    lines = [f"NAME, WHERE = {name!r}, {where}", *lines]
    point = point_of(f"gradient of {name} at {list(where)}", "result", own, truth, scale, culprit)
    return lines, replace(point, limit=gradient_limit(case))


def _worst_gradient(
    oracle: Half, case: ModelCase, grads: Mapping[str, np.ndarray]
) -> tuple[str, tuple[int, ...], float, float, float]:
    """Return the parameter's number whose gradient departs most from the oracle's, every number looked at (cases are
    small)."""
    worst: tuple[float, str, tuple[int, ...], float, float] = (-1.0, "", (), 0.0, 0.0)
    scale = max(float(np.max(np.abs(grad))) for grad in grads.values())
    for name, grad in grads.items():
        order = np.argsort(-np.abs(grad), axis=None)[:64]
        for flat in order:
            unit = np.zeros(grad.size)
            unit[flat] = 1.0
            truth = oracle_derivative(oracle, case, name, unit.reshape(grad.shape))
            scale = max(scale, abs(truth))
            gap = abs(float(grad.flat[flat]) - truth)
            if gap > worst[0]:
                where = tuple(int(i) for i in np.unravel_index(int(flat), grad.shape))
                worst = (gap, name, where, float(grad.flat[flat]), truth)
    return worst[1], worst[2], worst[3], worst[4], scale

"""Repro files of a whole model: forward tap, cached decoding, or gradient, on the shrunk case."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.compare import relative_difference
from tessera_parity.halves import Half
from tessera_parity.localize import (
    BACKWARD,
    FORWARD,
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
from tessera_parity.shrink import Shrunk, is_seeded, shrink
from tessera_shared.batch import Batch
from tessera_shared.errors import ParityError
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import Objective


def write_model_repro(
    oracle: Half, half: Half, case: ModelCase, out: Path, *, name: str, max_attempts: int = 120
) -> tuple[list[Path], Shrunk, Culprit]:
    """Localize, shrink and write both files; return them with the shrunk case and the culprit.

    `oracle` is whoever is held to be right: a half, where the oracle itself is the suspect. Raises `ParityError` when
    nothing departs on this case: a repro of nothing is not written.
    """
    located = locate(oracle, half, case)
    if located is None:
        raise ParityError(
            f"repro of {name}: expected a divergence of {half.name} on this case, because a repro must show one; try "
            "the version and machine that wrote the report"
        )
    return write_located(oracle, half, case, located, out, name=name, max_attempts=max_attempts)


def write_located(
    oracle: Half, half: Half, case: ModelCase, located: "Located", out: Path, *, name: str, max_attempts: int = 120
) -> tuple[list[Path], Shrunk, Culprit]:
    """Shrink a case whose culprit is known, and write both files."""
    ask, op = _QUESTIONS[located.question], located.culprit.op

    def fails(smaller: ModelCase) -> bool:
        try:
            found = ask(oracle, half, smaller)
        except SURPRISES:  # a broken half may also break on a cut case; that is another failure
            return False
        return found is not None and found.op == op

    shrunk = shrink(case, fails, max_attempts=max_attempts)
    found = ask(oracle, half, shrunk.case)
    if found is None:  # the given case itself is taken at its word, and does not show in what comes out
        raise ParityError(
            f"repro of {name}: expected {op} to show in logits or gradients, because a file compares those; try another case"
        )
    paths = []
    for side in (half.name, oracle.name):
        source = Source()
        lines, point = _WRITERS[located.question](oracle, half, shrunk, found, side, source)
        paths.append(write_file(out, name, side, source, lines, replace(point, against=oracle.name), found))
    return paths, shrunk, found


@dataclass(frozen=True, kw_only=True)
class Located:
    """The first departing operation of a case, and the question that found it: forward, backward or decode."""

    culprit: Culprit
    question: str


def locate(oracle: Half, half: Half, case: ModelCase) -> Located | None:
    """Return what departs first on a case: forwards, backwards, or through the cache; None when nothing does.

    A half that raises is not located here (`repro_state.Forward` shows it).
    """
    for question, ask in _QUESTIONS.items():
        if question == BACKWARD and half.name == "numpy":
            continue  # the oracle has no reverse differentiation
        if question == DECODE and case.token_ids_BT.shape[1] < 2:
            continue  # nothing is left to decode
        culprit = ask(oracle, half, case)
        if culprit is not None:
            return Located(culprit=culprit, question=question)
    return None


_Question = Callable[[Half, Half, ModelCase], Culprit | None]


def _backward(oracle: Half, half: Half, case: ModelCase) -> Culprit | None:
    """Localize backwards, where a parameter's gradient departs as well: a file shows what comes out.

    On one token a softmax has no slope, so a tap's gradient may be wrong and reach no parameter.
    """
    culprit = localize_backward(oracle, half, None, case)
    if culprit is None:
        return None
    *_, own, truth, scale = _worst_gradient(oracle, case, _gradients(half, case))
    return culprit if not abs(own - truth) <= gradient_limit(case) * scale else None


def _gradients(half: Half, case: ModelCase) -> dict[str, np.ndarray]:
    batch = Batch(case.token_ids_BT, case.labels_BT, case.positions_BT, case.segments_BT)
    _, _, grads = half.module("train.step").loss_and_grads(
        {name: half.array(value) for name, value in case.params.items()},
        Batch(*(half.array(field) for field in batch)),
        spec=case.spec, numerics=FLOAT64, objective=Objective(),
    )  # fmt: skip
    return {name: half.numpy(grad) for name, grad in grads.items()}


def _decode(oracle: Half, half: Half, case: ModelCase) -> Culprit | None:
    """Localize through the cache, where the logits depart as well: a file shows what comes out."""
    culprit = localize_decode(oracle, half, case)
    if culprit is None:
        return None
    gap = relative_difference(decoded_logits(half, case), decoded_logits(oracle, case))
    return culprit if gap.value > culprit.limit else None


def case_lines(case: ModelCase, source: Source, *, name: str = "params") -> list[str]:
    """Return lines that make a case's weights (again from their seed where they have one) and integers."""
    source.needs("tessera_shared.numerics", "FLOAT64")
    return [
        f"SPEC = {source.of(case.spec)}",
        *weight_lines(case, source),
        f"token_ids_BT = array({source.of(case.token_ids_BT, 'token_ids')})",
        f"labels_BT = array({source.of(case.labels_BT, 'labels')})",
        f"positions_BT = array({source.of(case.positions_BT, 'positions')})",
        f"segments_BT = array({source.of(case.segments_BT, 'segments')})",
        f"{name} = {{name: array(value) for name, value in weights.items()}}",
    ]


def weight_lines(case: ModelCase, source: Source) -> list[str]:
    """Return lines that define `weights` as NumPy arrays."""
    if not is_seeded(case):
        rows = (f"    {name!r}: {source.of(value, name)}," for name, value in case.params.items())
        return ["weights = {", *rows, "}"]
    source.needs("tessera_shared.tensors", "tensor_table")
    return [
        "rng = np.random.default_rng(0)",
        "weights = {",
        "    name: rng.standard_normal(info.shape) / np.sqrt(info.shape[-1]) if len(info.shape) == 2",
        '    else rng.standard_normal(info.shape) / 4 + (info.init == "ones")',
        "    for name, info in tensor_table(SPEC).items()",
        "}",
    ]


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
        *case_lines(case, source),
        "result = {}",
        "forward(",
        "    params, token_ids_BT, spec=SPEC, numerics=FLOAT64, positions_BT=positions_BT, segments_BT=segments_BT,",
        "    tap=lambda name, value: result.setdefault(name, value),",
        ")",
    ]
    source.needs(module_of(side, "model.transformer"), "forward")
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
        *case_lines(case, source),
        f"result = teacher_forced_logits(params, token_ids_BT, spec=SPEC, numerics=FLOAT64, prefill={prefill})",
    ]
    source.needs(module_of(side, "serve.decode"), "teacher_forced_logits")
    return lines, point_of(
        f"logits{list(gap.where)} with prefill {prefill}", f"result[{gap.where}]", own[gap.where], truth[gap.where],
        gap.scale,
        culprit,
    )  # fmt: skip


def _gradient_lines(
    oracle: Half, half: Half, shrunk: Shrunk, culprit: Culprit, side: str, source: Source
) -> tuple[list[str], Point]:
    case = shrunk.case
    name, where, own, truth, scale = _worst_gradient(oracle, case, _gradients(half, case))
    source.needs("tessera_shared.batch", "Batch")
    source.needs("tessera_shared.objectives", "Objective")
    lines = [*case_lines(case, source), "batch = Batch(token_ids_BT, labels_BT, positions_BT, segments_BT)"]
    if side == "numpy":
        source.needs(module_of(side, "train.step"), "batch_loss")
        lines += [
            "step = np.zeros(weights[NAME].shape, complex)",
            "step[WHERE] = 1e-30j  # a complex step: the slope without cancellation",
            "loss, _ = batch_loss(",
            "    {**params, NAME: params[NAME] + step}, batch, spec=SPEC, numerics=FLOAT64, objective=Objective()",
            ")",
            "result = np.imag(loss) / 1e-30",
        ]
    else:
        source.needs(module_of(side, "train.step"), "loss_and_grads")
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


DECODE = "decode"
_QUESTIONS: dict[str, _Question] = {FORWARD: localize_forward, BACKWARD: _backward, DECODE: _decode}
_WRITERS = {FORWARD: _forward_lines, BACKWARD: _gradient_lines, DECODE: _decode_lines}

"""Programs of training: gradients of any objective, whole steps, updates by given gradients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tessera_parity import budget
from tessera_parity.cases import ModelCase
from tessera_parity.repro_model import case_lines
from tessera_parity.repro_op import fewer, plainer, smaller_arrays
from tessera_parity.repro_source import BRING, Source, module_of
from tessera_parity.repro_state import Arrays, smaller_cases
from tessera_shared.errors import SpecError
from tessera_shared.objectives import AdamWOptions, DistilOptions, Objective


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Loss and gradients of any objective, with a teacher of the student's spec where it distils."""

    case: ModelCase
    objective: Objective
    recompute: bool = False

    @property
    def about(self) -> str:
        """See `Program`."""
        return "train.step.loss_and_grads"

    @property
    def limit(self) -> float:
        """See `Program`."""
        return budget.gradient_limit(self.case.spec, num_positions=self.case.token_ids_BT.size)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`."""
        return self.case.spec.num_layers, int(self.case.token_ids_BT.size)

    def floor(self, truth: Arrays) -> float:
        """The largest gradient: what is zero by algebra has no magnitude of its own."""
        return max(float(np.max(np.abs(value), initial=0.0)) for value in truth.values())

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        teaching = self.objective.distil is not None
        call = f"spec=SPEC, numerics=FLOAT64, objective={source.of(self.objective)}" + ", teacher=teacher" * teaching
        lines = [*case_lines(self.case, source), *_batch_lines(source)]
        if teaching:
            source.needs(module_of(side, "train.step" if side == "numpy" else "distil.teacher"), "Teacher")
            theirs = [
                "noise = np.random.default_rng(1)",
                "theirs = {name: array(value + 0.5 * noise.standard_normal(value.shape)) for name, value in weights.items()}",
                "teacher = Teacher(theirs, SPEC, FLOAT64)",
            ]
            lines += theirs
        if side == "numpy":
            source.needs(module_of(side, "train.step"), "batch_loss")
            return [
                *lines,
                "",
                "",
                "def loss(named):",
                f"    return batch_loss(named, batch, {call})[0]",
                "",
                "",
                'result = {"loss": loss(params), "gradient": gradient(loss, params)}',
            ]
        source.needs(module_of(side, "train.step"), "loss_and_grads")
        return [
            *lines,
            f"value, _, grads = loss_and_grads(params, batch, {call}, recompute={self.recompute})",
            'result = {"loss": value, "gradient": grads}',
        ]

    def smaller(self) -> "Iterator[tuple[str, Gradients]]":
        """Cut the case; an objective that no longer fits its vocabulary is refused by both sides and so left out."""
        for what, case in smaller_cases(self.case):
            yield what, replace(self, case=case)
        for what, objective in plainer_objectives(self.objective):
            yield what, replace(self, objective=objective)


def plainer_objectives(objective: Objective) -> Iterator[tuple[str, Objective]]:
    """Yield objectives with one thing less: no distillation, no z-loss, one field of the options at its default."""
    if objective.distil is not None:
        yield "no distillation", replace(objective, distil=None)
        plain = DistilOptions()
        for name in (each.name for each in fields(plain)):
            if getattr(objective.distil, name) != getattr(plain, name):
                changed: dict[str, Any] = {name: getattr(plain, name)}
                try:
                    yield f"plain {name}", replace(objective, distil=replace(objective.distil, **changed))
                except SpecError:
                    continue
    if objective.z_loss:
        yield "no z-loss", replace(objective, z_loss=0.0)


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """One training step over a case's batch and the same rows backwards with fewer labels, as `optimizer` takes it."""

    case: ModelCase
    options: AdamWOptions
    lr: float = 0.1

    @property
    def about(self) -> str:
        """See `Program`."""
        return "train.step.train_step"

    @property
    def limit(self) -> float:
        """See `Program`."""
        return 4.0 * budget.gradient_limit(self.case.spec, num_positions=2 * self.case.token_ids_BT.size)

    @property
    def size(self) -> tuple[int | None, int | None]:
        """See `Program`; tokens of both micro-batches."""
        return self.case.spec.num_layers, 2 * int(self.case.token_ids_BT.size)

    def floor(self, truth: Arrays) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        step = module_of(side, "train.step")
        source.needs("tessera_shared.objectives", "Objective", "IGNORE_INDEX")
        source.needs(step, "init_state")
        lines = [
            *case_lines(self.case, source),
            *_batch_lines(source),
            f"OPTIONS = {source.of(self.options)}",
            f"labels = {source.of(self.case.labels_BT, 'labels')}[:, ::-1]",
            "few_BT = np.where(np.arange(labels.shape[1]) < 2, labels, IGNORE_INDEX).astype(np.int32)",
            f"backwards_BT = array({source.of(self.case.token_ids_BT, 'token_ids')}[:, ::-1].copy())",
            "batches = [batch, Batch(backwards_BT, array(few_BT), positions_BT, segments_BT)]",
            "state = init_state(params, options=OPTIONS)",
            "settings = {'spec': SPEC, 'numerics': FLOAT64, 'objective': Objective()}",
        ]
        if side != "numpy":
            source.needs(step, "train_step")
            return [
                *lines,
                f"state, metrics = train_step(state, batches, lr={self.lr!r}, options=OPTIONS, **settings)",
                'result = {"params": state.params, "loss": metrics["loss"], "norm": metrics["grad_norm"]}',
            ]
        source.needs(step, "batch_loss", "apply_gradients")
        source.needs("tessera_shared.tensors", "tensor_table")
        return [
            *lines,
            "",
            "",
            "def loss(named):",
            "    return sum(batch_loss(named, each, **settings)[0] for each in batches)",
            "",
            "",
            "count = max(sum(float(batch_loss(params, each, **settings)[1]) for each in batches), 1.0)",
            "grads = {name: grad / count for name, grad in gradient(loss, params).items()}",
            "decays = {name: info.decay for name, info in tensor_table(SPEC).items()}",
            f"state, norm = apply_gradients(state, grads, lr={self.lr!r}, options=OPTIONS, decay_mask=decays)",
            'result = {"params": state.params, "loss": np.asarray(loss(params) / count), "norm": np.asarray(norm)}',
        ]

    def smaller(self) -> "Iterator[tuple[str, TrainStep]]":
        """See `Program`."""
        for what, case in smaller_cases(self.case):
            yield what, replace(self, case=case)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """AdamW updates by given gradients, from nothing or from given moments; what is compared is the state at the end."""

    params: Arrays
    gradients: tuple[Arrays, ...]
    rates: tuple[float, ...]
    options: AdamWOptions
    decay: Mapping[str, bool]
    moments: tuple[Arrays, Arrays, int] | None = None
    part: str | None = None  # "params", "first", "second": what is compared; None = all of it

    @property
    def about(self) -> str:
        """See `Program`."""
        return "train.step.apply_gradients"

    @property
    def limit(self) -> float:
        """See `Program`."""
        return budget.optimizer_limit(len(self.gradients))

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Neither layers nor tokens."""
        return None, None

    def floor(self, truth: Arrays) -> float:
        """See `Program`."""
        del truth
        return 0.0

    def lines(self, side: str, source: Source) -> list[str]:
        """See `Program`."""
        source.needs(module_of(side, "train.step"), "init_state", "apply_gradients")
        source.needs(module_of(side, "train.optim"), "moments")
        lines = [
            f"PARAMS = {source.of(dict(self.params), 'params')}",
            f"GRADIENTS = {source.of([dict(step) for step in self.gradients], 'gradients')}",
            f"RATES = {list(self.rates)!r}",
            f"OPTIONS = {source.of(self.options)}",
            f"DECAY = {dict(self.decay)!r}",
            *BRING,
            "state = init_state(bring(PARAMS), options=OPTIONS)",
        ]
        if self.moments is not None:
            first, second, count = self.moments
            source.needs(module_of(side, "train.optim"), "state_from_moments")
            lines += [
                f"FIRST = {source.of(dict(first), 'first')}",
                f"SECOND = {source.of(dict(second), 'second')}",
                f"given = state_from_moments(bring(FIRST), bring(SECOND), {count}, options=OPTIONS)",
                "state = state._replace(optimizer=given)",
            ]
        compared = '"params": state.params, "first": first, "second": second, "count": count, "norm": norm'
        kept = compared if self.part is None else {"params": '"params": state.params'}.get(
            self.part, f'"{self.part}": {self.part}'
        )  # fmt: skip
        return [
            *lines,
            "for grads, lr in zip(GRADIENTS, RATES, strict=True):",
            "    state, norm = apply_gradients(state, bring(grads), lr=lr, options=OPTIONS, decay_mask=DECAY)",
            "first, second, count = moments(state.optimizer)",
            f"result = {{{kept}}}",
        ]

    def smaller(self) -> "Iterator[tuple[str, Updates]]":
        """Cut the number of updates, then tensors and their sizes, then digits."""
        for kept in fewer(len(self.gradients)):
            for first in (0, len(self.gradients) - kept):
                part = slice(first, first + kept)
                yield (
                    f"updates {len(self.gradients)} -> {kept}",
                    replace(self, gradients=self.gradients[part], rates=self.rates[part]),
                )
        for what, params in smaller_arrays(self.params):
            yield what, self._like(params)
        rounded = [{name: plainer(value) for name, value in arrays.items()} for arrays in self._dictionaries()]
        if any(arrays[name] is not old[name] for arrays, old in zip(rounded, self._dictionaries(), strict=True)
               for name in arrays):  # fmt: skip
            yield "values in eighths", self._with(rounded)

    def _dictionaries(self) -> list[Arrays]:
        state = [] if self.moments is None else list(self.moments[:2])
        return [self.params, *self.gradients, *state]

    def _with(self, arrays: list[dict[str, np.ndarray]]) -> "Updates":
        steps = len(self.gradients)
        state = None if self.moments is None else (arrays[1 + steps], arrays[2 + steps], self.moments[2])
        return replace(self, params=arrays[0], gradients=tuple(arrays[1 : 1 + steps]), moments=state)

    def _like(self, params: Arrays) -> "Updates":
        """Return everything cut to the names and shapes of these parameters."""
        cut = [
            {name: arrays[name][tuple(slice(size) for size in value.shape)] for name, value in params.items()}
            for arrays in self._dictionaries()
        ]
        return replace(self._with(cut), decay={name: self.decay[name] for name in params})


def _batch_lines(source: Source) -> list[str]:
    source.needs("tessera_shared.batch", "Batch")
    return ["batch = Batch(token_ids_BT, labels_BT, positions_BT, segments_BT)"]

"""Native faces: `torch.nn.Module` and `flax.nnx.Module` over the same functions give the same logits, names and
gradients.

A user of one framework trains through these with that framework's own loop; so they are compared with the plain
functions (to the bit: same operations, same order) and taken through a few steps of the ecosystem's own optimizer.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tessera_parity.budget import gradient_limit
from tessera_parity.compare import relative_difference
from tessera_parity.exact import Equalities
from tessera_parity.families import family_spec, random_weights
from tessera_parity.halves import Half
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_shared.numerics import FLOAT64
from tessera_shared.spec import ARCHITECTURES, ModelSpec
from tessera_shared.tensors import tensor_table

_STEPS, _RATE = 3, 0.05


def run(context: Context) -> Iterator[Check]:
    """Yield names, logits and three plain gradient-descent steps for each installed half."""
    finals: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    cases = context.budget(quick=1, default=2, full=4)
    for half in context.halves:
        names = Equalities("native", "names and shapes", (half.name,))
        logits = Equalities("native", "logits", (half.name, f"{half.name} native"))
        for index in range(cases):
            context.advance(f"native: {half.name} {index + 1}/{cases}")
            spec, arrays, ids_BT = _case(context, index)
            face = _FACES[half.name](half, spec, arrays)
            table = {name: info.shape for name, info in tensor_table(spec).items()}
            names.values({name: tuple(value.shape) for name, value in face.weights().items()}, table, f"case {index}")
            plain = half.module("model.transformer").forward(
                {name: half.array(value) for name, value in arrays.items()},
                half.array(ids_BT),
                spec=spec,
                numerics=FLOAT64,
            )
            logits.arrays(face.logits(ids_BT), half.numpy(plain), f"case {index}")
            finals[f"{half.name} {index}"] = face.descend(ids_BT)
        yield names.check("state_dict | nnx.Param names are the tensor table's")
        yield logits.check("module call against the plain function")
    if context.torch is not None and context.jax is not None:
        yield _descent(context, finals, cases)


def _case(context: Context, index: int) -> tuple[ModelSpec, dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    rng = np.random.default_rng((context.seed, 43, index))
    spec = family_spec(ARCHITECTURES[index % 4], rng)
    if context.lane == QUICK:  # what a face adds does not depend on depth; steps compile in half the time
        spec = replace(spec, num_layers=1, window_from_layer=0)
    return spec, random_weights(spec, rng), rng.integers(0, spec.vocab_size, (2, 7)).astype(np.int32)


def _descent(context: Context, finals: dict[str, dict[str, np.ndarray[Any, Any]]], cases: int) -> Check:
    observed, limit, compared = 0.0, 0.0, 0
    for index in range(cases):
        spec, _, ids_BT = _case(context, index)
        limit = max(limit, _STEPS * gradient_limit(spec, num_positions=ids_BT.shape[1]))
        for name, value in finals[f"torch {index}"].items():
            observed = max(observed, relative_difference(value, finals[f"jax {index}"][name]).value)
            compared += value.size
    return Check(
        subject="native",
        name=f"weights after {_STEPS} steps of torch.optim.SGD and optax.sgd",
        question=Question.MATHEMATICS,
        sides=("torch native", "jax native"),
        verdict=Verdict.PARITY if compared and observed <= limit else Verdict.DIVERGENCE,
        cases=cases,
        compared=compared,
        observed=observed,
        limit=limit,
        device=context.device,
    )


class _TorchFace:
    """A `torch.nn.Module` trained by `torch.optim`."""

    def __init__(self, half: Half, spec: ModelSpec, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        params = {name: half.array(value) for name, value in arrays.items()}
        self._half = half
        self._model = half.module("model.module").TesseraModel(spec, FLOAT64, params)

    def weights(self) -> dict[str, Any]:
        return dict(self._model.state_dict())

    def logits(self, ids_BT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._half.numpy(self._model(self._half.array(ids_BT)))

    def descend(self, ids_BT: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        import torch

        ids = self._half.array(ids_BT).long()
        optimizer = torch.optim.SGD(self._model.parameters(), lr=_RATE)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            logits_BTV = self._model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return {name: self._half.numpy(value) for name, value in self._model.state_dict().items()}


class _JaxFace:
    """A `flax.nnx.Module` trained by Optax."""

    def __init__(self, half: Half, spec: ModelSpec, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        params = {name: half.array(value) for name, value in arrays.items()}
        self._half = half
        self._model = half.module("model.module").TesseraModel(spec, FLOAT64, params)

    def weights(self) -> dict[str, Any]:
        return dict(self._model.params())

    def logits(self, ids_BT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._half.numpy(self._model(self._half.array(ids_BT)))

    def descend(self, ids_BT: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        import optax
        from flax import nnx

        ids = self._half.array(ids_BT)
        optimizer = nnx.Optimizer(self._model, optax.sgd(_RATE), wrt=nnx.Param)

        def loss(model: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:]).mean()

        step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))
        for _ in range(_STEPS):
            step(self._model, optimizer)
        return {name: self._half.numpy(value) for name, value in self._model.params().items()}


_FACES: dict[str, Callable[..., Any]] = {"torch": _TorchFace, "jax": _JaxFace}

SUBJECT = Subject(
    name="native",
    about="torch.nn.Module and flax.nnx.Module: names, logits, and steps of their ecosystems' own optimizers",
    run=run,
)

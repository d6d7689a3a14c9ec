"""Values for arguments, from their names. This is the only thing that is written by hand about the paired functions'
inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tessera_shared.dims import shape_of, suffix_of
from tessera_shared.numerics import Numerics
from tessera_shared.objectives import (
    IGNORE_INDEX,
    AdamWOptions,
    Denominator,
    DistilOptions,
    Divergence,
    Objective,
    TemperatureScale,
    TopKForm,
)
from tessera_shared.spec import ModelSpec

PICKED: dict[str, tuple[Any, ...]] = {
    "eps": (1e-6, 1e-5, 1e-12, 1e-2),
    "softcap": (None, 2.0, 30.0),
    "window": (None, 1, 3, 5),
    "beta": (0.0, 0.1, 0.5, 0.9, 1.0),
    "alpha": (0.05, 0.1, 0.5, 0.9),
    "z_loss": (0.0, 1e-4, 0.1),
    "detach_mixture": (False, True),
    "min_p": (0.0, 0.03, 0.3),
    "top_p": (1.0, 0.9173, 0.3711),  # no sum of equal probabilities lands on these
    "max_norm": (1e-3, 1.0, 1e3),
    "layer": (0,),
    "start": (0, 1, 2**31 + 3),
    "count": (5,),
}
"""Arguments that take one of a few values."""


@dataclass(kw_only=True)
class Draw:
    """Draws the arguments of one call. Arguments that belong together (`cos`, `sin`; `positions`, `segments`) agree."""

    sizes: dict[str, int]
    rng: np.random.Generator
    style: str
    numerics: Numerics
    names: tuple[str, ...]
    spec_of: Callable[[Mapping[str, int], np.random.Generator], ModelSpec]
    drawn: dict[str, Any] = field(default_factory=dict)

    def has_rule(self, name: str) -> bool:
        """Can this argument be drawn from its name?"""
        if name in ("params", "state", "cache", "teacher", "batch", "batches", "arrays"):
            return False
        return suffix_of(name) is not None or name in PICKED or name in self._words()

    def value(self, name: str, *, optional: bool = False) -> Any:
        """Return the value of one argument; `optional` ones (default None) are left out every third time."""
        words = self._words()
        if name in words:
            return words[name]()
        if name in PICKED:
            choices = PICKED[name]
            return choices[int(self.rng.integers(len(choices)))]
        if optional and self.rng.random() < 1 / 3:
            return None
        return self._array(name)

    def _words(self) -> dict[str, Callable[[], Any]]:
        """Return the rules of arguments that are no arrays."""
        return {
            "numerics": lambda: self.numerics,
            "dtype": lambda: "float64",
            "spec": lambda: self.spec_of(self.sizes, self.rng),
            "grads": self._grads,
            "temperature": self._temperature,
            "top_k": lambda: int(self.rng.choice([0, 1, 3, self.sizes["V"]])),
            "k": lambda: int(self.rng.choice([1, (self.sizes["V"] + 1) // 2, self.sizes["V"]])),
            "form": self._form,
            "options": self._options,
            "objective": self._objective,
        }

    def _array(self, name: str) -> Any:
        """Return an array by the word before its shape suffix."""
        shape = shape_of(name, self.sizes)
        word = name.rpartition("_")[0]
        if word in ("token_ids", "prompt_ids"):
            return self.rng.integers(0, self.sizes["V"], shape).astype(np.int32)
        if word == "labels":
            return self._labels(shape)
        if word == "teacher" and "objective" in self.names and self.rng.random() < 0.3:
            self.drawn["teacher"] = None  # an objective without distillation refuses a teacher
            return None
        if word in ("positions", "key_positions"):
            return self._positions(shape)
        if word in ("segments", "key_segments"):
            return self.rng.choice([0, 0, 0, 1, 1, -1], shape).astype(np.int32)
        if word == "mask":
            return self._mask(shape)
        if word == "uniforms":
            return self.rng.random(shape)
        if word in ("key", "counters"):
            return self.rng.integers(0, 2**32, shape, dtype=np.uint32)
        if word in ("cos", "sin"):
            return self._rotation(shape)[word]
        if word == "probs":
            return self._probabilities(shape)
        if word == "gain":
            return 1.0 + 0.3 * self.rng.standard_normal(shape)
        if word in ("weight", "bias"):
            return self.rng.standard_normal(shape)
        if word == "projection":
            return self._projection(shape)
        return values(shape, self.rng, self.style)

    def _labels(self, shape: tuple[int, ...]) -> np.ndarray:
        real = self.sizes["V"] - 2 if {"options", "objective"} & set(self.names) else self.sizes["V"]
        labels_BT = self.rng.integers(0, max(1, real), shape)  # padded ids are no labels (`distil_options`)
        share = self.rng.choice([0.0, 0.4, 1.1], p=[0.4, 0.4, 0.2])  # 1.1: all ignored
        return np.where(self.rng.random(shape) < share, IGNORE_INDEX, labels_BT).astype(np.int32)

    def _positions(self, shape: tuple[int, ...]) -> np.ndarray:
        """Queries are the last T of S keys; some keys are empty (-1); half the time past 512."""
        if "offset" not in self.drawn:
            self.drawn["offset"] = int(self.rng.choice([0, 0, 513, 4000]))
        last = max(self.sizes["S"], self.sizes["T"]) if "key_positions_BS" in self.names else shape[-1]
        positions = np.tile(np.arange(last - shape[-1], last), (shape[0], 1)) + self.drawn["offset"]
        empty = self.rng.random(shape) < (0.15 if "key_positions_BS" in self.names else 0.0)
        return np.where(empty, -1, positions).astype(np.int32)

    def _mask(self, shape: tuple[int, ...]) -> np.ndarray:
        """Random, with whole rows closed now and then."""
        closed = self.rng.random((*shape[:-1], 1)) < 0.2
        return np.asarray((self.rng.random(shape) < 0.7) & ~closed)

    def _rotation(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        if "rotation" not in self.drawn:
            half = self.rng.uniform(-np.pi, np.pi, (*shape[:-1], shape[-1] // 2))
            angles = np.concatenate([half, half], axis=-1)
            self.drawn["rotation"] = {"cos": np.cos(angles), "sin": np.sin(angles)}
        rotation: dict[str, np.ndarray] = self.drawn["rotation"]
        return rotation

    def _probabilities(self, shape: tuple[int, ...]) -> np.ndarray:
        weights = np.exp(3.0 * self.rng.standard_normal(shape))
        weights *= self.rng.random((*shape[:-1], 1)) > 0.1  # a closed row is all zeros
        return np.asarray(weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300))

    def _projection(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """None stands for the identity, so only where the widths allow it."""
        if self.sizes["D"] == self.sizes["F"] and self.rng.random() < 0.5:
            return None
        return np.asarray(self.rng.standard_normal(shape))

    def _grads(self) -> dict[str, np.ndarray]:
        shapes = {"a": (3, 5), "b": (7,), "c": (1, 1)}
        return {name: values(shape, self.rng, self.style) for name, shape in shapes.items()}

    def _temperature(self) -> float:
        lowest = [0.0] if any(name.startswith("uniforms") for name in self.names) else []
        return float(self.rng.choice([*lowest, 0.25, 0.7, 1.0, 2.0, 4.0]))

    def _form(self) -> TopKForm:
        forms = [form for form in TopKForm if form is not TopKForm.FULL]
        return forms[int(self.rng.integers(len(forms)))]

    def _options(self) -> DistilOptions | AdamWOptions:
        if "labels_BT" not in self.names:
            return AdamWOptions(eps=float(self.rng.choice([1e-8, 1e-3])), clip_norm=None)
        return distil_options(self.sizes["V"], self.rng)

    def _objective(self) -> Objective:
        distil = None if "teacher" in self.drawn else distil_options(self.sizes["V"], self.rng)
        return objective_of(distil, self.rng)


def objective_of(distil: DistilOptions | None, rng: np.random.Generator) -> Objective:
    """Return an objective around `distil`, with a z-loss where there is a cross-entropy for it."""
    z_loss = float(rng.choice([0.0, 0.05]))
    return Objective(distil=distil, z_loss=z_loss if distil is None or distil.hard_weight > 0.0 else 0.0)


def distil_options(vocab_size: int, rng: np.random.Generator) -> DistilOptions:
    """Return one distillation loss with every convention drawn."""
    divergence = list(Divergence)[int(rng.integers(len(Divergence)))]
    forms = [form for form in TopKForm if form is not TopKForm.FULL]
    top_k = divergence is Divergence.FORWARD_KL and rng.random() < 0.5
    return DistilOptions(
        divergence=divergence,
        temperature=float(rng.choice([0.5, 1.0, 3.0])),
        temperature_scale=list(TemperatureScale)[int(rng.integers(2))],
        beta=float(rng.choice([0.0, 0.1, 0.5, 1.0])),
        alpha=float(rng.choice([0.1, 0.6])),
        detach_mixture=divergence is not Divergence.SKEW_KL and bool(rng.random() < 0.3),
        top_k=int(rng.integers(1, vocab_size + 1)) if top_k else None,
        top_k_form=forms[int(rng.integers(len(forms)))] if top_k else TopKForm.FULL,
        hard_weight=float(rng.choice([0.0, 0.3, 1.0])),
        denominator=list(Denominator)[int(rng.integers(2))],
        real_vocab_size=max(1, vocab_size - 2) if rng.random() < 0.3 and not top_k else None,
    )


def values(shape: tuple[int, ...], rng: np.random.Generator, style: str) -> np.ndarray:
    """Return floats: `normal`, `small` (1e-4), `large` (1e2), `offset` (1e3 away from 0), `ties` (steps of a half),
    `constant` (each last axis one number), or `tiny` (1e-9, where an epsilon decides)."""
    x = rng.standard_normal(shape)
    if style == "small":
        return np.asarray(x * 1e-4)
    if style == "large":
        return np.asarray(x * 1e2)
    if style == "offset":
        return np.asarray(x + 1e3)
    if style == "ties":
        return np.asarray(np.round(x * 2.0) / 2.0)
    if style == "constant":
        return np.asarray(np.broadcast_to(x[..., :1], shape).copy())
    if style == "tiny":
        return np.asarray(x * 1e-9)
    return x

"""Probes of what carries state: optimizer, training step, sampler, random streams."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tessera_parity.cases import ModelCase
from tessera_parity.compare import flatten
from tessera_parity.halves import Array, Half
from tessera_parity.mutants.battery import Observed, Probe, bring, calling
from tessera_parity.mutants.cases import battery_cases
from tessera_parity.mutants.probes_model import DEPTH, batch_of
from tessera_parity.repro_op import Call
from tessera_parity.repro_training import TrainStep, Updates
from tessera_parity.shrink import seeded_params
from tessera_shared.batch import Batch
from tessera_shared.numerics import FLOAT64
from tessera_shared.objectives import IGNORE_INDEX, AdamWOptions, Objective
from tessera_shared.randomness import stream_key
from tessera_shared.spec import ModelSpec
from tessera_shared.tensors import tensor_table

_SHAPES = {"matrix": (5, 3), "gain": (3,)}
_DECAYS = {"matrix": True, "gain": False}

SAMPLERS: dict[str, dict[str, float | int]] = {
    "sample.temperature": {"temperature": 1.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "sample.top_k": {"temperature": 1.0, "top_k": 4, "top_p": 1.0, "min_p": 0.0},
    "sample.top_p": {"temperature": 1.0, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
    "sample.min_p": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.3},
    "sample": {"temperature": 0.8, "top_k": 6, "top_p": 0.85, "min_p": 0.05},
}


def optimizer_probes(seed: int) -> Iterator[Probe]:
    """Yield each part of the update from the oracle's own inputs, so that the part at fault is the one that departs."""
    rng = np.random.default_rng((seed, 8))
    grads = {name: rng.standard_normal(shape) for name, shape in _SHAPES.items()}
    yield Probe(subject="optimizer", op="global_norm", observe=calling("train.optim", "global_norm", grads))
    for scale, max_norm in ((1.0, 0.5), (1.0, 1e3), (1e-4, 5e-5)):
        small = {name: grad * scale for name, grad in grads.items()}
        observe = calling("train.optim", "clip_by_global_norm", small, max_norm=max_norm)
        yield Probe(subject="optimizer", op="clip_by_global_norm", observe=observe)
    plain = AdamWOptions(beta1=0.8, beta2=0.95, eps=1e-30, weight_decay=0.0, clip_norm=None)
    yield _update(rng, "adamw.first_moment", plain, "first")
    yield _update(rng, "adamw.second_moment", plain, "second")
    yield _update(rng, "adamw.update", plain, "params")
    yield _update(rng, "adamw.epsilon", replace(plain, eps=0.3), "params")
    yield _update(rng, "adamw.decay", replace(plain, weight_decay=0.4), "params")
    yield _three_steps(rng)


def _update(rng: np.random.Generator, op: str, options: AdamWOptions, part: str) -> Probe:
    """Observe one part of one update that starts from given moments at step 2."""
    params, grads, first, second = (
        {name: rng.standard_normal(shape) for name, shape in _SHAPES.items()} for _ in range(4)
    )
    second = {name: value**2 for name, value in second.items()}

    def observe(half: Half) -> Observed:
        module = half.module("train.optim")
        state = module.state_from_moments(bring(half, first), bring(half, second), 2, options=options)
        moved, state = module.adamw_update(
            bring(half, params), bring(half, grads), state, lr=0.05, options=options, decay_mask=_DECAYS
        )
        after = module.moments(state)
        return flatten(half, {"first": after[0], "second": after[1], "params": moved}[part], part)

    program = Updates(
        params=params, gradients=(grads,), rates=(0.05,), options=options, decay=_DECAYS,
        moments=(first, second, 2), part=part,
    )  # fmt: skip
    return Probe(subject="optimizer", op=op, observe=observe, program=program)


def _three_steps(rng: np.random.Generator) -> Probe:
    """Observe three updates from nothing: initial state, step count, the learning rate of each step."""
    params = {name: rng.standard_normal(shape) for name, shape in _SHAPES.items()}
    grads = [{name: rng.standard_normal(shape) for name, shape in _SHAPES.items()} for _ in range(3)]
    options, rates = AdamWOptions(eps=1e-3), tuple(0.1 / (step + 1) for step in range(3))

    def observe(half: Half) -> Observed:
        module, moved = half.module("train.optim"), bring(half, params)
        state = module.adamw_init(moved, options=options)
        out: Observed = {}
        for step, grad in enumerate(grads):
            moved, state = module.adamw_update(
                moved, bring(half, grad), state, lr=rates[step], options=options, decay_mask=_DECAYS
            )
            out |= flatten(half, moved, f"params{step}")
        first, second, count = module.moments(state)
        out["count"] = np.asarray(half.numpy(count), np.float64).reshape(())
        return out | flatten(half, {"first": first, "second": second}, "moments")

    program = Updates(
        params=params, gradients=tuple(grads), rates=rates, options=replace(options, clip_norm=None), decay=_DECAYS
    )
    return Probe(subject="optimizer", op="adamw.state", observe=observe, depth=4, program=program)


def training_probes(seed: int) -> Iterator[Probe]:
    """Yield a training step over two micro-batches that count unequally many tokens."""
    case = battery_cases(seed)[0]
    spec, options = replace(case.spec, num_layers=1), AdamWOptions(eps=1e-2, clip_norm=0.5)
    case = replace(case, spec=spec, params=seeded_params(spec, seed))
    yield Probe(
        subject="training", op="train_step", observe=_train(case, options), depth=3 * DEPTH, gradient=True,
        program=TrainStep(case=case, options=options),
    )  # fmt: skip


def _train(case: ModelCase, options: AdamWOptions) -> Callable[[Half], Observed]:
    spec, params = case.spec, case.params
    ragged_BT = case.labels_BT.copy()
    ragged_BT[0, :4] = IGNORE_INDEX
    second = batch_of(case)._replace(token_ids_BT=case.token_ids_BT[:, ::-1].copy(), labels_BT=ragged_BT)
    micro_batches = [batch_of(case), second]
    whole = Batch(*(np.concatenate(fields) for fields in zip(*micro_batches, strict=True)))

    def observe(half: Half) -> Observed:
        module = half.module("train.step")
        state = module.init_state(bring(half, params), options=options)
        if half.name == "numpy":
            return _oracle_step(half, state, whole, spec, options)
        state, metrics = module.train_step(
            state,
            bring(half, micro_batches),
            lr=0.1,
            spec=spec,
            numerics=FLOAT64,
            objective=Objective(),
            options=options,
        )
        names = ("loss", "grad_norm", "num_tokens", "lr")
        out = {name: np.asarray(half.numpy(metrics[name]), np.float64).reshape(()) for name in names}
        return out | {name: half.numpy(state.params[name]) for name in tensor_table(spec)}

    return observe


def _oracle_step(half: Half, state: Any, batch: Batch, spec: ModelSpec, options: AdamWOptions) -> Observed:
    """Train on the whole batch at once, each number of the gradient by its own complex step."""
    module, count = half.module("train.step"), int((batch.labels_BT != IGNORE_INDEX).sum())

    def loss_of(params: Mapping[str, Array]) -> Array:
        return module.batch_loss(params, batch, spec=spec, numerics=FLOAT64, objective=Objective())[0]

    loss, grads = float(loss_of(state.params)), {}
    for name, value in state.params.items():
        unit = np.eye(value.size).reshape(-1, *value.shape)
        slopes = [module.directional_derivative(loss_of, state.params, {name: way}) for way in unit]
        grads[name] = np.array(slopes).reshape(value.shape) / count
    decays = {name: info.decay for name, info in tensor_table(spec).items()}
    state, norm = module.apply_gradients(state, grads, lr=0.1, options=options, decay_mask=decays)
    values = {"loss": loss / count, "grad_norm": norm, "num_tokens": count, "lr": 0.1}
    out = {name: np.asarray(value, np.float64).reshape(()) for name, value in values.items()}
    return out | {name: np.asarray(state.params[name]) for name in tensor_table(spec)}


def sampling_probes(seed: int) -> Iterator[Probe]:
    """Yield the sampler over many uniforms, one rule at a time, on logits with ties; then all rules together."""
    rng = np.random.default_rng((seed, 10))
    rows, vocabulary = 64, 11
    logits_BV = np.round(rng.standard_normal((rows, vocabulary)) * 2.0) / 2.0  # halves: ties everywhere
    uniforms_B = np.concatenate([rng.random(rows - 2), [0.0, 1.0 - 2.0**-53]])
    yield Probe(subject="sampling", op="greedy", observe=calling("serve.sampling", "greedy", logits_BV))
    for op, options in SAMPLERS.items():
        observe = calling("serve.sampling", "sample", logits_BV, uniforms_B, **options)
        yield Probe(subject="sampling", op=op, observe=observe)
    uniform_BV = np.zeros((rows, 4))
    exact_B = np.tile([0.0, 0.25, 0.5, 0.75], rows // 4)  # on the edges of the cumulative sum, which are exact here
    for top_p in (1.0, 0.5):
        observe = calling(
            "serve.sampling", "sample", uniform_BV, exact_B, temperature=1.0, top_k=0, top_p=top_p, min_p=0.0
        )
        yield Probe(subject="sampling", op="sample" if top_p == 1.0 else "sample.top_p", observe=observe)


def randomness_probes(seed: int) -> Iterator[Probe]:
    """Yield bits and uniforms near counters 0 and 2**32."""
    key_2 = stream_key(seed, "mutants")
    for start in (0, 2**32 - 2):
        counters = {"key_2": key_2, "start": start, "count": 5}
        bits = Call(path="randomness", function="random_bits", inputs=counters)
        yield Probe(subject="randomness", op="random_bits", observe=_bits(key_2, start), program=bits)
        for dtype in ("float32", "float64"):
            draw = Call(path="randomness", function="uniforms", inputs={**counters, "dtype": dtype})
            yield Probe(subject="randomness", op="uniforms", observe=_uniforms(key_2, start, dtype), program=draw)


def _bits(key_2: np.ndarray, start: int) -> Callable[[Half], Observed]:
    def observe(half: Half) -> Observed:
        bits_X2 = half.module("randomness").random_bits(key_2, start, 5)
        return {"bits": half.numpy(bits_X2).astype(np.int64) & 0xFFFFFFFF}

    return observe


def _uniforms(key_2: np.ndarray, start: int, dtype: str) -> Callable[[Half], Observed]:
    def observe(half: Half) -> Observed:
        return {"uniforms": half.numpy(half.module("randomness").uniforms(key_2, start, 5, dtype=dtype))}

    return observe

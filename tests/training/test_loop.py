"""The loop behind `tessera train`: the same numbers as single steps, and memory for one state where it is compiled."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from tessera_shared.half_loading import load_half_module
from tessera_shared.init import initial_weights
from tessera_shared.numerics import FLOAT32
from tessera_shared.objectives import AdamWOptions, Objective
from tessera_shared.packing import batch_at, join_documents
from tessera_shared.schedule import Schedule, learning_rate
from tessera_shared.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=23, num_layers=1, width=6, ffn_width=5, num_heads=3, num_kv_heads=1, head_width=2, max_positions=16
)
SCHEDULE, OPTIONS, OBJECTIVE = Schedule(peak=1e-2, total_steps=5), AdamWOptions(), Objective()
STREAM = join_documents([np.random.default_rng(0).integers(1, 23, 200).tolist()], end_id=0)
BATCHES = partial(batch_at, STREAM, rows=3, length=7, seed=0)
FIXED: dict[str, Any] = {"spec": SPEC, "numerics": FLOAT32, "objective": OBJECTIVE, "options": OPTIONS}


def begun(backend: str, *, resumed: bool = False) -> Any:
    """A state as a new run has it, or as a resumed one: there the step is the optimizer's own count."""
    params, optim, step = (load_half_module(backend, name) for name in ("model.params", "train.optim", "train.step"))
    state = step.init_state(params.params_from_numpy(initial_weights(SPEC, seed=0), dtype="float32"), options=OPTIONS)
    if not resumed:
        return state
    first, second, _ = optim.moments(state.optimizer)
    optimizer = optim.state_from_moments(first, second, 0, options=OPTIONS)
    return step.TrainState(state.params, optimizer, optim.moments(optimizer)[2])


def numbers(backend: str, state: Any) -> dict[str, np.ndarray]:
    params, optim = (load_half_module(backend, name) for name in ("model.params", "train.optim"))
    first, second, _ = optim.moments(state.optimizer)
    sides = {"params": state.params, "first": first, "second": second}
    return {
        f"{side}/{name}": array
        for side, arrays in sides.items()
        for name, array in params.params_to_numpy(arrays).items()
    }


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("backend", "compiled"), [("torch", False), ("jax", False), ("jax", True)])
def test_the_loop_is_single_steps_in_a_row_to_the_bit(backend: str, compiled: bool, resumed: bool) -> None:
    pytest.importorskip(backend)
    loop, step = (load_half_module(backend, name) for name in ("train.loop", "train.step"))
    single, expected = step.train_step, []
    if compiled:
        import jax

        single = jax.jit(step.train_step, static_argnames=("spec", "numerics", "objective", "options", "recompute"))
    state = begun(backend)
    for index in range(4):
        state, metrics = single(state, [BATCHES(index)], lr=learning_rate(SCHEDULE, index), **FIXED)
        expected.append((float(metrics["loss"]), numbers(backend, state)))

    seen: list[tuple[float, dict[str, np.ndarray]]] = []

    def keep(index: int, state: Any, metrics: Any) -> bool:
        seen.append((float(metrics["loss"]), numbers(backend, state)))
        return index < 3

    started = begun(backend, resumed=resumed)
    final = loop.train(started, BATCHES, num_steps=5, schedule=SCHEDULE, compiled=compiled, on_step=keep, **FIXED)
    assert int(final.step) == len(seen) == 4
    for (loss, arrays), (true_loss, truth) in zip(seen, expected, strict=True):
        assert loss == true_loss
        assert arrays.keys() == truth.keys()
        assert all(np.array_equal(arrays[name], truth[name]) for name in truth)


def test_a_compiled_jax_loop_writes_over_its_state_and_an_eager_one_does_not() -> None:
    jax = pytest.importorskip("jax")
    loop = load_half_module("jax", "train.loop")
    for compiled in (True, False):
        started = begun("jax")
        loop.train(started, BATCHES, num_steps=2, schedule=SCHEDULE, compiled=compiled, **FIXED)
        leaves = jax.tree.leaves((started.params, started.optimizer))
        assert {leaf.is_deleted() for leaf in leaves} == {compiled}

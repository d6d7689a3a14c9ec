"""The fast path's wiring against oracle and plain half, and that what is wrong in it is seen."""

import dataclasses

import pytest

pytest.importorskip("torch")

from tessera_parity.kernel_fast import fast_checks
from tessera_parity.loading import Patch, load_half
from tessera_parity.result import Verdict
from tessera_parity.subjects.context import Context


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(numpy=load_half("numpy"), torch=load_half("torch"), jax=None, seed=2, cases=8)


def test_the_fast_path_computes_what_the_plain_half_computes(context: Context) -> None:
    checks = list(fast_checks(context))
    assert len(checks) == 5
    assert [check.name for check in checks if check.verdict is not Verdict.PARITY] == []
    assert all(check.compared > 100 for check in checks)


@pytest.mark.parametrize(
    ("file", "find", "replace", "seen_in"),
    [
        ("layout", "np.flatnonzero(begins_BT)", "np.arange(0, begins_BT.size, length)", "logits"),
        ("transformer", "longest_key=layout.longest, window=window,", "longest_key=layout.longest, window=None,", "logits"),
        ("transformer", "return ops.rms_norm(stream, gain_D, eps=eps,", "return ops.rms_norm(stream, gain_D, eps=0.1,", "logits"),
        ("loss", "temperature=options.temperature,", "temperature=1.0,", "gradients"),
        ("step", "torch._foreach_add_(", "torch._foreach_copy_(", "gradients"),
        ("step", "options.weight_decay if decay else 0.0", "options.weight_decay", "update"),
        ("step", "scale = scale * (options.clip_norm", "scale = scale * 1.0 or (options.clip_norm", "update"),
        ("step", "step=state.step_count,", "step=state.step_count + 1,", "update"),
        ("decode", "cache.lengths_B.fill_(start + length)", "cache.lengths_B.fill_(start)", "tokens"),
        ("decode", "layout.positions_BT + start", "layout.positions_BT", "tokens"),
        ("projections", "return y if bias_F is None else y + bias_F", "return y", "packed"),
        ("packed_weights", "rest = {name: array for", "rest = {name: array * (1.0 + 1e-9) for", "packed"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_wiring_is_seen(context: Context, file: str, find: str, replace: str, seen_in: str) -> None:
    patch = Patch(file=f"tessera_torch/fast/{file}.py", find=find, replace=replace)
    spoiled = dataclasses.replace(context, torch=load_half("torch", patches=(patch,)))
    red = [check.name for check in fast_checks(spoiled) if check.verdict is not Verdict.PARITY]
    assert any(seen_in in name for name in red), red

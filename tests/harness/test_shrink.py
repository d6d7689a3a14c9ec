"""Shrinking keeps the failure and loses everything else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera_parity.cases import ModelCase, model_case
from tessera_parity.loading import Patch, load_half
from tessera_parity.localize import localize_forward
from tessera_parity.mutants.cases import battery_cases
from tessera_parity.shrink import candidates, shrink
from tessera_shared.tensors import tensor_table


def is_whole(case: ModelCase) -> bool:
    shapes = {name: info.shape for name, info in tensor_table(case.spec).items()}
    fields = (case.token_ids_BT, case.labels_BT, case.positions_BT, case.segments_BT)
    return (
        {name: value.shape for name, value in case.params.items()} == shapes
        and len({field.shape for field in fields}) == 1
        and bool(np.all(case.token_ids_BT < case.spec.vocab_size))
        and bool(np.all((case.labels_BT < case.spec.vocab_size) & ((case.labels_BT >= 0) | (case.labels_BT == -100))))
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_cut_is_a_whole_case_and_smaller_or_plainer(seed: int) -> None:
    case = model_case(seed)
    for what, smaller in candidates(case):
        assert is_whole(smaller), what
        assert smaller.token_ids_BT.size <= case.token_ids_BT.size
        assert smaller.spec.num_layers <= case.spec.num_layers


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 2), tokens=st.integers(1, 6), width=st.integers(1, 12))
def test_shrinking_stops_exactly_where_the_failure_does(layers: int, tokens: int, width: int) -> None:
    def fails(case: ModelCase) -> bool:
        return case.spec.num_layers >= layers and case.token_ids_BT.shape[1] >= tokens and case.spec.width >= width

    shrunk = shrink(battery_cases(0)[1], fails)
    assert shrunk.finished
    assert (shrunk.layers, shrunk.tokens, shrunk.case.spec.width) == (layers, tokens, width)
    assert shrunk.case.spec.architecture == "llama"
    assert not shrunk.case.spec.qk_norm
    assert shrunk.values_seed == 0


def test_attempts_are_bounded_and_the_result_still_fails() -> None:
    asked = []

    def fails(case: ModelCase) -> bool:
        asked.append(case)
        return case.spec.num_layers == 2

    shrunk = shrink(battery_cases(0)[0], fails, max_attempts=5)
    assert not shrunk.finished
    assert len(asked) == shrunk.attempts == 6  # and one for the seeded values
    assert shrunk.layers == 2


def test_a_failure_that_needs_its_values_keeps_them() -> None:
    case = battery_cases(0)[0]
    name = "model.norm.weight"
    needed = float(case.params[name][0])
    shrunk = shrink(case, lambda candidate: float(candidate.params[name][0]) == needed)
    assert shrunk.values_seed is None
    assert shrunk.case.params[name][0] == needed


@pytest.mark.parametrize(
    ("file", "find", "new", "layers", "tokens"),
    [
        ("norms.py", "np.sqrt(mean_square_BT1 + eps)", "np.sqrt(mean_square_BT1)", 1, 1),
        ("attention.py", "(query - key < window)", "(query - key <= window)", 1, 2),
    ],
)
def test_a_real_bug_shrinks_to_a_layer_and_a_few_tokens(
    file: str, find: str, new: str, layers: int, tokens: int
) -> None:
    oracle = load_half("numpy")
    wrong = load_half("numpy", patches=(Patch(file=f"tessera_shared/reference/{file}", find=find, replace=new),))
    case = battery_cases(0)[1]
    first = localize_forward(oracle, wrong, case)
    assert first is not None

    def fails(candidate: ModelCase) -> bool:
        found = localize_forward(oracle, wrong, candidate)
        return found is not None and found.op == first.op

    shrunk = shrink(case, fails)
    assert shrunk.layers <= layers
    assert shrunk.tokens <= max(tokens, 4)
    assert fails(shrunk.case)

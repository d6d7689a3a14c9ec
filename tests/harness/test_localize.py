"""The localizer names the operation at fault, not the first number that looks wrong."""

from dataclasses import replace

import numpy as np
import pytest

from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.localize import (
    localize_backward,
    localize_forward,
    owner_of,
    position_of,
    readers_of,
    record_taps,
)
from tessera_parity.localize_decode import localize_decode
from tessera_parity.mutants.cases import battery_cases
from tessera_shared.tensors import tensor_table


@pytest.fixture(scope="module")
def oracle() -> Half:
    return load_half("numpy")


@pytest.fixture(scope="module")
def torch_half() -> Half:
    return load_half("torch")


CASES = battery_cases(0)

PLANTED = {
    "embed": ("transformer.py", "np.asarray(table_VD[token_ids_BT])", "1.01 * np.asarray(table_VD[token_ids_BT])"),
    "attention.norm": ("norms.py", "np.sqrt(mean_square_BT1 + eps)", "np.sqrt(mean_square_BT1 + 2.0 * eps)"),
    "rope_tables": (
        "rope.py",
        "np.cos(angles_BTH) * attention_factor",
        "np.cos(angles_BTH) * (1.1 * attention_factor)",
    ),
    "attention_mask": ("attention.py", "(key <= query)", "(key < query)"),
    "attention.mix": ("attention.py", '"bnts,bsnh->btnh", probs_BNTS', '"bnts,bsnh->btnh", 2.0 * probs_BNTS'),
    "mlp.act": ("mlp.py", "gate_BTF * sigmoid * up_BTF", "gate_BTF * sigmoid * sigmoid * up_BTF"),
    "out": ("transformer.py", "round_to(x_BTD + fed, numerics.compute)", "round_to(x_BTD - fed, numerics.compute)"),
    "logits": ("transformer.py", "logits_BTV = x_BTD @ table_VD.T", "logits_BTV = -x_BTD @ table_VD.T"),
}


@pytest.mark.parametrize("op", PLANTED)
def test_a_bug_anywhere_in_the_forward_pass_is_named_by_its_own_operation(op: str, oracle: Half) -> None:
    file, find, new = PLANTED[op]
    wrong = load_half("numpy", patches=(Patch(file=f"tessera_shared/reference/{file}", find=find, replace=new),))
    culprit = localize_forward(oracle, wrong, CASES[1])
    assert culprit is not None
    assert culprit.op == op
    assert culprit.observed > culprit.limit
    assert culprit.position is not None


def test_one_wrong_operation_does_not_accuse_the_next(oracle: Half) -> None:
    file, find, new = PLANTED["attention.mix"]
    wrong = load_half("numpy", patches=(Patch(file=f"tessera_shared/reference/{file}", find=find, replace=new),))
    truth = record_taps(oracle, CASES[0])
    own = record_taps(wrong, CASES[0], replace=truth)
    assert [name for name in truth if not np.array_equal(truth[name], own[name])] == [
        "layers.0.attention.mix",
        "layers.1.attention.mix",
    ]


@pytest.mark.parametrize("case", CASES, ids=("plain", "rich"))
def test_a_clean_half_is_accused_of_nothing(case: object, oracle: Half, torch_half: Half) -> None:
    assert localize_forward(oracle, torch_half, case) is None  # type: ignore[arg-type]
    assert localize_backward(oracle, torch_half, None, case) is None  # type: ignore[arg-type]
    assert localize_decode(oracle, torch_half, case) is None  # type: ignore[arg-type]


def test_gradients_that_are_all_zero_accuse_no_one(oracle: Half, torch_half: Half) -> None:
    ignored = replace(CASES[0], labels_BT=np.full_like(CASES[0].labels_BT, -100))
    assert localize_backward(oracle, torch_half, None, ignored) is None


BACKWARD = {
    "attention.mix": ("attention.py", "torch.einsum(\"bkgts,bskh->btkgh\", probs_BKGTS, v_BSKH)",
                      "torch.einsum(\"bkgts,bskh->btkgh\", probs_BKGTS.detach(), v_BSKH)"),
    "residual": ("transformer.py", "x_BTD + mixed_BTD)", "x_BTD.detach() + mixed_BTD)"),
    "mlp.gate": ("mlp.py", 'project("gate", normed_BTD)', 'project("gate", normed_BTD.detach())'),
    "mlp.up": ("mlp.py", 'project("up", normed_BTD)', 'project("up", normed_BTD.detach())'),
    "cross_entropy": ("../distil/losses.py", "loss_BT = normalizer_BT -", "loss_BT = normalizer_BT.detach() -"),
}  # fmt: skip


@pytest.mark.parametrize("op", BACKWARD)
def test_a_gradient_that_departs_names_the_reader_that_made_it(op: str, oracle: Half) -> None:
    file, find, new = BACKWARD[op]
    path = f"tessera_torch/model/{file}".replace("model/../", "")
    wrong = load_half("torch", patches=(Patch(file=path, find=find, replace=new),))
    assert localize_forward(oracle, wrong, CASES[0]) is None
    culprit = localize_backward(oracle, wrong, None, CASES[0])
    assert culprit is not None
    assert (culprit.op, culprit.direction, culprit.half) == (op, "backward", "torch")


def test_every_weight_belongs_to_an_operation_that_is_tapped(oracle: Half) -> None:
    taps = record_taps(oracle, CASES[1])
    for name in tensor_table(CASES[1].spec):
        layer, op = owner_of(name)
        if not name.endswith("lm_head.weight"):
            assert (op if layer is None else f"layers.{layer}.{op}") in taps


def test_every_tap_but_the_logits_has_readers_that_come_after_it(oracle: Half) -> None:
    for case in CASES:
        order = list(record_taps(oracle, case))
        for index, name in enumerate(order[:-1]):
            assert all(reader in order[index + 1 :] for reader in readers_of(name, dict.fromkeys(order))), name  # type: ignore[arg-type]


def test_positions_are_words() -> None:
    assert position_of("layers.1.attention.q_rope", (1, 5, 0, 2)) == "row 1, token 5, head 0, dimension 2"
    assert position_of("cos", (3,)) == "index (3,)"

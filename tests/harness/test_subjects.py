"""The six subjects of question 1: clean halves are parity, and each subject has a twin that must fail."""

from dataclasses import replace

import numpy as np
import pytest

from tessera_parity.loading import Patch, load_half
from tessera_parity.pairs import collect_pairs
from tessera_parity.result import Question, Verdict
from tessera_parity.subjects import SUBJECTS, block, forward, gradients, losses, ops, optimizer
from tessera_parity.subjects.context import QUICK, Context
from tessera_parity.tally import Tally, attempt
from tessera_shared.errors import ParityError

pytest.importorskip("torch")

SUBJECT_NAMES = {subject.name for subject in SUBJECTS}


@pytest.fixture(scope="module")
def context():
    return Context(numpy=load_half("numpy"), torch=load_half("torch"), jax=None, lane=QUICK, cases=2)


def broken(context, file, find, replacement):
    patch = Patch(file=f"tessera_torch/{file}", find=find, replace=replacement)
    return replace(context, torch=load_half("torch", patches=(patch,)))


CLEAN = [ops, block, forward, losses, gradients, optimizer]


@pytest.mark.parametrize("subject", CLEAN, ids=lambda module: module.SUBJECT.name)
def test_a_clean_half_is_parity_and_says_what_was_compared(context, subject):
    checks = [check for check in subject.SUBJECT.run(context) if check.name != "mirrored signatures"]
    assert checks
    for check in checks:
        assert check.verdict is Verdict.PARITY, check
        assert check.compared > 0
        assert check.cases > 0
        assert check.question is Question.MATHEMATICS
        assert check.observed <= check.limit


MUST_FAIL = [
    (ops, "model/norms.py", "True) + eps)", "True) + eps * 1.001)", "model.norms.rms_norm"),
    (block, "model/mlp.py", "layer_prefix(layer)", "layer_prefix(max(0, layer - 1))", "mlp_block"),
    (forward, "model/norms.py", "True) + eps)", "True) + eps * 1.001)", "attention.norm"),
    (
        losses,
        "distil/losses.py",
        "Rule(Divergence.REVERSE_KL, temperature)",
        "Rule(Divergence.REVERSE_KL, temperature * 1.001)",
        "distil.losses.reverse_kl",
    ),
    (optimizer, "train/optim.py", "beta2, state.step + 1", "beta2, state.step + 2", "params"),
]


@pytest.mark.parametrize(("subject", "file", "find", "replacement", "name"), MUST_FAIL)
def test_a_planted_bug_turns_the_subject_red(context, subject, file, find, replacement, name):
    checks = {check.name: check for check in subject.SUBJECT.run(broken(context, file, find, replacement))}
    assert checks[name].verdict is Verdict.DIVERGENCE
    assert checks[name].case is not None
    assert checks[name].op is not None


def test_a_wrong_gradient_is_seen_against_the_oracles_slope(context):
    spoiled = broken(
        context,
        "train/step.py",
        "grads = torch.autograd.grad(loss_sum",
        "grads = torch.autograd.grad(loss_sum * 1.000001",
    )
    red = [check for check in gradients.SUBJECT.run(spoiled) if check.verdict is Verdict.DIVERGENCE]
    assert "loss" not in {check.name for check in red}
    assert "mlp.down_proj.weight" in {check.name for check in red}


def test_a_half_that_raises_is_a_divergence_and_not_a_crash(context):
    spoiled = broken(context, "model/transformer.py", "def embed(", "def embed_away(")
    checks = list(forward.SUBJECT.run(spoiled))
    assert {check.verdict for check in checks} == {Verdict.DIVERGENCE}
    assert all("raised NameError" in check.detail for check in checks)


def test_no_paired_function_is_in_no_subject(context):
    pytest.importorskip("jax")
    pairs, _ = collect_pairs({"numpy": context.numpy, "torch": context.torch, "jax": load_half("jax")})
    for pair in pairs:
        elsewhere = ops.elsewhere(pair.path)
        assert elsewhere is None or elsewhere in SUBJECT_NAMES, pair.path
    covered = {pair.path for pair in ops.op_pairs(pairs)}
    assert {"model.rope.apply_rope", "model.attention.attention_probs", "serve.sampling.sample"} <= covered


def test_the_scale_of_a_structural_zero_is_that_of_the_terms_that_cancel(context):
    from tessera_parity.cases import MODEL_SIZES, generated_spec, model_case

    case = next(
        case
        for case in (model_case((1, index), pool=1) for index in range(100))
        if case.spec.qkv_bias and not case.spec.qk_norm and np.any(case.labels_BT >= 0)
    )
    assert generated_spec(MODEL_SIZES[0], np.random.default_rng(0)).num_layers == 2
    objective = gradients.objective_of(case)
    floors = gradients.cancelling_scale(context.numpy, context.torch, case, objective)
    _, grads = gradients.loss_and_grads(context.torch, case, objective)
    name = "model.layers.0.self_attn.k_proj.bias"
    assert floors[name] > 0.0
    assert np.abs(grads["model.layers.0.mlp.down_proj.weight"]).max() > 0.0


def test_a_tally_keeps_the_worst_by_ratio_and_refuses_to_judge_nothing():
    tally = Tally(subject="s", name="n", sides=("numpy", "torch"))
    with pytest.raises(ParityError, match="compared = 0"):
        tally.check()
    _, raised = attempt(lambda: {}["missing"])
    assert raised is not None
    tally.add(raised, 1e-12, case={"seed": 1})
    check = tally.check()
    assert check.verdict is Verdict.DIVERGENCE
    assert "raised KeyError" in check.detail


def test_an_error_of_the_harness_itself_is_not_blamed_on_a_half():
    def refuse():
        raise ParityError("harness")

    with pytest.raises(ParityError):
        attempt(refuse)

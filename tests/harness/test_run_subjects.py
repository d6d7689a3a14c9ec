"""Subjects that look at files, streams, text, laws, decode, faces, trajectory and the witness: clean is parity, a
planted bug is red."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tessera_parity.exact import Equalities
from tessera_parity.flips import Sampling, greedy_gap, sampled_gap
from tessera_parity.loading import Patch, load_half
from tessera_parity.result import Check, Verdict
from tessera_parity.subjects import decode, files, laws, native, streams, text, trajectory, witness
from tessera_parity.subjects.context import QUICK, Context
from tessera_shared import packing
from tessera_shared.tokens import Tokenizer

pytest.importorskip("torch")
pytest.importorskip("jax")


@cache
def _clean() -> Context:
    return Context(numpy=load_half("numpy"), torch=load_half("torch"), jax=load_half("jax"), seed=3, lane=QUICK)


def _patched(half: str, file: str, find: str, put: str) -> Context:
    package = {"torch": "torch_impl/tessera_torch/", "jax": "jax_impl/tessera_jax/"}[half]
    fresh = load_half(half, patches=(Patch(file=package + file, find=find, replace=put),))
    return replace(_clean(), torch=fresh) if half == "torch" else replace(_clean(), jax=fresh)


def _torch_only(context: Context) -> Context:
    return replace(context, jax=None)


def _red(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.verdict is Verdict.DIVERGENCE}


def test_streams_agree_and_a_wrong_rotation_does_not() -> None:
    assert not _red(list(streams.run(_clean())))
    bad = _patched("torch", "randomness.py", "(second >> (32 - rotation))", "(second >> (31 - rotation))")
    assert {"known answers", "bits", "uniforms"} <= _red(list(streams.run(_torch_only(bad))))


def test_files_come_back_to_the_bit_and_a_lossy_way_in_does_not() -> None:
    assert not _red(list(files.run(_torch_only(_clean()))))
    bad = _patched(
        "torch",
        "model/params.py",
        "return torch.from_numpy(np.array(array))",
        "return torch.from_numpy(np.array(array)) + 0.0",
    )
    assert "arrays in and out" in _red(list(files.run(_torch_only(bad))))  # -0.0 + 0.0 is 0.0


def test_text_is_a_pure_function_and_a_label_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _red(list(text.run(_clean())))
    honest = packing.cut_windows

    def shifted(*arguments: object, **options: object) -> object:
        batch = honest(*arguments, **options)
        return batch._replace(labels_BT=np.roll(batch.labels_BT, 1, axis=1))

    monkeypatch.setattr(packing, "cut_windows", shifted)
    assert "packing" in _red(list(text.run(_clean())))


@pytest.mark.parametrize(
    ("file", "find", "put", "law"),
    [
        ("model/attention.py", "(key >= 0) & (key <= query)", "(key >= 0) & (key <= query + 1)", "causality"),
        ("model/attention.py", "(key >= 0) & (key <= query)", "(key <= query)", "decode"),
        ("model/attention.py", "& (segments_BT[:, :, None] >= 0)", "| (segments_BT[:, :, None] >= 0)", "packing"),
        ("model/attention.py", "query - key < window", "query - key < window - 1", "wide window"),
    ],
)
def test_a_broken_mask_breaks_its_law(file: str, find: str, put: str, law: str) -> None:
    assert law in _red(list(laws.run(_torch_only(_patched("torch", file, find, put)))))


def test_every_law_holds_of_the_clean_half() -> None:
    checks = list(laws.run(_torch_only(_clean())))
    assert not _red(checks)
    assert len(checks) == len(laws.LAWS)


def test_a_law_that_compares_nothing_is_a_divergence() -> None:
    model = laws.model_of(_clean().numpy, (0, 37, 0), QUICK)
    assert laws._check(_clean(), _clean().numpy, lambda model: iter(()), [model]).verdict is Verdict.DIVERGENCE


def test_decode_sees_a_cache_written_one_slot_off() -> None:
    clean = _torch_only(_clean())
    assert not _red(list(decode.run(clean)))
    bad = _patched("torch", "model/cache.py", 'keys_BS = cache["positions_BS"]', 'keys_BS = cache["positions_BS"] - 1')
    assert "teacher-forced logits" in _red(list(decode.run(_torch_only(bad))))


def test_native_faces_agree_and_a_face_that_rounds_does_not() -> None:
    assert not _red(list(native.run(_torch_only(_clean()))))
    bad = _patched("torch", "model/module.py", "return dict(self.named_parameters())",
                   "return {n: p.float().to(p.dtype) for n, p in self.named_parameters()}")  # fmt: skip
    assert "logits" in _red(list(native.run(_torch_only(bad))))


@pytest.mark.slow
def test_trajectory_runs_as_one_and_decay_scaled_twice_does_not() -> None:
    context = replace(_clean(), cases=6)
    assert not _red(list(trajectory.run(context)))
    bad = _patched(
        "torch",
        "train/optim.py",
        "change + options.weight_decay * value",
        "change + 1.001 * options.weight_decay * value",
    )
    red = _red(list(trajectory.run(replace(bad, cases=6))))
    assert "float64: one run" in red


@pytest.mark.slow
def test_the_witness_denies_what_both_halves_and_the_oracle_share() -> None:
    pytest.importorskip("transformers")
    clean = replace(_torch_only(_clean()), cases=2)
    assert not _red(list(witness.run(clean)))
    bad = _patched("torch", "model/norms.py", "keepdim=True) + eps)", "keepdim=True) + 2 * eps)")
    red = [check for check in witness.run(replace(_torch_only(bad), cases=2)) if check.verdict is Verdict.DIVERGENCE]
    assert {check.sides[1] for check in red} == {"torch"}
    assert {check.who for check in red} >= {"torch"}


def test_nothing_compared_is_never_equal() -> None:
    assert Equalities("files", "empty", ("a", "b")).check().verdict is Verdict.DIVERGENCE


def test_equalities_tell_the_first_difference() -> None:
    equal = Equalities("files", "x", ("a", "b"))
    equal.arrays(np.array([1.0, 2.0]), np.array([1.0, 3.0]), "tensor w")
    equal.arrays(np.array([0.0]), np.array([-0.0]), "tensor z")
    check = equal.check()
    assert check.observed == 2.0
    assert check.detail == "tensor w: element 1: 2.0 against 3.0"


def test_a_greedy_flip_is_explained_by_a_near_tie_only() -> None:
    logits_V = np.array([1.0, 5.0, 5.0 - 1e-7, 2.0])
    assert greedy_gap(logits_V, 1, 2) == 5.0 - logits_V[2]
    assert greedy_gap(logits_V, 1, 0) == 4.0
    assert greedy_gap(logits_V, 0, 3) == 4.0, "two choices near each other but far from the top are no tie"


@pytest.mark.parametrize("how", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.05)])
def test_a_sampled_flip_is_explained_at_the_border_of_two_intervals_only(how: Sampling) -> None:
    reference = _clean().numpy.module("serve.sampling")
    logits_V = np.array([0.3, 2.0, 1.1, -1.0, 0.9])

    def drawn(uniform: float) -> int:
        return int(reference.sample(logits_V[None], np.array([uniform]), temperature=how.temperature, top_k=how.top_k,
                                    top_p=how.top_p, min_p=how.min_p)[0])  # fmt: skip

    low, high = 0.0, 0.999
    first = drawn(low)
    while low < (middle := (low + high) / 2) < high:  # bisect to the two floats at the border of the first's interval
        low, high = (middle, high) if drawn(middle) == first else (low, middle)
    second, error = drawn(high), 1e-9
    assert second != first
    assert sampled_gap(logits_V, high, first, second, how=how, logit_error=error) == 0.0
    reach = math.expm1(4.0 * error / how.temperature)  # what an error of both logits can move the border by
    assert sampled_gap(logits_V, high + 2.0 * reach, first, second, how=how, logit_error=error) > 0.0
    assert sampled_gap(logits_V, high - 2.0 * reach, first, second, how=how, logit_error=error) > 0.0


def test_the_witness_reads_text_as_we_do_and_sees_a_lost_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    context = replace(_torch_only(_clean()), cases=3)
    assert witness._tokens(context).verdict is Verdict.PARITY
    honest = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: honest(self, text)[:-1])
    assert witness._tokens(context).verdict is Verdict.DIVERGENCE

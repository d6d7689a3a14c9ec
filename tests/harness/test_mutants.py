"""The harness proves that it can fail: planted bugs are caught and named, clean halves are not accused."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import tessera_parity
from tessera_parity.cli.mutants import passes, summary
from tessera_parity.loading import Patch, load_half
from tessera_parity.mutants import catalogue_torch, engine, laws, twins
from tessera_parity.mutants.battery import Probe
from tessera_parity.mutants.diagnose import Bench
from tessera_parity.mutants.engine import Proof, catalogue, first_notice, prove, prove_all
from tessera_parity.mutants.equivalents import EQUIVALENTS, prove_equivalents
from tessera_parity.mutants.mutant import Mutant
from tessera_parity.result import Verdict
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK, Context

ROOMS = Path(str(tessera_parity.__file__)).parents[2]


def context(*, jax: bool = False, lane: str = DEFAULT) -> Context:
    return Context(numpy=load_half("numpy"), torch=load_half("torch"), jax=load_half("jax") if jax else None, lane=lane)


def source_of(mutant: Mutant) -> str:
    room = {
        "tessera_torch": "torch_impl",
        "tessera_jax": "jax_impl",
        "tessera_shared": "shared",
        "tessera_parity": "parity",
    }
    return (ROOMS / room[mutant.file.split("/", 1)[0]] / mutant.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", catalogue(), ids=lambda mutant: mutant.name)
def test_every_patch_applies_exactly_once_and_still_parses(mutant: Mutant) -> None:
    source = source_of(mutant)
    assert source.count(mutant.find) == 1
    assert mutant.find != mutant.replace
    ast.parse(source.replace(mutant.find, mutant.replace))


def test_the_catalogue_covers_both_halves_the_oracle_and_the_harness() -> None:
    mutants = catalogue()
    assert len({mutant.name for mutant in mutants}) == len(mutants) >= 48
    halves, kinds = Counter(m.half for m in mutants), {m.kind for m in mutants}
    assert min(halves["torch"], halves["jax"]) >= 20
    assert {"reference", "shared", "harness"} <= set(halves)
    wanted = "algebra mask index precision optimizer reduction cache sampling loss rope gradient harness"
    assert set(wanted.split()) <= kinds


def test_all_torch_bugs_are_caught_and_named_and_the_clean_half_passes_all_probes() -> None:
    proof = prove_all(context(), halves=["torch"])
    assert [check.verdict for check in proof.clean] == [Verdict.PARITY]
    assert len(proof.outcomes) == len(catalogue_torch.MUTANTS)
    assert [outcome.name for outcome in proof.outcomes if not outcome.killed] == []
    assert [(o.name, o.named_op) for o in proof.outcomes if o.named_op != o.expected_op] == []
    assert [outcome.name for outcome in proof.outcomes if "raised" in outcome.detail] == []
    assert passes(proof)


def test_bugs_in_the_oracle_in_shared_code_and_in_the_harness_are_caught_too() -> None:
    proof = prove_all(context(), halves=["reference", "shared", "harness"])
    assert [(o.name, o.named_op) for o in proof.outcomes if not o.killed or o.named_op != o.expected_op] == []
    assert all("numpy moved" in outcome.detail for outcome in proof.outcomes if outcome.half == "reference")


def test_shares_are_the_whole_and_the_first_alone_judges_the_clean_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = tuple(mutant for mutant in catalogue() if mutant.half in ("shared", "harness"))
    monkeypatch.setattr(engine, "catalogue", lambda: quick[:7])
    parts = [prove_all(context(), halves=["torch", "shared", "harness"], share=(part, 3)) for part in range(3)]
    assert sorted(o.name for part in parts for o in part.outcomes) == sorted(mutant.name for mutant in quick[:7])
    assert [len(part.outcomes) for part in parts] == [3, 2, 2]
    assert [len(part.clean) for part in parts] == [1, 0, 0]


def test_a_few_jax_bugs_are_caught_and_named() -> None:
    names = ["jax-norm-eps-1e-6", "jax-mask-sees-next", "jax-top-k-drops-one", "jax-clip-scales-up"]
    outcomes = prove(context(jax=True, lane=QUICK), names=names)
    assert [(o.name, o.named_op) for o in outcomes if not o.killed or o.named_op != o.expected_op] == []


def test_twins_and_laws_hold_of_the_code_as_it_is() -> None:
    assert twins.clean_twins() == []
    assert laws.broken_laws() == []


def test_a_bug_that_does_not_apply_makes_the_run_red(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Mutant(
        name="gone", half="torch", kind="algebra", file="tessera_torch/model/norms.py", find="no such source",
        replace="", expected_op="attention.norm",
    )  # fmt: skip
    monkeypatch.setattr(engine, "catalogue", lambda: (gone,))
    proof = prove_all(context(lane=QUICK), names=["gone"])
    assert proof.not_applied == ["gone"]
    assert proof.kill_rate == 0.0
    assert not passes(proof)
    assert any("gone" in line for line in summary(proof))


def test_a_patch_that_changes_nothing_is_not_caught() -> None:
    bench = Bench(context())
    same = Patch(
        file="tessera_torch/model/norms.py", find="lifted_BTD = x_BTD.to(up)", replace="lifted_BTD = (x_BTD.to(up))"
    )
    assert first_notice(bench, load_half("torch", patches=(same,))) is None


def test_a_probe_that_accuses_the_clean_half_kills_nothing_and_is_reported() -> None:
    bench = Bench(context())
    observe = bench.probes[0].observe

    def liar(half: object) -> dict[str, object]:
        observed = observe(half)  # type: ignore[arg-type]
        return (
            observed
            if getattr(half, "name", "") == "numpy"
            else {name: 2.0 * value for name, value in observed.items()}
        )

    lying = Probe(subject="ops", op="liar", observe=liar)  # type: ignore[arg-type]
    bench.probes = [lying]
    assert not bench.may_kill(lying, "torch")
    assert first_notice(bench, load_half("torch")) is None
    assert engine._clean_check(bench, bench.halves[0]).verdict is Verdict.DIVERGENCE


def test_equivalent_patches_are_equal_to_the_bit() -> None:
    lines = prove_equivalents(context())
    assert len(lines) == sum(one.half == "torch" for one in EQUIVALENTS)
    assert all(": equivalent" in line for line in lines), lines


def test_the_full_lane_shrinks_what_it_caught() -> None:
    outcome = prove(context(lane=FULL), names=["torch-norm-eps-1e-6"])[0]
    assert outcome.repro_layers == 1
    assert outcome.repro_tokens == 1


def test_rates_of_nothing_are_unknown_and_do_not_pass() -> None:
    proof = Proof(outcomes=[], clean=[])
    assert proof.kill_rate is None
    assert proof.localization_rate is None
    assert not passes(proof)


def test_an_unknown_bug_is_a_mistake_of_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    from tessera_parity.cli.main import run_command_line

    assert run_command_line(["mutants", "no-such-bug", "--quick"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "no-such-bug" in said

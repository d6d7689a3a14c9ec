"""Patches that change nothing: listed with the argument and held to bit-equal evidence, never counted as planted
bugs."""

from dataclasses import dataclass

import numpy as np

from tessera_parity.halves import Half
from tessera_parity.loading import Patch, load_half
from tessera_parity.mutants.battery import Probe
from tessera_parity.mutants.diagnose import Bench
from tessera_parity.subjects.context import Context


@dataclass(frozen=True, kw_only=True)
class Equivalent:
    """A patch, why it cannot be seen, and the subjects in which it must be equal to the bit."""

    name: str
    half: str
    patch: Patch
    because: str
    subjects: tuple[str, ...]


EQUIVALENTS = (
    Equivalent(
        name="torch-first-candidate-not-forced", half="torch",
        patch=Patch(file="tessera_torch/serve/sampling.py", find="    kept_BV[:, 0] = True\n", replace=""),
        because="top_k >= 1 and top_p > 0 keep the first candidate, and p0 >= min_p * p0 for every legal min_p <= 1",
        subjects=("sampling", "decode"),
    ),
    Equivalent(
        name="jax-first-candidate-not-forced", half="jax",
        patch=Patch(file="tessera_jax/serve/sampling.py", find="    kept_BV |= rank_V == 0\n", replace=""),
        because="top_k >= 1 and top_p > 0 keep the first candidate, and p0 >= min_p * p0 for every legal min_p <= 1",
        subjects=("sampling",),
    ),
    Equivalent(
        name="torch-jsd-mixture-flag-ignored", half="torch",
        patch=Patch(
            file="tessera_torch/distil/losses.py",
            find="Rule(Divergence.GENERALIZED_JSD, temperature, beta, detach_mixture)",
            replace="Rule(Divergence.GENERALIZED_JSD, temperature, beta, False)",
        ),
        because="the mixture minimizes beta KL(p|m) + (1-beta) KL(q|m) over m, so by the envelope theorem no "
        "gradient flows through it",
        subjects=("losses",),
    ),
    Equivalent(
        name="torch-masked-score-another-constant", half="torch",
        patch=Patch(
            file="tessera_torch/model/attention.py", find="masked_fill(~mask_B1TS, -1e30)",
            replace="masked_fill(~mask_B1TS, -1e29)",
        ),
        because="a masked score is below every visible one either way, and its exponential is replaced by zero in the "
        "next line",
        subjects=("ops", "forward"),
    ),
)  # fmt: skip


def prove_equivalents(context: Context) -> list[str]:
    """Return one line per equivalent patch: proven to the bit on the battery, or refuted and by what."""
    bench = Bench(context)
    clean = {half.name: half for half in context.halves}
    return [_line(bench, one, clean[one.half]) for one in EQUIVALENTS if one.half in clean]


def _line(bench: Bench, one: Equivalent, clean: Half) -> str:
    patched = load_half(one.half, patches=(one.patch,))
    probes = [probe for probe in bench.probes if probe.subject in one.subjects]
    for probe in probes:
        if not equal_to_the_bit(probe, patched, clean):
            return f"{one.name}: NOT equivalent, {probe.subject} {probe.op} differs"
    return f"{one.name}: equivalent, equal to the bit under {len(probes)} probes: {one.because}"


def equal_to_the_bit(probe: Probe, left: Half, right: Half) -> bool:
    """Do two halves answer a probe with the same bytes?"""
    one, two = probe.observe(left), probe.observe(right)
    return one.keys() == two.keys() and all(
        np.ascontiguousarray(one[name]).tobytes() == np.ascontiguousarray(two[name]).tobytes() for name in one
    )

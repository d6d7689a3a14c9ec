"""Planted bugs of the harness's own checks: comparers that cannot fail, seen in other projects (parity anchors,
section 6)."""

from tessera_parity.mutants.mutant import named

MUTANTS = named(
    "harness", "harness", "tessera_parity",
    (
        ("nan-forgiven", "harness", "compare.py", "unequal = mask_of(a) != mask_of(b)",
         "unequal = np.zeros(a.shape, bool)",
         "relative_difference"),
        ("signed-difference", "harness", "compare.py", "    gap = np.abs(gap)\n", "", "relative_difference"),
        ("mean-for-max", "harness", "compare.py", "value=float(gap[worst]) / scale",
         "value=float(np.mean(gap)) / scale",
         "relative_difference"),
        ("empty-comparison-passes", "harness", "compare.py", "if a.size == 0:", "if a.size < 0:",
         "relative_difference"),
        ("shapes-may-differ", "harness", "compare.py", "if a.shape != b.shape:", "if a.size != b.size:",
         "relative_difference"),
        ("missing-arrays-forgiven", "harness", "compare.py",
         "pairs = {name: relative_difference(a[name], b[name], floor=floor) for name in a}",
         "pairs = {name: relative_difference(a[name], b[name], floor=floor) for name in list(a)[:1]}",
         "compare_results"),
        ("limit-a-million-times-wider", "harness", "budget.py", "UNIT = 1e-12", "UNIT = 1e-6", "mathematics_limit"),
        ("nothing-compared-passes", "harness", "exact.py", "if self._unequal or nothing else", "if self._unequal else",
         "Equalities"),
        ("best-verdict-wins", "harness", "result.py", "return max((check.verdict", "return min((check.verdict",
         "verdict"),
        ("patch-that-does-not-apply", "harness", "loading.py", "if count != 1:", "if count > 1:", "load_half"),
        ("no-resync", "harness",
         "localize.py", 'return half.array(replace[name], str(value.dtype).removeprefix("torch."))',
         "return value", "record_taps"),
        ("shrinker-keeps-passing-cases", "harness", "shrink.py", "if fails(smaller):", "if not fails(smaller):",
         "shrink"),
    ),
)  # fmt: skip

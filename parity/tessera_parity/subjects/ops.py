"""Ops: every paired function whose inputs follow from its argument names, in float64, against the oracle.

Nothing is listed here: pairs come from the packages, inputs from names. Functions over whole models or states have
subjects of their own (`ELSEWHERE` says which), and `tests/harness/test_subjects.py` holds that no paired function is in
neither.
"""

from collections.abc import Callable, Iterator
from typing import Any

from tessera_parity import budget
from tessera_parity.cases import OP_SIZES, STYLES, OpCase, bring, case_seed, op_case
from tessera_parity.compare import compare_results, flatten
from tessera_parity.halves import Half
from tessera_parity.pairs import Pair, collect_pairs
from tessera_parity.result import Check, Question, Verdict
from tessera_parity.subjects.context import QUICK, Context, Subject
from tessera_parity.tally import Tally, attempt
from tessera_shared.errors import ParityError

ELSEWHERE = {
    "distil.losses": "losses",
    "distil.teacher": "trajectory",
    "model.attention.attention_block": "block",
    "model.cache": "decode",
    "model.dtypes": "forward",
    "model.mlp.mlp_block": "block",
    "model.params": "forward",
    "model.transformer.block": "block",
    "model.transformer.forward": "forward",
    "model.transformer.hidden_states": "forward",
    "process": "trajectory",
    "randomness": "streams",
    "serve.decode": "decode",
    "train": "optimizer",
}
"""Paired modules, folders and functions that other subjects look at."""


def run(context: Context) -> Iterator[Check]:
    """Yield one check per function and half."""
    halves = halves_of(context)
    pairs, problems = collect_pairs(halves)
    yield _mirrored(context, pairs, problems)
    for pair in op_pairs(pairs):
        context.advance(f"ops: {pair.path}")
        yield from check_pair(context, pair, halves, subject="ops")


def halves_of(context: Context) -> dict[str, Half]:
    """Return the context's halves by name, the oracle included."""
    return {half.name: half for half in (context.numpy, *context.halves)}


def op_pairs(pairs: list[Pair]) -> list[Pair]:
    """Return those of the paired functions that this subject looks at: one side alone has nothing to be held against."""
    return [pair for pair in pairs if elsewhere(pair.path) is None and len(pair.functions) > 1]


def _mirrored(context: Context, pairs: list[Pair], problems: list[ParityError]) -> Check:
    """Names, parameter names, order, kinds and defaults of the paired surface, as a check of its own."""
    return Check(
        subject="ops",
        name="mirrored signatures",
        question=Question.EXACT,
        sides=tuple(halves_of(context)),
        verdict=Verdict.DIVERGENCE if problems else Verdict.PARITY,
        cases=len(pairs) + len(problems),
        compared=len(pairs) + len(problems),
        observed=float(len(problems)),
        limit=budget.EXACT,
        unit="functions whose twin differs",
        device=context.device,
        detail=str(problems[0]) if problems else "",
    )


def elsewhere(path: str) -> str | None:
    """Return the subject that looks at this function instead of `ops`, or None."""
    parts = path.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((ELSEWHERE[prefix] for prefix in prefixes if prefix in ELSEWHERE), None)


def check_pair(context: Context, pair: Pair, halves: dict[str, Half], *, subject: str) -> Iterator[Check]:
    """Compare one function's result with the first side's (the oracle's where it has one) over generated inputs."""
    order = [side for side in ("numpy", "torch", "jax") if side in pair.functions]
    first, others = order[0], order[1:]
    tallies = {
        side: Tally(subject=subject, name=pair.path, sides=(first, side), device=context.device, op=pair.path)
        for side in others
    }
    for index in range(context.budget(quick=4, default=14, full=42)):
        case = generated(context, pair, index, subject=subject)
        truth = flatten(halves[first], pair.functions[first](**bring(halves[first].array, case.inputs)))
        floor = budget.cancellation_floor(pair.path, case.inputs)
        limit = budget.mathematics_limit(1, length=max(case.sizes.values()))
        for side in others:
            half = halves[side]
            call = as_one(context, half, pair.functions[side]) if subject == "ops" else pair.functions[side]
            found, raised = attempt(lambda c=call, h=half, k=case: flatten(h, c(**bring(h.array, k.inputs))))  # type: ignore[misc]
            which, difference = ("out", raised) if raised else compare_results(truth, found, floor=floor)
            tallies[side].add(difference, limit, case=case.to_json(), detail="" if which == "out" else which)
    for side in others:
        yield tallies[side].check()


def as_one(context: Context, half: Half, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of the same arguments, compiled as one where `Context.as_one` does. What is no array is fixed
    in it."""

    def call(**inputs: Any) -> Any:
        fixed = {name: value for name, value in inputs.items() if not hasattr(value, "shape")}
        arrays = {name: value for name, value in inputs.items() if name not in fixed}
        return context.as_one(half, lambda arrays: function(**fixed, **arrays))(arrays)

    return call


def generated(context: Context, pair: Pair, index: int, *, subject: str) -> OpCase:
    """Return one case. Quick runs keep to one or two sets of sizes, because JAX compiles each primitive for each
    shape."""
    pool = OP_SIZES if context.lane != QUICK else OP_SIZES[: 2 if subject == "ops" else 1]
    sizes = pool[0 if index % 3 == 0 else index % len(pool)]
    function = next(iter(pair.functions.values()))
    seed = case_seed(context.seed, subject, index)
    return op_case(pair.path, function, seed, sizes=sizes, style=STYLES[index % len(STYLES)])


SUBJECT = Subject(name="ops", about="every paired operation on generated inputs, float64, against the oracle", run=run)

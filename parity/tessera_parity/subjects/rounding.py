"""Question 2 as a subject: which lane looks at what, and what it must be able to see. The policy is in `rounding`."""

from collections.abc import Iterator
from dataclasses import replace

from tessera_parity.result import Check
from tessera_parity.resync import FUSED
from tessera_parity.rounding import Plan, judge
from tessera_parity.rounding_cases import POOLS
from tessera_parity.sequential import RUN_FALSE_ALARMS
from tessera_parity.subjects.context import DEFAULT, FULL, QUICK, Context, Subject
from tessera_parity.variants import Variant

DTYPES = ("float32", "bfloat16")

PLANS: dict[str, Plan] = {
    QUICK: Plan(cases=28, most=40, shift=0.25, scatter=0.15),
    DEFAULT: Plan(pools=tuple(POOLS), losses=True, cases=40, most=60, shift=0.15, scatter=0.1),
    FULL: Plan(pools=tuple(POOLS), losses=True, cases=120, most=160, shift=0.03, scatter=0.04),
}

SHAPE_PLANS: dict[str, Plan] = {
    "tiny": Plan(pools=("tiny",), cases=28, most=36, shift=0.25, scatter=0.15),
    "qwen3-0.6b": Plan(pools=("qwen3-0.6b",), cases=10, most=14, shift=0.5, scatter=0.15),
}
"""For the shape that `--model` names. A case of the larger one takes seconds on 16 cores, so less is asked of it: the
operations are those that the small pools see more sharply."""


def run(context: Context) -> Iterator[Check]:
    """Yield one check per half, dtype and tensor class.

    Full lanes run JAX a second time through plain jit; a model of a known shape (`SHAPES`) is a pool of its own.
    """
    plan = PLANS[context.lane]
    if context.cases is not None:
        plan = replace(plan, cases=context.cases, most=context.cases)
    dtypes = tuple(dtype for dtype in DTYPES if context.dtype in (None, dtype))  # float64 is question 1's
    if not dtypes or not context.halves:
        return
    fused = context.lane == FULL and context.jax is not None
    shaped = context.model in SHAPE_PLANS
    share = RUN_FALSE_ALARMS / (1 + fused + shaped)
    yield from judge(
        context.numpy, context.halves, dtypes=dtypes, seed=context.seed, plan=plan, device=context.device,
        false_alarms=share, advance=context.advance,
    )  # fmt: skip
    if context.model in SHAPE_PLANS:
        yield from judge(
            context.numpy, context.halves, dtypes=dtypes, seed=context.seed, plan=SHAPE_PLANS[context.model], device=context.device,
            false_alarms=share, advance=context.advance,
        )  # fmt: skip
    if fused and context.jax is not None:
        jit = Variant(name="jit", half="jax", about="jax.jit as users call it", mode=FUSED)
        again = judge(
            context.numpy, [context.jax], dtypes=dtypes, seed=context.seed + 1, plan=PLANS[DEFAULT],
            device=context.device, variants={"jax": jit}, false_alarms=share, advance=context.advance,
        )  # fmt: skip
        yield from (replace(check, name=f"{check.name} (jit)") for check in again)


SUBJECT = Subject(name="rounding", about="every operation's error against float64, in units of a legal one", run=run)

"""`parity explain`: what each check that is not parity means, and what to do about it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tessera_parity.cli.repro import read_settings
from tessera_parity.report.jsonl import RESULT_FILE, read_run
from tessera_parity.report.summary import check_message, repro_command
from tessera_parity.repro import rerun_command
from tessera_parity.result import Check, Question, Run, Verdict
from tessera_parity.store import Settings
from tessera_parity.terminal import COLORS, headline

MEANING = {
    Question.MATHEMATICS: "In float64 the two sides compute different things: a formula, mask, index or order of operations "
    "differs. Rounding cannot explain it.",
    Question.ROUNDING: "The formulas agree in float64, but a cast, an accumulator or a fused operation rounds elsewhere than "
    "the policy says. Being more accurate counts as well: the sides then drift apart in training.",
    Question.EXACT: "Integers, bytes or names that must be equal are not.",
    Question.LAW: "One side contradicts itself: two ways of computing the same thing differ. The other side is not involved.",
    Question.WITNESS: "Hugging Face transformers computes something else from the same config and weights.",
}
VERDICTS = {
    Verdict.UNCALIBRATED: "Nothing is known about what legal implementations do on this machine. Try: parity calibrate",
    Verdict.INCONCLUSIVE: "Too few cases for the stated power. Try: parity run --full, or --cases with more.",
}


def explain(result: Annotated[Path, typer.Argument(help="A run directory, or its result.json.")]) -> None:
    """Explain every check of a run that is not parity, and say what to do next."""
    directory = result.parent if result.name == RESULT_FILE else result
    run = read_run(directory)
    settings = read_settings(directory, {"lane": run.lane, "seed": run.seed})
    console = Console()
    console.print(Text(headline(run), style=f"bold {COLORS[run.verdict]}"), soft_wrap=True)
    odd = [check for check in run.checks if check.verdict is not Verdict.PARITY]
    if not odd:
        console.print("Every check is parity; there is nothing to explain.")
    for line in environment_lines(run) if odd else []:
        console.print(line, soft_wrap=True)
    for check in odd:
        console.print()
        console.print(Text(check_message(check), style=COLORS[check.verdict]), soft_wrap=True)
        for line in advice(check, str(directory), settings):
            console.print("  " + line, soft_wrap=True, markup=False)


def environment_lines(run: Run) -> list[str]:
    """Return where the two sides' settings differ: these explain more than tensors do."""
    found = run.environment.get("differences") or []
    return (
        ["Settings that differ between the sides, to be looked at first:", *(f"  {line}" for line in found)]
        if found
        else []
    )


def advice(check: Check, directory: str, settings: Settings | None = None) -> list[str]:
    """Return what a check means and what to do next, most likely cause first.

    With the run's settings, also the command that runs the check's subject again by itself.
    """
    lines = [VERDICTS.get(check.verdict, MEANING[check.question])]
    if check.detail.startswith("raised ") or "; raised " in check.detail:
        lines.append("The half raised where the oracle answered: read that message first.")
    if check.op is not None:
        lines.append(f"Look at {check.op}" + (f" in layer {check.layer}" if check.layer is not None else "") + ".")
    lines.append(who_line(check))
    if check.verdict is Verdict.DIVERGENCE:
        lines.append(f"Replay and shrink: {repro_command(check, directory)}")
    if settings is not None and check.verdict is not Verdict.UNCALIBRATED:
        again = rerun_command({"subject": check.subject, "sides": check.sides}, settings)
        lines.append(f"Run it again by itself: {again}")
    return [line for line in lines if line]


def who_line(check: Check) -> str:
    """Return which side to suspect, as far as it is known."""
    if check.who is not None:
        return f"The witness says that {check.who} moved."
    if len(check.sides) == 2 and check.sides[0] == "numpy":
        other = check.sides[1]
        return f"Compared with the oracle: suspect {other}, unless the same check also departs for the other half."
    if set(check.sides) == {"torch", "jax"}:
        return "Compared with each other: the checks against numpy of the same name say which one departs."
    return ""

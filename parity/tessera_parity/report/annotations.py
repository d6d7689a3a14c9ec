"""GitHub annotations: workflow commands that a runner turns into notes on the change (its "workflow commands")."""

import os
from collections.abc import Mapping

from tessera_parity.report.summary import check_message, clean
from tessera_parity.result import MutantOutcome, Run, Verdict


def annotations(run: Run) -> list[str]:
    """Return one `::error` a divergence and a surviving mutant, one `::warning` an undecided check."""
    lines = []
    for check in run.checks:
        if check.verdict is not Verdict.PARITY:
            level = "error" if check.verdict is Verdict.DIVERGENCE else "warning"
            lines.append(_command(level, f"parity: {check.subject} {check.name}", check_message(check)))
    lines += [_survivor(mutant) for mutant in run.mutants if not mutant.killed]
    return lines


def print_annotations(run: Run, environment: Mapping[str, str] = os.environ) -> None:
    """Print the annotations when a GitHub runner is listening (`GITHUB_ACTIONS=true`)."""
    if environment.get("GITHUB_ACTIONS") == "true":
        print("\n".join(annotations(run)))


def _survivor(mutant: MutantOutcome) -> str:
    message = f"planted bug {mutant.name} ({mutant.half}, {mutant.kind}) was not caught. {mutant.detail}"
    return _command("error", "parity: planted bug survived", message)


def _command(level: str, title: str, message: str) -> str:
    return f"::{level} title={_escape(title).replace(':', '%3A').replace(',', '%2C')}::{_escape(message.strip())}"


def _escape(text: str) -> str:
    return clean(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

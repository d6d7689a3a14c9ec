"""`junit.xml`: one test case a check, so that any CI shows a divergence as a failed test."""

from pathlib import Path
from xml.etree import ElementTree

from tessera_parity.report.summary import check_message, clean, false_alarms, kill_rate
from tessera_parity.result import Check, Run, Verdict

JUNIT_FILE = "junit.xml"


def junit(run: Run) -> ElementTree.Element:
    """Return the document: divergences are failures; uncalibrated and inconclusive are errors, never skips."""
    verdicts = [check.verdict for check in run.checks]
    failures = verdicts.count(Verdict.DIVERGENCE)
    suite = ElementTree.Element(
        "testsuite",
        name="parity",
        tests=str(len(run.checks)),
        failures=str(failures),
        errors=str(len(run.checks) - failures - verdicts.count(Verdict.PARITY)),
        time=f"{run.seconds:.3f}",
        timestamp=clean(run.started),
    )
    properties = ElementTree.SubElement(suite, "properties")
    stated = {"verdict": run.verdict, "kill rate": kill_rate(run), "false alarms": false_alarms(run), "seed": run.seed}
    for name, value in stated.items():
        ElementTree.SubElement(properties, "property", name=name, value=clean(value))
    for check in run.checks:
        _test_case(suite, check)
    document = ElementTree.Element("testsuites")
    document.append(suite)
    return document


def write_junit(run: Run, directory: Path) -> None:
    """Write `junit.xml` into `directory`."""
    document = junit(run)
    ElementTree.indent(document)
    ElementTree.ElementTree(document).write(directory / JUNIT_FILE, encoding="utf-8", xml_declaration=True)


def _test_case(suite: ElementTree.Element, check: Check) -> None:
    name = f"{check.name} [{check.question}; {'-'.join(check.sides)}; {check.dtype}; {check.device}]"
    case = ElementTree.SubElement(
        suite, "testcase", classname=clean(f"parity.{check.subject}"), name=clean(name), time=f"{check.seconds:.3f}"
    )
    if check.verdict is Verdict.DIVERGENCE:
        ElementTree.SubElement(case, "failure", type="divergence", message=check_message(check))
    elif check.verdict is not Verdict.PARITY:
        ElementTree.SubElement(case, "error", type=str(check.verdict), message=check_message(check))

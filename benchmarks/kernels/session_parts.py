"""The parts of a session: which processes each runs for an op, how what they leave is read, how it is told.

Records are plain types, kept by part and op in one JSON file (`session.py`). A record with `"done": true` is not made again.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import doctor
import probes
import run_all
import sweeping
from boxed import Job, Ran, Record

CASES = run_all.ROOT / "parity" / "tessera_parity" / "kernel_cases"
FUZZED = tuple(sorted(path.stem for path in CASES.glob("*.py") if path.stem not in ("__init__", "case")))
TRYING = "trying:"  # what harness.TRYING says

BENCH_SHARES = {
    "flash_attention": 3, "quant_matmul": 6, "linear_distillation": 3, "paged_attention": 4, "fp8_matmul": 2, "sample": 2,
    "swiglu": 2,
}  # fmt: skip
SWEEP_SHARES = {
    "flash_attention": 6, "quant_matmul": 6, "paged_attention": 4, "fp8_matmul": 4, "rms_norm": 4, "gate_up": 3, "sample": 2,
    "linear_distillation": 2,
}  # fmt: skip
"""Among how many processes an op's configurations are divided when they are compiled before anything is timed; else one."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every part is told."""

    dry: bool
    folder: Path  # for what processes leave
    lane: str = "quick"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of work."""

    ops: Sequence[str]  # in the order in which they are begun
    seconds: Mapping[str, float]  # estimates for one op, None of them measured yet; other ops: `usual`
    usual: float
    timed: bool  # it has the GPU to itself, one process at a time, after a warm-up
    job: Callable[[str, Setting, Record], Job]  # op, setting, what is known of it -> the process
    warm: Callable[[str, Setting], Sequence[Job]]
    report: Callable[[Mapping[str, Record]], list[str]]

    def expected(self, op: str) -> float:
        """Return the seconds that one op is taken to need, compiled."""
        return self.seconds.get(op, self.usual)


def _none(op: str, setting: Setting) -> Sequence[Job]:
    del op, setting
    return ()


# ---- doctor: what is here


def _doctor(op: str, setting: Setting, known: Record) -> Job:
    del known
    command = [sys.executable, str(run_all.HERE / "doctor.py")]
    environment = run_all.environment_of(setting.dry)
    return Job(part="doctor", name=op, command=command, environment=environment, limit=90, read=_read_doctor)


def _read_doctor(ran: Ran) -> Record:
    line = next((line for line in reversed(ran.out.splitlines()) if line.startswith("{")), None)
    if line is None:
        return {"problem": ran.problem() or "said nothing", "done": False}
    found = json.loads(line)
    missing = [name for name, fault in found["peers"].items() if fault]
    told = f"{found['gpu'] or 'no GPU'}; " + (f"peers missing: {', '.join(missing)}" if missing else "all peers import")
    return {"problem": "", "done": False, "told": told, "found": found}  # each machine is asked anew


def _report_doctor(records: Mapping[str, Record]) -> list[str]:
    lines: list[str] = []
    for record in records.values():
        lines += doctor.report_of(record["found"]) if "found" in record else [f"**{record['problem']}**"]
    return lines


# ---- check: every configuration against float64


def _worker(op: str, setting: Setting) -> list[str]:
    command = [sys.executable, "-m", "tessera_parity.kernel_worker", op, "--no-bugs", "--lane", setting.lane]
    return [*command, *(["--device", "cpu", "--cases", "1"] if setting.dry else ["--device", "cuda"])]


def _check(op: str, setting: Setting, known: Record) -> Job:
    del known
    environment = run_all.environment_of(setting.dry)
    return Job(
        part="check",
        name=op,
        command=_worker(op, setting),
        environment=environment,
        limit=240,
        least=5 if setting.dry else 45,
        read=_read_check,
    )


def _read_check(ran: Ran) -> Record:
    record = run_all.read_check(ran)
    told = record["problem"] or (
        f"right, {record['cases']} cases, {len(record['configs_run'])} configurations, {record['observed']:.2f} of the limit"
    )
    return record | {"done": not record["problem"], "told": told}


def _report_check(records: Mapping[str, Record]) -> list[str]:
    lines = ["| op | cases | share of the error limit | configurations | |", "| --- | --- | --- | --- | --- |"]
    for op, one in records.items():
        share = f"{one['observed']:.2f}" if "observed" in one else ""
        told = one["problem"] or ("right" + (f", left out: {one['left_out']}" if one.get("left_out") else ""))
        lines.append(
            f"| {op} | {one.get('cases', one.get('begun', 0))} | {share} | {len(one.get('configs_run', ()))} | {told} |"
        )
    return lines


# ---- sanitize: no access outside what was allocated


def _sanitize(op: str, setting: Setting, known: Record) -> Job:
    del known
    log = setting.folder / f"sanitize-{op}.log"
    tool = ["compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--print-limit", "5",
            "--target-processes", "application-only", "--log-file", str(log)]  # fmt: skip
    environment = run_all.environment_of(setting.dry) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = _worker(op, setting)

    def read(ran: Ran) -> Record:
        return read_sanitizer(ran, log.read_text(errors="replace") if log.exists() else "", setting.dry)

    return Job(
        part="sanitize", name=op, command=command if setting.dry else [*tool, *command], environment=environment,
        limit=600, least=5 if setting.dry else 45, read=read,
    )  # fmt: skip


FAULT = re.compile(r"=+ (Invalid|Misaligned|Out-of-range|Illegal|Race|Uninitialized|Program hit|Internal)[^\n]*")


def read_sanitizer(ran: Ran, log: str, dry: bool) -> Record:
    """Return what memcheck found; a worker stopped at its seconds without a fault has still run that many cases clean."""
    worker = run_all.read_check(ran)
    faults = [found.group(0).lstrip("= ") for found in FAULT.finditer(log)]
    summary = re.search(r"ERROR SUMMARY: (\d+) error", log)
    errors = max(len(faults), int(summary.group(1)) if summary else 0)
    problem = f"{errors} errors: {faults[0] if faults else 'see the log'}" if errors else ""
    if not problem and not worker["begun"]:
        problem = (ran.problem() or "no case ran") + (f"; {log.strip().splitlines()[-1][:160]}" if log.strip() else "")
    if not problem and worker["problem"] and not worker["stopped"]:
        problem = f"no memory error, but {worker['problem']}"
    watched = "run without the sanitizer" if dry else f"no error in {worker['begun']} cases"
    told = problem or watched + (", stopped at its seconds" if worker["stopped"] else "")
    return {"problem": problem, "errors": errors, "begun": worker["begun"], "stopped": worker["stopped"], "told": told,
            "log": log[-2000:] if errors else "", "done": not problem and not dry}  # fmt: skip


def _report_sanitize(records: Mapping[str, Record]) -> list[str]:
    lines = ["compute-sanitizer memcheck over the quick fuzz lane, every allocation its own (no caching allocator):", "",
             "| op | cases begun | memory errors | |", "| --- | --- | --- | --- |"]  # fmt: skip
    lines += [f"| {op} | {one['begun']} | {one['errors']} | {one['told']} |" for op, one in records.items()]
    for op, one in records.items():
        lines += ["", f"{op}:", "", "```text", one["log"].strip(), "```"] if one["log"] else []
    return lines


# ---- time: every row beside its peers


def _time(op: str, setting: Setting, known: Record) -> Job:
    path = setting.folder / f"time-{op}.json"
    path.unlink(missing_ok=True)
    without = known.get("without", [])
    environment = run_all.environment_of(setting.dry) | {"TESSERA_BENCH_WITHOUT": ",".join(without)}
    return Job(
        part="time", name=op, command=run_all.bench_command(op, path), environment=environment, limit=150, least=20,
        read=lambda ran: read_time(op, ran, path, known),
    )  # fmt: skip


def read_time(op: str, ran: Ran, path: Path, known: Record) -> Record:
    """Return an op's rows, those of before kept where this run has none, and a peer that took the process down named."""
    found = run_all.read_bench(op, ran, path)
    fresh = {row["shape"] for row in found["rows"]}
    found["rows"] += [row for row in known.get("rows", ()) if row["shape"] not in fresh]
    found["gpu"] = found["gpu"] or known.get("gpu", "")
    found["limits"] = found["limits"] or known.get("limits", {})
    without = list(known.get("without", []))
    tried = [
        line.strip().removeprefix(TRYING).strip() for line in ran.err.splitlines() if line.strip().startswith(TRYING)
    ]
    crashed = ran.code not in (0, None)
    if crashed and tried and not tried[-1].startswith("our") and tried[-1] not in without:
        without.append(tried[-1])
    told = found["problem"] or f"{len(found['rows'])} rows" + (
        f", {len(found['late'])} shapes late" if found["late"] else ""
    )
    return found | {"without": without, "again": len(without) > len(known.get("without", [])), "told": told,
                    "done": not found["problem"] and not found["late"]}  # fmt: skip


def _warm_bench(op: str, setting: Setting) -> Sequence[Job]:
    shares = 1 if setting.dry else BENCH_SHARES.get(op, 1)
    path = setting.folder / "warm.json"
    return [_warm("time", op, run_all.bench_command(op, path.with_stem(f"warm-{op}-{share}")), share, shares, setting)
            for share in range(shares)]  # fmt: skip


def _warm(part: str, op: str, command: Sequence[str], share: int, shares: int, setting: Setting) -> Job:
    environment = run_all.environment_of(setting.dry) | {"TESSERA_BENCH_WARM": f"{share}/{shares}"}
    return Job(
        part="warm", name=f"{part} {op} {share + 1}/{shares}", command=command, environment=environment, limit=150, least=15,
        read=lambda ran: {"problem": ran.problem()},
    )  # fmt: skip


def _report_time(records: Mapping[str, Record]) -> list[str]:
    results = [{"op": op} | record for op, record in sorted(records.items())]
    seconds = sum(record["seconds"] for record in records.values())
    dry = any(record["gpu"].startswith("none") for record in records.values())
    title, *lines = run_all.report_of(results, {}, seconds=seconds, dry=dry).splitlines()
    return [title.lstrip("# "), *lines]


# ---- sweep: which configuration


def _sweep(op: str, setting: Setting, known: Record) -> Job:
    path = setting.folder / f"sweep-{op}.json"
    path.write_text(json.dumps(known), encoding="utf-8")
    command = [sys.executable, str(run_all.HERE / "sweeping.py"), op, "--json", str(path)]
    return Job(
        part="sweep", name=op, command=command, environment=run_all.environment_of(setting.dry), limit=180, least=20,
        read=lambda ran: read_sweep(ran, path),
    )  # fmt: skip


def read_sweep(ran: Ran, path: Path) -> Record:
    """Return the shapes swept so far; a candidate in which the process died is left out the next time."""
    empty = {"shapes": {}, "fatal": [], "at": "", "limits": {}, "late": [], "gpu": ""}
    record: Record = empty | json.loads(path.read_text(encoding="utf-8"))
    if ran.code is None:
        record["at"] = ""  # stopped, not crashed
    problem = ran.problem()
    told = problem or f"{len(record['shapes'])} shapes" + (f", {len(record['late'])} late" if record["late"] else "")
    died = bool(record["at"]) and record["at"] not in record["fatal"]
    return record | {"problem": problem, "told": told, "again": died, "done": not problem and not record["late"]}


def _warm_sweep(op: str, setting: Setting) -> Sequence[Job]:
    shares = 1 if setting.dry else SWEEP_SHARES.get(op, 1)
    command = [sys.executable, str(run_all.HERE / "sweeping.py"), op]
    return [_warm("sweep", op, command, share, shares, setting) for share in range(shares)]


def choices(records: Mapping[str, Record]) -> dict[str, Any]:
    """Return the machine-readable answer of all sweeps: `chosen.json`."""
    return {op: sweeping.choices_of(record) for op, record in records.items() if record["shapes"]}


# ---- profile: what limits each kernel


def _profile(op: str, setting: Setting, known: Record) -> Job:
    del known
    command = [sys.executable, str(run_all.HERE / "probes.py"), op] if setting.dry else probes.command_of(op)
    return Job(
        part="profile", name=op, command=command, environment=run_all.environment_of(setting.dry), limit=90, least=20,
        read=lambda ran: read_profile(ran, setting.dry),
    )  # fmt: skip


def read_profile(ran: Ran, dry: bool) -> Record:
    """Return one record for each launch that was profiled; a dry run profiles none."""
    launches = [asdict(one) for one in probes.read(ran.out)]
    told = next((line for line in ran.out.splitlines() if line.startswith(("==ERROR==", "==WARNING=="))), "")
    problem = ran.problem() or ("" if launches or dry else f"no launch was profiled; {told}")
    return {"problem": problem, "launches": launches, "told": problem or f"{len(launches)} launches",
            "done": bool(launches) and not problem}  # fmt: skip


MARKS = Path(tempfile.gettempdir()) / "tessera-warm"
"""Empty files here say what was compiled on this machine: a fresh machine has none."""


def is_warm(part: str, op: str) -> bool:
    """Was this op's code compiled on this machine already?"""
    return (MARKS / f"{part}-{op}").exists()


def mark_warm(part: str, op: str) -> None:
    """Remember that it was."""
    MARKS.mkdir(parents=True, exist_ok=True)
    (MARKS / f"{part}-{op}").touch()


def _timed_ops() -> Sequence[str]:
    return run_all.longest_first(run_all.names_of())


SWEEP_SECONDS = {
    "flash_attention": 80, "cuda_flash_attention": 30, "gate_up": 20, "linear_cross_entropy": 35, "linear_distillation": 60,
    "quant_matmul": 50, "cuda_quant_matmul": 40, "paged_attention": 40, "fp8_matmul": 40, "rms_norm": 40, "sample": 20, "rope": 15,
    "swiglu": 15, "cuda_linear_distillation": 30, "cuda_fp8_matmul": 10, "adamw": 12,
}  # fmt: skip

PARTS: dict[str, Part] = {
    "doctor": Part(
        ops=("machine",), seconds={}, usual=25, timed=False, job=_doctor, warm=_none, report=_report_doctor
    ),
    "check": Part(
        ops=sorted(FUZZED, key=lambda op: ("attention" not in op, "linear" not in op, op)),
        seconds={}, usual=100, timed=False, job=_check, warm=_none, report=_report_check,
    ),
    "sanitize": Part(
        ops=sorted(FUZZED, key=lambda op: ("attention" not in op, "linear" not in op, op)),
        seconds={}, usual=150, timed=False, job=_sanitize, warm=_none, report=_report_sanitize,
    ),
    "time": Part(
        ops=_timed_ops(), seconds=run_all.SECONDS, usual=60, timed=True, job=_time, warm=_warm_bench, report=_report_time
    ),
    "sweep": Part(
        ops=tuple(sweeping.SOURCES), seconds=SWEEP_SECONDS, usual=40, timed=True, job=_sweep, warm=_warm_sweep,
        report=sweeping.table_of,
    ),
    "profile": Part(
        ops=probes.OPS, seconds={}, usual=20, timed=True, job=_profile, warm=_none, report=probes.table_of
    ),
}  # fmt: skip

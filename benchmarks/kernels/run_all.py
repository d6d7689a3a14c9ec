"""Every kernel beside its peers, one table. Writes JSON and a dated report with hardware and versions.

    python benchmarks/kernels/run_all.py [--only op,op] [--out DIR] [--check] [--dry]

Each op runs in a process of its own with a time limit, longest first, and every row is kept at once, so that neither a
crash nor the limit loses what was measured. `--check` first fuzzes the op on the GPU in every configuration (planted bugs
left out) and times nothing that is wrong. `--dry` runs the same scripts on a CPU: tiny shapes, Triton's interpreter,
numbers that mean nothing. `session.py` does the same and more in boxes of seconds.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from boxed import Ran, run_boxed, told_until  # noqa: E402

ROOT = HERE.parents[1]
ROOMS = ("shared", "kernels", "torch_impl", "parity")
PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "flashinfer-python")
CHECKS_AT_ONCE = 4
TIME_IS_UP = "left out, time is up:"  # what harness.turn says
SECONDS = {
    "linear_distillation": 60, "quant_matmul": 40, "paged_attention": 35, "linear_cross_entropy": 30, "flash_attention": 25,
    "fp8_matmul": 25, "sample": 25, "cuda_flash_attention": 20, "cuda_rms_norm": 20, "cuda_quant_matmul": 20, "rms_norm": 20, "swiglu": 20,
    "rope": 15, "cuda_linear_distillation": 20, "cuda_fp8_matmul": 15,
    "adamw": 12,
}  # fmt: skip
"""What an op's bench takes on an H200 once everything is compiled: estimates from shapes and samples, not measured yet."""


def main() -> int:
    """Run what is asked for; the exit code is 0 unless a script failed, a check was red or a must was missed."""
    options = _options()
    if options.child:
        return _child(options.child, Path(options.json))
    names = _names(options.only)
    if not options.dry and not _has_gpu():
        print(
            "gpu = none: expected an NVIDIA GPU that torch can see, because kernels are timed on it; try --dry",
            file=sys.stderr,
        )
        return 4
    clock = time.perf_counter()
    checks = _check_all(names, options) if options.check else {}
    wrong = [name for name, found in checks.items() if found["problem"]]
    results = [
        bench(name, limit=options.limit, dry=options.dry)
        for name in longest_first(names)
        if name not in wrong and not options.check_only
    ]
    results.sort(key=lambda one: str(one["op"]))
    report = report_of(results, checks, seconds=time.perf_counter() - clock, dry=options.dry)
    print(report)
    _write(options, results, checks, report)
    failed = [one for one in results if one["problem"]]
    missed = [v for one in results for row in one["rows"] for v in row["verdicts"] if v[1] is False]
    return 1 if wrong or failed or missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of ops with commas between; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "reports", help="where report and JSON go")
    parser.add_argument("--check", action="store_true", help="fuzz each op first, every configuration")
    parser.add_argument("--check-only", action="store_true", help="fuzz and time nothing")
    parser.add_argument("--lane", default="quick", choices=("quick", "default", "full"), help="of --check")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, nothing is written without --out")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one op")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.check = options.check or options.check_only
    return options


def names_of() -> list[str]:
    """Return every op that has a bench here, in alphabetical order."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def longest_first(names: list[str]) -> list[str]:
    """Return ops so that what takes longest begins first; an op that nobody estimated counts as a minute."""
    return sorted(names, key=lambda name: -SECONDS.get(name, 60))


def _names(only: str) -> list[str]:
    known = names_of()
    asked = [name for name in only.split(",") if name]
    for name in asked:
        if name not in known:
            sys.exit(f"only = {name!r}: expected one of {', '.join(known)}, because each has a bench_<op>.py here")
    return [name for name in known if not asked or name in asked]


def _child(name: str, path: Path) -> int:
    """Measure one op in this process; every row is in the JSON as soon as it is there."""
    import harness

    limits = {} if harness.is_warm_up() else harness.ceilings()
    rows: list[dict[str, Any]] = []
    for row in importlib.import_module(f"bench_{name}").rows():
        rows.append(row.to_json(limits))
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"limits": limits, "gpu": harness.gpu_name(), "rows": rows}), encoding="utf-8")
        fresh.replace(path)
    return 0


def environment_of(dry: bool) -> dict[str, str]:
    """Return the environment of every process here: the rooms on Python's path, torch.compile without processes of its own
    (they would run beside what is timed) and, dry, the interpreter."""
    rooms = os.pathsep.join(str(ROOT / room) for room in ROOMS)
    extra = {"TESSERA_BENCH_DRY": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if dry else {}
    path = os.pathsep.join(part for part in (rooms, os.environ.get("PYTHONPATH", "")) if part)
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} | extra


def bench_command(name: str, path: Path) -> list[str]:
    """Return the command that measures one op and leaves its rows in `path`."""
    return [sys.executable, str(HERE / "run_all.py"), "--child", name, "--json", str(path)]


def bench(name: str, *, limit: float, dry: bool) -> dict[str, Any]:
    """Run one op's bench in a process of its own for at most `limit` seconds; rows that were ready by then are kept."""
    print(f"== {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        path = Path(folder) / "rows.json"
        environment = told_until(environment_of(dry), limit)
        ran = run_boxed(bench_command(name, path), environment=environment, seconds=limit)
        sys.stderr.write(ran.err[-4000:])
        found = read_bench(name, ran, path)
    print(f"   {len(found['rows'])} rows, {ran.seconds:.0f} s {found['problem']}", file=sys.stderr, flush=True)
    return found


def read_bench(name: str, ran: Ran, path: Path) -> dict[str, Any]:
    """Return what a bench left: its rows, what went wrong, which shapes and peers it left out."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"limits": {}, "gpu": "", "rows": []}
    lines = [line.strip() for line in ran.err.splitlines()]
    late = [line.removeprefix(TIME_IS_UP).strip() for line in lines if line.startswith(TIME_IS_UP)]
    missing = sorted({line for line in lines if line.startswith("left out: ")})
    problem = ran.problem() or ("" if found["rows"] or late else "gave no rows")
    return {"op": name, "problem": problem, "seconds": ran.seconds, "late": late, "missing": missing} | found


def _check_all(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(CHECKS_AT_ONCE if not options.dry else 1) as pool:
        return dict(zip(names, pool.map(lambda name: _check(name, options), names), strict=True))


def _check(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fuzz one op: the examples, generated cases and every configuration, by the rule of `parity run kernels`."""
    device = "cpu" if options.dry else "cuda"
    command = [sys.executable, "-m", "tessera_parity.kernel_worker", name, "--device", device, "--no-bugs"]
    command += ["--lane", options.lane]
    return read_check(run_boxed(command, environment=environment_of(options.dry), seconds=options.limit))


def read_check(ran: Ran) -> dict[str, Any]:
    """Return what a fuzzing worker found; `begun` counts the cases that it began, also where it was stopped."""
    said = [json.loads(line) for line in ran.out.splitlines() if line.startswith("{") and line.endswith("}")]
    begun = sum(line["kind"] == "at" for line in said)
    fuzzed = next((line["what"] for line in said if line["kind"] == "fuzzed"), None)
    if fuzzed is None:
        last = next((line["what"] for line in reversed(said) if line["kind"] in ("lost", "at")), "")
        return {"problem": f"{ran.problem() or 'no result'} at {last}", "begun": begun, "stopped": ran.code is None}
    problem = f"{fuzzed['failure']} in {fuzzed['failing_case']}" if fuzzed["failure"] else ""
    return {"problem": problem, "begun": begun, "stopped": False} | fuzzed


def report_of(results: list[dict[str, Any]], checks: Mapping[str, dict[str, Any]], *, seconds: float, dry: bool) -> str:
    """Return the report as Markdown: limits, checks, one line for each row, counted musts, notes, what was left out."""
    gpu = next((one["gpu"] for one in results if one["gpu"]), "no GPU")
    limits: dict[str, float] = next((one["limits"] for one in results if one["limits"]), {})
    lines = [
        f"# Kernels on {gpu}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"Python {platform.python_version()}, {_versions()}, {_driver()}. {seconds:.0f} s in all.",
        "Made by `python benchmarks/kernels/run_all.py`: medians of interleaved samples (p20 to p80 beside ours), random",
        "data, CUDA graphs where a call can be captured (* = launched from the host).",
        "",
        "Limits of this run: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in limits.items())
        + " (copy in GB/s, the others in TFLOP/s; bf16 and fp8 from the datasheet).",
    ]
    if dry:
        lines += ["", "**Dry run on a CPU: the numbers mean nothing.**"]
    if checks:
        lines += [
            "",
            "| checked first | cases | share of the error limit | configurations | |",
            "| --- | --- | --- | --- | --- |",
        ]
        for name, found in checks.items():
            told = found["problem"] or "right"
            lines.append(
                f"| {name} | {found.get('cases', 0)} | {found.get('observed', float('nan')):.2f} "
                f"| {len(found.get('configs_run', {}))} | {told} |"
            )
    lines += ["", "| op | shape | ours ms | peers ms (their time / ours) | rate | share of limit | must |",
              "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for one in results:
        lines += [_table_line(row) for row in one["rows"]]
        if one["problem"]:
            lines.append(f"| {one['op']} | | | | | | **{one['problem']}** |")
    judged = [verdict[1] for one in results for row in one["rows"] for verdict in row["verdicts"]]
    lines += ["", f"Musts: {judged.count(True)} met, {judged.count(False)} missed, {judged.count(None)} not judged."]
    notes = [f"- {row['op']}, {row['shape']}: {row['notes']}" for one in results for row in one["rows"] if row["notes"]]
    for one in results:
        notes += [f"- {one['op']}, {line}" for line in one.get("missing", ())]
        notes += [f"- {one['op']}, {TIME_IS_UP} {shape}" for shape in one.get("late", ())]
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def _table_line(row: dict[str, Any]) -> str:
    ours = row["ours"]
    peers = ", ".join(
        f"{name} {timing['median_ms']:.4g}{'' if timing['graph'] else '*'} ({row['ratios'][name]:.2f}x)"
        for name, timing in row["peers"].items()
    )
    unit = "GB/s" if row["limit"] == "copy" else "TFLOP/s"
    share = "" if row["share"] is None else f"{100 * row['share']:.0f} % of {row['limit']}"
    marks = {True: "met", False: "**missed**", None: "not judged"}
    must = "; ".join(f"{text}: {marks[met]}" for text, met in row["verdicts"])
    return (
        f"| {row['op']} | {row['shape']} | {ours['median_ms']:.4g}{'' if ours['graph'] else '*'} "
        f"({ours['p20']:.4g} to {ours['p80']:.4g}) | {peers or 'none'} | {row['rate']:,.0f} {unit} | {share} | {must} |"
    )


def _write(
    options: argparse.Namespace, results: list[dict[str, Any]], checks: dict[str, dict[str, Any]], report: str
) -> None:
    if options.dry and options.out == ROOT / "benchmarks" / "reports":
        return  # a dry run's numbers are not kept among the reports
    gpu = next((one["gpu"] for one in results if one["gpu"]), "no-gpu")
    slug = "".join(c if c.isalnum() else "-" for c in gpu.lower()).strip("-")
    part = f"_{options.only.replace(',', '_')}" if options.only else ""
    path = options.out / f"{datetime.now(UTC):%Y-%m-%d}_kernels_{slug}{part}.md"
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(report, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({"results": results, "checks": checks}, indent=1), encoding="utf-8")
    print(f"written: {path.name} and its .json", file=sys.stderr)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA driver"
    return f"driver, SM clock, memory clock, power limit: {done.stdout.strip().splitlines()[0]}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; no report was written", file=sys.stderr)
        sys.exit(130)

"""Questions 1 and 2 on an NVIDIA GPU: generated cases, then real shapes. Writes a dated report with hardware and
versions.

    python benchmarks/gpu_lane.py [--out DIR] [--calibrate]

Every part is a `parity` command line that a person could type; this file only chooses them, times them and collects
what they print. Parts run side by side, the longest first: they share the GPU, and most of their time is the CPU's, for
JAX's compiler and float64. `--at-once 1` is one after the other, for a GPU that does not hold several. The report is
written after every part, so that what is finished is kept. Both sides run without TF32 and without reduced-precision
bfloat16 sums (`tessera_parity.environment` records it). Exit code: the parts' worst; 4 no GPU, 130 interrupted.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("shared", "kernels", "torch_impl", "jax_impl", "parity")

GENERATED = ("ops", "block", "forward", "losses", "gradients", "optimizer", "trajectory")
SHAPES = ("tiny", "qwen3-0.6b")
SHAPE_CASES = {"tiny": 40, "qwen3-0.6b": 30}
"""Calibration cases of a real shape: large tensors scatter little, and are drawn and differentiated in float64."""


def main() -> int:
    """Run the parts, write the report, return the worst exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "reports", help="where the report is written")
    parser.add_argument(
        "--calibrate", action="store_true", help="first measure the legal variants on this device: 20 minutes"
    )
    parser.add_argument(
        "--only", action="append", choices=("generated", "rounding", *map(_slug, SHAPES)), help="run this part alone"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script itself")
    parser.add_argument("--lane", choices=("quick", "full"), default="quick", help="full takes over ten minutes")
    parser.add_argument("--at-once", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 4)),
                        help="parts at a time; default: one for each four cores, at most four")  # fmt: skip
    options = parser.parse_args()
    if options.at_once < 1:
        print(f"at_once = {options.at_once}: expected at least 1, because it counts parts; try 1", file=sys.stderr)
        return 2
    gpu = gpu_name() if options.device == "cuda" else "none (dry run on the CPU)"
    if gpu is None:
        print(
            "gpu = none: expected an NVIDIA GPU that torch can see, because this lane measures it; try make parity",
            file=sys.stderr,
        )
        return 4
    options.out.mkdir(parents=True, exist_ok=True)
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    slug = "".join(c if c.isalnum() else "-" for c in gpu.lower()).strip("-")
    report = options.out / f"{day}_parity_{slug}.md"
    began, parts = time.perf_counter(), []
    calibrations, jobs = plan(options)
    pool, started = ThreadPoolExecutor(options.at_once), []
    try:
        for batch in (*([one] for one in calibrations), jobs):  # runs read what calibration leaves
            running = [pool.submit(part, name, words, f"{day}_{slug}_{name}", started) for name, words in batch]
            for done in as_completed(running):
                parts.append(done.result())
                seconds = time.perf_counter() - began
                report.write_text(written(gpu, parts, options.at_once, seconds), encoding="utf-8")
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        end(started)
        kept = f"{len(parts)} parts are in {report}" if parts else "no part had ended"
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    print(report.read_text(encoding="utf-8"))
    return max(result["exit"] for result in parts)


Job = tuple[str, list[str]]
"""A part's name and arguments of `parity`."""


def plan(options: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """Return the calibrations that were asked for, and the parts, longest first."""
    where = ["--device", options.device]
    jobs = ["--jobs", str(os.cpu_count() or 1)]
    calibration, parts = [], []
    if options.calibrate:
        calibration.append(("calibrate", ["calibrate", "--cases", "60", *jobs, *where]))
        calibration += [
            (f"calibrate-{_slug(shape)}", ["calibrate", "--pool", shape, "--cases", str(cases), *jobs, *where])
            for shape, cases in SHAPE_CASES.items()
        ]
    parts.append(("generated", ["run", *GENERATED, f"--{options.lane}", *where]))
    parts.append(("rounding", ["run", "rounding", *where]))
    parts += [
        (_slug(shape), ["run", "model", "rounding", "--model", shape, f"--{options.lane}", *where]) for shape in SHAPES
    ]
    wanted = [(name, arguments) for name, arguments in reversed(parts) if not options.only or name in options.only]
    return calibration, wanted


def _slug(shape: str) -> str:
    return shape.replace(".", "-")


GRACE = 10
"""Seconds in which an interrupted part may end by itself: a terminal's Ctrl-C reaches it too."""


def end(started: list[subprocess.Popen[str]]) -> None:
    """Wait for the parts that were interrupted with this process; interrupt those that were not."""
    until = time.monotonic() + GRACE
    for process in started:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)


def part(name: str, arguments: list[str], folder: str, started: list[subprocess.Popen[str]]) -> dict[str, object]:
    """Run one `parity` command line, noted in `started`; keep its exit code, seconds and the lines that it printed."""
    command = [sys.executable, "-m", "tessera_parity", *arguments]
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder}_")) / "run"  # a second run of the day has its own
    if arguments[0] == "run":
        command += ["--report", str(scratch)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*(str(ROOT / room) for room in ROOMS), os.environ.get("PYTHONPATH", "")]),
        "PYTHONSAFEPATH": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two frameworks share one GPU
        "COLUMNS": "110",
    }
    print(f"== {name}: parity {' '.join(arguments)}", flush=True)
    clock = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    started.append(process)
    out, errors = process.communicate()
    code, seconds = process.returncode, time.perf_counter() - clock
    print(out[-6000:], errors[-3000:], f"{name}: exit {code}, {seconds:.0f} s", sep="\n", flush=True)
    return {
        "name": name,
        "command": "parity " + " ".join(arguments),
        "exit": code,
        "seconds": seconds,
        "printed": (out if code in (0, 1, 3) else errors).strip(),
        "largest": largest(scratch / "result.json"),
    }


def largest(result: Path) -> str:
    """Return the largest share of its limit that any check of question 1 used, from a run's result.json."""
    if not result.exists():
        return ""
    checks = [
        c for c in json.loads(result.read_text(encoding="utf-8"))["checks"] if c["question"] == "same mathematics"
    ]
    worst = max(checks, key=lambda c: c["observed"], default=None)
    if worst is None:
        return ""
    compared = sum(c["compared"] for c in checks)
    return f"largest float64 difference {worst['observed']:.2e} ({worst['name']}, limit {worst['limit']:.1e}); {compared:,} numbers"


def gpu_name() -> str | None:
    """Return the GPU's name, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def written(gpu: str, parts: list[dict[str, object]], at_once: int, seconds: float) -> str:
    """Return the report of the parts that are done as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "jax", "numpy", "flax", "optax"))
    lines = [
        f"# Parity on {gpu}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"Python {platform.python_version()}, {versions}, {os.cpu_count()} CPU cores, {driver()}.",
        f"Made by `python benchmarks/gpu_lane.py`, {at_once} parts at a time, {seconds:.0f} s in all. TF32 off and full-precision",
        "sums on both sides.",
        "",
        "| part | command | exit | seconds | question 1 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {p['name']} | `{p['command']}` | {p['exit']} | {p['seconds']:.0f} | {p['largest']} |" for p in parts]
    for p in parts:
        lines += ["", f"## {p['name']}", "", "```text", str(p["printed"]), "```"]
    return "\n".join(lines) + "\n"


def driver() -> str:
    """Return the driver's version in words."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA driver"
    return f"driver {done.stdout.strip().splitlines()[0]}"


if __name__ == "__main__":
    sys.exit(main())

"""One call of every kernel of the table, marked by an NVTX range: what Nsight Compute profiles, and what it printed, read.

    ncu --nvtx --nvtx-include "regex:probe.*/" ... python benchmarks/kernels/probes.py rms_norm

`session.py profile` makes that command. Shapes are those of the benches where a call launches few kernels; a loss runs one
chunk of rows, or all rows and a few stripes of ids, forward and gradients.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / room) for room in ("shared", "kernels"))]

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "ComputeWorkloadAnalysis")
MOST_KERNELS = 64
"""Kernels that one op's probes may profile."""

SMALL = 0.02
"""A kernel below this share of its probe's time is not told."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A call to profile; the first call, unmarked, compiles."""

    name: str
    call: Callable[[], object]


OPS = (
    "flash_attention", "cuda_flash_attention", "linear_cross_entropy", "linear_distillation",
    "cuda_linear_distillation", "swiglu", "quant_matmul",
    "cuda_quant_matmul", "paged_attention", "fp8_matmul", "cuda_fp8_matmul", "rms_norm", "cuda_rms_norm", "sample", "rope", "adamw",
)  # fmt: skip
"""What falls shortest of its goal first."""


def main() -> int:
    """Run one op's probes, each once unmarked and once in its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    options = parser.parse_args()
    import harness
    import torch

    with torch.autograd.set_multithreading_enabled(False):  # a range is of one thread, the backward's too
        for probe in probes_of(options.op):
            probe.call()
            name = (
                f"probe {options.op} {re.sub(r'[^0-9A-Za-z_ .=-]', '-', probe.name)}"  # ncu reads / * + [ ] as syntax
            )
            if harness.is_dry():
                print(name, flush=True)
                continue
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_push(name)
            probe.call()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_pop()
    return 0


def probes_of(op: str) -> Iterator[Probe]:
    """Yield an op's probes; tensors are made as they are asked for."""
    makers: dict[str, Callable[[], Iterator[Probe]]] = {
        "flash_attention": _attention, "cuda_flash_attention": _cuda_attention, "linear_cross_entropy": _cross_entropy,
        "linear_distillation": _distillation, "cuda_linear_distillation": _cuda_distillation, "swiglu": _swiglu, "quant_matmul": _quant,
        "cuda_quant_matmul": _cuda_quant, "paged_attention": _paged,
        "fp8_matmul": _fp8, "cuda_fp8_matmul": _cuda_fp8, "rms_norm": partial(_norm, "triton"),
        "cuda_rms_norm": partial(_norm, "cuda"), "sample": _sample, "rope": _rope, "adamw": _adamw,
    }  # fmt: skip
    return makers[op]()


def _attention() -> Iterator[Probe]:
    import bench_flash_attention as bench
    import harness
    import torch

    from tessera_kernels.triton.flash_attention import flash_attention

    for shape in harness.choose((bench.FULL[1], bench.FULL[3]), bench.TINY):
        leaves = bench.leaves_of(shape[0], shape[3], shape[1], shape[2], shape[4])
        out = flash_attention(*leaves)[0]
        yield Probe(
            name=f"forward S{shape[3]} H{shape[4]}", call=partial(flash_attention, *(x.detach() for x in leaves))
        )
        yield Probe(
            name=f"backward S{shape[3]} H{shape[4]}",
            call=partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True),
        )


def _cuda_attention() -> Iterator[Probe]:
    import bench_cuda_flash_attention as bench

    for _, sweep in zip(range(2), bench.sweeps(), strict=False):
        yield Probe(name=f"{sweep.part} {sweep.shape}", call=sweep.candidates[sweep.current])


def _cross_entropy() -> Iterator[Probe]:
    import bench_linear_cross_entropy as bench
    import harness
    import torch

    hidden, head, labels = bench.inputs(torch.float32)
    ids = harness.choose(4096, 64)
    stripes = hidden, head[:ids].detach().requires_grad_(), labels % ids
    yield Probe(name=f"no logits, {ids} ids", call=partial(bench.ours, *stripes, mode="no_logits"))
    few = harness.choose(1664, 4)
    given = hidden[:few].detach().requires_grad_(), head, labels[:few]
    yield Probe(name=f"{few} rows, forward and gradients", call=partial(bench.ours, *given))


def _distillation() -> Iterator[Probe]:
    import bench_linear_distillation as bench
    import harness
    import torch

    student, head, teacher, teacher_head, labels = bench.inputs(torch.float32)
    ids = harness.choose(4096, 64)
    stripes = student, head[:ids].detach().requires_grad_(), teacher, teacher_head[:ids], labels % ids
    for divergence in ("forward_kl", "reverse_kl"):
        yield Probe(
            name=f"{divergence} no logits {ids} ids",
            call=partial(bench.ours, *stripes, divergence=divergence, mode="no_logits"),
        )
    few = harness.choose(1024, 4)
    given = student[:few].detach().requires_grad_(), head, teacher[:few], teacher_head, labels[:few]
    for divergence in ("forward_kl", "generalized_jsd"):
        yield Probe(name=f"{divergence} {few} rows", call=partial(bench.ours, *given, divergence=divergence))


def _swiglu() -> Iterator[Probe]:
    import harness
    from sweep_memory_bound import SWEEPS

    shapes = {"gate_up": 1, "swiglu": 2}
    for name, most in shapes.items():
        for _, sweep in zip(range(harness.choose(most, 1)), SWEEPS[name](), strict=False):
            yield Probe(name=f"{name} {sweep.part} {sweep.shape}", call=sweep.candidates[sweep.current])


def _quant() -> Iterator[Probe]:
    import bench_quant_matmul as bench
    import harness
    import torch

    from tessera_kernels.triton.quant_matmul import quant_matmul

    outputs, width = harness.choose(bench.SHAPES[0], (96, 256))
    weight = torch.randn(outputs, width, device=harness.device(), dtype=torch.bfloat16) / width**0.5
    for name in ("W8A16 channel", "W4A16 g128"):
        packed = bench.FORMATS[name](weight)
        for count in harness.choose((1, 16, 256), (1,)):
            x = torch.randn(count, width, device=harness.device()).to(torch.bfloat16)
            yield Probe(name=f"{name} rows {count}", call=partial(quant_matmul, x, packed))


def _cuda_distillation() -> Iterator[Probe]:
    import bench_cuda_linear_distillation as bench

    for sweep in bench.sweeps():
        yield Probe(name=sweep.part, call=sweep.candidates[sweep.current])


def _cuda_fp8() -> Iterator[Probe]:
    import bench_cuda_fp8_matmul as bench

    for sweep in bench.sweeps():
        yield Probe(name=sweep.shape, call=sweep.candidates[sweep.current])


def _cuda_quant() -> Iterator[Probe]:
    import bench_cuda_quant_matmul as bench

    for sweep in bench.sweeps():
        yield Probe(name=f"{sweep.part} {sweep.shape}", call=sweep.candidates[sweep.current])


def _paged() -> Iterator[Probe]:
    import bench_paged_attention as bench
    import harness

    for shape in harness.choose((bench.DECODE[0], bench.PREFILL[0]), bench.TINY):
        yield Probe(name=str(shape), call=bench.call_of(bench.inputs_of(shape), shape))


def _fp8() -> Iterator[Probe]:
    import bench_fp8_matmul as bench

    for sweep in bench.sweeps():
        yield Probe(name=f"{sweep.part} {sweep.shape}", call=sweep.candidates[sweep.current])
        if sweep.part.startswith("block"):
            return


def _norm(room: str) -> Iterator[Probe]:
    import harness
    import torch

    rms_norm = import_module(f"tessera_kernels.{room}.rms_norm")
    for rows, width in harness.choose(((16384, 4096), (4096, 16384)), ((5, 64),)):
        x, gain = (torch.randn(*shape, device=harness.device(), dtype=torch.bfloat16).requires_grad_()
                   for shape in ((rows, width), (width,)))  # fmt: skip
        out = rms_norm.rms_norm(x, gain, eps=1e-6)
        yield Probe(
            name=f"forward {rows}x{width}", call=partial(rms_norm.rms_norm, x.detach(), gain.detach(), eps=1e-6)
        )
        yield Probe(
            name=f"backward {rows}x{width}",
            call=partial(torch.autograd.grad, out, (x, gain), torch.randn_like(out), retain_graph=True),
        )


def _sample() -> Iterator[Probe]:
    import bench_sample as bench

    for sweep in bench.sweeps():
        yield Probe(name=sweep.shape, call=sweep.candidates[sweep.current])
        if "top-p" in sweep.shape:
            return


def _rope() -> Iterator[Probe]:
    yield from _first_sweep("rope")


def _adamw() -> Iterator[Probe]:
    yield from _first_sweep("adamw")


def _first_sweep(name: str) -> Iterator[Probe]:
    from sweep_memory_bound import SWEEPS

    sweep = next(SWEEPS[name]())
    yield Probe(name=f"{sweep.part} {sweep.shape}", call=sweep.candidates[sweep.current])


def command_of(op: str) -> list[str]:
    """Return the command that profiles one op: counters of a few sections, clocks left as they are."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--nvtx"]
    command += ["--nvtx-include", "regex:probe.*/", "--launch-count", str(MOST_KERNELS)]
    for section in SECTIONS:
        command += ["--section", section]
    return [*command, sys.executable, str(HERE / "probes.py"), op]


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What the counters say of one launch."""

    probe: str
    kernel: str
    us: float
    tensor: float | None  # % of the tensor pipe's cycles
    dram: float | None  # % of the memory's bandwidth
    compute: float | None  # % of the busiest pipe
    occupancy: float | None  # % of the warps that fit
    registers: int | None
    shared: int | None  # bytes of a block
    stalls: str  # the two most frequent reasons, warps a cycle each


def read(text: str) -> list[Profiled]:
    """Return the launches in what ncu printed as raw CSV; columns that it does not have stay None."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    unit = rows[0].get("gpu__time_duration.sum", "") if rows else ""  # the line below the names says the units
    scale = MICROSECONDS.get(unit.strip(), 1e-3)
    return [_launch(row, scale) for row in rows if (row.get("ID") or "").strip().isdigit()]


MICROSECONDS = {
    "ns": 1e-3,
    "nsecond": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
    "second": 1e6,
}


def _launch(row: Mapping[str, str], scale: float) -> Profiled:
    cells = " ".join(str(cell) for cell in row.values())
    marked = re.search(r"probe \w+ ([^\"]+?)\"", cells + '"')
    duration = _number(row, ("gpu__time_duration.sum",)) or 0.0
    return Profiled(
        probe=marked.group(1).strip() if marked else "",
        kernel=re.sub(r"[<(].*", "", row.get("Kernel Name", "?")).removeprefix("void ").strip(),
        us=duration * scale,
        tensor=_largest(row, r"pipe_tensor.*cycles_active.*pct_of_peak_sustained_(active|elapsed)$")
        or _largest(row, r"pipe_tensor.*pct_of_peak_sustained_(active|elapsed)$"),
        dram=_largest(row, r"(gpu__dram|dram_)_throughput\.avg\.pct_of_peak_sustained_elapsed$"),
        compute=_number(row, ("sm__throughput.avg.pct_of_peak_sustained_elapsed",)),
        occupancy=_number(row, ("sm__warps_active.avg.pct_of_peak_sustained_active",)),
        registers=_whole(_number(row, ("launch__registers_per_thread",))),
        shared=_whole(_number(row, ("launch__shared_mem_per_block", "launch__shared_mem_per_block_dynamic"))),
        stalls=_stalls(row),
    )


def _stalls(row: Mapping[str, str]) -> str:
    found = {}
    for name, cell in row.items():
        reason = re.search(r"average_warps_issue_stalled_(\w+?)_per_issue_active", name or "")
        value = _parsed(cell)
        if reason and value is not None and reason.group(1) not in ("selected", "not_selected"):
            found[reason.group(1)] = value
    most = sorted(found.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{reason.replace('_', ' ')} {value:.1f}" for reason, value in most)


def _parsed(cell: Any) -> float | None:
    try:
        return float(str(cell).replace(",", ""))
    except ValueError:
        return None


def _number(row: Mapping[str, str], names: Sequence[str]) -> float | None:
    found = [value for name in names if (value := _parsed(row.get(name, ""))) is not None]
    return found[0] if found else None


def _largest(row: Mapping[str, str], pattern: str) -> float | None:
    found = [value for name, cell in row.items()
             if name and re.search(pattern, name) and (value := _parsed(cell)) is not None]  # fmt: skip
    return max(found, default=None)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def table_of(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return Markdown for docs/kernels.md: one line for each launch that matters."""
    lines = ["| op | probe | kernel | us | tensor % | DRAM % | busiest pipe % | occupancy % | registers | shared KiB | stalls |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for op, record in records.items():
        launches = [Profiled(**one) for one in record.get("launches", ())]
        total: dict[str, float] = {}
        for one in launches:
            total[one.probe] = total.get(one.probe, 0.0) + one.us
        for one in launches:
            if one.us >= SMALL * total[one.probe]:
                shared = None if one.shared is None else one.shared / 1024
                cells = (one.tensor, one.dram, one.compute, one.occupancy, one.registers, shared)
                told = " | ".join("" if cell is None else f"{cell:.0f}" for cell in cells)
                lines.append(f"| {op} | {one.probe} | `{one.kernel}` | {one.us:.1f} | {told} | {one.stalls} |")
        if not launches:
            lines.append(f"| {op} | {record.get('problem') or 'not measured'} | | | | | | | | | |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""The report of compiled code: what it reads in a disassembly, and what a person sees of kernels compiled without a GPU."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

BENCHES = Path(__file__).parents[2] / "benchmarks" / "kernels"
TOOLS = Path(sys.modules["triton"].__file__ or "").parent / "backends" / "nvidia" / "bin"
needs_assembler = pytest.mark.skipif(
    not (TOOLS / "ptxas").exists(), reason="this Triton came without NVIDIA's assembler"
)

# One loop from 0x10 to 0xa0. Its middle was moved behind the end of the kernel, and a longer loop without products follows it.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA 0x90 ;
        /*0030*/                   STG.E.U16 desc[UR4][R2.64], R8 ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/               @P1 BRA 0x40 ;
        /*0080*/                   EXIT ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   MUFU.EX2 R5, R5 ;
        /*00c0*/                   MUFU.EX2 R6, R6 ;
        /*00d0*/                   BRA 0x10 ;
"""

SPILLS = """
import triton
import triton.language as tl

@triton.jit
def _crowded(x, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    held = tl.load(x + places)
    tl.debug_barrier()
    other = tl.load(x + BLOCK + places)
    tl.debug_barrier()
    tl.store(y + places, held * tl.sum(other, 0) + other * tl.sum(held, 0))
"""

COMPILE_SPILLS = """
import sys
from compile_launches import Recorder, empty
import torch
from crowded import _crowded
recorder = Recorder().install()
_crowded[(1,)](empty(16384, dtype=torch.float32), empty(8192, dtype=torch.float32), BLOCK=8192, num_warps=1)
(found,) = recorder.found
print(found.kernel, found.code.spill > 0, found.code.problems)
"""


@pytest.fixture(scope="module")
def code() -> Iterator[ModuleType]:
    """Give `compiled_code`, which is a file beside the benches."""
    sys.path.insert(0, str(BENCHES))
    try:
        yield importlib.import_module("compiled_code")
    finally:
        sys.path.remove(str(BENCHES))
        sys.modules.pop("compiled_code", None)


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python on the benches' modules, in a process of its own: they stand in for Triton's driver."""
    places = [str(BENCHES), *([str(path)] if path else []), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=False, env=environment
    )


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(str(BENCHES / "compile_report.py"), *arguments)


def test_the_main_loop_has_the_products_and_what_was_moved_out_of_the_way(code: ModuleType) -> None:
    instructions = list(code.disassemble(LISTING))
    assert [one.kind for one in instructions][:3] == ["S2R", "LDG", "BRA"]
    assert [one.guarded for one in instructions][:3] == [False, False, True]
    loop = code.main_loop(instructions)
    assert [one.address for one in loop] == [0x10, 0x20, 0x90, 0xA0, 0xB0, 0xC0, 0xD0]
    assert code.order_of(loop) == "LDG BRA P W0 x*2 BRA"


def test_without_products_the_main_loop_is_the_longest(code: ModuleType) -> None:
    loop = code.main_loop(list(code.disassemble(LISTING.replace("HGMMA.64x128x16.F32.BF16", "IADD3"))))
    assert [one.kind for one in loop][-2:] == ["MUFU", "BRA"]
    assert code.main_loop([]) == []


def test_the_widest_access_counts(code: ModuleType) -> None:
    instructions = list(code.disassemble(LISTING))
    assert code._widest(instructions, ("LDG",), "UTMALDG") == "128"
    assert code._widest(instructions, ("STG",), "UTMASTG") == "16"
    assert code._widest(instructions, ("RED",)) == "-"


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "blocks"),
    [  # CUDA's programming guide, table of compute capabilities: 65,536 registers, 64 (48) warps, 32 (24) blocks
        (32, 0, 1, 90, 32),  # blocks
        (32, 0, 4, 90, 16),  # warps
        (255, 0, 4, 90, 2),  # registers
        (168, 0, 8, 90, 1),
        (64, 100 * 1024, 4, 90, 2),  # shared memory
        (64, 227 * 1024, 4, 90, 1),
        (64, 227 * 1024 + 1, 4, 90, 0),
        (64, 100 * 1024, 4, 86, 0),
    ],
)
def test_blocks_of_a_multiprocessor(
    code: ModuleType, registers: int, shared: int, warps: int, arch: int, blocks: int
) -> None:
    assert code.blocks_that_fit(registers, shared, warps, arch) == blocks


def test_what_nobody_wants_is_said(code: ModuleType) -> None:
    good = {"registers": 64, "stack": 0, "spill": 0, "shared": 0, "warps": 4, "blocks": 2, "wgmma": 1, "waits": 1}
    assert code.Code(**good).problems == []
    assert code.Code(**good | {"spill": 8, "stack": 8}).problems == ["spills 8 bytes"]
    assert code.Code(**good | {"stack": 8}).problems == ["stack of 8 bytes"]
    assert code.Code(**good | {"blocks": 0}).problems == ["does not fit"]
    assert code.Code(**good, overwritten=("MOV R1, R2",)).problems == [
        "operand of a product under way overwritten by MOV R1, R2"
    ]
    assert code.Code(**good, warnings=("C7510: potential loss",)).problems == ["wgmma serialized"]


# A loop whose product reads R180 to R183; what stands in the two places decides whether anything writes there too early.
RACE = """
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R88, R180, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0020*/                   {before} ;
        /*0030*/               @P0 BRA 0x60 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0050*/                   EXIT ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0080*/                   {after} ;
        /*0090*/                   BRA 0x0 ;
"""


@pytest.mark.parametrize(
    ("before", "pending", "after", "where"),
    [
        ("F2FP.BF16.F32.PACK_AB R184, R8, R180", "0x0", "F2FP.BF16.F32.PACK_AB R181, R8, R9", None),
        ("F2FP.BF16.F32.PACK_AB R181, R8, R9", "0x0", "NOP", "0x20"),
        ("LDS.128 R176, [R4]", "0x0", "LDS.64 R184, [R4]", None),
        ("LDS.128 R177, [R4]", "0x0", "NOP", "0x20"),
        ("ISETP.GE.AND P0, PT, R180, R4, PT", "0x0", "STG.E [R180], R181", None),
        ("SHFL.BFLY PT, R182, R4, 0x1, 0x1f", "0x0", "NOP", "0x20"),
        ("NOP", "0x1", "IMAD.WIDE R182, R4, R5, R6", None),  # the second group may be under way, the first may not
        ("NOP", "0x2", "IMAD.WIDE R182, R4, R5, R6", "0x80"),
    ],
)
def test_a_register_operand_of_a_product_under_way_is_left_alone(
    code: ModuleType, before: str, pending: str, after: str, where: str | None
) -> None:
    found = code.overwriting(list(code.disassemble(RACE.format(before=before, pending=pending, after=after))))
    assert [text.rsplit(" ", 1)[-1] for text in found] == ([where] if where else [])


@needs_assembler
@pytest.mark.parametrize("name", ["quant_matmul", "flash_attention"])
def test_no_cuda_kernel_writes_into_what_a_product_under_way_reads(code: ModuleType, name: str) -> None:
    """One kernel in four of those on Hopper; the machine code, for the source cannot show it."""
    pytest.importorskip("cuda.bindings.nvrtc")
    from tessera_kernels.cuda._compile import build

    op = importlib.import_module(f"tessera_kernels.cuda.{name}")
    seen = 0
    for kernel in [one for one in op.specializations() if one.needs == "sm_90a" and "few" not in one.entry][::4]:
        listing = code.sass_of(build(kernel, "sm_90a").path.read_bytes(), TOOLS)
        functions = [text for text in listing.split("Function : ")[1:] if text.startswith(kernel.entry)]
        instructions = list(code.disassemble(functions[0]))  # each function begins at address 0
        assert code.overwriting(instructions) == (), kernel.title
        seen += sum(
            one.kind in code.WGMMA and re.match(r"R\d+, R\d+", one.operands) is not None for one in instructions
        )
    assert seen >= 16  # products whose left factor lies in registers


@needs_assembler
def test_a_table_of_an_op_and_exit_code_0() -> None:
    done = report("--only", "rope,adamw", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nrope  " in done.stdout
    assert "\nadamw  " in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith("  none")]
    assert len(rows) >= 3
    assert all(8 <= int(row[4]) <= 255 for row in rows), "registers"
    assert f"{len(rows)} kernels, 0 with a problem, 0 left out" in done.stdout


@needs_assembler
def test_a_kernel_that_became_other_code_is_named(tmp_path: Path) -> None:
    """What a commit that only moves code around shows without a GPU; one bit of one instruction is enough."""
    only = ("--only", "adamw")
    report(*only, "--sass", str(tmp_path))
    (path, *_) = listings = sorted(tmp_path.glob("*.sass"))
    assert f"{len(listings)} of {len(listings)} kernels are what" in report(*only, "--same-as", str(tmp_path)).stdout
    text = path.read_text(encoding="utf-8")
    last = re.findall(r"/\* 0x([0-9a-f]{16}) \*/", text)[-1]
    path.write_text(text.replace(last, f"{int(last, 16) ^ 1:016x}"), encoding="utf-8")
    (tmp_path / "empty.sass").touch()
    said = report(*only, "--same-as", str(tmp_path), "--sass", str(tmp_path)).stdout  # read before it is written
    assert f"{len(listings) - 1} of {len(listings)} kernels are what" in said
    assert said.rstrip().endswith("  ".join(text.splitlines()[:2]))


@needs_assembler
def test_a_kernel_that_spills_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "crowded.py").write_text(SPILLS, encoding="utf-8")
    done = run("-c", COMPILE_SPILLS, path=tmp_path)
    assert done.stdout.startswith("_crowded True ['spills "), done.stdout + done.stderr


@needs_assembler
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "ropes"], "only = 'ropes': expected one of"),
        (["--arch", "91"], "arch = 91: expected one of 80, 86"),
        (["--config", "best"], "config = 'best': expected a number or all"),
        (["--only", "rope", "--shape", "nowhere"], "no kernel was compiled"),
        (["--same-as", str(BENCHES)], "expected a folder that --sass wrote"),
    ],
)
def test_a_wrong_word_is_one_line(arguments: list[str], said: str) -> None:
    done = report(*arguments)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert said in done.stderr

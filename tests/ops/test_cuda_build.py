"""The documented command that compiles the CUDA kernels, on a machine without a GPU."""

import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from tessera_kernels.cuda import _compile
from tessera_kernels.cuda import build as command
from tessera_kernels.cuda._compile import ARCHS, Kernel, build, build_emulated
from tessera_kernels.cuda.rms_norm import specializations
from tessera_shared.errors import KernelError, MissingDependency

GOOD = '#include "device.cuh"\nTESSERA_KERNEL(32) tiny(int* y) { y[threadIdx.x] = FILL; }\nTESSERA_ENTRY(tiny)\n'
SPILLS = (
    '#include "device.cuh"\nTESSERA_KERNEL(32) tiny(float* y, int n) {\n    float held[256];\n'
    "    for (int i = 0; i < 256; ++i) held[i] = y[i * n];\n    y[threadIdx.x] = held[n];\n}\nTESSERA_ENTRY(tiny)\n"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (_compile._folder, _compile._emulator, _compile._forget):
        monkeypatch.setattr(_compile, cached.__name__, cached.__wrapped__)
    return tmp_path / "cache" / "tessera" / "cuda"


def written(folder: Path, source: str) -> Kernel:
    path = folder / "tiny.cu"
    path.write_text(source, encoding="utf-8")
    return Kernel(str(path), "tiny", (("FILL", 7),))


def test_the_kernels_of_rms_norm_hold_everything_in_registers() -> None:
    """Every kind of kernel in bfloat16, the wide and the unaligned included, for Hopper; half of them for sm_80."""
    kernels = [one for one in specializations() if ("NUMBER", "bf16") in one.defines]
    assert {one.entry for one in kernels} == {"rms_norm_forward", "rms_norm_backward", "rms_norm_sum_partials"}
    for kernel in kernels:
        for arch in ARCHS[: 1 + (("GAIN_AFTER_CAST", 0) not in kernel.defines)]:
            built = build(kernel, arch)
            assert (built.stack_bytes, built.spill_bytes) == (0, 0), f"{kernel.title} for {arch}"
            assert 0 < built.registers <= 128
            assert built.path.read_bytes()[:4] == b"\x7fELF"


def test_the_command_prints_a_row_for_each_kernel_and_the_second_time_from_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = written(tmp_path, GOOD)
    monkeypatch.setattr(command, "specializations", lambda op: [kernel])
    assert command.main(["--op", "rms_norm", "--verbose"]) == 0
    first = capsys.readouterr()
    assert re.search(r"tiny FILL=7 +sm_90a +\d+ +0 +0 +\d+\.\d\d\n", first.out)
    assert re.search(r"tiny FILL=7 +sm_80 +\d+ +0 +0 +\d+\.\d\d\n", first.out)
    assert "2 kernels: 2 compiled, 0 from the cache; none with a stack frame" in first.out
    assert str(cache) in first.err
    assert command.main(["--op", "rms_norm", "--arch", "sm_80"]) == 0
    second = capsys.readouterr()
    assert re.search(r"sm_80 +\d+ +0 +0 +cached\n", second.out)
    assert "1 kernels: 0 compiled, 1 from the cache" in second.out
    assert len(list(cache.glob("*.cubin"))) == 2


def test_what_decides_the_code_decides_the_name(cache: Path, tmp_path: Path) -> None:
    kernel = written(tmp_path, GOOD)
    first = build(kernel, "sm_80")
    assert build(kernel, "sm_80").seconds == 0.0
    assert build(Kernel(kernel.file, "tiny", (("FILL", 8),)), "sm_80").path != first.path
    assert build(written(tmp_path, GOOD.replace("= FILL", "= 1 + FILL")), "sm_80").path != first.path
    assert build_emulated(kernel) == build_emulated(kernel)


def test_what_nobody_used_for_a_month_goes_when_something_is_compiled(cache: Path, tmp_path: Path) -> None:
    kernel, month = written(tmp_path, GOOD), time.time() - 40 * 86400
    kept, gone = (build(replace(kernel, defines=(("FILL", number),)), "sm_80") for number in (1, 2))
    emulated = build_emulated(kernel)
    for path in cache.iterdir():
        os.utime(path, (month, month))
    assert build(replace(kernel, defines=(("FILL", 1),)), "sm_80").seconds == 0.0
    assert build_emulated(kernel) == emulated
    build(replace(kernel, defines=(("FILL", 3),)), "sm_80")
    assert kept.path.exists()
    assert emulated.exists()
    assert not gone.path.exists()
    assert not gone.path.with_suffix(".json").exists()


def test_a_torn_note_about_a_kernel_is_made_anew(cache: Path, tmp_path: Path) -> None:
    kernel = written(tmp_path, GOOD)
    first = build(kernel, "sm_80")
    first.path.with_suffix(".json").write_text('{"registers": 1', encoding="utf-8")
    again = build(kernel, "sm_80")
    assert again.seconds > 0.0
    assert again.registers == first.registers


def test_a_stack_frame_is_told_and_no_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "specializations", lambda op: [written(tmp_path, SPILLS)])
    assert command.main(["--arch", "sm_90a", "--op", "rms_norm"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sm_90a +\d+ +1024 +0 ", out)
    assert "1 with a stack frame or spilled registers" in out


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (GOOD.replace("FILL", "missing"), 'tiny.cu:2 = identifier "missing" is undefined: expected source'),
        (GOOD.replace("device.cuh", "absent.cuh"), 'tiny.cu:1 = cannot open source file "absent.cuh"'),
        (GOOD.replace("[threadIdx.x]", "[blockIdx.w]"), "tiny.cu:2 = "),
    ],
)
def test_bad_source_is_one_line_with_file_and_line_number(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str, says: str
) -> None:  # fmt: skip
    kernel = written(tmp_path, source)
    monkeypatch.setattr(command, "specializations", lambda op: [kernel])
    assert command.main(["--arch", "sm_80", "--op", "rms_norm"]) == KernelError.exit_code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1
    with pytest.raises(KernelError, match=r"tiny.cu:\d = .*compiles for the emulator"):
        build_emulated(kernel)
    assert list(cache.glob("tiny*")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--op", "absent"], "op = 'absent': expected one of "), (["--arch", "90a"], "arch = '90a': expected a target")],
)
def test_an_unknown_op_or_target_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == KernelError.exit_code
    assert says in capsys.readouterr().err


def test_a_compiler_that_is_not_there_is_one_line(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    kernel = written(tmp_path, GOOD)
    monkeypatch.setattr(_compile, "import_module", missing)
    with pytest.raises(MissingDependency, match=r"cuda.bindings = not installed"):
        build(kernel, "sm_80")
    monkeypatch.setattr(_compile.shutil, "which", lambda name: None)
    monkeypatch.setattr(_compile, "_host_compiler", _compile._host_compiler.__wrapped__)
    with pytest.raises(MissingDependency, match=r"c\+\+ = not found"):
        build_emulated(kernel)


def test_a_cache_that_cannot_be_written_is_no_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no directory", encoding="utf-8")
    made: list[Path] = []
    monkeypatch.setattr(_compile.atexit, "register", lambda remove, folder, **_: made.append(Path(folder)))
    path = build(written(tmp_path, GOOD), "sm_80").path
    assert path.exists()
    assert made == [path.parent]  # and it goes when the process ends
    shutil.rmtree(path.parent)


def test_only_what_a_target_can_run_is_compiled_for_it() -> None:
    assert Kernel("x.cu", "x").archs() == ARCHS
    assert Kernel("x.cu", "x", needs="sm_90a").archs() == ("sm_90a",)
